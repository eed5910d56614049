"""Approach 3: L(N, D) = E + A / N^alpha + B / D^beta fitted to final losses.

Hoffmann et al. 2022, section 3.3 and D.2: minimise the sum over runs of
  Huber_delta( LSE(a - alpha log N, b - beta log D, e) - log L ),   delta = 1e-3,
from a grid of 4,500 starts, with E = exp(e), A = exp(a), B = exp(b).

The sum, not the mean: the mean divides gradients by the number of runs, which lets an optimiser
with a fixed tolerance stop early, as happened to the published fit (Besiroglu et al. 2024). Here
every start goes on until its gradient vanishes, and the gradient is part of the result.

The optimiser is Newton's method with Levenberg-Marquardt damping on exact second derivatives, in
float64, for many problems at once: a problem is a start, a vector of log losses, and a weight for
every run. A bootstrap resample is a vector of weights.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chinchilla_jax.errors import UserError
from chinchilla_jax.scaling.laws import WITH_EMBEDDING, ParametricLaw

DELTA = 1e-3
NAMES = ("a", "b", "e", "alpha", "beta")  # of the five parameters, in this order everywhere
FEWEST_RUNS = len(NAMES) + 1
_CHUNK = 256     # problems at a time: their arrays stay in the cache
_ROUND = 8       # steps between two looks at what has converged
_MOST_ROUNDS = 40
_PAUSE = 12      # Gauss-Newton steps before Newton's are tried (again)
_TOLERANCE = 1e-12  # of the gradient, over the largest that the runs could have together


def grid() -> np.ndarray:
  """The paper's 4,500 starts (section D.2), (a, b, e, alpha, beta) in rows."""
  axes = (np.arange(0, 26, 5), np.arange(0, 26, 5), np.arange(-1, 1.1, 0.5),
          np.arange(0, 2.1, 0.5), np.arange(0, 2.1, 0.5))
  return np.array(list(itertools.product(*axes)), np.float64)


@dataclasses.dataclass(frozen=True)
class Solutions:
  """What came of many problems, in the order in which they were given.

  Attributes:
    theta: (problems, 5), in the order of NAMES.
    objective: sum of Huber losses.
    gradient: Euclidean norm of the objective's gradient in (a, b, e, alpha, beta).
    converged: the gradient, with log N and log D centred, is below 1e-12 of its scale
      (sum of weights times delta, or times 1 where delta is larger).
  """

  theta: np.ndarray
  objective: np.ndarray
  gradient: np.ndarray
  converged: np.ndarray


@dataclasses.dataclass(frozen=True)
class ParametricFit:
  """The best of all starts.

  Attributes:
    law: its constants; a budget's optimum follows from them.
    objective: sum of Huber losses at the optimum.
    gradient: norm of the gradient there, in (a, b, e, alpha, beta).
    condition: condition number of the Hessian there, in the same parameters.
    condition_centred: the same with log N and log D centred, as the optimiser sees it.
    starts, converged: how many there were, and how many ended where the gradient vanishes.
    at_best: how many of them ended at this optimum (objective equal to 1e-9); 0: the gradient
      vanishes nowhere near the lowest objective, and the fit is to be distrusted.
    rms: root mean square residual of log L.
  """

  law: ParametricLaw
  theta: tuple[float, ...]
  objective: float
  gradient: float
  condition: float
  condition_centred: float
  starts: int
  converged: int
  at_best: int
  rms: float
  runs: int
  delta: float


def law_of(theta: Any, name: str = "fit", source: str = "",
           params: str = WITH_EMBEDDING) -> ParametricLaw:
  """The law of (a, b, e, alpha, beta)."""
  a, b, e, alpha, beta = (float(value) for value in theta)
  return ParametricLaw(name, math.exp(e), math.exp(a), math.exp(b), alpha, beta, source, params)


