"""Splash attention in our shapes, without a TPU; and does it compile for one?"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chinchilla_jax.kernels import splash
from chinchilla_jax.model import blockwise
from chinchilla_jax.parallel import topology
from chinchilla_jax.training import ahead

needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"),
                                  reason="libtpu is not installed; make test installs it")
DIVISOR = 3.0


def draw(t, k, seed=0):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=(2, 2, t, k)), jnp.float32) for _ in range(4)]


def reference(segments_bt, q, k, v):
  seen = jnp.tri(q.shape[2], dtype=bool)[None]
  if segments_bt is not None:
    seen &= segments_bt[:, :, None] == segments_bt[:, None]
  return blockwise.attend_rows(DIVISOR, q, k, v, seen, None)[0]


def everything(f, segments_bt, q, k, v, grad):
  """The output and the gradients of q, k and v."""
  def run(grad, *arrays):
    out, vjp = jax.vjp(functools.partial(f, segments_bt), *arrays)
    return out, *vjp(grad)
  return jax.jit(run)(grad, q, k, v)


def kernel(segments_bt, q, k, v):
  return splash.attend(q, k, v, segments_bt, divisor=DIVISOR, interpret=True)


@pytest.mark.parametrize(("t", "k", "segmented", "fused"), [
    (150, 16, True, True), (256, 64, False, True), (150, 16, True, False)])
def test_values_and_gradients(t, k, segmented, fused, monkeypatch):
  """Two blocks; 150 does not divide into them."""
  monkeypatch.setattr(splash, "BLOCK", 128)
  monkeypatch.setattr(splash, "FUSED_BLOCKS", 2 if fused else 1)
  arrays = draw(t, k)
  segments_bt = jnp.asarray([[4] * 60 + [0] * (t - 60), [1] * t]) if segmented else None
  got, want = (everything(f, segments_bt, *arrays) for f in (kernel, reference))
  for x, y in zip(got, want, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_documents_do_not_see_each_other(monkeypatch):
  """Other tokens in the first of two documents: nothing of the second moves, either way."""
  monkeypatch.setattr(splash, "BLOCK", 128)
  *arrays, grad = draw(140, 16)
  segments_bt = jnp.asarray([[5] * 50 + [0] * 90] * 2)
  changed = [jnp.concatenate([y[:, :, :50], x[:, :, 50:]], axis=2)
             for x, y in zip(arrays, draw(140, 16, seed=1)[:3], strict=True)]
  before, after = (everything(kernel, segments_bt, *a, grad) for a in (arrays, changed))
  for x, y in zip(before, after, strict=True):
    np.testing.assert_array_equal(x[:, :, 50:], y[:, :, 50:])
    assert jnp.any(x[:, :, :50] != y[:, :, :50])


@pytest.mark.tpu_topology
@needs_libtpu
@pytest.mark.parametrize(("name", "t", "k"), [
    ("v4:2x2x1", 1100, 128), ("v5e:2x2", 1100, 64), ("v5p:2x2x1", 2600, 128),
    ("v6e:2x2", 1100, 96), ("tpu7x:2x2x1", 1100, 128)])
def test_it_compiles(name, t, k):
  """Forward and backward; 2,600 tokens take two kernels for the latter."""
  found = ahead.devices(topology.parse(name))
  mesh = jax.sharding.Mesh(np.array(found[:1]), ("data",))
  here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  q = jax.ShapeDtypeStruct((2, 1, t, k), jnp.bfloat16, sharding=here)
  segments_bt = jax.ShapeDtypeStruct((1, t), jnp.int32, sharding=here)

  def run(q, k, v, grad, segments_bt):
    f = lambda *a: splash.attend(*a, segments_bt, divisor=8.0)
    out, vjp = jax.vjp(f, q, k, v)
    return out, vjp(grad)

  text = jax.jit(run).lower(q, q, q, q, segments_bt).compile().as_text()
  assert "splash_mha_fwd" in text and "splash_mha_dkv" in text
  assert ("splash_mha_dq" in text) == (t > 4 * splash.BLOCK)
