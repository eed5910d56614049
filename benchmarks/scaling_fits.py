"""Times of the three fits, coverage of their intervals, and known traps, on planted laws.

  JAX_PLATFORMS=cpu python benchmarks/scaling_fits.py times
  JAX_PLATFORMS=cpu python benchmarks/scaling_fits.py coverage     a minute of CPU
  JAX_PLATFORMS=cpu python benchmarks/scaling_fits.py parabola
  JAX_PLATFORMS=cpu python benchmarks/scaling_fits.py mean
  JAX_PLATFORMS=cpu python benchmarks/scaling_fits.py ends

Everything is seeded; only times differ from machine to machine.
"""

import argparse
import pathlib
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "scaling"))

import planted  # noqa: E402
from scipy import optimize, special  # noqa: E402

from chinchilla_jax.scaling import (  # noqa: E402
  bootstrap,
  fit_envelope,
  fit_isoflop,
  fit_parametric,
  fit_varpro,
)
from chinchilla_jax.scaling.bootstrap import Resampling  # noqa: E402

LAW = planted.BESIROGLU


def times() -> None:
  """240 runs as in the paper's Figure 4 with 1 % of noise; the second fit has compiled programs."""
  n, d, _, loss = planted.figure_4_runs(LAW, noise=0.01, seed=5)
  for what in ("first", "second"):
    start, cpu = time.perf_counter(), time.process_time()
    found = fit_parametric.fit(n, d, loss)
    print(f"approach 3, {found.starts:,} starts, {what} fit of the process: "
          f"{time.perf_counter() - start:.1f} s, {time.process_time() - cpu:.1f} s of CPU; "
          f"{found.converged:,} converged, {found.at_best:,} at the optimum, gradient norm "
          f"{found.gradient:.1e}")
  weights = bootstrap.weights(np.zeros(len(n)), Resampling())
  start, cpu = time.perf_counter(), time.process_time()
  theta = fit_parametric.resampled(found, n, d, loss, weights)
  print(f"approach 3, 1,000 resamples, 5 starts each: {time.perf_counter() - start:.1f} s, "
        f"{time.process_time() - cpu:.1f} s of CPU; {np.isfinite(theta).all(1).sum():,} converged")
  start = time.perf_counter()
  agreement = fit_varpro.compare(found, n, d, loss)
  print(f"variable projection: {time.perf_counter() - start:.1f} s; largest difference of the five "
        f"parameters {agreement.largest_difference:.1e}; condition numbers "
        f"{found.condition:.1e}, centred {found.condition_centred:.1e}, two dimensions "
        f"{agreement.condition:.1f}")
  n, d, c, loss = planted.isoflop_runs(LAW, sizes=11, spread=5, noise=0.01)
  start = time.perf_counter()
  iso = fit_isoflop.fit(n, d, c, loss)
  fit_isoflop.resampled(iso, n, d, loss,
                        bootstrap.weights(fit_isoflop.budgets(c), Resampling()))
  print(f"approach 2, 99 runs, 1,000 resamples: {time.perf_counter() - start:.2f} s")
  curves = planted.curves(LAW, np.geomspace(7e7, 1e10, 18), np.geomspace(2.5, 160, 12), 400)
  start = time.perf_counter()
  envelope = fit_envelope.fit(curves)
  fit_envelope.resampled(envelope, curves, bootstrap.weights(np.zeros(len(curves)), Resampling()))
  print(f"approach 1, {len(curves)} curves of 400 points, 1,500 FLOP values, 1,000 resamples: "
        f"{time.perf_counter() - start:.1f} s")


