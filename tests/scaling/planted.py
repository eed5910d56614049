"""Synthetic runs that follow a known law."""

import csv
import pathlib

import numpy as np

from chinchilla_jax.scaling import laws, paper_tables
from chinchilla_jax.scaling.fit_envelope import TrainingCurve
from chinchilla_jax.scaling.laws import ParametricLaw

BESIROGLU = laws.PUBLISHED["besiroglu_2024"]
# alpha = beta, so that an IsoFLOP profile is symmetric about its minimum in log N.
SYMMETRIC = ParametricLaw("symmetric", 1.7, 500.0, 1500.0, 0.35, 0.35)
# Exponents 3:1 apart, the "asymmetric" surface of Czech et al. 2026.
ASYMMETRIC = ParametricLaw("asymmetric", 1.69, 400.0, 400.0, 0.465, 0.155)


def theta(law: ParametricLaw) -> np.ndarray:
  """(a, b, e, alpha, beta) of a law."""
  return np.array([np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta])


def isoflop_runs(law: ParametricLaw, budgets=paper_tables.ISOFLOP_BUDGETS, sizes: int = 9,
                 spread: float = 4.0, noise: float = 0.0, seed: int = 0):
  """(N, D, C, L): `sizes` sizes at each budget, from optimum / spread to optimum x spread.

  noise: standard deviation of log L.
  """
  rng = np.random.default_rng(seed)
  c = np.repeat(np.array(budgets, np.float64), sizes)
  best, _ = law.optimum(c)
  n = best * np.tile(np.geomspace(1 / spread, spread, sizes), len(budgets))
  d = c / (6 * n)
  return n, d, c, law.loss(n, d) * np.exp(noise * rng.standard_normal(len(n)))


def figure_4_runs(law: ParametricLaw, count: int = 240, noise: float = 0.0, seed: int = 0):
  """(N, D, C, L) of `count` runs spread as those of the paper's Figure 4."""
  rng = np.random.default_rng(seed)
  c = np.resize(np.array(paper_tables.ISOFLOP_BUDGETS), count)
  best, _ = law.optimum(c)
  n = best * np.exp(rng.uniform(-1.8, 1.8, count))
  d = c / (6 * n)
  return n, d, c, law.loss(n, d) * np.exp(noise * rng.standard_normal(count))


def curves(law: ParametricLaw, sizes, tokens_per_param=(5, 10, 20, 40, 80), points: int = 60,
           penalty: float = 1.0, noise: float = 0.0, seed: int = 0) -> list[TrainingCurve]:
  """Curves of cosine runs, each above the law until its learning rate has decayed.

  penalty: what is added at the full rate, in units of the law's B / D^beta. noise: of log L.
  """
  rng = np.random.default_rng(seed)
  out = []
  for n in sizes:
    for ratio in tokens_per_param:
      total = ratio * n
      d = total * np.linspace(1 / points, 1, points)
      rate = (1 + np.cos(np.pi * d / total)) / 2
      loss = law.loss(n, d) + penalty * rate * law.B / d**law.beta
      loss = loss * np.exp(noise * rng.standard_normal(points))
      out.append(TrainingCurve(f"n{n:.3g}_r{ratio:.3g}", float(n), d, 6 * n * d, loss,
                               float(total)))
  return out


def write_csv(path: pathlib.Path, n, d, c, loss, **more) -> pathlib.Path:
  """A table with the columns params, tokens, flops, loss, and more."""
  columns = {"params": n, "tokens": d, "flops": c, "loss": loss, **more}
  with open(path, "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(columns)
    writer.writerows(zip(*([value if isinstance(value, str) else repr(float(value))
                            for value in column] for column in columns.values()), strict=True))
  return path
