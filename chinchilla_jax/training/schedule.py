"""The learning rate as a function of the step."""

import jax.numpy as jnp
import optax

from chinchilla_jax import config as schema
from chinchilla_jax import durations
from chinchilla_jax.errors import UserError


def learning_rate(config: schema.Schedule, peak: float, clock: durations.Clock) -> optax.Schedule:
  """Learning rate of the update after `step` updates (so update 0 has `warmup_from`).

  * warm-up: linear from `warmup_from` to the peak (Gopher, section 3).
  * cosine: from the peak to final_ratio · peak at the last step (Chinchilla, section 3.1).
  * wsd: the peak, then in the last `cooldown` steps the factor 1 - sqrt(t), t from 0 to 1,
    down to final_ratio · peak (Hägele et al. 2024).
  * constant: the peak.

  Raises:
    UserError: warm-up (and cooldown) do not fit into the run.
  """
  total = clock.total_steps
  warmup = clock.steps(config.warmup, "config.schedule.warmup")
  cooldown = clock.steps(config.cooldown, "config.schedule.cooldown")
  needed = warmup + (cooldown if config.shape == "wsd" else 0)
  if needed > total or (config.shape == "cosine" and warmup == total):
    what = "warm-up and cooldown" if config.shape == "wsd" else "warm-up"
    raise UserError(f"config.schedule: {what} of {needed:,} steps do not fit into a run of "
                    f"{total:,} steps; set config.schedule.warmup='5%' or a longer run_length")
  final = config.final_ratio * peak
  if config.shape == "cosine":
    return optax.warmup_cosine_decay_schedule(config.warmup_from, peak, warmup, total, final)
  parts = [optax.linear_schedule(config.warmup_from, peak, warmup), optax.constant_schedule(peak)]
  boundaries = [warmup]
  if config.shape == "wsd" and cooldown:
    parts.append(lambda step: final + (peak - final) * (1 - jnp.sqrt(step / cooldown)))
    boundaries.append(total - cooldown)
  return optax.join_schedules(parts, boundaries)
