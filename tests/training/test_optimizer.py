import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chinchilla_jax import config as schema
from chinchilla_jax.training import optimizer as lib


def make(lr=1e-3, parameters="bfloat16", rounding="master", **fields):
  config = schema.Optimizer(**{"clip_norm": 0.0, "weight_decay": 0.0, **fields})
  return lib.AdamW(config, schema.Precision(parameters=parameters, rounding=rounding),
                   lambda step: lr)


def weights(seed=0):
  rng = np.random.default_rng(seed)
  return {"a": {"kernel": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)},
          "norm": jnp.ones(4, jnp.float32)}


def grads_of(seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), jnp.float32), weights())


def applied(adamw, grads, state, params, step, key, groups=(), good=True):
  norms, take = adamw.propose(grads, 1.0, state, params, step, key, groups)
  return *take(good), norms


def run(adamw, start, grads, steps):
  params, state = adamw.init(start)
  apply = jax.jit(functools.partial(applied, adamw))
  for step in range(steps):
    params, state, norms = apply(grads(step), state, params, jnp.int32(step), jax.random.key(step))
  return params, state, norms


def reference(start, grads, steps, lr, b1, b2, eps, decay, clip):
  """AdamW as Loshchilov & Hutter write it, in float64."""
  flat = lambda tree: [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
  w, factors = flat(start), [1.0, 0.0]
  m, v = [0 * x for x in w], [0 * x for x in w]
  for step in range(steps):
    g = flat(grads(step))
    norm = np.sqrt(sum((x**2).sum() for x in g))
    g = [x * min(1.0, clip / norm) for x in g]
    m = [b1 * a + (1 - b1) * x for a, x in zip(m, g, strict=True)]
    v = [b2 * a + (1 - b2) * x**2 for a, x in zip(v, g, strict=True)]
    hat = [a / (1 - b1 ** (step + 1)) / (np.sqrt(b / (1 - b2 ** (step + 1))) + eps)
           for a, b in zip(m, v, strict=True)]
    w = [x - lr * (h + decay * f * x) for x, h, f in zip(w, hat, factors, strict=True)]
  return w


def test_adamw_is_the_papers():
  adamw = make(lr=1e-2, parameters="float32", weight_decay=0.1, clip_norm=1.0)
  params, _, norms = run(adamw, weights(), grads_of, 20)
  want = reference(weights(), grads_of, 20, 1e-2, 0.9, 0.95, 1e-8, 0.1, 1.0)
  for got, expected in zip(jax.tree.leaves(params), want, strict=True):
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)
  g = np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads_of(19))])
  np.testing.assert_allclose(norms["grad_norm"], np.linalg.norm(g), rtol=1e-5)


def test_parameters_are_always_the_master_cast():
  adamw = make()
  params, state = adamw.init(weights())
  for step in range(50):
    params, state, _ = applied(adamw, grads_of(step), state, params, jnp.int32(step),
                               jax.random.key(0))
    for p, m in zip(jax.tree.leaves(params), jax.tree.leaves(state["master"]), strict=True):
      assert p.dtype == jnp.bfloat16 and m.dtype == jnp.float32
      np.testing.assert_array_equal(p, m.astype(jnp.bfloat16))


def test_an_update_below_half_an_ulp_moves_the_master_and_in_time_the_parameter():
  adamw = make(lr=1e-4)  # A bfloat16 ulp above 1 is 2**-7; Adam's first updates are about lr.
  start = {"w": jnp.ones(1, jnp.float32)}
  constant = lambda step: {"w": -jnp.ones(1, jnp.float32)}
  params, state, _ = run(adamw, start, constant, 1)
  assert params["w"][0] == 1 and state["master"]["w"][0] > 1
  params, state, _ = run(adamw, start, constant, 100)
  assert params["w"][0] == 1 + 2**-7
  np.testing.assert_allclose(state["master"]["w"][0], 1.01, rtol=1e-3)


