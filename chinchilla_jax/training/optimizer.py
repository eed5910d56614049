"""AdamW over bfloat16 parameters with float32 truth in the optimizer state (law 4).

Three ways to hold the weights, all of the same optimizer:

  parameters  rounding    state        what it is
  bfloat16    master      master mu nu Chinchilla: the parameters are always the float32
                                       master cast to bfloat16
  bfloat16    stochastic  mu nu        Gopher: no copy, an update is rounded up or down at random
                                       with the probabilities that make it right on average
  float32     -           mu nu        the baseline

Moments, clipping and decay are float32 always. Learning rate, decay and epsilon may differ by
parameter path: `optimizer.lr_patterns`, `optimizer.decay_patterns`, and the groups of
`model.parametrisation`; their factors multiply.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from chinchilla_jax import config as schema
from chinchilla_jax import patterns
from chinchilla_jax.model.parametrisation import Factors

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

  def rounded(self, weights: Tree) -> Tree:
    """Float32 weights as parameters, to the nearest."""
    return jax.tree.map(lambda w: w.astype(self.precision.parameters), weights)

  def init(self, weights: Tree) -> tuple[Tree, dict[str, Tree]]:
    """Parameters and optimizer state from freshly drawn float32 weights."""
    zeros = lambda: jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    state = {"count": jnp.int32(0), "mu": zeros(), "nu": zeros()}
    if self.has_master:
      state["master"] = weights
    return self.rounded(weights), state

  def apply(self, grads: Tree, state: dict[str, Tree], params: Tree, step: jax.Array,
            key: jax.Array, groups: tuple[tuple[str, Factors], ...] = (),
            ) -> tuple[Tree, dict[str, Tree], dict[str, jax.Array]]:
    """One update.

    Args:
      grads: gradients of the mean loss, any float dtype.
      state: the optimizer's state.
      params: the parameters.
      step: int32, steps before this one; the learning rate follows it, skipped ones included.
      key: of this update, for stochastic rounding.
      groups: (pattern, factors) by parameter path, those of `parametrisation.groups`. If there
        are any, every parameter must match one.

    Returns:
      New parameters, new state, and float32 norms: `grad_norm` (before clipping),
      `update_norm` (of the change of the float32 weights), `param_norm` (before the update),
      and the learning rate before any factor.
    """
    config = self.config
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    weights = state["master"] if self.has_master else jax.tree.map(
        lambda p: p.astype(jnp.float32), params)
    grad_norm = optax.tree.norm(grads)
    if config.clip_norm:
      scale = jnp.minimum(1.0, config.clip_norm / jnp.maximum(grad_norm, 1e-30))
      grads = jax.tree.map(lambda g: g * scale, grads)

    factors = patterns.match_tree(weights, groups, None if groups else Factors())
    directions, new_state = self._adam(grads, state, factors)
    learning_rate = jnp.asarray(self.schedule(step), jnp.float32)
    lr = patterns.match_tree(weights, config.lr_patterns, 1.0)
    decay = patterns.match_tree(weights, config.decay_patterns, 0.0)

    def update(u, w, lr, decay, group):
      change = -learning_rate * (u + config.weight_decay * (decay * group.decay) * w)
      return change if lr * group.lr == 1 else change * (lr * group.lr)

    updates = jax.tree.map(update, directions, weights, lr, decay, factors)
    new_weights = jax.tree.map(jnp.add, weights, updates)

    if self.has_master:
      new_state["master"] = new_weights
    if self.precision.rounding == "stochastic":
      new_params = _stochastic_round_tree(new_weights, key)
    else:
      new_params = self.rounded(new_weights)
    norms = {"grad_norm": grad_norm, "update_norm": optax.tree.norm(updates),
             "param_norm": optax.tree.norm(weights), "learning_rate": learning_rate}
    return new_params, new_state, norms


  def _adam(self, grads: Tree, state: dict[str, Tree], factors: Tree) -> tuple[Tree, dict]:
    """Adam's directions and {count, mu, nu}; parameters of one epsilon go through it together."""
    leaves, structure = jax.tree.flatten(grads)
    mu, nu, groups = map(structure.flatten_up_to, (state["mu"], state["nu"], factors))
    done = {}
    for eps in dict.fromkeys(group.eps for group in groups):
      here = [i for i, group in enumerate(groups) if group.eps == eps]
      pick = lambda leaves, here=here: [leaves[i] for i in here]
      adam = optax.scale_by_adam(self.config.b1, self.config.b2, self.config.eps * eps)
      directions, moments = adam.update(
          pick(leaves), optax.ScaleByAdamState(state["count"], pick(mu), pick(nu)))
      count = moments.count
      done |= dict(zip(here, zip(directions, moments.mu, moments.nu, strict=True), strict=True))
    directions, mu, nu = (structure.unflatten(part)
                          for part in zip(*(done[i] for i in sorted(done)), strict=True))
    return directions, {"count": count, "mu": mu, "nu": nu}


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
