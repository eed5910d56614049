"""Approach 2: planted laws, the bias of parabolas, budgets, minima that are not there."""

import numpy as np
import planted
import pytest

from chinchilla_jax.errors import UserError
from chinchilla_jax.scaling import bootstrap, fit_isoflop
from chinchilla_jax.scaling.bootstrap import Resampling

PROFILES = tuple(fit_isoflop.PROFILES)


def test_a_symmetric_law_is_recovered_exactly():
  law = planted.SYMMETRIC
  found = fit_isoflop.fit(*planted.isoflop_runs(law, spread=8))
  assert found.law.a == pytest.approx(0.5, abs=1e-12)
  assert found.law.b == pytest.approx(0.5, abs=1e-12)
  assert found.law.optimum(1e24) == pytest.approx(law.optimum(1e24), rel=1e-10)
  for profile in found.profiles:
    best = law.at(profile.flops)
    assert (profile.n_opt, profile.d_opt) == pytest.approx((best.params, best.tokens), rel=1e-10)
    assert not profile.outside
  assert not found.warnings and not found.alone


@pytest.mark.parametrize("law", [planted.BESIROGLU, planted.ASYMMETRIC], ids=lambda law: law.name)
def test_exponents_are_exact_and_constants_nearly_where_sizes_are_centred(law):
  """The same sizes about every optimum shift every minimum by the same factor."""
  shift = {}
  for kind in PROFILES:
    found = fit_isoflop.fit(*planted.isoflop_runs(law, sizes=15, spread=8), profile=kind)
    assert found.law.a == pytest.approx(law.a, abs=1e-9)
    assert found.law.b == pytest.approx(law.b, abs=1e-9)
    shift[kind] = abs(np.log(found.law.optimum(1e24)[0] / law.optimum(1e24)[0]))
  assert shift["cubic"] < 0.2 * shift["parabola"]
  assert shift["akima"] < 0.2 * shift["parabola"]
  assert shift["parabola"] < 0.2


def test_a_parabola_is_biased_where_sizes_are_not_centred():
  """The same sizes at every budget, as people sample: without noise (Czech et al. 2026)."""
  law, rows = planted.ASYMMETRIC, []
  sizes = np.geomspace(4e4, 4e6, 14)
  for budget in (1e18, 3e18, 1e19, 3e19, 1e20):
    rows += [(n, budget / 6 / n, budget) for n in sizes]
  n, d, c = np.array(rows).T
  error = {kind: abs(fit_isoflop.fit(n, d, c, law.loss(n, d), profile=kind).law.a - law.a)
           for kind in PROFILES}
  assert error["parabola"] > 0.01
  assert error["cubic"] < error["parabola"] / 2 and error["akima"] < error["parabola"] / 2


@pytest.mark.parametrize("kind", PROFILES)
def test_order_and_units_do_not_matter(kind):
  n, d, c, loss = planted.isoflop_runs(planted.BESIROGLU, noise=0.003, seed=1)
  first = fit_isoflop.fit(n, d, c, loss, profile=kind).law
  order = np.random.default_rng(3).permutation(len(n))
  second = fit_isoflop.fit(n[order], d[order], c[order], loss[order], profile=kind).law
  millions = fit_isoflop.fit(n / 1e6, d, c, loss, profile=kind).law
  assert (second.k_n, second.a, second.k_d, second.b) == pytest.approx(
      (first.k_n, first.a, first.k_d, first.b), rel=1e-9)
  assert (1e6 * millions.k_n, millions.a) == pytest.approx((first.k_n, first.a), rel=1e-9)


def test_n_and_d_spend_the_budget():
  """With C = 6ND, the parabola in log D is that in log N, mirrored."""
  n, d, c, loss = planted.isoflop_runs(planted.BESIROGLU, noise=0.01, seed=2)
  found = fit_isoflop.fit(n, d, c, loss)
  assert found.law.a + found.law.b == pytest.approx(1, abs=1e-9)
  for profile in found.profiles:
    assert 6 * profile.n_opt * profile.d_opt == pytest.approx(profile.flops, rel=1e-9)


def test_the_loss_of_the_minima():
  law = planted.SYMMETRIC
  found = fit_isoflop.fit(*planted.isoflop_runs(law, spread=1.5, sizes=5))
  for profile in found.profiles:
    assert profile.loss == pytest.approx(law.at(profile.flops).loss, rel=1e-5)
  predicted = found.loss_constant * 1e20**-found.loss_exponent
  assert predicted == pytest.approx(law.at(1e20).loss, rel=0.02) and found.loss_exponent > 0