@pytest.mark.parametrize("fields", [{}, {"rounding": "stochastic"}, {"parameters": "float32"}])
def test_an_update_that_is_not_taken_changes_no_bit(fields):
  adamw = make(clip_norm=1.0, weight_decay=0.1, **fields)
  params, state, _ = run(adamw, weights(), grads_of, 3)
  state["mu"]["norm"] = jnp.array([-0.0, 0.0, 1e-45, -1.0], jnp.float32)
  bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads_of(3))
  for grads in (grads_of(3), bad):
    new = jax.jit(functools.partial(applied, adamw))(grads, state, params, jnp.int32(3),
                                                     jax.random.key(3), good=jnp.bool(False))[:2]
    for got, old in zip(jax.tree.leaves(new), jax.tree.leaves((params, state)), strict=True):
      assert got.dtype == old.dtype and got.tobytes() == old.tobytes()


def test_the_share_makes_the_gradients_of_the_mean():
  adamw = make(lr=1e-2, parameters="float32", clip_norm=2.0)
  params, state = adamw.init(weights())
  sums = jax.tree.map(lambda g: 64 * g, grads_of(0))
  want = applied(adamw, grads_of(0), state, params, jnp.int32(0), jax.random.key(0))
  norms, take = adamw.propose(sums, 1 / 64, state, params, jnp.int32(0), jax.random.key(0))
  for got, expected in zip(jax.tree.leaves((*take(True), norms)), jax.tree.leaves(want),
                           strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_without_master_or_noise_such_updates_would_be_lost():
  """Why the two roundings exist: bfloat16 alone stands still."""
  w = jnp.bfloat16(1)
  for _ in range(100):
    w = w + jnp.bfloat16(1e-4)
  assert w == 1


def test_the_norms_scale_and_the_decay_patterns():
  adamw = make(lr=1.0, weight_decay=0.5, parameters="float32")
  zero = lambda step: jax.tree.map(jnp.zeros_like, weights())
  params, _, norms = run(adamw, weights(), zero, 1)
  np.testing.assert_allclose(params["a"]["kernel"], 0.5 * weights()["a"]["kernel"], rtol=1e-6)
  np.testing.assert_array_equal(params["norm"], weights()["norm"])
  np.testing.assert_allclose(
      norms["update_norm"], 0.5 * np.linalg.norm(weights()["a"]["kernel"]), rtol=1e-5)


@pytest.mark.parametrize("value", [1.0, 1.001, -3.14159, 1e-30, 65504.3, 0.0, -1e-6])
def test_stochastic_rounding_is_unbiased(value):
  n = 200_000
  x = jnp.full(n, value, jnp.float32)
  rounded = np.asarray(lib.stochastic_round(x, jax.random.key(1)), np.float64)
  low, high = np.unique(rounded)[[0, -1]]
  ulp = max(high - low, abs(value) * 2.0**-7, 1e-40)
  assert len(np.unique(rounded)) <= 2 and low <= float(x[0]) <= high
  # The mean of n draws on a lattice of one ulp: five standard errors.
  assert abs(rounded.mean() - float(x[0])) <= 5 * 0.5 * ulp / np.sqrt(n)
  assert rounded.std() == 0 if float(jnp.bfloat16(value)) == float(x[0]) else rounded.std() > 0


def test_stochastic_rounding_keeps_what_is_not_finite():
  x = jnp.array([jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
  rounded = lib.stochastic_round(x, jax.random.key(0))
  assert rounded[0] == jnp.inf and rounded[1] == -jnp.inf and jnp.isnan(rounded[2])


def test_stochastic_updates_drift_as_the_master_does():
  start = {"w": jnp.ones(4096, jnp.float32)}
  constant = lambda step: {"w": -jnp.ones(4096, jnp.float32)}
  params, state, _ = run(make(lr=1e-4, rounding="stochastic"), start, constant, 100)
  assert "master" not in state and params["w"].dtype == jnp.bfloat16
  mean = np.asarray(params["w"], np.float64).mean()
  np.testing.assert_allclose(mean, 1.01, atol=5e-4)  # Master: see the test above.


def test_float32_parameters_have_no_second_copy():
  _, state = make(parameters="float32").init(weights())
  assert set(state) == {"count", "mu", "nu"}
