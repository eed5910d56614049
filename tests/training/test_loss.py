import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chinchilla_jax.training import loss

N, D, V = 37, 8, 11


@pytest.fixture
def arrays():
  rng = np.random.default_rng(0)
  return dict(x_nd=jnp.asarray(rng.normal(size=(N, D)), jnp.float32),
              embedding_vd=jnp.asarray(rng.normal(size=(V, D)), jnp.float32),
              bias_v=jnp.asarray(rng.normal(size=V), jnp.float32),
              targets_n=jnp.asarray(rng.integers(0, V, N), jnp.int32),
              weights_n=jnp.asarray(rng.integers(0, 3, N), jnp.float32))


def naive(x_nd, embedding_vd, bias_v, targets_n, weights_n, z_loss):
  """Token by token, from the definition."""
  objective = nll = 0.0
  for n in range(N):
    logits_v = embedding_vd @ x_nd[n] + bias_v
    log_z = jnp.log(jnp.sum(jnp.exp(logits_v)))
    nll += weights_n[n] * (log_z - logits_v[targets_n[n]])
    objective += weights_n[n] * (log_z - logits_v[targets_n[n]] + z_loss * log_z**2)
  return objective, nll


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [0, 1, 16, 37, 1000])
def test_value_and_gradient_are_those_of_the_definition(arrays, z_loss, chunk):
  def ours(x, e, b):
    return loss.cross_entropy(x, e, b, arrays["targets_n"], arrays["weights_n"], z_loss, chunk)
  def theirs(x, e, b):
    return naive(x, e, b, arrays["targets_n"], arrays["weights_n"], z_loss)
  args = arrays["x_nd"], arrays["embedding_vd"], arrays["bias_v"]
  np.testing.assert_allclose(ours(*args), theirs(*args), rtol=1e-5)
  got = jax.grad(lambda *a: 3 * ours(*a)[0], argnums=(0, 1, 2))(*args)
  want = jax.grad(lambda *a: 3 * theirs(*a)[0], argnums=(0, 1, 2))(*args)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


def test_targets_of_weight_zero_count_for_nothing(arrays):
  kept = arrays["weights_n"] > 0
  few = {name: a[kept] if name.endswith(("_n", "_nd")) else a for name, a in arrays.items()}
  np.testing.assert_allclose(loss.cross_entropy(*arrays.values(), 0.0, 16),
                             loss.cross_entropy(*few.values(), 0.0, 16), rtol=1e-6)


def test_bfloat16_hidden_states_keep_the_loss_in_float32(arrays):
  half = dict(arrays, x_nd=arrays["x_nd"].astype(jnp.bfloat16),
              embedding_vd=arrays["embedding_vd"].astype(jnp.bfloat16))
  objective, nll = loss.cross_entropy(*half.values(), 0.0, 16)
  assert objective.dtype == nll.dtype == jnp.float32
  np.testing.assert_allclose(nll, loss.cross_entropy(*arrays.values(), 0.0, 16)[1], rtol=2e-2)
  grads = jax.grad(lambda x, e: loss.cross_entropy(
      x, e, *list(half.values())[2:], 0.0, 16)[0], argnums=(0, 1))(half["x_nd"],
                                                                   half["embedding_vd"])
  assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.bfloat16]
