"""What can be said of cuDNN's attention without a GPU: what it is asked for, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chinchilla_jax.errors import UserError
from chinchilla_jax.kernels import cudnn
from chinchilla_jax.model import blockwise


def draw(k=16, dtype=jnp.bfloat16):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=(2, 3, 9, k)), dtype) for _ in range(3)]


def test_the_same_question_to_xla_is_causal_attention(monkeypatch):
  """JAX's own plain form takes the same arguments; all but the kernel is then tested."""
  ask = jax.nn.dot_product_attention
  asked = []
  def xla(*arrays, implementation, **options):
    asked.append(implementation)
    return ask(*arrays, implementation="xla", **options)
  monkeypatch.setattr(jax.nn, "dot_product_attention", xla)
  q, k, v = draw()
  got = cudnn.attend(q, k, v, None, divisor=3.0)
  want = blockwise.attend_rows(3.0, q, k, v, jnp.tri(9, dtype=bool)[None], None)[0]
  assert asked == ["cudnn"] and got.dtype == want.dtype
  np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=0.02)


def test_it_is_cudnn_that_is_asked():
  """No quiet fall back: JAX says that cuDNN is not here, or that CPUs have none of it."""
  with pytest.raises((RuntimeError, NotImplementedError)):
    cudnn.attend(*draw(), None, divisor=3.0)


@pytest.mark.parametrize(("k", "dtype", "segmented", "said"), [
    (16, jnp.bfloat16, True, "cannot keep the documents of a sequence apart; use plain attention"),
    (16, jnp.float32, False, "does not multiply float32; use plain attention, or activations in"),
    (136, jnp.bfloat16, False, "a head of 136 dimensions; use plain attention, or a multiple of 8"),
    (12, jnp.float16, False, "a head of 12 dimensions"),
])
def test_refusals(k, dtype, segmented, said):
  segments_bt = jnp.zeros((3, 9), jnp.int32) if segmented else None
  with pytest.raises(UserError, match=said):
    cudnn.attend(*draw(k, dtype), segments_bt, divisor=3.0)
