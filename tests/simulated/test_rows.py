"""The order of a sequence that is cut among devices (model/placement.py)."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinchilla_jax.model.placement import Rows

orders = st.tuples(st.integers(1, 24), st.integers(1, 8), st.integers(0, 30))


@settings(max_examples=60, deadline=None)
@given(orders)
def test_collect_undoes_deal(order):
  share, groups, block = order
  length = share * groups
  rows = Rows.of(length, groups, block)
  x = np.arange(2 * length * 3).reshape(2, length, 3)
  for axis in (1, -2):
    np.testing.assert_array_equal(rows.collect(rows.deal(x, axis), axis), x)
    np.testing.assert_array_equal(rows.deal(rows.collect(x, axis), axis), x)


@settings(max_examples=60, deadline=None)
@given(orders)
def test_positions_say_where_each_dealt_token_stood(order):
  share, groups, block = order
  length = share * groups
  rows = Rows.of(length, groups, block)
  positions = rows.positions(length)
  assert positions.dtype == np.int32 and sorted(positions) == list(range(length))
  text = np.arange(length) ** 2
  np.testing.assert_array_equal(rows.deal(text, 0), text[positions])


@settings(max_examples=30, deadline=None)
@given(orders)
def test_rounds_are_stretches_of_the_text_and_join_puts_them_together(order):
  share, groups, block = order
  length = share * groups
  rows = Rows.of(length, groups, block)
  text = jnp.arange(length)[None]
  dealt = rows.deal(text, 1)
  turns = [rows.take(dealt, 1, turn) for turn in range(rows.rounds)]
  np.testing.assert_array_equal(jnp.concatenate(turns, axis=1), text)
  np.testing.assert_array_equal(rows.join(turns, 1), dealt)


@settings(max_examples=60, deadline=None)
@given(orders)
def test_every_device_has_as_much_of_every_round(order):
  """The balance that the dealing is for: no device has only early, cheap rows."""
  share, groups, block = order
  rows = Rows.of(share * groups, groups, block)
  assert rows.groups == groups and rows.block <= (block or share)
  if groups == 1:
    assert rows.rounds * rows.block >= share > (rows.rounds - 1) * rows.block
    return
  assert rows.rounds * rows.block == share
  of_device = rows.positions(share * groups).reshape(groups, rows.rounds, rows.block)
  for turn in range(rows.rounds):
    first = turn * groups * rows.block
    np.testing.assert_array_equal(of_device[:, turn].ravel(),
                                  np.arange(first, first + groups * rows.block))


def test_the_order_of_a_short_sequence():
  rows = Rows.of(12, 2, 2)
  assert rows == Rows(groups=2, block=2, rounds=3)
  assert rows.positions(12).tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]
  # Blocks are equal: 6 rows a device in blocks of at most 4 are blocks of 3.
  assert Rows.of(12, 2, 4) == Rows(groups=2, block=3, rounds=2)
  assert Rows.of(12, 1, 5) == Rows(groups=1, block=5, rounds=3)


def test_what_does_not_divide_is_refused():
  with pytest.raises(AssertionError):
    Rows.of(10, 4, 2)
