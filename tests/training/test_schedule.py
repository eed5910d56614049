import numpy as np
import pytest

from chinchilla_jax import config as schema
from chinchilla_jax import durations
from chinchilla_jax.errors import UserError
from chinchilla_jax.training import schedule

TOTAL, PEAK = 1000, 2e-4


def rates(steps=TOTAL, **fields):
  clock = durations.clock(f"{steps} steps", 1, (), seq_len=1, n_params=1, epoch_tokens=1)
  rate = schedule.learning_rate(schema.Schedule(**fields), PEAK, clock)
  return np.array([float(rate(step)) for step in range(steps)])


def test_cosine_warms_up_peaks_and_ends_at_a_tenth():
  lr = rates(warmup="100 steps")
  np.testing.assert_allclose(lr[0], 1e-7, rtol=1e-4)
  np.testing.assert_allclose(lr[50], 1e-7 + (PEAK - 1e-7) / 2, rtol=1e-5)
  np.testing.assert_allclose(lr[100], PEAK, rtol=1e-6)
  half = 100 + 450
  np.testing.assert_allclose(lr[half], 0.55 * PEAK, rtol=1e-5)
  np.testing.assert_allclose(lr[-1], 0.1 * PEAK, rtol=1e-3)
  assert np.all(np.diff(lr[:101]) > 0) and np.all(np.diff(lr[100:]) < 0)


def test_wsd_is_flat_then_one_minus_sqrt():
  lr = rates(shape="wsd", warmup="100 steps", cooldown="20%", final_ratio=0.0)
  np.testing.assert_allclose(lr[100:801], PEAK, rtol=1e-6)
  t = (np.arange(800, TOTAL) - 800) / 200
  np.testing.assert_allclose(lr[800:], PEAK * (1 - np.sqrt(t)), rtol=1e-4)


def test_wsd_ends_at_the_final_ratio():
  lr = rates(shape="wsd", warmup="0 steps", cooldown="10%", final_ratio=0.1)
  np.testing.assert_allclose(lr[0], PEAK, rtol=1e-6)
  t = 99 / 100
  np.testing.assert_allclose(lr[-1], PEAK * (0.1 + 0.9 * (1 - np.sqrt(t))), rtol=1e-4)


def test_constant():
  lr = rates(shape="constant", warmup="10 steps")
  np.testing.assert_allclose(lr[10:], PEAK, rtol=1e-6)


@pytest.mark.parametrize("fields", [
    dict(warmup="1000 steps"), dict(warmup="900 steps", shape="wsd", cooldown="20%")])
def test_a_warmup_that_does_not_fit_is_refused(fields):
  with pytest.raises(UserError, match="do not fit into a run of 1,000 steps"):
    rates(**fields)