def fit(n: np.ndarray, d: np.ndarray, loss: np.ndarray, *, delta: float = DELTA,
        starts: np.ndarray | None = None, name: str = "fit",
        params: str = WITH_EMBEDDING) -> ParametricFit:
  """Approach 3 on runs of n parameters, d tokens and final losses in nats per token.

  Args:
    delta: of the Huber loss; math.inf is least squares of log losses.
    starts: (starts, 5) in the order of NAMES; the paper's grid by default.

  Raises:
    UserError: fewer runs than parameters, or too few different N or D to tell them apart.
  """
  check(n, d)
  starts = grid() if starts is None else np.asarray(starts, np.float64)
  ones = np.ones((1, len(n)))
  zero = np.zeros(len(starts), np.int64)
  found = solve(starts, np.log(n), np.log(d), np.log(loss)[None], ones, zero, zero, delta)
  best = _best(found)
  theta = found.theta[best]
  if not usable(theta):
    raise UserError(f"approach 3: the best fit has alpha = {theta[3]:.3g} and beta = "
                    f"{theta[4]:.3g}, and is no law: the losses do not fall with both N and D as "
                    "E + A/N^alpha + B/D^beta does; look at the runs, or fit approach 2")
  at_best = found.converged & (found.objective <= found.objective[best] * (1 + 1e-9) + 1e-24)
  hessian, centred = hessians(theta, np.log(n), np.log(d), np.log(loss), delta)
  residual = np.log(law_of(theta).loss(np.asarray(n, np.float64), d)) - np.log(loss)
  return ParametricFit(
      law_of(theta, name, f"approach 3, {len(n)} runs, Huber delta {delta:g}", params),
      tuple(map(float, theta)), float(found.objective[best]), float(found.gradient[best]),
      float(np.linalg.cond(hessian)), float(np.linalg.cond(centred)), len(starts),
      int(found.converged.sum()), int(at_best.sum()), float(np.sqrt(np.mean(residual**2))),
      len(n), delta)


def check(n: np.ndarray, d: np.ndarray) -> None:
  """Raises UserError where five parameters cannot be told from these runs."""
  if len(n) < FEWEST_RUNS:
    raise UserError(f"approach 3: {len(n)} runs are too few for its 5 parameters; give at least "
                    f"{FEWEST_RUNS}, and many more for intervals that mean something")
  for what, values in (("model sizes", n), ("numbers of tokens", d)):
    if len(np.unique(values)) < 3:
      raise UserError(f"approach 3: the runs have {len(np.unique(values))} different {what}; an "
                      "exponent and its constant beside E need at least 3")


def usable(theta: np.ndarray) -> np.ndarray:
  """Whether constants are finite, and exponents positive: what a law needs. (..., 5) -> (...)."""
  theta = np.asarray(theta)
  return (np.isfinite(theta).all(-1) & (theta[..., 3:] > 0).all(-1)
          & (np.abs(theta[..., :3]) < 200).all(-1))


def _best(found: Solutions) -> int:
  """The lowest objective; among equals (to 1e-12) the smallest gradient."""
  objective = np.where(np.isfinite(found.objective), found.objective, np.inf)
  near = objective <= objective.min() * (1 + 1e-12) + 1e-28
  return int(np.argmin(np.where(near, found.gradient, np.inf)))


def resampled(fitted: ParametricFit, n: np.ndarray, d: np.ndarray, loss: np.ndarray,
              weights: np.ndarray) -> np.ndarray:
  """Optima of resamples, (resamples, 5); a row of NaN where there is none.

  A resample of fewer than six different runs, or of fewer than three different N or D, determines
  no law and has none, whatever an optimiser makes of it.

  Every resample is fitted from several starts: the optimum of all runs, and points around it,
  so that a resample whose optimum has moved is followed there.

  Args:
    weights: (resamples, runs), how often each run is in each resample.
  """
  starts = around(np.asarray(fitted.theta), np.log(n), np.log(d))
  found = solve(np.tile(starts, (len(weights), 1)), np.log(n), np.log(d), np.log(loss)[None],
                weights, np.zeros(len(starts) * len(weights), np.int64),
                np.repeat(np.arange(len(weights)), len(starts)), fitted.delta)
  enough = [(row > 0).sum() >= FEWEST_RUNS and len(np.unique(n[row > 0])) >= 3
            and len(np.unique(d[row > 0])) >= 3 for row in weights]
  return np.where(np.array(enough)[:, None], best_of_groups(found, len(starts)), np.nan)