def coverage(sets: int = 400, resamples: int = 400) -> None:
  """How often intervals of many noisy data sets contain the truth."""
  rates = {}
  n, d, c, _ = planted.isoflop_runs(LAW, sizes=11, spread=5)
  losses = np.stack([planted.isoflop_runs(LAW, sizes=11, spread=5, noise=0.01, seed=k)[3]
                     for k in range(sets)])
  which, data = np.arange(sets), (np.log(n), np.log(d), np.log(losses))
  whole = fit_parametric.solve(np.tile(planted.theta(LAW), (sets, 1)), *data, np.ones((1, len(n))),
                               which, np.zeros(sets, int))
  weights = bootstrap.weights(np.zeros(len(n)), Resampling(count=resamples))
  found = fit_parametric.solve(
      np.repeat(whole.theta, resamples, 0), *data, weights, np.repeat(which, resamples),
      np.tile(np.arange(resamples), sets))
  theta = np.where(found.converged[:, None], found.theta, np.nan).reshape(sets, resamples, 5)
  rates["approach 3, a"] = ((theta[..., 4] / (theta[..., 3] + theta[..., 4])), LAW.a)
  for i, name in enumerate(("log A", "log B", "log E", "alpha", "beta")):
    rates[f"approach 3, {name}"] = (theta[..., i], planted.theta(LAW)[i])
  for profile in ("parabola", "cubic"):
    rows = []
    for k in range(sets):
      iso = fit_isoflop.fit(n, d, c, losses[k], profile=profile)
      weights = bootstrap.weights(fit_isoflop.budgets(c), Resampling(count=resamples, seed=k))
      rows.append(fit_isoflop.resampled(iso, n, d, losses[k], weights)["a"])
    rates[f"approach 2, {profile}, a"] = (np.array(rows), LAW.a)
  for name, make in (
      ("curves on the law, 40 sizes", lambda k: planted.curves(
          LAW, np.geomspace(2e7, 4e10, 40), (400,), 400, 0.0, 0.003, k)),
      ("20 sizes x 16 lengths, cosine", lambda k: planted.curves(
          LAW, np.geomspace(5e7, 2e10, 20), np.geomspace(2.5, 160, 16), 60, 1.0, 0.003, k))):
    rows = []
    for k in range(sets // 4):
      curves = make(k)
      envelope = fit_envelope.fit(curves, window=0, points=300)
      weights = bootstrap.weights(np.zeros(len(curves)), Resampling(count=resamples, seed=k))
      rows.append(fit_envelope.resampled(envelope, curves, weights, 0)["a"])
    rates[f"approach 1, {name}, a"] = (np.array(rows), LAW.a)
  for name, (samples, truth) in rates.items():
    cells = []
    for confidence in (0.8, 0.95):
      tail = 50 * (1 - confidence)
      low, high = np.nanpercentile(samples, [tail, 100 - tail], axis=1)
      cells.append(f"{100 * ((low <= truth) & (truth <= high)).mean():.0f} % (nominal "
                   f"{100 * confidence:.0f} %, median width {np.median(high - low):.3f})")
    print(f"{name}: {len(samples)} data sets: {'; '.join(cells)}", flush=True)


def parabola() -> None:
  """Approach 2 without noise: error of a, and of N_opt at 1e24 FLOPs, by profile."""
  for law in (LAW, planted.ASYMMETRIC):
    for spread in (2, 4, 8, 16):
      n, d, c, loss = planted.isoflop_runs(law, sizes=15, spread=spread)
      _profile_errors(f"{law.name}, sizes within {spread}x of the optimum", law, n, d, c, loss)
    sizes = {"besiroglu_2024": (8e7, 8e9), "asymmetric": (4e4, 4e6)}[law.name]
    budgets = {"besiroglu_2024": (6e18, 1e19, 3e19, 6e19, 1e20, 3e20),
               "asymmetric": (1e18, 3e18, 1e19, 3e19, 1e20)}[law.name]
    c = np.repeat(budgets, 14)
    n = np.tile(np.geomspace(*sizes, 14), len(budgets))
    d = c / 6 / n
    _profile_errors(f"{law.name}, the same 14 sizes at every budget", law, n, d, c, law.loss(n, d))


def _profile_errors(what: str, law, n, d, c, loss) -> None:
  cells = []
  for profile in fit_isoflop.PROFILES:
    found = fit_isoflop.fit(n, d, c, loss, profile=profile).law
    ratio = found.optimum(1e24)[0] / law.optimum(1e24)[0]
    cells.append(f"{profile} a {found.a - law.a:+.4f}, N {100 * (ratio - 1):+.1f} %")
  print(f"{what}: {'; '.join(cells)}")


def mean() -> None:
  """The objective divided by the number of runs or not, in SciPy's L-BFGS-B as it comes."""
  n, d, _, loss = planted.figure_4_runs(LAW, noise=0.01, seed=5)
  best = fit_parametric.fit(n, d, loss)
  print(f"true optimum: a = {best.law.a:.4f}")

  def objective(theta, divide):
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * np.log(n), b - beta * np.log(d), np.full(len(n), e)])
    residual = special.logsumexp(terms, axis=0) - np.log(loss)
    return special.huber(1e-3, residual).sum() / divide

  for start in ((5, 5, 0, 0.5, 0.5), (10, 10, 0, 0.5, 0.5)):
    for divide, word in ((1, "sum"), (len(n), "mean")):
      out = optimize.minimize(objective, start, args=(divide,), method="L-BFGS-B")
      _, _, _, alpha, beta = out.x
      print(f"{word} from {start}: success {out.success}, objective "
            f"{out.fun * divide / best.objective:.3f} x the least, a = "
            f"{beta / (alpha + beta):.4f}, (a, b) = ({out.x[0]:.2f}, {out.x[1]:.2f})")


def ends() -> None:
  """Approach 1 on noisy curves that lie on the law: with and without the envelope's ends."""
  for noise in (0.003, 0.01):
    without, all_points = [], []
    for seed in range(60):
      curves = planted.curves(LAW, np.geomspace(2e7, 4e10, 40), (400,), 400, 0.0, noise, seed)
      found = fit_envelope.fit(curves, window=0, points=300)
      without.append(found.law.a)
      all_points.append(np.polyfit(np.log(found.flops), np.log(found.params), 1)[0])
    print(f"noise {100 * noise:g} %, 60 data sets: mean error of a {np.mean(without) - LAW.a:+.4f} "
          f"without the ends, {np.mean(all_points) - LAW.a:+.4f} with them")


if __name__ == "__main__":
  measurements = {"times": times, "coverage": coverage, "parabola": parabola, "mean": mean,
                  "ends": ends}
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("what", choices=measurements)
  measurements[parser.parse_args().what]()
