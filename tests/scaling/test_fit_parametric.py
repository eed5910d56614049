"""Approach 3: planted laws, true convergence, two algorithms, resamples and their coverage."""

import functools
import math

import jax
import numpy as np
import planted
import pytest
from scipy import optimize, special

from chinchilla_jax.errors import UserError
from chinchilla_jax.scaling import bootstrap, fit_parametric, fit_varpro, laws
from chinchilla_jax.scaling.bootstrap import Resampling

FEW = fit_parametric.grid()[::37]  # 122 of the 4,500, for what does not need them all


def objective(theta, n, d, loss, delta=1e-3) -> float:
  """The paper's, written as it is printed."""
  a, b, e, alpha, beta = theta
  terms = np.stack([a - alpha * np.log(n), b - beta * np.log(d), np.full(len(n), e)])
  return special.huber(delta, special.logsumexp(terms, axis=0) - np.log(loss)).sum()


def test_the_grid_is_the_papers():
  grid = fit_parametric.grid()
  assert grid.shape == (4500, 5) and len(np.unique(grid, axis=0)) == 4500
  axes = [np.unique(column).tolist() for column in grid.T]
  assert axes == [[0, 5, 10, 15, 20, 25]] * 2 + [[-1, -0.5, 0, 0.5, 1]] + [[0, 0.5, 1, 1.5, 2]] * 2


@pytest.fixture(scope="module")
def noisy():
  """240 runs on Besiroglu's law with 1 % of noise, and the fit from the whole grid."""
  n, d, _, loss = planted.figure_4_runs(planted.BESIROGLU, noise=0.01, seed=5)
  return n, d, loss, fit_parametric.fit(n, d, loss)


def test_the_whole_grid_to_true_convergence(noisy):
  n, d, loss, found = noisy
  assert found.starts == 4500
  # The gradient's scale is sum of delta |dr/dtheta|, about 240 x 1e-3 x 20.
  assert found.gradient < 1e-12
  assert found.at_best > 3000 and found.converged >= found.at_best
  assert found.objective == pytest.approx(objective(found.theta, n, d, loss), rel=1e-12)
  numerical = optimize.approx_fprime(np.array(found.theta), objective, 1e-7, n, d, loss)
  assert np.abs(numerical).max() < 1e-4


def test_no_neighbour_is_better(noisy):
  n, d, loss, found = noisy
  rng = np.random.default_rng(0)
  scale = np.array([0.1, 0.1, 0.01, 0.01, 0.01])
  for size in (1e-6, 1e-3, 1.0):
    for _ in range(50):
      theta = np.array(found.theta) + size * scale * rng.standard_normal(5)
      assert objective(theta, n, d, loss) >= found.objective * (1 - 1e-14)


