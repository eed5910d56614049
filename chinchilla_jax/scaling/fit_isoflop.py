"""Approach 2: at each of several budgets, the model size of the least loss.

Hoffmann et al. 2022, section 3.2: runs of several sizes share a budget; a parabola of the final
loss in log N has its minimum at N_opt, one in log D at D_opt; power laws of the budget go through
the minima.

A parabola is a Taylor expansion about the minimum. Where alpha and beta differ, or the sizes are
not centred on the optimum, or they span a wide range, its minimum is shifted even without noise
(Czech et al. 2026, arXiv 2603.22339). Two others are offered: "cubic", which has the next term of
the expansion, and "akima", which goes through the points (Porian et al. 2024 interpolate so).
"""

import dataclasses

import numpy as np
from scipy import interpolate

from chinchilla_jax.errors import UserError
from chinchilla_jax.scaling.laws import WITH_EMBEDDING, FrontierLaw

PROFILES = {"parabola": 2, "cubic": 3, "akima": 4}  # and fewest sizes less one
TOLERANCE = 0.1  # runs of one budget: neighbours in FLOPs less than 10 % apart


@dataclasses.dataclass(frozen=True)
class Curve:
  """Loss over x = (log z - middle) / half, z being N or D: a polynomial, or knots for Akima."""

  kind: str
  middle: float
  half: float
  coefficients: tuple[float, ...] = ()  # lowest power first
  knots: tuple[tuple[float, float], ...] = ()

  def __call__(self, z: np.ndarray) -> np.ndarray:
    x = (np.log(z) - self.middle) / self.half
    if self.kind == "akima":
      return _akima(np.array([k[0] for k in self.knots]), np.array([k[1] for k in self.knots]))(x)
    return np.polynomial.polynomial.polyval(x, self.coefficients)


@dataclasses.dataclass(frozen=True)
class Profile:
  """One budget.

  Attributes:
    flops: geometric mean over its runs.
    runs: indices of them.
    n_opt, d_opt, loss: of the minimum; NaN where the profile has none.
    outside: the minimum lies outside the sampled sizes, or there is none.
    curve: loss over N.
  """

  flops: float
  runs: tuple[int, ...]
  n_opt: float
  d_opt: float
  loss: float
  outside: bool
  curve: Curve


@dataclasses.dataclass(frozen=True)
class IsoflopFit:
  """Power laws through the minima: N_opt = k_n C^a, D_opt = k_d C^b, L_opt = k_l C^-c."""

  law: FrontierLaw
  profiles: tuple[Profile, ...]
  loss_constant: float
  loss_exponent: float
  profile: str
  alone: tuple[int, ...]   # runs whose budget has too few sizes
  warnings: tuple[str, ...]


def budgets(flops: np.ndarray, tolerance: float = TOLERANCE) -> np.ndarray:
  """(runs,) -> labels 0, 1, ... by rising budget: a gap of more than `tolerance` starts the next.

  Raises:
    UserError: a group so wide that its ends are no one budget.
  """
  flops = np.asarray(flops, np.float64)
  order = np.argsort(flops, kind="stable")
  jumps = np.diff(np.log(flops[order])) > np.log1p(tolerance)
  labels = np.empty(len(flops), int)
  labels[order] = np.concatenate([[0], np.cumsum(jumps)])
  for label in range(labels.max() + 1):
    group = flops[labels == label]
    if group.max() > group.min() * (1 + tolerance) ** 2:
      raise UserError(
          f"approach 2: {len(group)} runs between {group.min():.3g} and {group.max():.3g} FLOPs "
          "lie too close to each other to be told apart as budgets, and too far to be one; give "
          f"runs of fixed budgets, or another --budget-tolerance (now {tolerance:g})")
  return labels


