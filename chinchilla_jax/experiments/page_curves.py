"""Curves as the page holds them: whole where there is room, else thinned to buckets.

Numbers are little-endian arrays in base64: float32 holds a logged loss to its last bit.
"""

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from chinchilla_jax.experiments import report
from chinchilla_jax.experiments.report import Run
from chinchilla_jax.experiments.run_log import Curve, Event

COLOURS = 8  # In page.css; then dashes begin.
_FEWEST_BUCKETS = 128
_LARGEST = float(np.finfo(np.float32).max)


def fit(runs: Sequence[Run], room: int) -> tuple[list[dict[str, Any]], list[str]]:
  """(training curves as the script reads them, a line of what was thinned for each run)."""
  names = [[name for name, values in run.train.series.items() if not np.isnan(values).all()]
           for run in runs]
  costs = [_bytes(len(run.train), len(series), thin=False)
           for run, series in zip(runs, names, strict=True)]
  shares = _shares(costs, room)
  parts, lines = [], []
  for run, series, cost, share in zip(runs, names, costs, shares, strict=True):
    count = len(run.train)
    buckets = max(_FEWEST_BUCKETS, int(share / _bytes(1, len(series), thin=True)))
    if cost <= share or buckets >= count:
      parts.append(_whole(run.train, series))
      lines.append(f"{run.name}: all {count:,} logged steps are in this page.")
    else:
      parts.append(thinned(run.train, series, buckets))
      each = f"{count // buckets:,} or {count // buckets + 1:,}" if count % buckets else (
          f"{count // buckets:,}")
      lines.append(f"{run.name}: {count:,} logged steps are thinned to {buckets:,} points, each "
                   f"the mean, smallest and largest value of {each} of them; single steps are in "
                   "metrics.jsonl.")
  return parts, lines


def _bytes(points: int, series: int, thin: bool) -> float:
  """Of a curve in the page: base64 of steps (4), tokens (8) and values (4)."""
  return points * (2 * (4 + 8) + 3 * 4 * series if thin else 4 + 8 + 4 * series) * 4 / 3


def _shares(costs: Sequence[float], room: float) -> list[float]:
  """What each may take: small ones all they need, the others equal parts of what is left."""
  shares, left = [0.0] * len(costs), len(costs)
  for index in sorted(range(len(costs)), key=costs.__getitem__):
    shares[index] = min(costs[index], room / left)
    room, left = room - shares[index], left - 1
  return shares


def _whole(curve: Curve, names: Sequence[str]) -> dict[str, Any]:
  return {"thin": False, "steps": _base64(curve.steps, "<u4"),
          "tokens": _base64(curve.tokens, "<f8"),
          "series": {name: {"mean": _floats(curve.series[name])} for name in names}}


def thinned(curve: Curve, names: Sequence[str], buckets: int) -> dict[str, Any]:
  """Buckets of equally many points: the first and last step of each; mean, min and max.

  Values that are not finite, or were not logged, are left out of a bucket; one that has no other
  is a gap.
  """
  starts = np.arange(buckets) * len(curve) // buckets
  ends = np.append(starts[1:], len(curve)) - 1
  series = {}
  for name in names:
    values = curve.series[name]
    finite = np.isfinite(values)
    count = np.add.reduceat(finite.astype(np.int64), starts)
    odd = np.add.reduceat(np.isinf(values).astype(np.int64), starts)
    empty = np.where(odd > 0, math.inf, math.nan)
    parts = {"mean": np.add.reduceat(np.where(finite, values, 0.0), starts) / np.maximum(count, 1),
             "min": np.minimum.reduceat(np.where(finite, values, math.inf), starts),
             "max": np.maximum.reduceat(np.where(finite, values, -math.inf), starts)}
    series[name] = {part: _floats(np.where(count > 0, found, empty))
                    for part, found in parts.items()}
  return {"thin": True, "steps": _base64(curve.steps[starts], "<u4"),
          "steps_to": _base64(curve.steps[ends], "<u4"),
          "tokens": _base64(curve.tokens[starts], "<f8"),
          "tokens_to": _base64(curve.tokens[ends], "<f8"), "series": series}


def _floats(values: np.ndarray) -> str:
  # What float32 cannot hold is still finite.
  finite = np.isfinite(values)
  return _base64(np.where(finite, np.clip(values, -_LARGEST, _LARGEST), values), "<f4")


def _base64(values: np.ndarray, dtype: str) -> str:
  if dtype == "<u4":
    values = np.minimum(values, 2**32 - 1)
  return base64.b64encode(np.ascontiguousarray(values, dtype)).decode()


def run_data(run: Run, index: int, train: dict[str, Any]) -> dict[str, Any]:
  marks, more = report.ticks(run)
  summary = run.summary
  flops_per_token = summary["flops"] / summary["tokens"] if summary["flops"] and summary[
      "tokens"] else None
  evals = run.evals
  return {
      "name": run.name, "colour": index % COLOURS, "dash": index // COLOURS % 4,
      "flops_per_token": flops_per_token, "train": train,
      "evals": {"steps": evals.steps.tolist(), "tokens": evals.tokens.tolist(),
                "series": {name: [_plain(value) for value in values.tolist()]
                           for name, values in evals.series.items()}},
      "marks": [_mark(run, event) for event in marks], "more_marks": more}


def _plain(value: float) -> float | str | None:
  """JSON has no NaN: null is "not logged", "inf" is "not finite"."""
  return None if math.isnan(value) else "inf" if math.isinf(value) else value


def _mark(run: Run, event: Event) -> dict[str, Any]:
  step = min(event.step, 2**53)
  tokens = float(np.interp(step, np.append(0, run.train.steps), np.append(0.0, run.train.tokens)))
  return {"kind": event.kind, "step": step, "tokens": tokens, "time": event.time,
          "text": event.text[:300]}
