"""Causal attention without relative positions on NVIDIA GPUs: cuDNN's kernel, through JAX.

What JAX 0.10 to 0.12 can ask of it: a causal mask, or padding at the end of a sequence. Documents
packed into a sequence need either a bias for every pair of tokens, b x t x t numbers in memory,
or cuDNN's packed layout, which JAX's public function does not offer. Neither is done here.
"""

import jax
import jax.numpy as jnp

from chinchilla_jax.errors import UserError

MAX_HEAD_DIM = 128  # 256 from Hopper on; JAX tells which only where there is a GPU.


def attend(q_hbtk: jax.Array, k_hbtk: jax.Array, v_hbtk: jax.Array,
           segments_bt: jax.Array | None, *, divisor: float) -> jax.Array:
  """Each position attends to itself and to all earlier ones.

  Args:
    q_hbtk, k_hbtk, v_hbtk: of one dtype, bfloat16 or float16. With rotary positions, rotated.
    segments_bt: None. It is here to be refused.
    divisor: of the scores, a constant.

  Returns:
    out_hbtk in the dtype of q.

  Raises:
    UserError: segments, another dtype, or a head size that cuDNN does not multiply.
  """
  refuse(q_hbtk.dtype, q_hbtk.shape[-1], segmented=segments_bt is not None)
  out_bthk = jax.nn.dot_product_attention(
      *(jnp.transpose(x, (1, 2, 0, 3)) for x in (q_hbtk, k_hbtk, v_hbtk)),
      scale=1 / divisor, is_causal=True, implementation="cudnn")
  return jnp.transpose(out_bthk, (2, 0, 1, 3))


def refuse(dtype: jax.typing.DTypeLike, kv_size: int, *, segmented: bool) -> None:
  """Raises a UserError where cuDNN's attention cannot do what is asked, and says what can."""
  cure = "use plain attention, or "
  if segmented:
    raise UserError("cuDNN attention: it cannot keep the documents of a sequence apart; "
                    f"{cure}let each sequence be one document")
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
    raise UserError(f"cuDNN attention: it does not multiply {jnp.dtype(dtype).name}; "
                    f"{cure}activations in bfloat16")
  if kv_size > MAX_HEAD_DIM or kv_size % 8:
    raise UserError(f"cuDNN attention: a head of {kv_size} dimensions; {cure}a multiple of 8 up "
                    f"to {MAX_HEAD_DIM}")
