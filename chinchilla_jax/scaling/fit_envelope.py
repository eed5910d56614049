"""Approach 1: the lower envelope of training curves.

Hoffmann et al. 2022, section 3.1: for every FLOP value, which run has the lowest training loss?
Losses are smoothed with a Gaussian over a window of 10 steps and interpolated; at 1,500
logarithmically spaced FLOP values the best run gives N, and the tokens it has seen give D; power
laws go through these points.

The method stands on the envelope being made of ends of runs: a run whose learning rate has not yet
decayed is worse than one scheduled to end there. The paper says that all its points lie in the
last 15 % of training; the share that does is part of the result here.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from chinchilla_jax.errors import UserError
from chinchilla_jax.scaling.laws import WITH_EMBEDDING, FrontierLaw

POINTS = 1500
WINDOW = 10.0    # steps
LAST = 0.15


@dataclasses.dataclass(frozen=True)
class TrainingCurve:
  """A run's training loss.

  Attributes:
    run: its id.
    params: N.
    tokens, flops, loss: (points,), rising tokens; loss in nats per token, not smoothed.
    total_tokens: of the whole run: the horizon of its schedule.
    steps_per_point: between two points; 1 where every step is there.
  """

  run: str
  params: float
  tokens: np.ndarray
  flops: np.ndarray
  loss: np.ndarray
  total_tokens: float
  steps_per_point: float = 1.0

  def smoothed(self, window: float = WINDOW) -> np.ndarray:
    """The loss, smoothed over a window of so many steps."""
    return smooth(self.loss, window / self.steps_per_point)


@dataclasses.dataclass(frozen=True)
class EnvelopeFit:
  """Power laws through the envelope.

  Attributes:
    flops: (points,).
    chosen: (points,), index of the run with the lowest loss.
    params, tokens, loss: (points,), of the envelope.
    kept: (points,), which points the power laws go through.
    share_in_last: of the kept points, how many lie in the last 15 % of their run.
    runs_used: runs that have a kept point.
  """

  law: FrontierLaw
  flops: np.ndarray
  chosen: np.ndarray
  params: np.ndarray
  tokens: np.ndarray
  loss: np.ndarray
  kept: np.ndarray
  share_in_last: float
  runs_used: int
  warnings: tuple[str, ...]


def smooth(loss: np.ndarray, window: float = WINDOW) -> np.ndarray:
  """Gaussian of standard deviation window / 4, cut off at window / 2 on both sides, in points.

  The paper gives the length of the window and no deviation. At the ends the weights that are
  left are normalised. A window of less than two points changes nothing.
  """
  half = int(window // 2)
  if half < 1 or len(loss) < 2:
    return np.asarray(loss, np.float64)
  kernel = np.exp(-0.5 * (np.arange(-half, half + 1) / (window / 4)) ** 2)
  loss = np.asarray(loss, np.float64)
  # "full", cut by hand: "same" would have the kernel's length on a curve shorter than it.
  over = lambda values: np.convolve(values, kernel)[half:half + len(loss)]
  return over(loss) / over(np.ones_like(loss))


def fit(curves: Sequence[TrainingCurve], *, points: int = POINTS, window: float = WINDOW,
        name: str = "fit", params: str = WITH_EMBEDDING) -> EnvelopeFit:
  """Approach 1.

  FLOP values reach from the end of the shortest run to that of the longest, in FLOPs: below, no
  run has ended, and there is nothing that the envelope could be made of. As long as the smallest of
  all sizes is the best somewhere further up, or the largest somewhere further down, the best size
  may lie beyond them: such ends flatten the fit and are left out of the power laws (not if fewer
  than two sizes would remain). The paper does not say what its range is, or what it does at the
  ends.

  Raises:
    UserError: fewer than two model sizes, or only one on the envelope.
  """
  curves = list(curves)
  n = np.array([curve.params for curve in curves])
  if len(np.unique(n)) < 2:
    raise UserError(f"approach 1: the curves are of {len(np.unique(n))} model size"
                    f"{'s' * (len(np.unique(n)) != 1)}, and a power law needs two; add sizes")
  ends = np.array([curve.flops[-1] for curve in curves])
  if not ends.max() > ends.min() * (1 + 1e-6):
    raise UserError("approach 1: all runs end at the same FLOPs; it needs runs of several lengths; "
                    "fit approach 2 or 3, or add lengths")
  flops = np.geomspace(ends.min(), ends.max(), points)
  losses, tokens = _on(curves, flops, window)
  chosen = np.where(np.isfinite(losses), losses, np.inf).argmin(0)
  at = np.arange(points)
  seen, total = tokens[chosen, at], np.array([curve.total_tokens for curve in curves])[chosen]
  if len(np.unique(n[chosen])) < 2:
    raise UserError(f"approach 1: one model size, {n[chosen][0]:.3g} parameters, is the best at "
                    "every FLOP value; add sizes on both sides of it, or lengths")
  warnings = []
  kept = _between(n, chosen)
  if len(np.unique(n[chosen[kept]])) < 2:
    kept = np.ones(points, bool)
    warnings.append("the envelope has fewer than two sizes between its last point of the smallest "
                    "and its first of the largest: its ends, where the best size may lie beyond "
                    "the sampled ones, are in the fit and flatten it")
  log_k_n, a = _line(np.log(flops[kept]), np.log(n[chosen[kept]]))
  log_k_d, b = _line(np.log(flops[kept]), np.log(seen[kept]))
  share = float((seen >= (1 - LAST) * total * (1 - 1e-9))[kept].mean())
  used = len(np.unique(chosen[kept]))
  if share < 0.9:
    warnings.append(f"{100 * share:.0f} % of the envelope lies in the last {100 * LAST:.0f} % of "
                    "its run (the paper: all of it): runs whose learning rate had not decayed "
                    "stand for runs that would have ended there; train each size for more lengths")
  if used < 5:
    warnings.append(f"only {used} of {len(curves)} runs are on the envelope")
  law = FrontierLaw(name, float(np.exp(log_k_n)), float(a), float(np.exp(log_k_d)), float(b),
                    f"approach 1, {len(curves)} curves, {points} FLOP values", params)
  return EnvelopeFit(law, flops, chosen, n[chosen], seen, losses[chosen, at], kept, share,
                     used, tuple(warnings))


def _between(n: np.ndarray, chosen: np.ndarray) -> np.ndarray:
  """(points,): after the last point of the smallest size and before the first of the largest."""
  at = np.arange(len(chosen))
  smallest = np.flatnonzero(n[chosen] == n.min())
  largest = np.flatnonzero(n[chosen] == n.max())
  return ((at > (smallest[-1] if len(smallest) else -1))
          & (at < (largest[0] if len(largest) else len(at))))


def resampled(fitted: EnvelopeFit, curves: Sequence[TrainingCurve], weights: np.ndarray,
              window: float = WINDOW) -> dict[str, np.ndarray]:
  """a, b, log_k_n, log_k_d of every resample of runs; NaN where one size is best everywhere.

  At the kept FLOP values of `fitted`; those that no drawn run reaches are left out of a resample.
  A minimum over runs does not care how often a run was drawn, only whether.

  Args:
    weights: (resamples, runs).
  """
  flops = fitted.flops[fitted.kept]
  losses, tokens = _on(curves, flops, window)
  losses = np.where(np.isfinite(losses), losses, np.inf)
  log_n, log_d = np.log([curve.params for curve in curves]), np.log(tokens)
  log_c, at = np.log(flops), np.arange(len(flops))
  out = {name: np.full(len(weights), np.nan) for name in ("a", "b", "log_k_n", "log_k_d")}
  for row, weight in enumerate(weights):
    drawn = np.flatnonzero(weight > 0)
    best = losses[drawn].argmin(0)
    there = np.isfinite(losses[drawn][best, at])
    chosen = drawn[best][there]
    if there.sum() < 2 or len(np.unique(log_n[chosen])) < 2:
      continue
    out["log_k_n"][row], out["a"][row] = _line(log_c[there], log_n[chosen])
    out["log_k_d"][row], out["b"][row] = _line(log_c[there], log_d[chosen, at[there]])
  return out


def _on(curves: Sequence[TrainingCurve], flops: np.ndarray,
        window: int) -> tuple[np.ndarray, np.ndarray]:
  """Smoothed loss and tokens of every run at FLOP values; NaN outside a run. (runs, points)."""
  losses, tokens = np.full((2, len(curves), len(flops)), np.nan)
  log_c = np.log(flops)
  for row, curve in enumerate(curves):
    own = np.log(curve.flops)
    inside = (log_c >= own[0] - 1e-12) & (log_c <= own[-1] + 1e-12)
    losses[row, inside] = np.interp(log_c[inside], own, curve.smoothed(window))
    tokens[row, inside] = np.exp(np.interp(log_c[inside], own, np.log(curve.tokens)))
  return losses, tokens


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
  """(c, p) of y = c + p x by least squares."""
  from_mean = x - x.mean()
  p = (from_mean * (y - y.mean())).sum() / (from_mean**2).sum()
  return y.mean() - p * x.mean(), p
