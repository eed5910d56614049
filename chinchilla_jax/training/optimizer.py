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
from collections.abc import Callable
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

  def propose(self, sums: Tree, share: Any, state: dict[str, Tree], params: Tree,
              step: jax.Array, key: jax.Array, groups: tuple[tuple[str, Factors], ...] = (),
              ) -> tuple[dict[str, jax.Array], Callable[[Any], tuple[Tree, dict[str, Tree]]]]:
    """The norms of one update, and the update itself once they have been judged.

    Args:
      sums: gradients of the loss summed over targets, any float dtype.
      share: float32 scalar, what turns a sum into the mean: one over the weight of the targets.
        Gradients of the mean would be one more array of 4 bytes a parameter in memory.
      state: the optimizer's state.
      params: the parameters.
      step: int32, steps before this one; the learning rate follows it, skipped ones included.
      key: of this update, for stochastic rounding.
      groups: (pattern, factors) by parameter path, those of `parametrisation.groups`. If there
        are any, every parameter must match one.

    Returns:
      (norms, take): float32 norms: `grad_norm` (before clipping), `update_norm` (of the change of
      the float32 weights), `param_norm` (before the update), and the learning rate before any
      factor. `take(good)` gives new parameters and new state where the bool scalar `good` is true
      and the old ones, bit for bit, where it is not.
    """
    config = self.config
    sums = jax.tree.map(lambda g: g.astype(jnp.float32), sums)
    weights = state["master"] if self.has_master else jax.tree.map(
        lambda p: p.astype(jnp.float32), params)
    grad_norm, scale = optax.tree.norm(sums) * share, jnp.float32(share)
    if config.clip_norm:
      scale *= jnp.minimum(1.0, config.clip_norm / jnp.maximum(grad_norm, 1e-30))
    count = optax.safe_increment(state["count"])
    learning_rate = jnp.asarray(self.schedule(step), jnp.float32)
    factors = patterns.match_tree(weights, groups, None if groups else Factors())
    lr = patterns.match_tree(weights, config.lr_patterns, 1.0)
    decay = patterns.match_tree(weights, config.decay_patterns, 0.0)

    def moments(scale):
      scaled = jax.tree.map(lambda g: g * scale, sums)
      return {"mu": optax.tree.update_moment(scaled, state["mu"], config.b1, 1),
              "nu": optax.tree.update_moment_per_elem_norm(scaled, state["nu"], config.b2, 2)}

    def updates(moments):
      def update(mu, nu, w, lr, decay, group):
        direction = mu / (jnp.sqrt(nu) + config.eps * group.eps)
        change = -learning_rate * (direction + config.weight_decay * (decay * group.decay) * w)
        return change if lr * group.lr == 1 else change * (lr * group.lr)

      return jax.tree.map(update, optax.tree.bias_correction(moments["mu"], config.b1, count),
                          optax.tree.bias_correction(moments["nu"], config.b2, count),
                          weights, lr, decay, factors)

    # A barrier for each leaf: XLA's CPU backend would else write every scalar of it as an array.
    written = jax.tree.map(jax.lax.optimization_barrier, updates(moments(scale)))
    norms = {"grad_norm": grad_norm, "update_norm": optax.tree.norm(written),
             "param_norm": optax.tree.norm(weights), "learning_rate": learning_rate}

    def take(good):
      keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
      # Everything is computed a second time: to hold new moments until the norm of the update is
      # known would take 8 bytes a parameter and more passes over memory. The scale depends on
      # `good`, so a compiler cannot make one computation of the two, and needs no copy of what it
      # writes over: the norms have read it before.
      new_state = keep(moments(jnp.where(good, scale, 0.0)), {k: state[k] for k in ("mu", "nu")})
      new_state["count"] = jnp.where(good, count, state["count"])
      new_weights = keep(jax.tree.map(jnp.add, weights, updates(new_state)), weights)
      if self.has_master:
        new_state["master"] = new_weights
      if self.precision.rounding == "stochastic":
        return keep(_stochastic_round_tree(new_weights, key), params), new_state
      # Rounded weights, not chosen between new and old ones: where parameters are gathered, that
      # would copy both.
      return self.rounded(new_weights), new_state

    return norms, take


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