def fit(n: np.ndarray, d: np.ndarray, flops: np.ndarray, loss: np.ndarray, *,
        profile: str = "parabola", tolerance: float = TOLERANCE, name: str = "fit",
        params: str = WITH_EMBEDDING) -> IsoflopFit:
  """Approach 2.

  Raises:
    UserError: fewer than two budgets with enough different sizes and a minimum.
  """
  if profile not in PROFILES:
    raise UserError(f"profile: got {profile!r}; one of: {', '.join(PROFILES)}")
  n, d, flops, loss = (np.asarray(values, np.float64) for values in (n, d, flops, loss))
  labels, fewest = budgets(flops, tolerance), PROFILES[profile] + 1
  profiles, alone, warnings = [], [], []
  for label in range(labels.max() + 1):
    runs = np.flatnonzero(labels == label)
    if len(np.unique(n[runs])) < fewest or len(np.unique(d[runs])) < fewest:
      alone += runs.tolist()
      continue
    one = np.ones((1, len(runs)))
    x_n, best, curve = _minima(n[runs], loss[runs], one, profile)
    x_d, _, _ = _minima(d[runs], loss[runs], one, profile)
    n_opt, d_opt, budget = np.exp(x_n[0]), np.exp(x_d[0]), np.exp(np.log(flops[runs]).mean())
    outside = not n[runs].min() <= n_opt <= n[runs].max()
    if not np.isfinite(n_opt + d_opt):
      warnings.append(f"budget {budget:.3g} FLOPs: no minimum between the sizes "
                      f"({n[runs].min():.3g} to {n[runs].max():.3g}); left out of the power laws")
    elif outside:
      side = "smaller" if n_opt < n[runs].min() else "larger"
      warnings.append(f"budget {budget:.3g} FLOPs: the minimum, {n_opt:.3g} parameters, lies "
                      f"outside the sampled sizes ({n[runs].min():.3g} to {n[runs].max():.3g}); "
                      f"train {side} models")
    profiles.append(Profile(float(budget), tuple(runs.tolist()), float(n_opt), float(d_opt),
                            float(best[0]), bool(outside), curve))
  usable = [one for one in profiles if np.isfinite(one.n_opt + one.d_opt)]
  if len(usable) < 2:
    what = (f"{len(usable)} budget{'s' * (len(usable) != 1)} with at least {fewest} sizes and a "
            "minimum between them")
    raise UserError(f"approach 2: the runs have {what}, and a power law needs two; add budgets, or "
                    "fit approach 3")
  if alone:
    warnings.append(f"{len(alone)} runs are in no profile: their budgets have fewer than {fewest} "
                    "different sizes")
  c = np.array([one.flops for one in usable])
  k_n, a = _power(c, np.array([one.n_opt for one in usable]))
  k_d, b = _power(c, np.array([one.d_opt for one in usable]))
  k_l, slope = _power(c, np.array([one.loss for one in usable]))
  law = FrontierLaw(name, float(k_n), float(a), float(k_d), float(b),
                    f"approach 2 ({profile}), {len(usable)} budgets", params)
  return IsoflopFit(law, tuple(profiles), float(k_l), float(-slope), profile, tuple(alone),
                    tuple(warnings))


def resampled(fitted: IsoflopFit, n: np.ndarray, d: np.ndarray, loss: np.ndarray,
              weights: np.ndarray) -> dict[str, np.ndarray]:
  """a, b, log_k_n, log_k_d of every resample; NaN where fewer than two budgets have a minimum.

  A budget of a resample without enough different sizes, or without a minimum, is left out of it.

  Args:
    weights: (resamples, runs).
  """
  n_opt, d_opt = [], []
  for one in fitted.profiles:
    runs = np.array(one.runs)
    for values, out in ((n, n_opt), (d, d_opt)):
      out.append(_minima(values[runs], loss[runs], weights[:, runs], fitted.profile)[0])
  log_c = np.log([one.flops for one in fitted.profiles])
  out = {}
  for (constant, exponent), minima in ((("log_k_n", "a"), n_opt), (("log_k_d", "b"), d_opt)):
    y = np.stack(minima, 1)
    good = np.isfinite(y)
    w, y = good.astype(float), np.where(good, y, 0.0)
    count = np.maximum(w.sum(1), 1)
    x_mean, y_mean = w @ log_c / count, y.sum(1) / count
    x = (log_c[None] - x_mean[:, None]) * w
    with np.errstate(invalid="ignore", divide="ignore"):
      slope = np.where(good.sum(1) >= 2, (x * y).sum(1) / (x * x).sum(1), np.nan)
    out[exponent], out[constant] = slope, y_mean - slope * x_mean
  return out


