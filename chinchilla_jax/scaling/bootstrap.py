"""Intervals by resampling runs.

A resample is a vector of weights, how often each run is in it, so that whatever is fitted takes
all resamples at once. Runs are what is drawn, never steps of a run: losses of one run are not
independent of each other.
"""

import dataclasses

import numpy as np

from chinchilla_jax.errors import UserError

KINDS = ("bootstrap", "paper")


@dataclasses.dataclass(frozen=True)
class Resampling:
  """How intervals are made.

  Attributes:
    kind: "bootstrap": as many runs as there are, drawn with replacement. "paper": 80 % of the
      runs, without replacement (Hoffmann et al. 2022, Table 2: "80 % of the dataset is sampled
      100 times"; whether with replacement it does not say).
    count: resamples. 0: no intervals.
    confidence: between the two percentiles, such as 0.95; the paper's is 0.8.
    seed: of the draws.
  """

  kind: str = "bootstrap"
  count: int = 1000
  confidence: float = 0.95
  seed: int = 0

  def __post_init__(self):
    if self.kind not in KINDS:
      raise UserError(f"resampling: got {self.kind!r}; one of: {', '.join(KINDS)}")
    if self.count < 0 or 0 < self.count < 20:
      raise UserError(f"resamples: got {self.count}; give at least 20, or 0 for no intervals")
    if not 0 < self.confidence < 1:
      raise UserError(f"confidence: got {self.confidence:g}; give a number between 0 and 1, such "
                      "as 0.95")

  def describe(self) -> str:
    if not self.count:
      return "no intervals"
    how = ("drawn with replacement" if self.kind == "bootstrap"
           else "80 % drawn without replacement")
    return (f"{100 * self.confidence:g} % intervals, percentiles of {self.count:,} resamples of "
            f"runs ({how}, seed {self.seed})")


PAPER = Resampling("paper", 100, 0.8)


def weights(groups: np.ndarray, resampling: Resampling) -> np.ndarray:
  """(resamples, runs): how often each run is in each resample.

  Args:
    groups: (runs,) of labels. Runs are drawn within their group, so that every resample has as
      many runs of a group as there are (80 % of them, rounded, for "paper").
  """
  groups = np.asarray(groups)
  rng = np.random.default_rng(resampling.seed)
  out = np.zeros((resampling.count, len(groups)))
  for group in dict.fromkeys(groups.tolist()):
    members = np.flatnonzero(groups == group)
    size = len(members)
    if resampling.kind == "bootstrap":
      out[:, members] = rng.multinomial(size, np.full(size, 1 / size), resampling.count)
    else:
      kept = max(1, round(0.8 * size))
      order = rng.random((resampling.count, size)).argsort(1)
      out[:, members] = order.argsort(1) < kept
  return out


def interval(samples: np.ndarray, confidence: float) -> tuple[float, float] | None:
  """The percentiles of samples that leave out (1 - confidence) / 2 on either side.

  Resamples that could not be fitted are NaN and are left out; None if fewer than half, or fewer
  than 20, are left.
  """
  samples = np.asarray(samples, np.float64)
  good = samples[np.isfinite(samples)]
  if len(good) < max(20, len(samples) / 2):
    return None
  tail = 50 * (1 - confidence)
  low, high = np.percentile(good, [tail, 100 - tail])
  return float(low), float(high)
