"""The next token from logits: temperature, top-k, top-p."""

import jax
import jax.numpy as jnp


def filter_logits(logits_bv: jax.Array, temperature: float, top_k: int, top_p: float) -> jax.Array:
  """Logits after temperature, with what top-k and top-p exclude at minus infinity.

  Args:
    logits_bv: float32.
    temperature: above 0; 1 leaves the distribution as it is.
    top_k: only the k likeliest pieces; 0 for all.
    top_p: only the likeliest pieces that together reach this probability (Holtzman et al.
      2020); at least one; 1 for all. Applied after top-k.
  """
  logits_bv = logits_bv / temperature
  if top_k:
    k = min(top_k, logits_bv.shape[-1])
    smallest_b1 = jax.lax.top_k(logits_bv, k)[0][:, -1:]
    logits_bv = jnp.where(logits_bv < smallest_b1, -jnp.inf, logits_bv)
  if top_p < 1:
    sorted_bv = -jnp.sort(-logits_bv, axis=-1)
    probability_bv = jax.nn.softmax(sorted_bv, axis=-1)
    before_bv = jnp.cumsum(probability_bv, axis=-1) - probability_bv
    # A piece stays if the likelier ones alone fall short of top_p.
    kept_bv = jnp.where(before_bv < top_p, sorted_bv, jnp.inf)
    logits_bv = jnp.where(logits_bv < kept_bv.min(axis=-1, keepdims=True), -jnp.inf, logits_bv)
  return logits_bv


def sample(logits_bv: jax.Array, key: jax.Array, temperature: float = 1.0, top_k: int = 0,
           top_p: float = 1.0) -> jax.Array:
  """int32 tokens_b; temperature 0 takes the likeliest."""
  if temperature == 0:
    return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
  logits_bv = filter_logits(logits_bv, temperature, top_k, top_p)
  return jax.random.categorical(key, logits_bv, axis=-1).astype(jnp.int32)
