"""Durations carry units: `"20 tokens/param"`, `"700000 steps"`, `"1%"`.

Pure Python, so that a config can be checked without importing JAX.
"""

import dataclasses
import math
import re

from chinchilla_jax import config as schema
from chinchilla_jax.errors import UserError

UNITS = {
    "steps": "optimizer steps",
    "tokens": "training tokens",
    "epochs": "passes over the training split of the store",
    "flops": "training FLOPs, counted as 6·N·D",
    "tokens/param": "tokens per parameter, with N by the rule of Table A9",
    "%": "percent of the run's steps",
}
_ALIASES = {"step": "steps", "token": "tokens", "epoch": "epochs", "flop": "flops",
            "tokens/parameter": "tokens/param", "percent": "%"}
# A comma stands before groups of three digits only: "1,5" may mean one and a half to its writer.
_WHOLE = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9][0-9_]*"
_NUMBER = rf"(?:{_WHOLE})(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+"
_PATTERN = re.compile(rf"\s*({_NUMBER})\s*([a-zA-Z/%]+)\s*")
_LARGEST = 1e30  # in any unit; far beyond what anybody can compute, far below what overflows
_MAX_STEPS = 2**31 - 1  # steps are counted in int32


@dataclasses.dataclass(frozen=True)
class Duration:
  """A positive or zero amount of training, in one of `UNITS`."""

  value: float
  unit: str

  def __str__(self) -> str:
    return f"{self.value:g}{'' if self.unit == '%' else ' '}{self.unit}"


def parse(text: str, field: str = "duration") -> Duration:
  """Reads "1.4e12 tokens" and the like; `field` is named when it cannot."""
  match = _PATTERN.fullmatch(text)
  unit = match and _ALIASES.get(match[2].lower(), match[2].lower())
  if unit not in UNITS:
    raise UserError(
        f"{field}: got {text[:60]!r}; a duration is a number and a unit, one of "
        f"{', '.join(UNITS)}, such as '20 tokens/param' or '1%'")
  value = float(match[1].replace("_", "").replace(",", ""))
  if value > _LARGEST:
    raise UserError(f"{field}: got {text[:60]!r}; allowed is at most {_LARGEST:g}")
  return Duration(value, unit)


@dataclasses.dataclass(frozen=True)
class BatchSchedule:
  """Sequences per step, constant within stages. `stages`: ((first step, sequences), ...).

  The cursor (index of the first sequence of a step) is a function of the step alone, so
  a batch-size ramp needs no state of its own.
  """

  stages: tuple[tuple[int, int], ...]

  def sequences(self, step: int) -> int:
    """Sequences in the batch of step `step` (counted from 0)."""
    return [count for first, count in self.stages if first <= step][-1]

  def cursor(self, step: int) -> int:
    """Sequences consumed before step `step`."""
    total = 0
    ends = [first for first, _ in self.stages[1:]] + [math.inf]
    for (first, count), end in zip(self.stages, ends, strict=True):
      total += count * max(0, int(min(end, step)) - first)
    return total


