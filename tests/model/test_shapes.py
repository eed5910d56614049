"""Published shapes and the parameter count, to the last parameter."""

import subprocess
import sys

import pytest

from chinchilla_jax import config as schema
from chinchilla_jax.errors import UserError
from chinchilla_jax.model import shapes

# The counts of Table A9's rows by the rule of docs/architecture.md, in the order of the table.
EXACT_A9 = (
    43720448, 57334208, 73824640, 89818240, 105811840, 116713472, 139739648, 162765824,
    174942848, 195833984, 216725120, 251068672, 278352128, 305635584, 424609280, 488545280,
    509239424, 552481280, 586597760, 632223488, 663956096, 724282112, 816340736, 892664832,
    1017957888, 1143250944, 1265591552, 1424348032, 1429230848, 1592870144, 1609077376,
    1730541056, 1793806720, 2006670848, 2282800640, 2297736960, 2638626560, 2979516160,
    3530420096, 3802333184, 4083683456, 4516047104, 6795586304, 9293188352, 11451786752,
    12295175936, 12568944384, 13735385088, 14940376192, 16183281920)
EXACT_GOPHER = (43720448, 116713472, 417420032, 1374684416, 7111740672, 279710317824)
CHINCHILLA = 70_061_956_352


def model_config(shape: shapes.Shape, **fields) -> schema.Model:
  return schema.Model(shape.n_layers, shape.d_model, shape.n_heads, shape.kv_size, shape.d_ff,
                      shape.vocab_size, **fields)


def test_table_a9_to_the_last_parameter():
  assert tuple(map(shapes.count_parameters, shapes.TABLE_A9)) == EXACT_A9
  for shape in shapes.TABLE_A9:
    printed = int(shape.params_label.replace(",", "").removesuffix("M"))
    assert round(shapes.count_parameters(shape) / 1e6) == printed
    assert shape.d_ff == 4 * shape.d_model


def test_key_size_is_not_a_quotient_in_six_rows():
  odd = [s.name for s in shapes.TABLE_A9 if s.n_heads * s.kv_size != s.d_model]
  assert odd == ["3530m", "4084m", "11452m", "12569m", "13735m", "14940m"]


def test_gopher_and_chinchilla():
  assert tuple(map(shapes.count_parameters, shapes.GOPHER)) == EXACT_GOPHER
  assert shapes.count_parameters(shapes.CHINCHILLA) == CHINCHILLA


@pytest.mark.parametrize("shape", [*shapes.GPT3, shapes.MT_NLG], ids=lambda s: s.name)
def test_planning_shapes_count_to_their_labels(shape):
  unit = {"M": 1e6, "B": 1e9}[shape.params_label[-1]]
  count = shapes.count_parameters(shape)
  assert count == pytest.approx(float(shape.params_label[:-1]) * unit, rel=0.025)


def test_gpt2_block_count_is_the_known_one():
  gpt2 = shapes.Shape("gpt2", "124M", 768, 3072, 64, 12, 12, 50_257, "learned", 1024)
  assert shapes.count_parameters(gpt2) == 124_439_808


@pytest.mark.parametrize("shape", [*shapes.TABLE_A9, *shapes.GOPHER, shapes.CHINCHILLA],
                         ids=lambda s: s.name)
def test_a_config_counts_as_its_shape(shape):
  assert shapes.parameter_groups(model_config(shape)) == shapes.parameter_groups(shape)


def test_switches():
  count = lambda **fields: shapes.count_parameters(model_config(shapes.CHINCHILLA, **fields))
  d, a, layers = 8192, 64 * 128, 80
  assert count(position="rotary") == 64_691_936_512 == CHINCHILLA - layers * (d * a + 2 * a)
  assert count(qk_norm=True) == CHINCHILLA + layers * 2 * 128
  assert count(activation="swiglu") == CHINCHILLA + layers * (d * 4 * d + 4 * d)
  biases = 32_000 + layers * (d + 4 * d + d)
  assert count(bias=False) == CHINCHILLA - biases
  assert count(bias=False, activation="swiglu") == CHINCHILLA - biases + layers * d * 4 * d
  assert count(activation="relu") == count(init="fan_in") == CHINCHILLA


def test_groups_sum_to_the_count():
  groups = shapes.parameter_groups(shapes.CHINCHILLA)
  assert groups["embedding"] == 32_000 * 8192
  assert groups["relative"] == 80 * 8192 * 8192
  assert sum(groups.values()) == CHINCHILLA


@pytest.mark.parametrize(("name", "found"), [
    ("70b", "chinchilla-70b"), ("chinchilla-70b", "chinchilla-70b"), ("Chinchilla 70B",
                                                                      "chinchilla-70b"),
    ("74m", "74m"), ("chinchilla-74m", "74m"), ("1018M", "1018m"), ("1,018M", "1018m"),
    ("1.018b", "1018m"), ("16.183B", "16183m"), ("gopher-280b", "gopher-280b"),
    ("Gopher_280B", "gopher-280b"), ("gpt3-175b", "gpt3-175b"), ("mt-nlg-530b", "mt-nlg-530b")])
def test_find(name, found):
  assert shapes.find(name).name == found


def test_44m_is_two_models():
  assert shapes.find("44m").n_heads == 8
  assert shapes.find("gopher-44m").n_heads == 16
  assert (shapes.count_parameters(shapes.find("44m"))
          == shapes.count_parameters(shapes.find("gopher-44m")))


@pytest.mark.parametrize(("name", "hint"), [
    ("280b", "gopher-280b"), ("175b", "gpt3-175b"), ("gopher-70b", "gopher-7.1b"),
    ("75m", "74m"), ("", "chinchilla-70b"), ("what?", "74m")])
def test_an_unknown_name_gets_the_nearest(name, hint):
  with pytest.raises(UserError, match="unknown model shape") as error:
    shapes.find(name)
  assert hint in str(error.value) and "\n" not in str(error.value)


def test_names_are_unique():
  everything = (*shapes.TABLE_A9, shapes.CHINCHILLA, *shapes.GOPHER, *shapes.GPT3, shapes.MT_NLG)
  assert len(shapes.SHAPES) == len(everything) == 66


def test_planning_needs_no_arrays():
  code = ("import sys, chinchilla_jax.model.shapes, chinchilla_jax.model.flops;"
          "print(sorted({'jax', 'flax', 'numpy'} & set(sys.modules)))")
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == "[]"
