"""Approach 3 by variable projection: the same objective, another algorithm, as a check.

For given exponents the law is linear in (E, A, B), so these three are solved for, and what is left
is a search in two dimensions (Czech et al. 2026, arXiv 2603.22339, who do this for squared errors
of L). Here the objective stays that of `fit_parametric`, the sum of Huber losses of log L: the
inner problem is linear least squares, reweighted until its gradient vanishes; by the envelope
theorem the gradient of the outer one is that of the objective at fixed (E, A, B).

Nothing but the data is shared with `fit_parametric`: no start, no code, no parametrisation. The
two must find the same optimum, and `Agreement` says how well they do.
"""

import dataclasses
import math

import numpy as np
from scipy import optimize

from chinchilla_jax.scaling.fit_parametric import ParametricFit, hessians

ALPHAS = np.linspace(0.05, 2.0, 40)  # of the first look, and of beta


@dataclasses.dataclass(frozen=True)
class Agreement:
  """Variable projection beside the fit from the grid of starts.

  Attributes:
    theta: (a, b, e, alpha, beta) of variable projection.
    objective: sum of Huber losses there.
    largest_difference: over the five parameters, absolute.
    objective_difference: of the two objectives, over that of the grid (0 if both are 0).
    condition: condition number of the outer problem's Hessian, in (alpha, beta), at the optimum.
  """

  theta: tuple[float, ...]
  objective: float
  largest_difference: float
  objective_difference: float
  condition: float