def microbatches(batch: schema.Batch, sequences: int) -> int:
  """Microbatches of a step of this many sequences, which is a stage of the batch's ramp."""
  if batch.ramp_by == "size":
    return batch.microbatches
  return -(-sequences * batch.microbatches // batch.sequences)


@dataclasses.dataclass(frozen=True)
class Clock:
  """Turns durations into steps for one run.

  Attributes:
    total_steps: optimizer steps of the whole run.
    batches: sequences per step.
    seq_len: tokens per sequence.
    n_params: parameters by the rule of Table A9.
    epoch_tokens: tokens of one pass over the training split.
  """

  total_steps: int
  batches: BatchSchedule
  seq_len: int
  n_params: int
  epoch_tokens: int

  def tokens(self, step: int) -> int:
    """Tokens trained on before step `step`."""
    return self.batches.cursor(step) * self.seq_len

  def flops(self, step: int) -> float:
    """Training FLOPs spent before step `step`, counted as 6·N·D."""
    return 6.0 * self.n_params * self.tokens(step)

  def steps(self, text: str, field: str = "duration") -> int:
    """Steps nearest to a duration; at least 1 unless the duration is 0."""
    duration = parse(text, field)
    if duration.value == 0:
      return 0
    if duration.unit == "%":
      return max(1, round(self.total_steps * duration.value / 100))
    if duration.unit == "steps":
      return max(1, round(duration.value))
    tokens = to_tokens(duration, self.n_params, self.epoch_tokens)
    return max(1, _steps_for_tokens(self.batches.stages, tokens / self.seq_len))


def to_tokens(duration: Duration, n_params: int, epoch_tokens: int) -> float:
  """Tokens of a duration in tokens, epochs, flops (6·N·D) or tokens/param."""
  match duration.unit:
    case "tokens":
      return duration.value
    case "epochs":
      return duration.value * epoch_tokens
    case "flops":
      return duration.value / (6.0 * n_params)
    case "tokens/param":
      return duration.value * n_params
  raise ValueError(f"{duration} has no fixed number of tokens")


def _steps_for_tokens(stages: tuple[tuple[int, int], ...], sequences: float) -> int:
  """Steps after which `sequences` have been consumed, rounded to the nearest step."""
  for index, (first, count) in enumerate(stages):
    last = index + 1 == len(stages)
    room = math.inf if last else count * (stages[index + 1][0] - first)
    if sequences <= room:
      return first + round(sequences / count)
    sequences -= room
  raise AssertionError("the last stage has no end")


def clock(run_length: str, sequences: int, ramp: tuple[tuple[str, int], ...], *, seq_len: int,
          n_params: int, epoch_tokens: int) -> Clock:
  """The clock of a run.

  Args:
    run_length: duration of the whole run, in any unit but percent.
    sequences: sequences per step at the start.
    ramp: ((duration, sequences), ...): from that point on, this many sequences per step.
      Percent means percent of the run's tokens.
    seq_len: tokens per sequence.
    n_params: parameters by the rule of Table A9.
    epoch_tokens: tokens of one pass over the training split.

  Raises:
    UserError: the run length is a percentage, or the ramp is out of order.
  """
  total = parse(run_length, "run_length")
  if total.unit == "%" or total.value <= 0:
    raise UserError(f"run_length: got {run_length!r}; give a positive length in "
                    f"{', '.join(unit for unit in UNITS if unit != '%')}")
  points = [(parse(at, "batch.ramp"), count) for at, count in ramp]
  total_sequences = _total_sequences(total, sequences, points, seq_len, n_params, epoch_tokens)
  stages = [(0, sequences)]
  for duration, count in points:
    if duration.unit == "steps":
      first = round(duration.value)
    elif duration.unit == "%":
      first = _steps_for_tokens(tuple(stages), total_sequences * duration.value / 100)
    else:
      tokens = to_tokens(duration, n_params, epoch_tokens)
      first = _steps_for_tokens(tuple(stages), tokens / seq_len)
    if first <= stages[-1][0]:
      raise UserError(f"batch.ramp: '{duration}' falls on step {first}, not after step "
                      f"{stages[-1][0]} where the stage before it starts; put the stages in order")
    stages.append((first, count))
  batches = BatchSchedule(tuple(stages))
  if total.unit == "steps":
    total_steps = max(1, round(total.value))
  else:
    total_steps = max(1, _steps_for_tokens(batches.stages, total_sequences))
  if total_steps > _MAX_STEPS:
    raise UserError(f"run_length: {run_length!r} is {total_steps:,} steps, and at most "
                    f"{_MAX_STEPS:,} can be counted; give a shorter one, or larger batches")
  return Clock(total_steps, batches, seq_len, n_params, epoch_tokens)


def _total_sequences(total, sequences, points, seq_len, n_params, epoch_tokens) -> float:
  """Sequences of the whole run. With a length in steps, percentages of tokens are solved for."""
  if total.unit != "steps":
    return to_tokens(total, n_params, epoch_tokens) / seq_len
  # steps = sum over stages of (share of the tokens) * T / count, so T = steps / that sum.
  # Only percentages need it; other points are placed without knowing T.
  percents = [(d.value / 100, count) for d, count in points if d.unit == "%"]
  inverse, share, count = 0.0, 0.0, sequences
  for upto, following in percents:
    inverse += (upto - share) / count
    share, count = upto, following
  inverse += (1 - share) / count
  return total.value / inverse
