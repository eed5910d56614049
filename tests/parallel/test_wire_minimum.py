"""The least bytes on the wire: by hand for small shapes, and never above what programs send."""

import jax
import pytest
from tiny import tiny_experiment, with_fields

from chinchilla_jax.model import transformer
from chinchilla_jax.parallel import wire_minimum

ONE = {"slice": 1, "data": 1, "context": 1, "tensor": 1}
# Every weight is cut, and every number on the wire has two bytes.
BASE = with_fields(tiny_experiment(), model__n_heads=4, model__kv_size=8, batch__sequences=32,
                   mesh__whole_below=0, model__remat="full")


def found(strategy, axes, experiment=BASE, **fields):
  """{(name, kind, axes): bytes} of one step."""
  made = with_fields(experiment, mesh__strategy=strategy, **fields)
  return {(t.name, t.kind, t.axes): t.wire_bytes
          for t in wire_minimum.terms(made, ONE | axes)}


def parameters(experiment=BASE):
  """(of the blocks, of all) numbers in the arrays."""
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  tree = transformer.abstract(experiment.model, "bfloat16")
  return count(tree["blocks"]), count(tree)


def test_one_device_says_nothing():
  assert wire_minimum.terms(BASE, ONE) == []
  assert wire_minimum.wire_bytes(BASE, ONE) == 0


def test_replicated_sums_gradients_once_whatever_the_microbatches():
  _, n = parameters()
  for parts in (1, 4):
    assert found("replicated", {"data": 8}, batch__microbatches=parts) == {
        ("sum gradient", "all-reduce", ("data",)): pytest.approx(2 * n * 2 * 7 / 8)}


def test_fsdp_gathers_twice_and_scatters_once_a_microbatch():
  blocks, n = parameters()
  for parts in (1, 4):
    assert found("fsdp", {"data": 8}, batch__microbatches=parts) == {
        ("gather for use", "all-gather", ("data",)):
            pytest.approx(parts * (blocks + n) * 2 * 7 / 8),
        ("scatter gradient", "reduce-scatter", ("data",)): pytest.approx(parts * n * 2 * 7 / 8)}
  kept = found("fsdp", {"data": 8}, model__remat="none")
  assert kept["gather for use", "all-gather", ("data",)] == pytest.approx(n * 2 * 7 / 8)


def test_float32_gradients_are_twice_as_long():
  scatter = ("scatter gradient", "reduce-scatter", ("data",))
  narrow = found("fsdp", {"data": 8})[scatter]
  assert found("fsdp", {"data": 8}, precision__gradients="float32")[scatter] == 2 * narrow


def test_slices_add_up_once_what_lies_cut_inside_them():
  _, n = parameters()
  rows = found("fsdp", {"slice": 2, "data": 4}, batch__microbatches=4)
  assert rows["sum gradient", "all-reduce", ("slice",)] == pytest.approx(2 * n / 4 * 2 / 2)


def test_small_weights_stay_whole_and_are_summed_by_all():
  rows = found("fsdp", {"data": 8}, mesh__whole_below=100_000)
  assert set(rows) == {("sum gradient", "all-reduce", ("data",))}


def test_deepmind_gathers_once_a_step_and_moves_tokens():
  rows = found("deepmind", {"data": 4, "tensor": 2}, batch__microbatches=2)
  m, tokens = BASE.model, 32 * 32 / 4
  move = tokens * m.d_model * 2 / 2
  assert not any(name == "gather for use" for name, _, _ in rows)
  gathered = rows["gather updated", "all-gather", ("data",)]
  assert rows["scatter gradient", "reduce-scatter", ("data",)] == pytest.approx(2 * gathered)
  # 2 layers: forward 4 moves, backward 4, again 3; and 4 at the ends.
  moved = [rows["tokens over tensor", kind, ("tensor",)] for kind in ("all-gather",
                                                                       "reduce-scatter")]
  assert moved == [pytest.approx((2 * 6 + 2) * move), pytest.approx((2 * 5 + 2) * move)]


@pytest.mark.parametrize("remat, moves", [("none", 8), ("dots", 10), ("full", 11)])
def test_remat_decides_what_is_moved_again(remat, moves):
  rows = found("fsdp_tensor", {"data": 4, "tensor": 2}, model__remat=remat)
  move = 32 * 32 / 4 * BASE.model.d_model * 2 / 2
  moved = sum(n for (name, _, _), n in rows.items() if name == "tokens over tensor")
  assert moved == pytest.approx((2 * moves + 4) * move)


def test_tokens_that_tensor_does_not_divide_are_summed_whole():
  rows = found("fsdp_tensor", {"data": 2, "tensor": 4}, data__seq_len=30)
  assert rows["tokens over tensor", "all-reduce", ("tensor",)] == pytest.approx(
      (2 * 10 + 4) * 32 * 30 / 2 * BASE.model.d_model * 2 * 3 / 4)


def test_keys_and_values_go_around_context():
  m = BASE.model
  rows = found("fsdp", {"data": 2, "context": 4})
  move = 2 * 32 * 32 / 2 * m.n_heads * m.kv_size * 2 * 3 / 4 * m.n_layers
  name = "keys and values over context"
  assert rows[name, "all-gather", ("context",)] == pytest.approx(2 * move)
  assert rows[name, "reduce-scatter", ("context",)] == pytest.approx(move)
  # Weights are cut over both, since both see other tokens.
  assert ("gather for use", "all-gather", ("data", "context")) in rows


def test_the_batch_decides_what_activations_weigh():
  mesh = ONE | {"data": 4, "tensor": 2}
  made = with_fields(BASE, mesh__strategy="deepmind")
  tokens = lambda n: sum(t.wire_bytes for t in wire_minimum.terms(made, mesh, n)
                         if t.name == "tokens over tensor")
  assert tokens(64) == 2 * tokens(32) == 2 * tokens(None)


def test_relative_keys_are_summed_where_that_is_less():
  """W_r multiplies what every device has: its gradient can be summed at the keys."""
  m = BASE.model
  w_r = m.n_layers * m.d_model * m.n_heads * m.kv_size
  blocks, n = parameters()
  rows = found("fsdp", {"data": 8}, data__seq_len=8, model__remat="dots")
  assert rows["sum keys", "all-reduce", ("data",)] == pytest.approx(
      2 * w_r / m.d_model * 9 * 2 * 7 / 8)
  assert rows["scatter gradient", "reduce-scatter", ("data",)] == pytest.approx(
      (n - w_r) * 2 * 7 / 8)
  assert rows["gather for use", "all-gather", ("data",)] == pytest.approx(
      (blocks + n - w_r) * 2 * 7 / 8)
  long = found("fsdp", {"data": 8}, data__seq_len=4096, model__remat="dots")
  assert ("sum keys", "all-reduce", ("data",)) not in long
