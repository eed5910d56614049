"""Turns what steps return into records, one step late (law 8: no host sync in the loop)."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax

from chinchilla_jax import config as schema
from chinchilla_jax import durations
from chinchilla_jax.model import flops
from chinchilla_jax.parallel import topology
from chinchilla_jax.training import guards


class Recorder:
  """Holds the newest step's device values until the step after it has been dispatched.

  So the host reads and writes while the device works. The time between two reads is the time
  of a step; `resume` after a pause keeps evaluations and saves out of it.

  Attributes:
    stop_signal: the signal by which some process asked all to stop, or 0; it comes with the
      values of a step as `stop_signal` and is not recorded.
  """

  def __init__(self, experiment: schema.Experiment, clock: durations.Clock, sinks: Sequence[Any],
               log_every: int):
    self._experiment = experiment
    self._clock = clock
    self._sinks = sinks
    self._log_every = log_every
    self.stop_signal = 0
    peak = topology.peak_flops(jax.devices()[0].device_kind)
    self._peak = peak and peak * len(jax.devices())
    model, seq_len = experiment.model, experiment.data.seq_len
    self._flops_per_token = {"mfu": flops.matmul(model, seq_len),
                             "mfu_causal": flops.matmul_causal(model, seq_len)}
    self._pending: tuple[int, Any] | None = None
    self._before: float | None = None  # When the step before finished; unknown after a pause.
    self._speeds: list[float] = []

  def step(self, step: int, values: dict[str, jax.Array]) -> None:
    """Takes the values of a step just dispatched, and writes those of the step before."""
    previous, self._pending = self._pending, (step, values)
    self._write(previous)

  def pause(self) -> None:
    """Writes what is pending; afterwards the log stands at the newest step."""
    previous, self._pending = self._pending, None
    self._write(previous)

  def resume(self) -> None:
    """Starts the clock again after a pause."""
    self._before = time.perf_counter()

  def event(self, record: dict[str, Any]) -> None:
    """Writes a record of its own kind at once, with the step's tokens and FLOPs."""
    self._send(self._stamp(record))

  def flush(self) -> None:
    """Returns when every line is on disk."""
    for sink in self._sinks:
      sink.flush()

  def median_tokens_per_second(self) -> float | None:
    """Over the steps of this process, evaluations and saves left out."""
    return statistics.median(self._speeds) if self._speeds else None

  def _write(self, pending: tuple[int, Any] | None) -> None:
    if pending is None:
      return
    step, values = pending
    values = {name: float(value) for name, value in jax.device_get(values).items()}
    self.stop_signal = int(values.pop("stop_signal", 0))
    now = time.perf_counter()
    sequences = self._clock.batches.sequences(step - 1)
    record = self._stamp({"kind": "train", "step": step, **values})
    if self._before is not None:
      speed = sequences * self._clock.seq_len / (now - self._before)
      self._speeds.append(speed)
      record["tokens_per_second"] = round(speed, 1)
      if self._peak is not None:
        # Of all devices' bfloat16 peak; attention over all pairs, and over visible pairs.
        for name, per_token in self._flops_per_token.items():
          record[name] = round(speed * per_token / self._peak, 4)
    self._before = now
    if step % self._log_every == 0 or step == self._clock.total_steps:
      self._send(record)
    first_bad = step - max(1, int(values["nonfinite_run"]))
    guards.stop_if_nonfinite(
        values, self._experiment.nonfinite_limit, step, self._clock.batches.cursor(first_bad),
        self._clock.batches.sequences(first_bad), self._experiment.seed)

  def _stamp(self, record: dict[str, Any]) -> dict[str, Any]:
    step = record["step"]
    tokens = self._clock.tokens(step)
    return {"kind": record["kind"], "step": step, "tokens": tokens,
            "epoch": round(tokens / self._clock.epoch_tokens, 6),
            "flops_6nd": self._clock.flops(step), **record}

  def _send(self, record: dict[str, Any]) -> None:
    for sink in self._sinks:
      sink.write(record)
