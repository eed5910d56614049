"""Turns what steps return into records, one step late (law 8: no host sync in the loop)."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from chinchilla_jax import config as schema
from chinchilla_jax import durations
from chinchilla_jax.data import address as addresses
from chinchilla_jax.errors import UserError
from chinchilla_jax.model import flops
from chinchilla_jax.parallel import topology

# What the guard looks at (`step.make_train_step`).
_JUDGED = ("loss", "grad_norm", "update_norm", "param_norm")


def _not_finite(values: dict[str, float]) -> str:
  """Which of a step's values are not finite, by their names in the log."""
  return ", ".join(
      name for name in _JUDGED if not math.isfinite(values.get(name, 0.0))) or "values"


class Recorder:
  """Holds the newest step's device values until the step after it has been dispatched.

  So the host reads and writes while the device works. The time between two reads is the time
  of a step; `resume` after a pause keeps evaluations and saves out of it.

  All processes read the same values, so what these attributes say is the same on all of them.

  Attributes:
    done: the newest step that is known to be finished.
    stop_signal: the signal by which some process asked all to stop, or 0; it comes with the
      values of a step as `stop_signal` and is not recorded.
    rollback: the step whose spike calls for a rollback, or 0.
  """

  def __init__(self, experiment: schema.Experiment, clock: durations.Clock, sinks: Sequence[Any],
               log_every: int, step: int = 0,
               address: Callable[[int, int], dict[str, Any]] | None = None):
    """Starts after `step`; `address(first sequence, sequences)` says what a batch is made of."""
    self._experiment = experiment
    self._clock = clock
    self._sinks = sinks
    self._log_every = log_every
    self._address = address
    self.done = step
    self.stop_signal = self.rollback = 0
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
    """Returns when every line is on disk.

    Raises:
      OSError: the disk is full; the lines wait.
    """
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
    self.done = step
    if step % self._log_every == 0 or step == self._clock.total_steps:
      self._send(record)
    if values["nonfinite_run"]:
      self._nonfinite(step, values)
    elif values.get("spike"):
      self._spike(step, values)

  def _nonfinite(self, step: int, values: dict[str, float]) -> None:
    run, limit = int(values["nonfinite_run"]), self._experiment.guard.nonfinite_limit
    what = _not_finite(values)
    self._trouble(step, "nonfinite", values, f"{what} not finite: update left out ({run} in a row)")
    if run >= limit:
      first = step - run + 1
      raise UserError(
          f"loss, gradient or update not finite in {run} steps in a row up to step {step}; the "
          f"first was step {first}, {addresses.text(self._batch(first))}; lower "
          "config.optimizer.peak_lr, or look at that batch")

  def _spike(self, step: int, values: dict[str, float]) -> None:
    policy = self._experiment.guard.spikes
    does = {"log": "update applied all the same", "skip": "update left out",
            "rollback": "going back to a checkpoint before it"}[policy]
    self._trouble(step, "spike", values,
                  f"spike: loss {values['loss']:.4f}, update norm {values['update_norm']:.4g}: "
                  f"{does}")
    if policy == "rollback":
      self.rollback = self.rollback or step

  def _trouble(self, step: int, what: str, values: dict[str, float], text: str) -> None:
    """Records what happened, with the address of the step's batch."""
    if self._sinks:  # Finding the documents takes a while; only one process needs them.
      batch = self._batch(step)
      self._send(self._stamp({
          "kind": "trouble", "step": step, "what": what,
          **{name: values[name] for name in _JUDGED if name in values},
          "batch": batch, "text": f"{text}; {addresses.text(batch)}"}))

  def _batch(self, step: int) -> dict[str, Any]:
    """The address of the batch of a step, which steps count from 1."""
    first, count = self._clock.batches.cursor(step - 1), self._clock.batches.sequences(step - 1)
    if self._address is None:
      return {"seed": self._experiment.seed, "sequences": [[first, first + count - 1]]}
    return self._address(first, count)

  def _stamp(self, record: dict[str, Any]) -> dict[str, Any]:
    step = record["step"]
    tokens = self._clock.tokens(step)
    return {"kind": record["kind"], "step": step, "tokens": tokens,
            "epoch": round(tokens / self._clock.epoch_tokens, 6),
            "flops_6nd": self._clock.flops(step), **record}

  def _send(self, record: dict[str, Any]) -> None:
    for sink in self._sinks:
      sink.write(record)
