"""The relative kernel against `model.blockwise`, without a TPU; and does it compile for one?"""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chinchilla_jax.errors import UserError
from chinchilla_jax.kernels import relative_tpu_blocks as blocks
from chinchilla_jax.kernels.relative_tpu import STRIDED, relative_attention
from chinchilla_jax.model import blockwise
from chinchilla_jax.parallel import topology
from chinchilla_jax.training import ahead

needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"),
                                  reason="libtpu is not installed; make test installs it")
NAMES = ("out", "dq", "dk", "dv", "dr", "du", "dv bias")


def draw(h, b, t, k, dtype="float32", documents=3, seed=0):
  """(q, k, v, r, u, v bias), segments, gradient of the output."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  arrays = (*(normal(h, b, t, k) for _ in range(3)), normal(h, t + 1, k),
            *(normal(h, k).astype(jnp.float32) for _ in range(2)))
  segments_bt = jnp.asarray(np.sort(rng.integers(0, documents or 1, size=(b, t)), axis=1))
  return arrays, segments_bt if documents else None, normal(h, b, t, k)


def kernel(segments_bt, q, *rest, **options):
  return relative_attention(q, *rest, segments_bt, divisor=math.sqrt(q.shape[-1]), interpret=True,
                            **options)


def reference(segments_bt, q, k, v, r, u, v_bias):
  seen_tt = jnp.tri(q.shape[2], dtype=bool)[None]
  if segments_bt is not None:
    seen_tt &= segments_bt[:, :, None] == segments_bt[:, None]
  return blockwise.attend_rows(math.sqrt(q.shape[-1]), q, k, v, seen_tt, (r, u, v_bias))[0]


def everything(f, arrays, segments_bt, grad):
  """The output and the six gradients."""
  def run(arrays, segments_bt, grad):
    out, vjp = jax.vjp(functools.partial(f, segments_bt), *arrays)
    return out, *vjp(grad)
  return jax.jit(run)(arrays, segments_bt, grad)


def distance(got, want):
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1)


CASES = [
    # tokens, kv_size, block_q, block_k, strided, documents
    (29, 64, 16, 8, True, 3),    # does not divide; taller than wide
    (29, 128, 8, 32, False, 2),  # a tile that reaches far ahead of its queries
    (41, 6, 16, 16, True, 0),
    (1, 8, 8, 8, False, 1),
    (200, 8, 256, 128, False, 2),  # two parts to a tile
]


@pytest.mark.parametrize(("t", "k", "block_q", "block_k", "strided", "documents"), CASES)
def test_values_and_gradients(t, k, block_q, block_k, strided, documents):
  case = draw(2, 2, t, k, documents=documents)
  options = dict(block_q=block_q, block_k=block_k, strided=strided)
  got = everything(functools.partial(kernel, **options), *case)
  for name, x, y in zip(NAMES, got, everything(reference, *case), strict=True):
    assert x.dtype == y.dtype and x.shape == y.shape, name
    assert distance(x, y) < 2e-6, name


def test_bfloat16_is_no_further_from_float32_than_the_reference():
  arrays, segments_bt, grad = draw(2, 2, 48, 16, "bfloat16")
  float32 = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
  exact = everything(reference, float32, segments_bt, grad.astype(jnp.float32))
  got = everything(functools.partial(kernel, block_q=16, block_k=16), arrays, segments_bt, grad)
  plain = everything(reference, arrays, segments_bt, grad)
  for name, x, y, z in zip(NAMES, got, plain, exact, strict=True):
    assert x.dtype == y.dtype, name
    assert distance(x, z) < 1.2 * distance(y, z) < 0.02, name


def test_a_ladder_of_plain_rotations_is_the_strided_one():
  turn = lambda f, x, strided: jax.jit(f, static_argnums=1)(x, blocks.Tiling(32, 16, 16, strided))
  x = jax.random.normal(jax.random.key(0), (16, 32))
  shifted = turn(blocks.shift, x, False)
  np.testing.assert_array_equal(shifted, turn(blocks.shift, x, True))
  a, c = np.indices((16, 16))
  np.testing.assert_array_equal(shifted, np.asarray(x)[a, 16 - a + c])
  y = jax.random.normal(jax.random.key(1), (16, 16))
  back = np.zeros((16, 32), np.float32)
  back[a, 16 - a + c] = y
  np.testing.assert_array_equal(turn(blocks.unshift, y, False), back)


def test_documents_do_not_see_each_other():
  """Other tokens in the first of two documents: nothing of the second moves, either way."""
  arrays, _, grad = draw(1, 1, 32, 8, seed=1)
  others, _, _ = draw(1, 1, 32, 8, seed=2)
  segments_bt = jnp.asarray([[5] * 13 + [0] * 19])
  changed = tuple(jnp.concatenate([y[:, :, :13], x[:, :, 13:]], axis=2)
                  for x, y in zip(arrays[:3], others[:3], strict=True)) + arrays[3:]
  f = functools.partial(kernel, block_q=8, block_k=8)
  before, after = (everything(f, a, segments_bt, grad) for a in (arrays, changed))
  for x, y in zip(before[:4], after[:4], strict=True):
    np.testing.assert_array_equal(x[:, :, 13:], y[:, :, 13:])
    assert jnp.any(x[:, :, :13] != y[:, :, :13])


@pytest.mark.parametrize("numbers", [[0, 1], [7, -3]])
def test_tiles_without_a_common_document_are_skipped(numbers):
  """Two documents, each of two whole tiles: what is not a number in one is not even multiplied."""
  (q, k, v, *rest), _, grad = draw(1, 1, 32, 8)
  segments_bt = jnp.repeat(jnp.asarray([numbers]), 16, axis=1)
  broken = jnp.where(jnp.arange(32)[:, None] < 16, jnp.nan, v)
  f = functools.partial(kernel, block_q=8, block_k=8)
  want = everything(f, (q, k, v, *rest), segments_bt, grad)
  got = everything(f, (q, k, broken, *rest), segments_bt, grad)
  for x, y in zip(got[:4], want[:4], strict=True):
    np.testing.assert_array_equal(x[:, :, 16:], y[:, :, 16:])


def test_documents_may_come_in_pieces():
  """Equal numbers are one document, wherever they are."""
  arrays, _, grad = draw(1, 1, 32, 8)
  segments_bt = jnp.asarray([[4] * 5 + [1] * 9 + [4] * 8 + [0] * 4 + [1] * 6])
  f = functools.partial(kernel, block_q=8, block_k=8)
  for x, y in zip(everything(f, arrays, segments_bt, grad),
                  everything(reference, arrays, segments_bt, grad), strict=True):
    assert distance(x, y) < 2e-6


def test_keys_after_the_query_do_not_count():
  """Not even infinite ones, in a tile on the diagonal or after it."""
  (q, k, v, *rest), segments_bt, _ = draw(1, 1, 32, 8, documents=0)
  f = functools.partial(kernel, segments_bt, block_q=8, block_k=8)
  want = f(q, k, v, *rest)[:, :, :20]
  later = jnp.arange(32)[:, None] >= 20
  got = f(q, jnp.where(later, 1e30, k), jnp.where(later, 1e30, v), *rest)[:, :, :20]
  np.testing.assert_array_equal(got, want)


def test_rows_that_hold_no_token_count_for_nothing():
  """However large u and v are: of 13 tokens in tiles of 8, three are not there."""
  (*arrays, u, v_bias), segments_bt, grad = draw(2, 2, 13, 8)
  large = (*arrays, 300 * jnp.abs(u), 300 * jnp.abs(v_bias))
  f = functools.partial(kernel, block_q=8, block_k=8)
  for x, y in zip(everything(f, large, segments_bt, grad),
                  everything(reference, large, segments_bt, grad), strict=True):
    assert distance(x, y) < 1e-3


@pytest.mark.parametrize(("block_q", "block_k"), [(8, 8), (32, 8), (8, 32), (16, 32)])
def test_every_tile_that_counts_is_met_once(block_q, block_k):
  tiling = blocks.Tiling(64, block_q, block_k, False)
  want = {(i, j) for i in range(64 // block_q) for j in range(64 // block_k)
          if j * block_k <= i * block_q + block_q - 1}
  by_query, by_key = tiling.tiles(), tiling.tiles_by_key()
  for tiles in (by_query, by_key):
    assert sorted(map(tuple, tiles[:2].T)) == sorted(want)
  for tiles, axis in ((by_query, 0), (by_key, 1)):
    for block in range(tiles[axis].max() + 1):
      first, last = tiles[2:4, tiles[axis] == block]
      alone = [0] * (len(first) - 1)
      assert (first.tolist(), last.tolist()) == ([1, *alone], [*alone, 1])
  # The buffer of dq: block i is in it when it is whole, and goes out before another comes in.
  i, _, _, _, done, whole = by_key
  assert (whole[done == 1] == i[done == 1]).all() and (np.diff(whole) >= 0).all()
  assert i[done == 1].tolist() == list(range(64 // block_q))


def test_what_is_kept_for_the_backward_pass_is_the_output_and_a_number_a_query():
  arrays, segments_bt, _ = draw(2, 1, 32, 8)
  kept = jax.eval_shape(lambda *a: jax.vjp(functools.partial(
      kernel, segments_bt, block_q=8, block_k=8), *a)[1], *arrays)
  sizes = sorted(x.size for x in jax.tree.leaves(kept) if x.dtype == jnp.float32)
  inputs = [x.size for x in arrays]
  assert sizes == sorted([*inputs, arrays[0].size, 2 * 32])


@pytest.mark.parametrize(("blocks", "said"), [
    (dict(block_q=64), "blocks of 64 queries and 512 keys; a TPU takes multiples of 128"),
    (dict(block_q=384, block_k=256), "blocks of 384 queries and 256 keys do not tile 768 tokens"),
])
def test_blocks_that_do_not_fit(blocks, said):
  arrays, segments_bt, _ = draw(1, 1, 600, 8)
  with pytest.raises(UserError, match=said):
    relative_attention(*arrays, segments_bt, divisor=1.0, **blocks)


@pytest.mark.tpu_topology
@needs_libtpu
@pytest.mark.parametrize(("name", "t", "k"), [
    ("v4:2x2x1", 4096, 128), ("v5e:2x2", 1100, 64), ("v5p:2x2x1", 1100, 128),
    ("v6e:2x2", 1100, 128), ("tpu7x:2x2x1", 1100, 128)])
def test_it_compiles(name, t, k):
  """Default blocks; 4,096 tokens are the most that v4 takes with them.

  A policy that saves the name has the forward kernel run once.
  """
  strided = name.split(":")[0] in STRIDED
  found = ahead.devices(topology.parse(name))
  mesh = jax.sharding.Mesh(np.array(found[:1]), ("data",))
  here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=here)
  q = array(jnp.bfloat16, 2, 1, t, k)
  r, u = array(jnp.bfloat16, 2, t + 1, k), array(jnp.float32, 2, k)

  def run(arrays, segments_bt, grad):
    f = lambda *a: relative_attention(*a, segments_bt, divisor=8.0, strided=strided, name="mixed")
    policy = jax.checkpoint_policies.save_only_these_names("mixed")
    out, vjp = jax.vjp(jax.checkpoint(f, policy=policy), *arrays)
    return out, vjp(grad)

  lowered = jax.jit(run).lower((q, q, q, r, u, u), array(jnp.int32, 1, t), q)
  text = lowered.compile().as_text()
  calls = [line for line in text.splitlines() if "tpu_custom_call" in line]
  assert [kernel_name in line for line in calls for kernel_name in
          ("relative_attention_forward", "relative_attention_backward")] == [1, 0, 0, 1]
  assert f"{t},{t}" not in text
