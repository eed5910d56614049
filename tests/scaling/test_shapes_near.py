import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinchilla_jax.errors import UserError
from chinchilla_jax.model import shapes
from chinchilla_jax.model.shapes import count_parameters
from chinchilla_jax.scaling import shapes_near

VOCAB = 32_000


@settings(deadline=None)
@given(st.floats(math.log(2e6), math.log(2e12)).map(math.exp), st.sampled_from([512, 8192]))
def test_generated_shapes_keep_the_ratios_and_the_count(n, vocab_size):
  shape = shapes_near.near(n, vocab_size)
  assert count_parameters(shape) == pytest.approx(n, rel=shapes_near.TOLERANCE)
  assert shape.d_ff == 4 * shape.d_model
  assert shape.n_heads * shape.kv_size == shape.d_model
  low, high = shapes_near.ASPECTS if n >= 44e6 else shapes_near.SMALL_ASPECTS
  assert low <= shape.d_model / shape.n_layers <= high
  if shape.d_model >= 512:  # Table A9's widths.
    assert shape.kv_size == (64 if shape.d_model < 1280 else 128)


@settings(deadline=None)
@given(st.sampled_from(shapes_near.PUBLISHED), st.floats(0.995, 1.005))
def test_published_rows_are_found(row, factor):
  found = shapes_near.near(count_parameters(row) * factor)
  # Rows that are as near as this one are as good.
  assert found in shapes_near.PUBLISHED
  assert count_parameters(found) == pytest.approx(count_parameters(row), rel=0.01)


def test_table_a9_lies_within_the_ratios():
  aspects = [row.d_model / row.n_layers for row in shapes.TABLE_A9]
  assert shapes_near.ASPECTS[0] <= min(aspects) and max(aspects) <= shapes_near.ASPECTS[1]
  off = [math.log(row.d_model / row.n_layers / shapes_near.aspect_trend(count_parameters(row)))
         for row in shapes.TABLE_A9]
  assert max(map(abs, off)) < 0.5


@pytest.mark.parametrize("n, name", [(70e9, "chinchilla-70b"), (67.9e9, "chinchilla-70b"),
                                     (1e9, "1018m"), (280e9, "gopher-280b")])
def test_known_sizes(n, name):
  assert shapes_near.near(n).name == name


def test_another_convention_of_n():
  shape = shapes_near.near(20e6, VOCAB, shapes_near.non_embedding)
  assert shapes_near.non_embedding(shape) == pytest.approx(20e6, rel=shapes_near.TOLERANCE)
  assert count_parameters(shape) == shapes_near.non_embedding(shape) + VOCAB * shape.d_model


def test_too_small_and_too_large():
  with pytest.raises(UserError, match=r"no model of 100,000 parameters.*32,000 pieces.*smaller"):
    shapes_near.near(1e5)
  with pytest.raises(UserError, match=r"no model of 1e\+15"):
    shapes_near.near(1e15)


def test_thinning_keeps_the_ends():
  rows = shapes_near.thinned(shapes.TABLE_A9, 7)
  assert len(rows) == 7
  assert rows[0].name == "44m" and rows[-1].name == "16183m"
  assert shapes_near.thinned(shapes.TABLE_A9[:3], 7) == list(shapes.TABLE_A9[:3])
