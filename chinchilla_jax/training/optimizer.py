"""AdamW over bfloat16 parameters with float32 truth in the optimizer state (law 4).

Three ways to hold the weights, all of the same optimizer:

  parameters  rounding    state        what it is
  bfloat16    master      master mu nu Chinchilla: the parameters are always the float32
                                       master cast to bfloat16
  bfloat16    stochastic  mu nu        Gopher: no copy, an update is rounded up or down at random
                                       with the probabilities that make it right on average
  float32     -           mu nu        the baseline

Moments, clipping and decay are float32 always.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from chinchilla_jax import config as schema
from chinchilla_jax import patterns

Tree = Any


@dataclasses.dataclass(frozen=True)
class AdamW:
  """AdamW's settings, its learning-rate schedule, and how weights are rounded."""

  config: schema.Optimizer
  precision: schema.Precision
  schedule: optax.Schedule

  @property
  def has_master(self) -> bool:
    return self.precision.parameters == "bfloat16" and self.precision.rounding == "master"

  def init(self, weights: Tree) -> tuple[Tree, dict[str, Tree]]:
    """Parameters and optimizer state from freshly drawn float32 weights."""
    zeros = lambda: jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    state = {"count": jnp.int32(0), "mu": zeros(), "nu": zeros()}
    if self.has_master:
      state["master"] = weights
    return jax.tree.map(lambda w: w.astype(self.precision.parameters), weights), state

  def apply(self, grads: Tree, state: dict[str, Tree], params: Tree, step: jax.Array,
            key: jax.Array) -> tuple[Tree, dict[str, Tree], dict[str, jax.Array]]:
    """One update.

    Args:
      grads: gradients of the mean loss, any float dtype.
      state: the optimizer's state.
      params: the parameters.
      step: int32, steps before this one; the learning rate follows it, skipped ones included.
      key: of this update, for stochastic rounding.

    Returns:
      New parameters, new state, and float32 norms: `grad_norm` (before clipping),
      `update_norm` (of the change of the float32 weights), `param_norm` (before the update),
      and the learning rate.
    """
    config = self.config
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    weights = state["master"] if self.has_master else jax.tree.map(
        lambda p: p.astype(jnp.float32), params)
    grad_norm = optax.tree.norm(grads)
    if config.clip_norm:
      scale = jnp.minimum(1.0, config.clip_norm / jnp.maximum(grad_norm, 1e-30))
      grads = jax.tree.map(lambda g: g * scale, grads)

    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    moments = optax.ScaleByAdamState(state["count"], state["mu"], state["nu"])
    directions, moments = adam.update(grads, moments)
    learning_rate = jnp.asarray(self.schedule(step), jnp.float32)
    decay = patterns.match_tree(weights, config.decay_patterns, 0.0)
    updates = jax.tree.map(
        lambda u, w, factor: -learning_rate * (u + config.weight_decay * factor * w),
        directions, weights, decay)
    new_weights = jax.tree.map(jnp.add, weights, updates)

    new_state = {"count": moments.count, "mu": moments.mu, "nu": moments.nu}
    if self.has_master:
      new_state["master"] = new_weights
    if self.precision.rounding == "stochastic":
      new_params = _stochastic_round_tree(new_weights, key)
    else:
      new_params = jax.tree.map(lambda w: w.astype(self.precision.parameters), new_weights)
    norms = {"grad_norm": grad_norm, "update_norm": optax.tree.norm(updates),
             "param_norm": optax.tree.norm(weights), "learning_rate": learning_rate}
    return new_params, new_state, norms


def _stochastic_round_tree(weights: Tree, key: jax.Array) -> Tree:
  leaves, structure = jax.tree.flatten(weights)
  keys = jax.random.split(key, len(leaves))
  return jax.tree.unflatten(
      structure, [stochastic_round(w, k) for w, k in zip(leaves, keys, strict=True)])


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
  """Rounds float32 to bfloat16 up or down at random, so that the mean is x.

  A bfloat16 is the upper half of a float32. Adding 16 random bits to the lower half and
  cutting it off carries into the upper half with just the probability of the part cut off.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  upper = ((bits + noise) >> 16).astype(jnp.uint16)
  # Infinities and NaNs have no neighbours to choose between.
  return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(upper, jnp.bfloat16),
                   x.astype(jnp.bfloat16))