def around(theta: np.ndarray, log_n: np.ndarray, log_d: np.ndarray) -> np.ndarray:
  """An optimum and four points around it: each exponent by a factor of 1.5 up and down.

  The constants turn about the middle of the runs, so that the points fit about as well.
  """
  starts = [theta]
  for which, middle in ((3, log_n.mean()), (4, log_d.mean())):
    for factor in (1 / 1.5, 1.5):
      moved = theta.copy()
      moved[which] *= factor
      moved[which - 3] += (moved[which] - theta[which]) * middle
      starts.append(moved)
  return np.array(starts)


def best_of_groups(found: Solutions, size: int) -> np.ndarray:
  """The best converged solution of every `size` consecutive problems; NaN where there is none."""
  good = usable(found.theta) & found.converged
  objective = np.where(good, found.objective, np.inf).reshape(-1, size)
  best = objective.argmin(1)
  theta = found.theta.reshape(-1, size, 5)[np.arange(len(best)), best]
  return np.where(np.isfinite(objective.min(1))[:, None], theta, np.nan)


# -------------------------------------------------------------------- Many problems at once


def solve(starts: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_loss: np.ndarray,
          weights: np.ndarray, which_loss: np.ndarray, which_weights: np.ndarray,
          delta: float = DELTA) -> Solutions:
  """Minimises the objective for every start.

  Args:
    starts: (problems, 5) in the order of NAMES.
    log_n, log_d: (runs,), common to all problems.
    log_loss: (data sets, runs); `which_loss` (problems,) says which one a problem is about.
    weights: (resamples, runs); `which_weights` (problems,) likewise.
  """
  x_mean, y_mean = log_n.mean(), log_d.mean()
  to_centred = lambda theta, sign: np.stack(
      [theta[:, 0] - sign * theta[:, 3] * x_mean, theta[:, 1] - sign * theta[:, 4] * y_mean,
       theta[:, 2], theta[:, 3], theta[:, 4]], 1)
  with _float64():
    step = _compiled_round()
    x, y = jnp.asarray(log_n - x_mean), jnp.asarray(log_d - y_mean)
    width = jnp.asarray(min(delta, 1e6))

    def advance(rows: np.ndarray, state: Any) -> Any:
      # Always whole chunks, so that there is one program; the last row fills up.
      padded = np.concatenate([rows, np.full(_CHUNK - len(rows), rows[-1])])
      with _float64():
        out = step(*(jnp.asarray(part[padded]) for part in state), x, y,
                   jnp.asarray(log_loss[which_loss[padded]]),
                   jnp.asarray(weights[which_weights[padded]]), width)
        return [np.asarray(part)[:len(rows)] for part in out]

    state = _first_state(to_centred(starts, 1.0))
    active = np.arange(len(starts))
    # Two at a time: XLA does small arrays on one core each.
    with futures.ThreadPoolExecutor(2) as pool:
      for _ in range(_MOST_ROUNDS):
        chunks = [active[i:i + _CHUNK] for i in range(0, len(active), _CHUNK)]
        for rows, out in zip(chunks, pool.map(
            lambda rows: advance(rows, state), chunks), strict=True):
          for part, new in zip(state, out, strict=True):
            part[rows] = new
        active = active[~state[_DONE][active]]
        if not len(active):
          break
  scale = weights[which_weights].sum(1) * min(delta, 1.0)
  centred_gradient = state[2]
  # d/d alpha at fixed a is that at fixed centred a, less mean(log N) times d/da.
  gradient = centred_gradient.copy()
  gradient[:, 3] -= x_mean * centred_gradient[:, 0]
  gradient[:, 4] -= y_mean * centred_gradient[:, 1]
  return Solutions(to_centred(state[0], -1.0), state[1], np.linalg.norm(gradient, axis=1),
                   np.linalg.norm(centred_gradient, axis=1) <= 10 * _TOLERANCE * scale)