def test_lbfgs_of_another_library_finds_nothing_better(noisy):
  n, d, loss, found = noisy
  for start in ((5, 5, 0, 0.5, 0.5), (10, 10, 0.5, 0.5, 0.5), (5, 10, -0.5, 0.5, 1.0)):
    other = optimize.minimize(objective, start, args=(n, d, loss), method="L-BFGS-B",
                              options={"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-12})
    assert other.fun >= found.objective * (1 - 1e-12)


def test_the_mean_instead_of_the_sum_stops_early(noisy):
  """What happened to the published fit: the same optimiser, its tolerances, and the mean.

  Where one run stops depends on the processor's last bits, so there are nine. Some of the sum's
  arrive; none of the mean's does.
  """
  n, d, loss, found = noisy
  starts = [(a, b, 0, 0.5, 0.5) for a in (0, 5, 10) for b in (0, 5, 10)]
  run = lambda divide: [optimize.minimize(
      lambda theta: objective(theta, n, d, loss) / divide, start, method="L-BFGS-B")
                        for start in starts]
  means, sums = run(len(n)), run(1)
  assert min(total.fun for total in sums) < 1.05 * found.objective
  assert min(mean.fun for mean in means) * len(n) > 1.2 * found.objective
  # From the middle, it says that it is done, and has hardly moved a and b.
  middle = means[4]
  assert middle.success and middle.x[:2] == pytest.approx([5, 5], abs=0.05)


@pytest.mark.parametrize("law", [planted.BESIROGLU, laws.PUBLISHED["approach_3_tex"],
                                 planted.SYMMETRIC, planted.ASYMMETRIC], ids=lambda law: law.name)
def test_planted_laws_without_noise(law):
  n, d, _, loss = planted.isoflop_runs(law, sizes=7, spread=6)
  found = fit_parametric.fit(n, d, loss, starts=FEW)
  assert np.array(found.theta) == pytest.approx(planted.theta(law), rel=1e-8)
  assert found.law.optimum(1e24) == pytest.approx(law.optimum(1e24), rel=1e-7)
  assert found.gradient < 1e-13 and found.rms < 1e-12


@pytest.mark.parametrize("delta", [1e-3, 1e-2, math.inf])
def test_variable_projection_agrees(noisy, delta):
  n, d, loss, _ = noisy
  found = fit_parametric.fit(n, d, loss, starts=FEW, delta=delta)
  agreement = fit_varpro.compare(found, n, d, loss)
  assert agreement.largest_difference < 1e-7
  assert agreement.objective_difference < 1e-11
  # Two well-scaled dimensions instead of five.
  assert agreement.condition < 20 < found.condition_centred < found.condition


def test_variable_projection_agrees_without_noise():
  n, d, _, loss = planted.isoflop_runs(planted.BESIROGLU, sizes=5)
  found = fit_parametric.fit(n, d, loss, starts=FEW)
  agreement = fit_varpro.compare(found, n, d, loss)
  assert agreement.largest_difference < 1e-9 and agreement.objective_difference == 0


def test_the_order_of_runs_does_not_matter(noisy):
  n, d, loss, found = noisy
  order = np.random.default_rng(1).permutation(len(n))
  again = fit_parametric.fit(n[order], d[order], loss[order], starts=FEW)
  assert again.theta == pytest.approx(found.theta, rel=1e-9)


def test_units_do_not_matter(noisy):
  """N in millions and D in billions: the same exponents and predictions, other constants."""
  n, d, loss, found = noisy
  again = fit_parametric.fit(n / 1e6, d / 1e9, loss, starts=FEW)
  assert again.theta[2:] == pytest.approx(found.theta[2:], rel=1e-9)
  assert again.law.A == pytest.approx(found.law.A / 1e6**found.law.alpha, rel=1e-8)
  assert again.law.loss(70e3, 1.4e3) == pytest.approx(found.law.loss(70e9, 1.4e12), rel=1e-10)


def test_the_same_bits_twice(noisy):
  n, d, loss, _ = noisy
  first, second = (fit_parametric.fit(n, d, loss, starts=FEW) for _ in range(2))
  assert first == second


def test_training_keeps_its_precision(noisy):
  n, d, loss, _ = noisy
  fit_parametric.fit(n, d, loss, starts=FEW[:3])
  assert not jax.config.jax_enable_x64
  assert jax.numpy.ones(2).dtype == np.float32


def test_outliers_pull_little():
  """What the Huber loss is for: two runs of ruined loss against least squares of logs."""
  n, d, _, loss = planted.figure_4_runs(planted.BESIROGLU, count=80, noise=0.002, seed=2)
  loss[[3, 40]] *= 1.3
  truth = planted.BESIROGLU.a
  huber, squares = (fit_parametric.fit(n, d, loss, starts=FEW, delta=delta).law.a
                    for delta in (1e-3, math.inf))
  assert abs(huber - truth) < 0.02 and abs(huber - truth) < abs(squares - truth) / 2


def test_a_resample_of_weights_is_a_fit_of_repeated_runs(noisy):
  n, d, loss, found = noisy
  weights = bootstrap.weights(np.zeros(len(n)), Resampling(count=20, seed=4))
  theta = fit_parametric.resampled(found, n, d, loss, weights)
  rows = np.repeat(np.arange(len(n)), weights[7].astype(int))
  alone = fit_parametric.fit(n[rows], d[rows], loss[rows], starts=FEW)
  assert theta[7] == pytest.approx(alone.theta, rel=1e-7)


def test_a_thousand_resamples_all_converge(noisy):
  n, d, loss, found = noisy
  weights = bootstrap.weights(np.zeros(len(n)), Resampling(count=1000))
  theta = fit_parametric.resampled(found, n, d, loss, weights)
  assert theta.shape == (1000, 5) and np.isfinite(theta).all()
  low, high = np.percentile(theta, [2.5, 97.5], axis=0)
  truth = planted.theta(planted.BESIROGLU)
  assert ((low < truth) & (truth < high)).all()


@functools.cache
def resamples_of_many(sets: int, count: int) -> np.ndarray:
  """(data sets, resamples, 5): optima of resamples of each of many noisy data sets."""
  law = planted.BESIROGLU
  n, d, _, _ = planted.isoflop_runs(law, sizes=11, spread=5)
  losses = np.stack([planted.isoflop_runs(law, sizes=11, spread=5, noise=0.01, seed=100 + k)[3]
                     for k in range(sets)])
  which, args = np.arange(sets), (np.log(n), np.log(d), np.log(losses))
  whole = fit_parametric.solve(np.tile(planted.theta(law), (sets, 1)), *args, np.ones((1, len(n))),
                               which, np.zeros(sets, int))
  assert whole.converged.all()
  weights = bootstrap.weights(np.zeros(len(n)), Resampling(count=count, seed=9))
  found = fit_parametric.solve(np.repeat(whole.theta, count, 0), *args, weights,
                               np.repeat(which, count), np.tile(np.arange(count), sets))
  assert found.converged.mean() > 0.999
  return np.where(found.converged[:, None], found.theta, np.nan).reshape(sets, count, 5)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_intervals_cover_the_truth_at_their_rate(confidence):
  """100 data sets of 99 runs with 1 % of noise, 200 resamples each."""
  theta = resamples_of_many(100, 200)
  truth = planted.theta(planted.BESIROGLU)
  tail = 50 * (1 - confidence)
  a = theta[..., 4] / (theta[..., 3] + theta[..., 4])
  for values, true in [*((theta[..., i], truth[i]) for i in range(5)), (a, planted.BESIROGLU.a)]:
    low, high = np.nanpercentile(values, [tail, 100 - tail], axis=1)
    rate = ((low <= true) & (true <= high)).mean()
    # Three standard errors of a rate over 100 data sets below; above, no more than everything.
    assert rate > confidence - 3 * math.sqrt(confidence * (1 - confidence) / 100)
    # And not by being endless: the interval of a is under 0.2 wide.
  low, high = np.nanpercentile(a, [tail, 100 - tail], axis=1)
  assert np.median(high - low) < 0.2


@pytest.mark.parametrize("cut, says", [
    (lambda n, d, loss: (n[:5], d[:5], loss[:5]), "5 runs are too few for its 5 parameters"),
    (lambda n, d, loss: (np.full(len(n), 1e9), d, loss), "1 different model sizes"),
    (lambda n, d, loss: (n, np.where(d > 1e10, 1e9, 2e9), loss), "2 different numbers of tokens"),
    (lambda n, d, loss: (n, d, np.sqrt(n) * d**0.1), "and is no law: the losses do not fall")])
def test_runs_that_cannot_be_fitted(noisy, cut, says):
  n, d, loss, _ = noisy
  with pytest.raises(UserError, match=says):
    fit_parametric.fit(*cut(n, d, loss), starts=FEW[:40])