def test_budgets_are_told_apart():
  # Whole steps: FLOPs of one budget differ by a few per cent.
  c = np.array([1.02e18, 3e18, 0.99e18, 1e18, 3.1e18])
  assert fit_isoflop.budgets(c).tolist() == [0, 1, 0, 0, 1]
  with pytest.raises(UserError, match="lie too close to each other to be told apart as budgets"):
    fit_isoflop.budgets(np.geomspace(1e18, 1e19, 40))
  assert fit_isoflop.budgets(np.geomspace(1e18, 1e19, 40), 0.01).tolist() == list(range(40))


@pytest.mark.parametrize("kind", PROFILES)
def test_a_minimum_outside_the_sizes_is_named(kind):
  law = planted.BESIROGLU
  n, d, c, loss = planted.isoflop_runs(law, budgets=(1e18, 1e19, 1e20, 1e21), sizes=8)
  # Of the last budget, only the sizes below the optimum.
  small = (c != 1e21) | (n < 0.8 * law.optimum(1e21)[0])
  n = np.where(small, n, n / 8)
  d = c / 6 / n
  found = fit_isoflop.fit(n, d, c, law.loss(n, d), profile=kind)
  (warning,) = found.warnings
  assert "budget 1e+21 FLOPs" in warning
  assert ("outside the sampled sizes" in warning and "train larger models" in warning
          or "no minimum between the sizes" in warning)
  assert [profile.outside for profile in found.profiles] == [False, False, False, True]


def test_runs_in_no_profile_are_counted():
  n, d, c, loss = planted.isoflop_runs(planted.BESIROGLU)
  more = (np.append(n, [1e9, 1e9]), np.append(d, [5e9, 7e9]), np.append(c, [3e19, 4.2e19]),
          np.append(loss, [3.0, 2.9]))
  found = fit_isoflop.fit(*more)
  assert found.alone == (len(n) + 1,)
  assert "1 runs are in no profile" in found.warnings[0]


@pytest.mark.parametrize("make, says", [
    (lambda n, d, c, loss: (n[:9], d[:9], c[:9], loss[:9]), "the runs have 1 budget with at least"),
    (lambda n, d, c, loss: (n, d, c, -loss + 10), "the runs have 0 budgets"),
    (lambda n, d, c, loss: (n[::5], d[::5], c[::5], loss[::5]), "0 budgets with at least 3 sizes")])
def test_runs_that_cannot_be_fitted(make, says):
  runs = planted.isoflop_runs(planted.BESIROGLU)
  with pytest.raises(UserError, match=says):
    fit_isoflop.fit(*make(*runs))


def test_an_unknown_profile():
  with pytest.raises(UserError, match="got 'spline'; one of: parabola, cubic, akima"):
    fit_isoflop.fit(*planted.isoflop_runs(planted.BESIROGLU), profile="spline")


@pytest.mark.parametrize("kind", PROFILES)
def test_resamples_are_fits_of_repeated_runs(kind):
  n, d, c, loss = planted.isoflop_runs(planted.BESIROGLU, sizes=12, noise=0.002, seed=4)
  found = fit_isoflop.fit(n, d, c, loss, profile=kind)
  weights = bootstrap.weights(fit_isoflop.budgets(c), Resampling(count=20, seed=4))
  samples = fit_isoflop.resampled(found, n, d, loss, weights)
  one = fit_isoflop.resampled(found, n, d, loss, np.ones((1, len(n))))
  assert (one["a"][0], np.exp(one["log_k_n"][0])) == pytest.approx(
      (found.law.a, found.law.k_n), rel=1e-9)
  rows = np.repeat(np.arange(len(n)), weights[3].astype(int))
  alone = fit_isoflop.fit(n[rows], d[rows], c[rows], loss[rows], profile=kind).law
  # The middle of a budget is that of all its runs here, and they are equal to rounding.
  assert (samples["a"][3], samples["b"][3]) == pytest.approx((alone.a, alone.b), rel=1e-7)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_intervals_cover_the_truth_at_their_rate(confidence):
  law, hits = planted.BESIROGLU, 0
  for seed in range(150):
    n, d, c, loss = planted.isoflop_runs(law, sizes=11, spread=5, noise=0.005, seed=seed)
    found = fit_isoflop.fit(n, d, c, loss, profile="cubic")
    weights = bootstrap.weights(fit_isoflop.budgets(c), Resampling(count=200, seed=seed))
    low, high = bootstrap.interval(fit_isoflop.resampled(found, n, d, loss, weights)["a"],
                                   confidence)
    hits += low <= law.a <= high
    assert high - low < 0.3
  assert hits / 150 > confidence - 3 * np.sqrt(confidence * (1 - confidence) / 150)
