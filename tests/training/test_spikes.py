"""The running estimate finds planted spikes, and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinchilla_jax import config
from chinchilla_jax.training import spikes

GUARD = config.Guard()
WINDOW = GUARD.spike_window


@functools.cache
def scanned(guard):
  def one(stats, values):
    stats, is_spike = spikes.judge(guard, stats, *values)
    return stats, (is_spike, stats)

  return jax.jit(lambda values: jax.lax.scan(one, spikes.init(), values)[1])


def judged(loss_n, norm_n=None, rate_n=None, guard=GUARD):
  """(indices of spikes, the estimate after each step)."""
  n = len(loss_n)
  values = (loss_n, np.ones(n) if norm_n is None else norm_n,
            np.ones(n) if rate_n is None else rate_n)
  found, stats = scanned(guard)(tuple(np.asarray(v, np.float32) for v in values))
  return np.flatnonzero(found).tolist(), jax.tree.map(np.asarray, stats)


def run_of(seed, n=2000):
  """(loss, update norm / rate, rate): a falling curve, warm-up from 0, cosine decay, noise."""
  rng, t = np.random.default_rng(seed), np.arange(n)
  loss = 2 + 8.4 / np.sqrt(1 + t / 20) + rng.normal(0, 0.05, n)
  rate = 1e-2 * np.minimum(t / (0.05 * n), 1) * (0.55 + 0.45 * np.cos(np.pi * t / n))
  norm = np.exp(-0.3 * np.log1p(t / 10) + 0.2 * t / n + rng.normal(0, 0.05, n))
  return loss, norm, rate


@pytest.mark.parametrize("seed", range(10))
def test_noise_a_falling_curve_warm_up_and_decay_are_no_spikes(seed):
  loss, norm, rate = run_of(seed)
  assert judged(loss, rate * norm, rate)[0] == []


def test_without_the_learning_rate_warm_up_would_be_one():
  """What the division is for: the rate triples within a window, which the norm alone shows."""
  loss, norm, rate = run_of(0)
  rate = np.where(np.arange(2000) < 1000, 1e-3, np.minimum(1e-3 + np.arange(-1000, 1000) * 1e-4, 1))
  assert judged(loss, rate * norm, rate)[0] == []
  assert judged(loss, rate * norm, np.ones(2000))[0] != []


@pytest.mark.parametrize("signal", ["loss", "norm"])
@pytest.mark.parametrize("place", [WINDOW, 700, 1999])
def test_a_planted_spike_is_found_where_it_is(signal, place):
  loss, norm, rate = run_of(3)
  rate[0] = rate[1]  # So that all steps are seen.
  clean = judged(loss, rate * norm, rate)[1]
  if signal == "loss":
    loss[place] = 8 * clean["loss_var"][place - 1]**0.5 + clean["loss_mean"][place - 1]
  else:
    norm[place] = np.exp(
        8 * clean["update_var"][place - 1]**0.5 + clean["update_mean"][place - 1])
  found, stats = judged(loss, rate * norm, rate)
  assert found == [place]
  # It counted as if it lay at the threshold.
  moved = {"loss": "loss", "norm": "update"}[signal]
  step = stats[f"{moved}_mean"][place] - stats[f"{moved}_mean"][place - 1]
  np.testing.assert_allclose(
      step, GUARD.spike_threshold * stats[f"{moved}_var"][place - 1]**0.5 / WINDOW, rtol=1e-2)


def test_nothing_is_a_spike_before_the_window_is_full_or_below_the_mean():
  loss, norm, rate = run_of(3)
  loss[WINDOW - 1] = 100.0
  loss[700] = norm[800] = 1e-3
  rate[0] = rate[1]
  assert judged(loss, rate * norm, rate)[0] == []


def test_an_early_spike_does_not_blind_the_guard():
  loss = 3 + np.random.default_rng(0).normal(0, 0.05, 400)
  loss[50], loss[200] = 1e30, 4.0
  assert judged(loss)[0] == [200]


@pytest.mark.parametrize("jump, most", [(0.5, 10), (4.0, 30), (100.0, 80)])
def test_a_level_that_stays_is_accepted_and_then_judged_by(jump, most):
  loss = 3 + np.random.default_rng(0).normal(0, 0.05, 4000)
  loss[500:] += jump
  loss[3500] += jump
  found, stats = judged(loss)
  assert found[0] == 500 and found[-1] == 3500
  assert found[:-1] == list(range(500, 499 + len(found))) and 2 <= len(found) - 1 <= most
  np.testing.assert_allclose(stats["loss_mean"][3499], 3 + jump, rtol=0.01)


@pytest.mark.parametrize("constant, is_spike", [(1.05, False), (1.07, True)])
def test_a_flat_curve_has_a_floor(constant, is_spike):
  """Six times one percent."""
  loss = np.full(300, 4.0)
  loss[200] *= constant
  assert judged(loss)[0] == ([200] if is_spike else [])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(2.96875, 3.03125, width=32), min_size=40, max_size=40))
def test_the_estimate_is_mean_and_variance_then_their_moving_average(loss):
  """Against the definitions, in float64, where nothing stands out."""
  guard = config.Guard(spike_window=16)
  _, stats = judged(loss, guard=guard)
  np.testing.assert_allclose(stats["loss_mean"][15], np.mean(loss[:16]), rtol=1e-5)
  np.testing.assert_allclose(stats["loss_var"][15], np.var(loss[:16]), rtol=1e-2, atol=1e-7)
  weights = np.concatenate([np.full(16, 1 / 16), np.full(24, 1 / 16)])
  for n in range(16, 40):
    weights[:n] *= 15 / 16
  mean = np.sum(weights * loss)
  np.testing.assert_allclose(stats["loss_mean"][-1], mean, rtol=1e-5)
  np.testing.assert_allclose(
      stats["loss_var"][-1], np.sum(weights * np.square(loss - mean)), rtol=1e-2, atol=1e-7)


BAD = [(np.nan, 1, 1), (np.inf, 1, 1), (-np.inf, 1, 1), (3, np.nan, 1), (3, np.inf, 1), (3, 0, 1),
       (3, 0, 0), (3, 1, 0), (3, 1, np.nan)]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", [0, 3, 200])
def test_what_is_not_finite_never_enters_and_is_no_spike(bad, place):
  loss, norm, rate = (np.array(a) for a in run_of(1, n=400))
  rate += 1e-4
  norm *= rate
  clean, after = judged(*(np.delete(a, place) for a in (loss, norm, rate)))
  loss[place], norm[place], rate[place] = bad
  found, stats = judged(loss, norm, rate)
  assert found == clean == []
  for name, values in stats.items():
    np.testing.assert_array_equal(np.delete(values, place), after[name])
    if place:
      np.testing.assert_array_equal(values[place], values[place - 1])


def test_types_and_names_do_not_change():
  """The estimate is part of the train state."""
  stats = spikes.init()
  assert {name: value.dtype.name for name, value in stats.items()} == {
      "seen": "int32", "loss_mean": "float32", "loss_var": "float32", "update_mean": "float32",
      "update_var": "float32"}
  one = jnp.float32(1)
  new, is_spike = jax.eval_shape(functools.partial(spikes.judge, GUARD),
                                 stats | {"others": one}, one, one, one)
  shape_of = lambda tree: {name: (a.shape, a.dtype) for name, a in tree.items()}
  assert shape_of(new) == shape_of(stats) and (is_spike.shape, is_spike.dtype) == ((), bool)
