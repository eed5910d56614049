import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chinchilla_jax.inference import sampling

PROBABILITIES = np.array([0.4, 0.3, 0.2, 0.07, 0.03])
LOGITS = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))[None, :]


def kept(**settings):
  settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings}
  logits_bv = sampling.filter_logits(LOGITS, **settings)
  return np.flatnonzero(np.isfinite(np.asarray(logits_bv)[0])).tolist()


@pytest.mark.parametrize("settings, want", [
    (dict(), [0, 1, 2, 3, 4]), (dict(top_k=2), [0, 1]), (dict(top_k=99), [0, 1, 2, 3, 4]),
    (dict(top_p=0.39), [0]), (dict(top_p=0.41), [0, 1]), (dict(top_p=0.69), [0, 1]),
    (dict(top_p=0.89), [0, 1, 2]), (dict(top_p=1e-9), [0]), (dict(top_k=3, top_p=0.5), [0, 1])])
def test_what_is_kept(settings, want):
  assert kept(**settings) == want


def test_frequencies_follow_the_filtered_distribution():
  keys = jax.random.split(jax.random.key(0), 20_000)
  draw = jax.vmap(lambda key: sampling.sample(LOGITS, key, temperature=0.5, top_k=3)[0])
  counts = np.bincount(np.asarray(draw(keys)), minlength=5) / 20_000
  want = PROBABILITIES**2 * (np.arange(5) < 3)
  np.testing.assert_allclose(counts, want / want.sum(), atol=0.02)


def test_temperature_zero_is_the_likeliest():
  assert sampling.sample(LOGITS, jax.random.key(0), temperature=0)[0] == 0
