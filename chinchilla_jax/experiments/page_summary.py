"""How a run stands: its state, and the numbers at the head of the page.

From the journal, the metrics and the lock; a run that goes on is only looked at.
"""

import datetime
import json
import math
import os
import pathlib
import signal
from typing import Any

import numpy as np

from chinchilla_jax.errors import UserError
from chinchilla_jax.experiments.run_log import Curve, Facts, Log

_BEGINNINGS, _ENDINGS = ("start", "resume"), ("stop", "complete", "failed", "rollback")
_QUIET = 600.0  # Seconds without a line after which a run is no longer taken for a running one.


def summary(folder: pathlib.Path, config: Facts, log: Log, journal: list[Facts]) -> Facts:
  """The numbers at the head of the page; None where one is not known."""
  train = log.train
  speeds = train.series["tokens_per_second"]
  speeds = speeds[np.isfinite(speeds)]
  step = int(train.steps[-1]) if len(train) else None
  params = log.flops / 6 / log.tokens if log.tokens and math.isfinite(log.flops) else None
  state, words = _status(folder, journal, step, _total_steps(config, log))
  wall, unended = _wall(folder, journal)
  whats = [event.kind for event in log.troubles]
  return {
      "state": state, "status": words, "step": step, "params": params and round(params),
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


def _status(folder: pathlib.Path, journal: list[Facts], step: int | None,
            total: int | None) -> tuple[str, str]:
  """(one word for the colour, words)."""
  where = "before its first step" if step is None else f"at step {step:,}" + (
      f" of {total:,}" if total else "")
  turns = [record for record in journal if record["event"] in _BEGINNINGS + _ENDINGS]
  if not turns:
    if step is not None and step == total:
      return "complete", f"complete {where}"
    return "unknown", f"{where}; no journal says how it ended" if step else "no metrics yet"
  last = turns[-1]
  match last["event"]:
    case "complete":
      return "complete", f"complete {where}"
    case "stop":
      by = f" by {signal_name(last['signal'])}" if last.get("signal") else ""
      return "stopped", f"stopped{by} {where}"
    case "failed":
      return "failed", f"failed {where}: {last.get('why', 'no reason given')}"
  age = _age(folder)
  if _alive(folder):
    return "running", f"running, {where}"
  if not _here(folder) and age is not None and age < _QUIET:
    return "running", f"running, it seems (its last line is {duration(age)} old), {where}"
  ago = "" if age is None else f"; its last line is {duration(age)} old"
  return "ended", f"ended without a word (killed, or its machine was) {where}{ago}"


def _lock(folder: pathlib.Path) -> Facts:
  for name in (".lock", "lease.json"):
    try:
      found = json.loads((folder / name).read_bytes())
    except (OSError, ValueError):
      continue
    if isinstance(found, dict) and type(found.get("pid")) is int:
      return found
  return {}


def _here(folder: pathlib.Path) -> bool:
  return _lock(folder).get("host") == os.uname().nodename


def _alive(folder: pathlib.Path) -> bool:
  """Whether the process that took the lock is one of this machine's. Trying the lock itself could
  turn away a trainer that starts at this moment."""
  if not _here(folder):
    return False
  try:
    os.kill(_lock(folder)["pid"], 0)
  except ProcessLookupError:
    return False
  except OSError:  # It is another user's.
    return True
  return True


def _age(folder: pathlib.Path) -> float | None:
  times = [path.stat().st_mtime for path in (folder / "metrics.jsonl", folder / "journal.jsonl")
           if path.is_file()]
  return datetime.datetime.now().timestamp() - max(times) if times else None


def _wall(folder: pathlib.Path, journal: list[Facts]) -> tuple[float | None, int]:
  """(seconds between the journal's starts and ends, starts whose end is not known)."""
  seconds, unended, begin = 0.0, 0, None
  known = False
  for record in journal:
    try:
      now = datetime.datetime.fromisoformat(record["time"]).timestamp()
    except (KeyError, TypeError, ValueError):
      continue
    if record["event"] in _BEGINNINGS:
      unended += begin is not None
      begin = now
    elif record["event"] in _ENDINGS and begin is not None:
      seconds, begin, known = seconds + max(0.0, now - begin), None, True
  if begin is not None and (age := _age(folder)) is not None:  # To its last line.
    last = datetime.datetime.now().timestamp() - age
    seconds, known = seconds + max(0.0, last - begin), True
  return (seconds if known else None), unended


def _step_seconds(train: Curve) -> float | None:
  """Seconds in steps: the tokens of each step over its speed, where a speed was logged."""
  if not len(train):
    return None
  speeds = train.series["tokens_per_second"]
  tokens = np.diff(train.tokens, prepend=0.0)
  good = np.isfinite(speeds) & (speeds > 0) & (tokens > 0)
  return float((tokens[good] / speeds[good]).sum()) if good.any() else None


def duration(seconds: float) -> str:
  """"3 d 04:05:06", "4:05:06" or "12.3 s"."""
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes, second = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  return (f"{days} d {hours:02d}:" if days else f"{hours}:") + f"{minutes:02d}:{second:02d}"


def signal_name(number: Any) -> str:
  try:
    return signal.Signals(number).name
  except ValueError:
    return f"signal {number}"
