"""Blockwise attention's own gradient against that of one block of all rows, by JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chinchilla_jax.model import blockwise
from chinchilla_jax.model.placement import WHOLE, Rows

H, B, K, DIVISOR, NAME = 2, 3, 8, 3.0, "mixed"


def draw(t, relative, documents, dtype):
  """(q, k, v, (r, u, v bias) or None), segments or None, gradient of the output."""
  rng = np.random.default_rng(t)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  biases = tuple(normal(H, K).astype(jnp.float32) for _ in range(2))
  arrays = (*(normal(H, B, t, K) for _ in range(3)),
            (normal(H, t + 1, K), *biases) if relative else None)
  segments_bt = jnp.asarray(np.sort(rng.integers(0, 3, size=(B, t)), axis=1))
  return arrays, segments_bt if documents else None, normal(H, B, t, K)


def in_blocks(block, segments_bt, q, k, v, relative):
  how = blockwise.How(DIVISOR, Rows.of(q.shape[2], 1, block), WHOLE, NAME)
  return blockwise.attend(how, q, k, v, relative, segments_bt)


def at_once(segments_bt, q, k, v, relative):
  seen_btt = jnp.tri(q.shape[2], dtype=bool)[None]
  if segments_bt is not None:
    seen_btt &= segments_bt[:, :, None] == segments_bt[:, None]
  return blockwise.attend_rows(DIVISOR, q, k, v, seen_btt, relative)[0]


def everything(f, arrays, grad):
  """The output and the gradient of every array."""
  def run(arrays, grad):
    out, pull = jax.vjp(f, *arrays)
    return out, pull(grad)
  return jax.tree.leaves(jax.jit(run)(arrays, grad))


@pytest.mark.parametrize("t, block", [(1, 4), (8, 0), (8, 4), (11, 4), (13, 1)])
@pytest.mark.parametrize("relative", [True, False], ids=["relative", "rotary"])
@pytest.mark.parametrize("documents", [True, False], ids=["documents", "whole"])
def test_values_and_all_gradients(t, block, relative, documents):
  arrays, segments_bt, grad = draw(t, relative, documents, jnp.float32)
  got = everything(functools.partial(in_blocks, block, segments_bt), arrays, grad)
  want = everything(functools.partial(at_once, segments_bt), arrays, grad)
  assert len(got) == (7 if relative else 4)
  for a, b in zip(got, want, strict=True):
    assert a.dtype == b.dtype and jnp.linalg.norm(b) > 0 or t == 1
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "rotary"])
def test_bfloat16_is_as_near_to_float32_as_its_rounding(relative):
  arrays, segments_bt, grad = draw(13, relative, True, jnp.bfloat16)
  got = everything(functools.partial(in_blocks, 4, segments_bt), arrays, grad)
  float32 = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
  want = everything(functools.partial(at_once, segments_bt), float32(arrays), float32(grad))
  for a, b in zip(got, want, strict=True):
    assert jnp.linalg.norm(float32(a) - b) < 0.01 * jnp.linalg.norm(b)


def test_keys_of_another_document_get_no_gradient_and_change_nothing():
  (q, k, v, relative), _, grad = draw(12, True, False, jnp.float32)
  segments_bt = jnp.repeat(jnp.arange(3), 4)[None].repeat(B, axis=0)
  f = functools.partial(in_blocks, 4, segments_bt)
  moved = k.at[:, :, :4].add(1.0), v.at[:, :, :4].add(1.0)
  np.testing.assert_array_equal(f(q, k, v, relative)[:, :, 4:], f(q, *moved, relative)[:, :, 4:])
  _, pull = jax.vjp(f, q, k, v, relative)
  _, d_k, d_v, _ = pull(grad.at[:, :, :4].set(0.0))
  assert not d_k[:, :, :4].any() and not d_v[:, :, :4].any() and d_k[:, :, 4:].any()


def test_a_policy_that_saves_what_was_mixed_does_not_attend_twice():
  arrays, segments_bt, grad = draw(12, False, False, jnp.float32)
  policies = jax.checkpoint_policies

  def searches_for_the_largest(policy):
    f = jax.checkpoint(functools.partial(in_blocks, 4, segments_bt), policy=policy)
    return str(jax.make_jaxpr(lambda *a: jax.vjp(f, *a)[1](grad))(*arrays)).count("= reduce_max")

  assert searches_for_the_largest(policies.save_only_these_names(NAME)) == 3  # Blocks.
  assert searches_for_the_largest(policies.nothing_saveable) == 6
