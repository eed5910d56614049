"""The numbers at the head of a report's page."""

import math

import numpy as np

from chinchilla_jax.errors import UserError
from chinchilla_jax.experiments import run_state
from chinchilla_jax.experiments.run_log import Curve, Facts, Log
from chinchilla_jax.training.run_folder import RunFolder


def summary(folder: RunFolder, config: Facts, log: Log, journal: list[Facts]) -> Facts:
  """The numbers at the head of the page; None where one is not known."""
  train = log.train
  speeds = train.series["tokens_per_second"]
  speeds = speeds[np.isfinite(speeds)]
  step = int(train.steps[-1]) if len(train) else None
  params = log.flops / 6 / log.tokens if log.tokens and math.isfinite(log.flops) else None
  total = _total_steps(config, log)
  found = run_state.of(folder, total)
  wall, unended = run_state.wall(folder, journal)
  whats = [event.kind for event in log.troubles]
  return {
      "state": "running" if found.elsewhere else found.state,
      "status": run_state.words(found, folder, step, total),
      "step": step, "params": params and round(params),
      "tokens": log.tokens or None, "flops": log.flops if log.flops > 0 else None,
      "wall_seconds": wall, "unended_legs": unended, "step_seconds": _step_seconds(train),
      "tokens_per_second": float(np.median(speeds)) if len(speeds) else None,
      "train_loss": train.last("loss"), "eval_loss": log.evals.last("loss"),
      "bits_per_byte": log.evals.last("bits_per_byte"),
      "eval_step": int(log.evals.steps[-1]) if len(log.evals) else None,
      "spikes": whats.count("spike"), "nonfinite": whats.count("nonfinite"),
      "left_out": sum("update left out" in event.text for event in log.troubles),
      "resumes": sum(record["event"] == "resume" for record in journal),
      "rollbacks": sum(record["event"] == "rollback" for record in journal),
  }


def _total_steps(config: Facts, log: Log) -> int | None:
  """Steps of the whole run, by its config; None where that cannot be told from its folder."""
  from chinchilla_jax import config_io, durations
  from chinchilla_jax.model import shapes
  tree: Facts = {}
  for name, value in config.items():
    *path, leaf = name.split(".")
    node = tree
    for key in path:
      node = node.setdefault(key, {})
    node[leaf] = value
  try:
    experiment = config_io.from_dict(tree)
    return durations.clock(
        experiment.run_length, experiment.batch.sequences, experiment.batch.ramp,
        seq_len=experiment.data.seq_len, n_params=shapes.count_parameters(experiment.model),
        epoch_tokens=round(log.epoch_tokens)).total_steps
  except (UserError, ValueError, TypeError, AttributeError, ZeroDivisionError):
    return None


def _step_seconds(train: Curve) -> float | None:
  """Seconds in steps: the tokens of each step over its speed, where a speed was logged."""
  if not len(train):
    return None
  speeds = train.series["tokens_per_second"]
  tokens = np.diff(train.tokens, prepend=0.0)
  good = np.isfinite(speeds) & (speeds > 0) & (tokens > 0)
  return float((tokens[good] / speeds[good]).sum()) if good.any() else None
