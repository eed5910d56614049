"""Where the train state and the batch lie: the values drawn, and the bytes each device holds."""

import eight
import jax
import numpy as np
import pytest

# One of each strategy, with as many axes as can be.
EACH = ("replicated data 8", "fsdp data 2 x context 4", "deepmind data 2 x context 2 x tensor 2",
        "fsdp_tensor data 2 x context 2 x tensor 2")
BASE = eight.experiment(precision__parameters="bfloat16")
# Each device's rows have 16 numbers or more. Shorter ones are not made as vectors by LLVM, and JAX
# 0.12 then rounds a logarithm otherwise: of the weights drawn, some differ by an ulp.
WIDE = eight.experiment(precision__parameters="bfloat16", model__d_model=128, model__kv_size=16)


@pytest.fixture(scope="module")
def alone():
  return eight.flat(jax.device_get(eight.init_of(WIDE)))


@pytest.mark.parametrize("name", EACH)
def test_a_state_drawn_on_eight_devices_is_that_of_one_bit_for_bit(name, alone):
  layout = eight.layout_of(name, WIDE)
  state = eight.init_of(WIDE, layout)
  got = eight.flat(jax.device_get(state))
  assert got.keys() == alone.keys()
  for path, array in alone.items():
    assert got[path].dtype == array.dtype
    np.testing.assert_array_equal(got[path], array, err_msg=path)
  assert_bytes(state, layout)


def assert_bytes(state, layout):
  arrays, entries = eight.flat(state), layout.entries(state)
  assert [entry.path for entry in entries] == list(arrays)
  for entry in entries:
    held = [shard.data.nbytes for shard in arrays[entry.path].addressable_shards]
    assert len(held) == 8
    assert set(held) == {entry.bytes_per_device(layout.mesh.shape)}, entry.path


@pytest.mark.parametrize("name", eight.LAYOUTS)
def test_bytes_per_device_are_those_of_the_table(name):
  layout, state = eight.layout_of(name, BASE), eight.fresh(BASE)
  assert_bytes(jax.device_put(state, layout.state(state)), layout)


@pytest.mark.parametrize("name", eight.LAYOUTS)
def test_a_device_holds_its_share_of_the_batch(name):
  layout, batch = eight.layout_of(name, BASE), eight.batch_of(BASE)
  shape = layout.mesh.shape
  for array in jax.device_put(batch, layout.rows).values():
    share = array.nbytes // (shape["slice"] * shape["data"])
    assert [shard.data.nbytes for shard in array.addressable_shards] == [share] * 8
  wanted = layout.batch(batch["inputs_bt"].shape)
  assert {name: (a.shape, str(a.dtype)) for name, a in wanted.items()} == {
      name: (a.shape, str(a.dtype)) for name, a in batch.items()}


@pytest.mark.parametrize("name, parameters, optimizer", [
    ("replicated data 8", 1, 1), ("fsdp data 8", 8, 8), ("fsdp data 2 x context 4", 8, 8),
    ("deepmind data 4 x tensor 2", 2, 8), ("fsdp_tensor data 2 x tensor 4", 8, 8),
    ("fsdp_tensor slice 2 x data 2 x tensor 2", 4, 4)])
def test_matrices_are_cut_into_as_many_parts_as_the_strategy_promises(name, parameters, optimizer):
  layout = eight.layout_of(name, BASE)
  for entry in layout.entries(eight.fresh(BASE)):
    matrix = len(entry.shape) >= 3 if "blocks" in entry.path else len(entry.shape) == 2
    if matrix and not entry.path.endswith(("/u", "/v")):
      wanted = parameters if entry.path.startswith("params") else optimizer
      assert entry.bytes == wanted * entry.bytes_per_device(layout.mesh.shape), entry.path


def test_an_override_of_the_config_is_obeyed():
  base = eight.experiment(mesh__overrides=(("embedding/table", "-,data"),))
  layout, state = eight.layout_of("fsdp data 8", base), eight.fresh(base)
  placed = jax.device_put(state, layout.state(state))
  for tree in (placed["params"], placed["optimizer"]["mu"]):
    table = tree["embedding"]["table"]
    assert table.addressable_shards[0].data.shape == (512, 4)
  assert_bytes(placed, layout)
