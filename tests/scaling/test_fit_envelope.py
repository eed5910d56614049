"""Approach 1: planted laws, where the envelope's ends are, and what noise does to it."""

import dataclasses

import numpy as np
import planted
import pytest

from chinchilla_jax.errors import UserError
from chinchilla_jax.scaling import bootstrap, fit_envelope
from chinchilla_jax.scaling.bootstrap import Resampling

LAW = planted.BESIROGLU


def on_the_law(sizes: int, noise: float = 0.0, seed: int = 0, points: int = 400):
  """Curves that are the law itself, all along: what approach 1 assumes, to perfection."""
  return planted.curves(LAW, np.geomspace(2e7, 4e10, sizes), (400,), points, 0.0, noise, seed)


def test_the_law_is_recovered_as_sizes_get_dense():
  error = []
  for sizes in (20, 40, 160):
    found = fit_envelope.fit(on_the_law(sizes, points=4000), window=0)
    error.append(abs(found.law.a - LAW.a))
    assert found.law.a + found.law.b == pytest.approx(1, abs=1e-9)
  assert error[0] < 3e-3 and error[1] < 5e-4 and error[2] < 1e-4
  assert found.law.optimum(1e21)[0] == pytest.approx(LAW.optimum(1e21)[0], rel=1e-3)


def test_the_envelope_is_below_every_curve():
  curves = planted.curves(LAW, np.geomspace(5e7, 5e9, 10), noise=0.003, seed=1)
  found = fit_envelope.fit(curves)
  assert len(found.flops) == 1500
  for curve in curves:
    inside = (found.flops >= curve.flops[0]) & (found.flops <= curve.flops[-1])
    at = np.interp(np.log(found.flops[inside]), np.log(curve.flops), curve.smoothed())
    assert (found.loss[inside] <= at + 1e-12).all()
  assert found.params == pytest.approx([curves[i].params for i in found.chosen])
  assert 6 * found.params * found.tokens == pytest.approx(found.flops, rel=1e-9)


def test_the_share_in_the_last_15_percent():
  many = np.geomspace(2.5, 160, 16)
  good = fit_envelope.fit(planted.curves(LAW, np.geomspace(5e7, 2e10, 20), many), window=0)
  assert good.share_in_last > 0.95 and not any("last 15 %" in w for w in good.warnings)
  assert good.law.a == pytest.approx(LAW.a, abs=0.02)
  # One long horizon a size: the envelope is made of learning rates that have not decayed.
  bad = fit_envelope.fit(planted.curves(LAW, np.geomspace(5e7, 2e10, 20), (160,)), window=0)
  assert bad.share_in_last < 0.5 and any("last 15 %" in w for w in bad.warnings)


def test_ends_where_the_best_size_may_lie_beyond_are_left_out():
  curves = planted.curves(LAW, np.geomspace(5e7, 2e10, 20), np.geomspace(2.5, 160, 16), noise=0.003)
  found = fit_envelope.fit(curves, window=0)
  chosen = found.params[found.kept]
  assert chosen.min() > 5.1e7 and chosen.max() < 1.9e10
  assert 0.2 < found.kept.mean() < 0.95
  # With them, the staircase's first and last steps pull the exponent down.
  log_c, log_n = np.log(found.flops), np.log(found.params)
  with_ends = np.polyfit(log_c, log_n, 1)[0]
  assert abs(found.law.a - LAW.a) < 0.5 * abs(with_ends - LAW.a)


def test_two_sizes_are_fitted_with_a_warning():
  curves = planted.curves(LAW, (1e8, 1e9), np.geomspace(1, 300, 12))
  found = fit_envelope.fit(curves, window=0)
  assert found.kept.all()
  assert "fewer than two sizes between" in found.warnings[0]


def test_smoothing():
  rng = np.random.default_rng(0)
  line = np.linspace(3, 2, 200)
  assert fit_envelope.smooth(np.full(50, 2.5)) == pytest.approx(np.full(50, 2.5), rel=1e-14)
  assert fit_envelope.smooth(line)[10:-10] == pytest.approx(line[10:-10], rel=1e-12)
  noise = 0.01 * rng.standard_normal(20000)
  # Of independent noise, what the sum of squares of the kernel says: about a third is left.
  assert 0.25 < fit_envelope.smooth(2 + noise).std() / noise.std() < 0.4
  assert fit_envelope.smooth(line, 1).tolist() == line.tolist()
  assert fit_envelope.smooth(line[:3]).shape == (3,)
  # A window of 10 steps on a curve with every 4th step is 2.5 points.
  curve = dataclasses.replace(on_the_law(1)[0], steps_per_point=4.0)
  assert curve.smoothed(10).tolist() == fit_envelope.smooth(curve.loss, 2.5).tolist()


def test_order_and_units_do_not_matter():
  curves = planted.curves(LAW, np.geomspace(5e7, 5e9, 10), noise=0.003, seed=1)
  first = fit_envelope.fit(curves).law
  second = fit_envelope.fit(curves[::-1]).law
  assert (second.k_n, second.a) == pytest.approx((first.k_n, first.a), rel=1e-12)
  millions = fit_envelope.fit([dataclasses.replace(c, params=c.params / 1e6) for c in curves]).law
  assert (1e6 * millions.k_n, millions.a) == pytest.approx((first.k_n, first.a), rel=1e-9)


def test_a_resample_is_the_envelope_of_the_drawn_runs():
  curves = planted.curves(LAW, np.geomspace(5e7, 2e10, 20), np.geomspace(2.5, 160, 16), noise=0.003)
  found = fit_envelope.fit(curves, points=300)
  weights = bootstrap.weights(np.zeros(len(curves)), Resampling(count=20, seed=4))
  samples = fit_envelope.resampled(found, curves, np.concatenate([np.ones((1, len(curves))),
                                                                   weights]))
  assert (samples["a"][0], np.exp(samples["log_k_d"][0])) == pytest.approx(
      (found.law.a, found.law.k_d))
  assert np.isfinite(samples["a"]).all() and samples["a"][1:].std() > 0


def test_intervals_cover_the_truth_at_their_rate():
  """Where its assumption holds: dense sizes, curves on the law, 0.3 % of noise."""
  hits = {0.8: 0, 0.95: 0}
  for seed in range(60):
    curves = on_the_law(40, noise=0.003, seed=seed)
    found = fit_envelope.fit(curves, window=0, points=300)
    weights = bootstrap.weights(np.zeros(len(curves)), Resampling(count=200, seed=seed))
    samples = fit_envelope.resampled(found, curves, weights, 0)
    for confidence in hits:
      low, high = bootstrap.interval(samples["a"], confidence)
      hits[confidence] += low <= LAW.a <= high
      assert high - low < 0.1
  for confidence, count in hits.items():
    assert count / 60 > confidence - 3 * np.sqrt(confidence * (1 - confidence) / 60)


@pytest.mark.parametrize("curves, says", [
    (lambda: planted.curves(LAW, (1e9,)), "the curves are of 1 model size, and"),
    (lambda: [c for n in (1e8, 1e9) for c in planted.curves(LAW, (n,), (1e20 / 6 / n**2,))],
     "all runs end at the same FLOPs"),
    (lambda: planted.curves(LAW, (1e9,)) + planted.curves(LAW, (1e16,), (1e-14, 1e-13)),
     "one model size, 1e[+]09 parameters, is the best")])
def test_curves_that_cannot_be_fitted(curves, says):
  with pytest.raises(UserError, match=says):
    fit_envelope.fit(curves(), window=0)