def _power(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
  """(k, p) of y = k x^p by least squares in logarithms."""
  lx, ly = np.log(x), np.log(y)
  p = ((lx - lx.mean()) * (ly - ly.mean())).sum() / ((lx - lx.mean()) ** 2).sum()
  return np.exp(ly.mean() - p * lx.mean()), p


def _minima(z: np.ndarray, loss: np.ndarray, weights: np.ndarray,
            kind: str) -> tuple[np.ndarray, np.ndarray, Curve]:
  """(log z at the minimum, loss there) for every row of weights, and the curve of the first row.

  NaN where there are too few different z, or no minimum.
  """
  middle = (np.log(z).max() + np.log(z).min()) / 2
  half = (np.log(z).max() - np.log(z).min()) / 2
  x = (np.log(z) - middle) / half
  if kind == "akima":
    return _akima_minima(x, loss, weights, middle, half)
  degree = PROFILES[kind]
  # Different sizes that a resample has: the first of equal ones counts for all.
  same = x[:, None] == x[None, :]
  first = same.argmax(0) == np.arange(len(x))
  enough = ((weights @ same > 0) & first[None]).sum(1) > degree
  basis = x[:, None] ** np.arange(degree + 1)
  normal = np.einsum("rm,mi,mj->rij", weights, basis, basis)
  normal[~enough] = np.eye(degree + 1)
  c = np.linalg.solve(normal, ((weights * loss) @ basis)[..., None])[..., 0]
  c[~enough] = np.nan
  with np.errstate(invalid="ignore", divide="ignore"):
    if kind == "parabola":
      at = np.where(c[:, 2] > 0, -c[:, 1] / (2 * c[:, 2]), np.nan)
    else:
      # Of c1 + 2 c2 x + 3 c3 x^2 = 0, the root where the second derivative is positive.
      root = np.sqrt(c[:, 2] ** 2 - 3 * c[:, 3] * c[:, 1])
      at = -c[:, 1] / (c[:, 2] + root)
      at = np.where(root > 0, at, np.nan)
      # A cubic says nothing far from its points.
      at = np.where(np.abs(at) <= 2, at, np.nan)
  value = (c * np.where(np.isfinite(at), at, 0.0)[:, None] ** np.arange(degree + 1)).sum(1)
  return middle + half * at, value, Curve(kind, middle, half, tuple(map(float, c[0])))


def _akima(x: np.ndarray, y: np.ndarray) -> interpolate.Akima1DInterpolator:
  return interpolate.Akima1DInterpolator(x, y)


def _akima_minima(x, loss, weights, middle, half):
  at = np.full(len(weights), np.nan)
  value, curve = at.copy(), None
  sizes, which = np.unique(x, return_inverse=True)
  sums = np.zeros((len(weights), len(sizes)))
  totals = sums.copy()
  for run, size in enumerate(which):
    sums[:, size] += weights[:, run]
    totals[:, size] += weights[:, run] * loss[run]
  for row in range(len(weights)):
    there = sums[row] > 0
    if curve is None:
      y = totals[row, there] / sums[row, there]
      curve = Curve("akima", middle, half,
                    knots=tuple(zip(sizes[there].tolist(), y.tolist(), strict=True)))
    if there.sum() <= PROFILES["akima"]:
      continue
    spline = _akima(sizes[there], totals[row, there] / sums[row, there])
    # Inside only: at an end the least loss is no minimum.
    stationary = spline.derivative().roots(extrapolate=False)
    stationary = stationary[np.isfinite(stationary)]
    ends = spline(sizes[there][[0, -1]]).min()
    values = spline(stationary)
    if len(stationary) and values.min() <= ends:
      at[row], value[row] = stationary[values.argmin()], values.min()
  return middle + half * at, value, curve
