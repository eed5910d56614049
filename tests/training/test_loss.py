import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chinchilla_jax.model.placement import WHOLE, Placement
from chinchilla_jax.training import loss

B, T, D, V = 6, 10, 8, 11
# As on 2 x 5 devices, without any: only the cut into pieces is other.
CUT = Placement(shards=lambda name: {"batch": 2, "length": 5}.get(name, 1))


@pytest.fixture
def arrays():
  rng = np.random.default_rng(0)
  return dict(x_btd=jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32),
              embedding_vd=jnp.asarray(rng.normal(size=(V, D)), jnp.float32),
              bias_v=jnp.asarray(rng.normal(size=V), jnp.float32),
              targets_bt=jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
              weights_bt=jnp.asarray(rng.integers(0, 3, (B, T)), jnp.float32))


def naive(x_btd, embedding_vd, bias_v, targets_bt, weights_bt, z_loss):
  """Token by token, from the definition."""
  objective = nll = 0.0
  for b in range(B):
    for t in range(T):
      logits_v = embedding_vd @ x_btd[b, t] + bias_v
      log_z = jnp.log(jnp.sum(jnp.exp(logits_v)))
      nll += weights_bt[b, t] * (log_z - logits_v[targets_bt[b, t]])
      objective += weights_bt[b, t] * (log_z - logits_v[targets_bt[b, t]] + z_loss * log_z**2)
  return objective, nll


@pytest.mark.parametrize("placement", [WHOLE, CUT], ids=["whole", "cut"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [0, 1, 4, 7, 20, 1000])
def test_value_and_gradient_are_those_of_the_definition(arrays, z_loss, chunk, placement):
  targets, weights = arrays["targets_bt"], arrays["weights_bt"]

  @jax.jit
  def ours(x, e, b):
    return loss.cross_entropy(x, e, b, targets, weights, z_loss, chunk, placement)

  theirs = jax.jit(lambda x, e, b: naive(x, e, b, targets, weights, z_loss))
  args = arrays["x_btd"], arrays["embedding_vd"], arrays["bias_v"]
  np.testing.assert_allclose(ours(*args), theirs(*args), rtol=1e-5)
  got = jax.grad(lambda *a: 3 * ours(*a)[0], argnums=(0, 1, 2))(*args)
  want = jax.grad(lambda *a: 3 * theirs(*a)[0], argnums=(0, 1, 2))(*args)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("placement", [WHOLE, CUT], ids=["whole", "cut"])
def test_no_bias_is_a_bias_of_zeros(arrays, placement):
  x, embedding, bias, *rest = arrays.values()
  ours = lambda bias: jax.value_and_grad(lambda x, e: loss.cross_entropy(
      x, e, bias, *rest, 0.1, 7, placement)[0], argnums=(0, 1))(x, embedding)
  jax.tree.map(np.testing.assert_array_equal, ours(None), ours(jnp.zeros_like(bias)))


def test_no_piece_is_larger_than_asked_for():
  for chunk in (1, 3, 10, 25, 60):
    pieces = loss._Pieces((B, T), chunk, WHOLE).split(jnp.zeros((B, T)))
    assert pieces[0].size <= chunk
    assert pieces.size >= B * T


def test_targets_of_weight_zero_count_for_nothing(arrays):
  zeroed = dict(arrays, weights_bt=arrays["weights_bt"].at[:, 7:].set(0.0))
  shorter = {name: a[:, :7] if "bt" in name else a for name, a in arrays.items()}
  np.testing.assert_allclose(loss.cross_entropy(*zeroed.values(), 0.0, 16),
                             loss.cross_entropy(*shorter.values(), 0.0, 16), rtol=1e-6)


def test_bfloat16_hidden_states_keep_the_loss_in_float32(arrays):
  half = dict(arrays, x_btd=arrays["x_btd"].astype(jnp.bfloat16),
              embedding_vd=arrays["embedding_vd"].astype(jnp.bfloat16))
  objective, nll = loss.cross_entropy(*half.values(), 0.0, 16)
  assert objective.dtype == nll.dtype == jnp.float32
  np.testing.assert_allclose(nll, loss.cross_entropy(*arrays.values(), 0.0, 16)[1], rtol=2e-2)
  grads = jax.grad(lambda x, e: loss.cross_entropy(
      x, e, *list(half.values())[2:], 0.0, 16)[0], argnums=(0, 1))(half["x_btd"],
                                                                   half["embedding_vd"])
  assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.bfloat16]
