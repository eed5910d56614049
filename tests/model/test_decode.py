"""Decoding with a cache gives the logits of the whole sequence at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chinchilla_jax import config as schema
from chinchilla_jax.model import transformer

T = 11
TINY = schema.Model(n_layers=2, d_model=12, n_heads=2, kv_size=6, d_ff=16, vocab_size=29,
                    attention_block=4)
VARIANTS = [dict(position="relative"), dict(position="relative", qk_norm=True),
            dict(position="rotary"), dict(position="rotary", qk_norm=True, activation="swiglu"),
            dict(position="rotary", bias=False)]


def random_params(config, dtype="float32"):
  leaves, tree = jax.tree.flatten(transformer.abstract(config, dtype))
  rng = np.random.default_rng(0)
  return tree.unflatten([jnp.asarray(rng.normal(size=p.shape, scale=0.3), dtype) for p in leaves])


TOKENS = jax.random.randint(jax.random.key(0), (2, T), 0, TINY.vocab_size)

whole_at_once = jax.jit(transformer.apply, static_argnums=(0, 4))


def decode_in_parts(config, params, parts, length, dtype="float32", context=None):
  """Logits of TOKENS read in parts of the given sizes."""
  step = jax.jit(transformer.decode, static_argnums=(0, 4, 5))
  cache = transformer.init_cache(config, TOKENS.shape[0], length, dtype)
  out, start = [], 0
  for part in parts:
    logits_btv, cache = step(config, params, TOKENS[:, start:start + part], cache, dtype, context)
    out.append(logits_btv)
    start += part
  assert int(cache["position"]) == start == T
  return jnp.concatenate(out, axis=1)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("length", [T, T + 5])
def test_cached_equals_uncached(fields, length):
  """In one go where the cache is full at the end; else prefill, steps, and a second prefill."""
  parts = (T,) if length == T else (6, 1, 1, 3)
  config = dataclasses.replace(TINY, **fields)
  params = random_params(config)
  whole = whole_at_once(config, params, TOKENS, None, "float32")
  got = decode_in_parts(config, params, parts, length)
  np.testing.assert_allclose(got, whole, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("fields", VARIANTS[1:3], ids=str)
def test_cached_is_near_uncached_in_bfloat16(fields):
  config = dataclasses.replace(TINY, **fields)
  params = random_params(config, "bfloat16")
  whole = whole_at_once(config, params, TOKENS, None, "bfloat16")
  got = decode_in_parts(config, params, (6, 1, 4), T + 2, "bfloat16")
  assert float(jnp.max(jnp.abs(got - whole))) < 0.1 * float(jnp.std(whole))


@pytest.mark.parametrize("position", ["relative", "rotary"])
def test_context_bounds_what_is_seen(position):
  """With one layer, logits at t are those of the last `context` tokens alone."""
  config = dataclasses.replace(TINY, n_layers=1, position=position)
  params, context = random_params(config), 4
  got = decode_in_parts(config, params, (3, 1, 1, 6), T, context=context)
  for t in range(T):
    window = TOKENS[:, max(0, t + 1 - context):t + 1]
    want = whole_at_once(config, params, window, None, "float32")[:, -1]
    np.testing.assert_allclose(got[:, t], want, rtol=1e-4, atol=1e-4)


def test_steps_share_one_program():
  traces = []

  def step(params, tokens, cache):
    traces.append(tokens.shape)
    return transformer.decode(TINY, params, tokens, cache, "float32")

  step, params = jax.jit(step), random_params(TINY)
  cache = transformer.init_cache(TINY, 2, T, "float32")
  for t in range(T):
    _, cache = step(params, TOKENS[:, t:t + 1], cache)
  assert traces == [(2, 1)]


def test_a_cache_at_position_0_takes_new_parameters():
  """The projected distances in it are of the parameters of the first call."""
  params = random_params(TINY)
  _, used = transformer.decode(TINY, params, TOKENS, transformer.init_cache(TINY, 2, T, "float32"),
                               "float32")
  other = jax.tree.map(lambda p: p * 1.5, params)
  again, _ = transformer.decode(TINY, other, TOKENS, used | {"position": jnp.int32(0)}, "float32")
  np.testing.assert_allclose(again, transformer.apply(TINY, other, TOKENS, None, "float32"),
                             rtol=1e-4, atol=1e-4)
