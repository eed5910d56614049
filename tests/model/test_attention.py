"""Attention against the equations, written as loops over heads, rows and columns in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chinchilla_jax import config as schema
from chinchilla_jax.model import attention, blockwise
from chinchilla_jax.model.attention import Attention
from chinchilla_jax.model.products import product

MODEL = schema.Model(n_layers=1, d_model=12, n_heads=2, kv_size=6, d_ff=8, vocab_size=11)
CASES = [
    # position, qk_norm, tokens, attention_block
    ("relative", False, 7, 0), ("relative", False, 7, 3), ("relative", True, 8, 4),
    ("relative", False, 1, 128), ("rotary", False, 7, 3), ("rotary", True, 8, 0),
]


def naive(params, x_btd, segments_bt, config):
  """Dai et al. 2019, section 3.3, or Su et al. 2021, equation 34: one score at a time."""
  b, t, d = x_btd.shape
  h, k = config.n_heads, config.kv_size
  half = k // 2

  def norm(x, gain):
    return x / np.sqrt(np.mean(x**2) + config.norm_epsilon) * gain

  def rotate(x, position):
    turned = (x[:half] + 1j * x[half:]) * np.exp(
        1j * position * config.rotary_base ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])

  def sinusoid(distance):
    angles = distance / 10_000 ** (2 * np.arange(d // 2) / d)
    return np.concatenate([np.sin(angles), np.cos(angles)])

  out_btd = np.zeros((b, t, d)) + params["bias_out"]
  for row in range(b):
    for head in range(h):
      w = {name: params[name][:, head] for name in params if name in
           ("w_query", "w_key", "w_value", "w_relative")}
      q, key, value = (x_btd[row] @ w[name] for name in ("w_query", "w_key", "w_value"))
      if config.qk_norm:
        q = np.stack([norm(q_i, params["query_norm"]["gain"]) for q_i in q])
        key = np.stack([norm(k_j, params["key_norm"]["gain"]) for k_j in key])
      for i in range(t):
        seen = [j for j in range(i + 1) if segments_bt[row, j] == segments_bt[row, i]]
        scores = []
        for j in seen:
          if config.position == "relative":
            relative_key = sinusoid(i - j) @ w["w_relative"]
            score = ((q[i] + params["u"][head]) @ key[j]
                     + (q[i] + params["v"][head]) @ relative_key)
          else:
            score = rotate(q[i], i) @ rotate(key[j], j)
          scores.append(score / np.sqrt(k))
        weights = np.exp(scores - np.max(scores))
        mixed = sum(w * value[j] for w, j in zip(weights / weights.sum(), seen, strict=True))
        out_btd[row, i] += mixed @ params["w_out"][head]
  return out_btd


def make(position, qk_norm, block):
  """(config, params all of whose entries are random, a function of params, x and segments)."""
  config = schema.Model(**{**vars(MODEL), "position": position, "qk_norm": qk_norm,
                           "attention_block": block})
  graph, state = nnx.split(Attention(config, jax.random.key(0)))
  leaves, tree = jax.tree.flatten(nnx.to_pure_dict(state))
  rng = np.random.default_rng(1)
  params = tree.unflatten([rng.normal(size=p.shape, scale=0.5) for p in leaves])
  return config, params, lambda params, x, segments: nnx.merge(graph, params)(x, segments)


def inputs(t, seed=2):
  rng = np.random.default_rng(seed)
  x_btd = rng.normal(size=(2, t, MODEL.d_model))
  segments_bt = np.sort(rng.integers(0, 3, size=(2, t)), axis=1)
  return x_btd, segments_bt


def float32(tree):
  return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


@pytest.mark.parametrize(("position", "qk_norm", "t", "block"), CASES)
def test_values(position, qk_norm, t, block):
  config, params, f = make(position, qk_norm, block)
  x_btd, segments_bt = inputs(t)
  got = jax.jit(f)(float32(params), float32(x_btd), jnp.asarray(segments_bt))
  np.testing.assert_allclose(got, naive(params, x_btd, segments_bt, config), rtol=2e-5, atol=2e-5)
  got = jax.jit(lambda p, x: f(p, x, None))(float32(params), float32(x_btd))
  one = np.zeros_like(segments_bt)
  np.testing.assert_allclose(got, naive(params, x_btd, one, config), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("position", "qk_norm", "t", "block"), CASES)
def test_gradients(position, qk_norm, t, block):
  """Along a random direction of each parameter and of the input, against central differences."""
  config, params, f = make(position, qk_norm, block)
  x_btd, segments_bt = inputs(t)
  rng = np.random.default_rng(3)
  cotangent = rng.normal(size=x_btd.shape)
  everything = {"x": x_btd, "params": params}

  def jax_loss(all_):
    return jnp.sum(f(all_["params"], all_["x"], jnp.asarray(segments_bt)) * float32(cotangent))

  grads = jax.jit(jax.grad(jax_loss))(float32(everything))
  leaves, tree = jax.tree.flatten(everything)
  for i, (leaf, grad) in enumerate(zip(leaves, jax.tree.leaves(grads), strict=True)):
    direction = rng.normal(size=leaf.shape)

    def naive_loss(step, i=i, direction=direction):
      moved = [a + step * direction if j == i else a for j, a in enumerate(leaves)]
      all_ = tree.unflatten(moved)
      return np.sum(naive(all_["params"], all_["x"], segments_bt, config) * cotangent)

    slope = (naive_loss(1e-5) - naive_loss(-1e-5)) / 2e-5
    # Of one token, what goes into the softmax has no gradient: what is left is float32's rounding
    # (6.5e-6 was seen), of which the gradient's own norm says nothing.
    least = 0.1 if t == 1 else 1e-2
    scale = np.linalg.norm(grad) * np.linalg.norm(direction) + least
    assert abs(np.sum(grad * direction) - slope) < 1e-4 * scale


def test_shift_puts_each_distance_in_its_column():
  c, s = 3, 7  # rows 4, 5, 6 of a sequence of 7: distances 7 ... 0 in columns 0 ... 7
  distances = jnp.broadcast_to(jnp.arange(s, -1, -1)[None, None, None], (1, 1, c, s + 1))
  shifted = blockwise.shift(distances)[0, 0]
  for i in range(c):
    for j in range(s - c + i + 1):
      assert shifted[i, j] == s - c + i - j


def test_rotary_scores_depend_on_distance_only():
  q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 8)) for i in (0, 1))
  def score(i, j):
    turn = lambda x, p: attention.rotate(x, jnp.array([p]), 10_000.0)
    return jnp.sum(turn(q, i) * turn(k, j))
  np.testing.assert_allclose(score(3, 1), score(40, 38), rtol=1e-4)
  assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_no_scores_are_kept_for_the_backward_pass():
  config, params, f = make("relative", False, 16)
  x = jax.ShapeDtypeStruct((2, 48, MODEL.d_model), jnp.float32)
  kept = jax.eval_shape(lambda p, x: jax.vjp(lambda p, x: f(p, x, None), p, x)[1],
                        float32(params), x)
  scores = {(16, s) for s in (16, 32, 48, 17, 33, 49)}
  assert not [a.shape for a in jax.tree.leaves(kept) if a.shape[-2:] in scores and a.size > 16 * 49]


def test_very_negative_scores_and_lone_tokens_stay_finite():
  _, params, f = make("relative", False, 4)
  x = 1e3 * jax.random.normal(jax.random.key(0), (1, 9, MODEL.d_model))
  segments = jnp.arange(9)[None]  # every token its own document
  loss = lambda x: jnp.sum(f(float32(params), x, segments))
  out, grad = jax.jit(jax.value_and_grad(loss))(x)
  assert jnp.isfinite(out) and jnp.all(jnp.isfinite(grad))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", ["btd,dhk->hbtk", "hbtk,hkd->btd", "dn,dhk->hnk", "btd,vd->btv",
                                  "hbck,hnk->hbcn", "hbcs,hbsk->hbck"])
@pytest.mark.parametrize("sizes", [dict(b=2, t=5, c=5, s=9, n=10), dict(b=1, t=1, c=1, s=1, n=2)])
def test_product_is_einsum(spec, dtype, sizes):
  """Values and gradients, on every form the model multiplies; bfloat16 has float32 sums."""
  sizes = sizes | dict(d=6, h=3, k=4, v=7)
  x_axes, w_axes, _ = spec.replace("->", ",").split(",")
  rng = np.random.default_rng(0)
  draw = lambda axes: jnp.asarray(rng.normal(size=[sizes[a] for a in axes]), dtype)
  x, w = draw(x_axes), draw(w_axes)
  out, vjp = jax.vjp(lambda x, w: product(spec, x, w.astype(jnp.float32), jnp.float32), x, w)
  want, want_vjp = jax.vjp(functools.partial(jnp.einsum, spec), x.astype(jnp.float32),
                           w.astype(jnp.float32))
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
  grad = jnp.asarray(rng.normal(size=out.shape), dtype).astype(jnp.float32)
  for got, exact in zip(jax.jit(vjp)(grad), want_vjp(grad), strict=True):
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(jnp.float32), exact, rtol=1e-2, atol=2e-2)
