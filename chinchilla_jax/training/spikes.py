"""Does the loss or the update of a step stand out? A running estimate, kept in the train state.

Two signals are watched: the loss, in nats per token, and the logarithm of the update's norm over
the learning rate, which warm-up and decay leave alone. Each has a mean and a variance with a
memory of `guard.spike_window` steps; a value above the mean by more than
`guard.spike_threshold` standard deviations is a spike (OLMo-core's skip-step optimizers).

A value that stands out, high or low, enters the estimate as if it lay at the threshold. So one
spike hardly moves the estimate, while every further one widens it: a level that stays is accepted
after some tens of steps, and is not a spike for ever.
"""

import jax
import jax.numpy as jnp

from chinchilla_jax import config as schema

Stats = dict[str, jax.Array]

# The least standard deviation of each signal, or the noise of a flat curve would be spikes. The
# loss's is relative to its mean; the other signal is a logarithm, so that its own is relative too.
LOSS_FLOOR = 0.01
UPDATE_FLOOR = 0.02


def init() -> Stats:
  """An estimate that has seen nothing: int32 seen (steps); float32 means and variances.

  loss_* are in nats per token, update_* of log(update norm / learning rate).
  """
  zero = lambda: jnp.float32(0)
  return {"seen": jnp.int32(0), "loss_mean": zero(), "loss_var": zero(),
          "update_mean": zero(), "update_var": zero()}


def judge(config: schema.Guard, stats: Stats, loss: jax.Array, update_norm: jax.Array,
          learning_rate: jax.Array) -> tuple[Stats, jax.Array]:
  """Judges one step by those before it, and takes it into the estimate.

  Args:
    config: window and threshold.
    stats: of `init`, or of the step before; may hold more, which is left out.
    loss: float32, nats per token.
    update_norm: float32, of the whole update, learning rate included.
    learning_rate: float32.

  Returns:
    (stats, is_spike): the estimate, and a bool scalar. Nothing is a spike before `spike_window`
    steps have been seen. A step with a value that is not finite, or with a learning rate of 0,
    is no spike and does not enter: that is others' business.
  """
  update = jnp.log(update_norm) - jnp.log(learning_rate)
  usable = jnp.isfinite(loss) & jnp.isfinite(update)
  seen = stats["seen"]
  # Plain averages at first, then exponential ones: there is no bias to correct.
  weight = jnp.maximum(1.0 / (seen.astype(jnp.float32) + 1.0), 1.0 / config.spike_window)
  new, above = {"seen": seen + 1}, False
  for name, value, floor in (("loss", loss, LOSS_FLOOR * jnp.abs(stats["loss_mean"])),
                             ("update", update, UPDATE_FLOOR)):
    mean, var = stats[f"{name}_mean"], stats[f"{name}_var"]
    reach = config.spike_threshold * jnp.maximum(jnp.sqrt(var), floor)
    distance = value - mean
    above |= distance > reach
    # The first value is the mean, however far it lies from 0.
    distance = jnp.where(seen > 0, jnp.clip(distance, -reach, reach), distance)
    new[f"{name}_mean"] = mean + weight * distance
    # West 1979. With the weights 1, 1/2, 1/3, ... it is the variance of all values so far.
    new[f"{name}_var"] = (1.0 - weight) * (var + weight * jnp.square(distance))
  is_spike = usable & (seen >= config.spike_window) & above
  return {name: jnp.where(usable, new[name], stats[name]) for name in new}, is_spike
