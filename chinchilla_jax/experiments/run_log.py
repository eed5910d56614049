"""A run's metrics.jsonl as columns, and its journal: read line by line, whatever is in them.

The log of 700,000 steps is not held as objects. A line that cannot be read is counted.
"""

import array
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from chinchilla_jax.errors import UserError
from chinchilla_jax.storage import logs
from chinchilla_jax.storage.paths import Place

Facts = dict[str, Any]

TRAIN_SERIES = ("loss", "tokens_per_second", "mfu", "mfu_causal", "learning_rate", "grad_norm",
                "update_norm", "param_norm")
EVAL_SERIES = ("loss", "bits_per_byte")


@dataclasses.dataclass(frozen=True)
class Curve:
  """Series over steps, ascending. NaN: not logged at this step; inf: logged, and not finite."""

  steps: np.ndarray              # [n] int64
  tokens: np.ndarray             # [n] float64, trained on up to and with this step
  series: dict[str, np.ndarray]  # [n] float64 each

  def __len__(self) -> int:
    return len(self.steps)

  def last(self, name: str) -> float | None:
    """The newest finite value of a series."""
    values = self.series.get(name, np.zeros(0))
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else None


@dataclasses.dataclass(frozen=True)
class Event:
  """Something that happened: a line of the journal, or one of kind "trouble" in the metrics."""

  kind: str         # start, resume, ...; spike, nonfinite
  step: int | None
  time: str         # "" where it is not known
  text: str


def lines(path: Place) -> Iterator[Facts | None]:
  """Records of a JSON lines file; None for a line that is none, such as one cut short."""
  try:
    for line in logs.lines(path):
      try:
        record = json.loads(line)
      except (ValueError, RecursionError):
        record = None
      yield record if isinstance(record, dict) else None
  except FileNotFoundError:
    return
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}); mend it, or leave this run "
                    "out") from None


class Log:
  """metrics.jsonl as columns."""

  def __init__(self, path: Place):
    train, evals = _Columns(TRAIN_SERIES), _Columns(EVAL_SERIES)
    self.troubles: list[Event] = []
    self.samples: list[Facts] = []
    self.notes: list[str] = []
    self.flops = self.tokens = 0.0
    self.epoch_tokens = 0.0
    unread = 0
    for record in lines(path):
      kind, step = (None, None) if record is None else (record.get("kind"), record.get("step"))
      tokens = record.get("tokens") if record else None
      if type(step) is not int or step < 0 or not is_number(tokens) or not math.isfinite(tokens):
        unread += 1
      elif kind == "trouble":
        self.troubles.append(Event(str(record.get("what", "trouble")), step, "",
                                   str(record.get("text", ""))))
      elif kind == "sample" and isinstance(record.get("text"), str):
        self.samples.append({"step": step, "prompt": str(record.get("prompt", "")),
                             "text": record["text"]})
      elif kind in ("train", "eval"):
        (train if kind == "train" else evals).add(step, float(tokens), record)
        self._totals(record, tokens)
    self.train, self.evals = train.curve(), evals.curve()
    self.nonfinite = int(np.isinf(self.train.series["loss"]).sum())
    if unread:
      self.notes.append(f"{unread:,} line{'s' * (unread > 1)} of metrics.jsonl cannot be read "
                        "(one at the end is cut short by a crash, or being written)")
    for columns, what in ((train, "step"), (evals, "evaluation")):
      if columns.doubled:
        self.notes.append(f"{columns.doubled:,} {what}s stand in metrics.jsonl more than once, or "
                          "not in order; the last line of each counts")
      for name, count in columns.nonfinite.items():
        self.notes.append(f"{name} was not finite in {count:,} lines of kind {what}: gaps in the "
                          "curve")

  def _totals(self, record: Facts, tokens: float) -> None:
    if tokens >= self.tokens:
      self.tokens = float(tokens)
      flops, epoch = record.get("flops_6nd"), record.get("epoch")
      self.flops = float(flops) if is_number(flops) else math.nan
      self.epoch_tokens = tokens / epoch if is_number(epoch) and epoch > 0 else 0.0


class _Columns:
  """Grows series by series."""

  def __init__(self, names: Sequence[str]):
    self._steps, self._tokens = array.array("q"), array.array("d")
    self._series = {name: array.array("d") for name in names}
    self.nonfinite: dict[str, int] = {}
    self.doubled = 0

  def add(self, step: int, tokens: float, record: Facts) -> None:
    self._steps.append(min(step, 2**53))
    self._tokens.append(tokens)
    for name, column in self._series.items():
      value = record.get(name)
      if type(value) is not float and not is_number(value):
        value = math.nan
      elif not -math.inf < value < math.inf:  # NaN is not, either.
        value = math.inf
        self.nonfinite[name] = self.nonfinite.get(name, 0) + 1
      column.append(value)

  def curve(self) -> Curve:
    steps = np.array(self._steps, np.int64)
    if len(steps) and not (np.diff(steps) > 0).all():
      # The last line of each step, in order.
      unique, index = np.unique(steps[::-1], return_index=True)
      order = len(steps) - 1 - index
      self.doubled = len(steps) - len(unique) or 1
    else:
      order = np.arange(len(steps))
    return Curve(steps[order], np.array(self._tokens)[order],
                 {name: np.array(column)[order] for name, column in self._series.items()})


def is_number(value: Any) -> bool:
  return isinstance(value, float) or type(value) is int and abs(value) < 10**300
