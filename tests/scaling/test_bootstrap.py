"""Resamples: who is drawn, how often, and what the percentiles are of."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chinchilla_jax.errors import UserError
from chinchilla_jax.scaling import bootstrap
from chinchilla_jax.scaling.bootstrap import Resampling


@given(groups=st.lists(st.integers(0, 3), min_size=1, max_size=30), seed=st.integers(0, 5))
def test_groups_keep_their_size(groups, seed):
  groups = np.array(groups)
  drawn = bootstrap.weights(groups, Resampling(count=20, seed=seed))
  subset = bootstrap.weights(groups, Resampling("paper", 20, 0.8, seed))
  assert drawn.shape == subset.shape == (20, len(groups))
  assert set(np.unique(subset)) <= {0.0, 1.0}
  for group in set(groups.tolist()):
    size = (groups == group).sum()
    assert (drawn[:, groups == group].sum(1) == size).all()
    assert (subset[:, groups == group].sum(1) == max(1, round(0.8 * size))).all()


def test_seeds_and_chances():
  groups = np.zeros(50)
  one, same, other = (bootstrap.weights(groups, Resampling(count=4000, seed=s)) for s in (1, 1, 2))
  assert np.array_equal(one, same) and not np.array_equal(one, other)
  # Every run is in a resample with probability 1 - (1 - 1/50)^50, once on average.
  assert ((one > 0).mean(0) == pytest.approx(1 - (1 - 1 / 50) ** 50, abs=0.03))
  assert one.mean(0) == pytest.approx(1, abs=0.08)
  assert bootstrap.weights(groups, bootstrap.PAPER).mean(0) == pytest.approx(0.8, abs=0.2)


def test_percentiles_leave_out_what_could_not_be_fitted():
  samples = np.concatenate([np.arange(101.0), [np.nan] * 50])
  assert bootstrap.interval(samples, 0.8) == pytest.approx((10, 90))
  assert bootstrap.interval(np.concatenate([samples, [np.nan] * 80]), 0.8) is None
  assert bootstrap.interval(np.arange(10.0), 0.8) is None


def test_the_papers_variant():
  assert (bootstrap.PAPER.kind, bootstrap.PAPER.count, bootstrap.PAPER.confidence) == (
      "paper", 100, 0.8)
  assert "80 % intervals, percentiles of 100 resamples of runs (80 % drawn" in (
      bootstrap.PAPER.describe())


@pytest.mark.parametrize("kind, count, confidence, says", [
    ("jackknife", 100, 0.9, "got 'jackknife'; one of: bootstrap, paper"),
    ("bootstrap", 5, 0.9, "resamples: got 5; give at least 20, or 0"),
    ("bootstrap", -1, 0.9, "resamples: got -1"),
    ("bootstrap", 100, 1.0, "confidence: got 1; give a number between 0 and 1")])
def test_bad_choices(kind, count, confidence, says):
  with pytest.raises(UserError, match=says):
    Resampling(kind, count, confidence)