def _float64():
  """Float64 inside, whatever the rest of the program uses; training is not touched."""
  return jax.enable_x64(True)


# A problem's state: theta, objective, gradient, hessian at the best point so far; damping; the
# point to try; Gauss-Newton steps left before Newton's; whether done.
_DONE = 7


def _first_state(theta: np.ndarray) -> list[np.ndarray]:
  count = len(theta)
  return [theta.copy(), np.full(count, np.inf), np.zeros((count, 5)), np.zeros((count, 5, 5)),
          np.full(count, 1e-2), theta.copy(), np.full(count, _PAUSE), np.zeros(count, bool)]


@functools.cache
def _compiled_round() -> Callable:
  return jax.jit(jax.vmap(_round, in_axes=(0,) * 8 + (None, None, 0, 0, None)))


def _round(theta, f, g, h, damping, trial, pause, done, x, y, t, w, delta):
  """_ROUND damped steps of one problem."""
  basis_x, basis_y = jnp.stack([jnp.ones_like(x), x, x * x], 1), jnp.stack(
      [jnp.ones_like(y), y, y * y], 1)
  basis_xy = jnp.stack([jnp.ones_like(x), x, y, x * y], 1)
  tolerance = _TOLERANCE * w.sum() * jnp.minimum(delta, 1.0)

  def step(_, state):
    theta, f, g, h, damping, trial, pause, done = state
    f_new, g_new, h_new = _derivatives(trial, pause == 0, x, y, t, w, delta, basis_x, basis_y,
                                       basis_xy)
    # At the floor of rounding the objective says nothing any more, and the gradient decides.
    level = jnp.isfinite(f) & (jnp.abs(f_new - f) <= 1e-13 * jnp.abs(f))
    better = (f_new < f) & ~level | level & ((g_new**2).sum() <= (g**2).sum())
    better &= jnp.isfinite(f_new) & ~done
    theta, f, g, h = jax.tree.map(lambda new, old: jnp.where(better, new, old),
                                  (trial, f_new, g_new, h_new), (theta, f, g, h))
    damping = jnp.clip(jnp.where(better, damping / 4, damping * 6), 1e-15, 1e12)
    done |= jnp.sqrt((g**2).sum()) <= tolerance
    move, positive = _damped_solve(h, g, damping)
    # No more than a factor of e^3 in a constant, or 0.5 in an exponent, at a time.
    move *= jnp.minimum(1.0, jnp.minimum(3.0 / jnp.abs(move[:3]).max(),
                                         0.5 / jnp.abs(move[3:]).max()))
    # Where Newton's matrix is not positive, look again with Gauss and Newton's, which is, and keep
    # to that for a while: far from an optimum the next one will not be positive either.
    trial = jnp.where(positive, theta - move, theta)
    pause = jnp.where(positive, jnp.maximum(pause - 1, 0), _PAUSE)
    return theta, f, g, h, damping, trial, pause, done

  return jax.lax.fori_loop(0, _ROUND, step, (theta, f, g, h, damping, trial, pause, done))