def compare(fitted: ParametricFit, n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> Agreement:
  """Fits again by variable projection and compares."""
  theta, objective = fit(n, d, loss, fitted.delta)
  difference = float(np.abs(theta - fitted.theta).max())
  relative = abs(objective - fitted.objective) / max(objective, fitted.objective, 1e-300)
  _, h = hessians(np.asarray(fitted.theta), np.log(n), np.log(d), np.log(loss), fitted.delta)
  outer = h[3:, 3:] - h[3:, :3] @ np.linalg.solve(h[:3, :3], h[:3, 3:])
  # Where both are 0 to rounding (losses without noise), their ratio says nothing.
  if max(objective, fitted.objective) < 1e-24 * len(n):
    relative = 0.0
  return Agreement(tuple(map(float, theta)), float(objective), difference, float(relative),
                   float(np.linalg.cond(outer)))


def fit(n: np.ndarray, d: np.ndarray, loss: np.ndarray,
        delta: float) -> tuple[np.ndarray, float]:
  """Returns (a, b, e, alpha, beta) and the sum of Huber losses at the optimum."""
  x_mean, y_mean = np.log(n).mean(), np.log(d).mean()
  problem = _Problem(np.log(n) - x_mean, np.log(d) - y_mean, np.log(loss), min(delta, 1e6))
  looks = [(problem.inner(alpha, beta, 40)[1], alpha, beta)
           for alpha in ALPHAS[::3] for beta in ALPHAS[::3]]
  best = min(looks)
  step = (ALPHAS[1] - ALPHAS[0]) * 1.5
  looks = [(problem.inner(alpha, beta, 80)[1], alpha, beta)
           for alpha in best[1] + np.arange(-2, 3) * step / 2 if alpha > 0
           for beta in best[2] + np.arange(-2, 3) * step / 2 if beta > 0]
  start = np.log(min(looks)[1:])
  # In logarithms, so that exponents stay positive; scaled, so that tolerances mean something.
  scale = max(min(looks)[0], 1e-30)
  found = optimize.minimize(lambda z: problem.outer(z, scale), start, jac=True, method="BFGS",
                            options={"gtol": 1e-13, "maxiter": 300})
  theta_z = _newton(problem, found.x, scale)
  alpha, beta = np.exp(theta_z)
  coefficients, objective = problem.inner(alpha, beta, 400)
  with np.errstate(divide="ignore"):
    e, a, b = np.log(coefficients)
  return np.array([a + alpha * x_mean, b + beta * y_mean, e, alpha, beta]), objective


def _newton(problem: "_Problem", z: np.ndarray, scale: float) -> np.ndarray:
  """A few Newton steps on the outer problem, with differences of its exact gradient."""
  gradient = problem.outer(z, scale)[1]
  for _ in range(20):
    h = 1e-5
    columns = [(problem.outer(z + h * unit, scale)[1] - problem.outer(z - h * unit, scale)[1])
               / (2 * h) for unit in np.eye(2)]
    hessian = (np.array(columns) + np.array(columns).T) / 2
    if not np.isfinite(hessian).all() or np.linalg.eigvalsh(hessian)[0] <= 0:
      break
    moved = z - np.linalg.solve(hessian, gradient)
    new_gradient = problem.outer(moved, scale)[1]
    if not np.linalg.norm(new_gradient) < 0.9 * np.linalg.norm(gradient):
      break
    z, gradient = moved, new_gradient
  return z


class _Problem:
  """Runs with log N and log D centred, and the objective at given exponents."""

  def __init__(self, x: np.ndarray, y: np.ndarray, log_loss: np.ndarray, delta: float):
    self.x, self.y, self.t, self.delta = x, y, log_loss, delta

  def _objective(self, prediction: np.ndarray) -> float:
    size = np.abs(np.log(prediction) - self.t)
    return math.fsum(np.where(size <= self.delta, size**2 / 2,
                              self.delta * (size - self.delta / 2)))

  def inner(self, alpha: float, beta: float, steps: int) -> tuple[np.ndarray, float]:
    """((E, A, B) for centred N and D, objective) of the best law with these exponents."""
    columns = np.stack([np.ones_like(self.x), np.exp(-alpha * self.x),
                        np.exp(-beta * self.y)], 1)
    # Squared relative errors, all constants at least 0: where to begin.
    weights = np.exp(-self.t)
    c, _ = optimize.nnls(columns * weights[:, None], np.ones(len(self.t)))
    c = np.maximum(c, 1e-6 * np.exp(self.t.mean()))
    prediction = columns @ c
    objective, damping = self._objective(prediction), 0.0
    for step in range(steps):
      residual = np.log(prediction) - self.t
      psi = np.clip(residual, -self.delta, self.delta)
      design = columns / prediction[:, None]
      gradient = design.T @ psi
      reweighted = np.minimum(1.0, self.delta / np.maximum(np.abs(residual), 1e-300))
      exact = (np.abs(residual) <= self.delta) - psi
      move = None
      for curvature in (exact, reweighted) if step >= 5 else (reweighted,):
        # In logarithms of the constants the scale of each is 1.
        matrix = (design * curvature[:, None]).T @ design * np.outer(c, c)
        matrix[np.diag_indices(3)] += damping * np.abs(np.diag(matrix)) + 1e-300
        try:
          factor = np.linalg.cholesky(matrix)
        except np.linalg.LinAlgError:
          continue
        move = c * np.linalg.solve(factor.T, np.linalg.solve(factor, gradient * c))
        break
      if move is None:
        damping = max(10 * damping, 1e-6)
        continue
      share = min(1.0, 0.9 / max((move / c).max(), 1e-300))
      new = c - share * move
      new_prediction = columns @ new
      new_objective = self._objective(new_prediction)
      if new_objective <= objective:
        small = np.abs(share * move / c).max() < 1e-15
        c, prediction, objective, damping = new, new_prediction, new_objective, damping / 10
        if small:
          break
      elif np.abs(move / c).max() < 1e-13:
        break
      else:
        damping = max(10 * damping, 1e-6)
    return c, objective

  def outer(self, z: np.ndarray, scale: float) -> tuple[float, np.ndarray]:
    """Objective over `scale` at exponents exp(z), constants solved for, and its gradient in z."""
    alpha, beta = np.exp(np.clip(z, -20, 3))
    c, objective = self.inner(alpha, beta, 200)
    terms = c[1] * np.exp(-alpha * self.x), c[2] * np.exp(-beta * self.y)
    prediction = c[0] + terms[0] + terms[1]
    psi = np.clip(np.log(prediction) - self.t, -self.delta, self.delta) / prediction
    gradient = np.array([-alpha * (psi * terms[0] * self.x).sum(),
                         -beta * (psi * terms[1] * self.y).sum()])
    return objective / scale, gradient / scale