def _derivatives(theta, newton, x, y, t, w, delta, basis_x, basis_y, basis_xy):
  """Objective, gradient, and second derivatives at one point; all runs at once.

  With softmax weights p of the three terms and residual r, dr = (p1, p2, p3, -x p1, -y p2), and
  the Hessian of LSE is diag(p) - p p'. `newton`: exact second derivatives; else those of
  iteratively reweighted least squares, which bound the Huber loss from above.
  """
  a, b, e, alpha, beta = theta
  # Over the term E; 600 keeps exp finite.
  q1 = jnp.exp(jnp.minimum(a - e - alpha * x, 600.0))
  q2 = jnp.exp(jnp.minimum(b - e - beta * y, 600.0))
  total = 1.0 + q1 + q2
  p3 = 1.0 / total
  p1, p2 = q1 * p3, q2 * p3
  r = e + jnp.log(total) - t
  size = jnp.abs(r)
  inside = size <= delta
  f = (w * jnp.where(inside, 0.5 * r * r, delta * (size - 0.5 * delta))).sum()
  psi = w * jnp.clip(r, -delta, delta)
  irls = w * jnp.minimum(1.0, delta / jnp.maximum(size, 1e-300))
  product = jnp.where(newton, jnp.where(inside, w, 0.0) - psi, irls)
  single = jnp.where(newton, psi, 0.0)
  ga, gb, ge = (psi * p1) @ basis_x[:, :2], (psi * p2) @ basis_y[:, :2], (psi * p3).sum()
  g = jnp.stack([ga[0], gb[0], ge, -ga[1], -gb[1]])
  aa = (product * p1 * p1 + single * p1) @ basis_x
  bb = (product * p2 * p2 + single * p2) @ basis_y
  ab = (product * p1 * p2) @ basis_xy
  ae = (product * p1 * p3) @ basis_x[:, :2]
  be = (product * p2 * p3) @ basis_y[:, :2]
  ee = (product * p3 * p3 + single * p3).sum()
  h = jnp.stack([
      jnp.stack([aa[0], ab[0], ae[0], -aa[1], -ab[2]]),
      jnp.stack([ab[0], bb[0], be[0], -ab[1], -bb[1]]),
      jnp.stack([ae[0], be[0], ee, -ae[1], -be[1]]),
      jnp.stack([-aa[1], -ab[1], -ae[1], aa[2], ab[3]]),
      jnp.stack([-ab[2], -bb[1], -be[1], ab[3], bb[2]])])
  return f, g, h


def _damped_solve(h, g, damping):
  """(H + damping D)^-1 g by Cholesky, unrolled; D is |diag H|, kept from vanishing.

  Returns: (solution, whether the matrix was positive definite).
  """
  diagonal = jnp.abs(jnp.diagonal(h))
  scale = jnp.maximum(diagonal, 1e-6 * diagonal.max() + 1e-300)
  rows, size, positive = [[None] * 5 for _ in range(5)], 5, jnp.array(True)
  for i in range(size):
    for j in range(i + 1):
      value = h[i, j] - sum(rows[i][k] * rows[j][k] for k in range(j))
      if i == j:
        value += damping * scale[i]
        positive &= value > 1e-15 * scale[i]
        rows[i][i] = jnp.sqrt(jnp.maximum(value, 1e-15 * scale[i]))
      else:
        rows[i][j] = value / rows[j][j]
  forward = []
  for i in range(size):
    forward.append((g[i] - sum(rows[i][k] * forward[k] for k in range(i))) / rows[i][i])
  out = [None] * size
  for i in reversed(range(size)):
    out[i] = (forward[i] - sum(rows[k][i] * out[k] for k in range(i + 1, size))) / rows[i][i]
  return jnp.stack(out), positive


def hessians(theta: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_loss: np.ndarray,
             delta: float) -> tuple[np.ndarray, np.ndarray]:
  """Second derivatives of the objective, in (a, b, e, alpha, beta) and with N and D centred."""
  x_mean, y_mean = log_n.mean(), log_d.mean()
  out = []
  for shift in ((0.0, 0.0), (x_mean, y_mean)):
    x, y = log_n - shift[0], log_d - shift[1]
    moved = np.array(theta)
    moved[0] -= theta[3] * shift[0]
    moved[1] -= theta[4] * shift[1]
    with _float64():
      bases = [jnp.asarray(np.stack(columns, 1)) for columns in (
          (np.ones_like(x), x, x * x), (np.ones_like(y), y, y * y),
          (np.ones_like(x), x, y, x * y))]
      out.append(np.asarray(_derivatives(
          jnp.asarray(moved), True, jnp.asarray(x), jnp.asarray(y), jnp.asarray(log_loss),
          jnp.ones(len(x)), jnp.asarray(min(delta, 1e6)), *bases)[2]))
  return out[0], out[1]
