"""Relative (Transformer-XL) attention on TPU as one Pallas kernel each way.

  score(i, j) = ((q_i + u) . k_j + (q_i + v) . r_(i-j)) / divisor       (Dai et al. 2019, 3.3)

over the keys j <= i of the query's document, with r_n = W_r R_n. Neither scores nor their
position term ever leave the chip's vector memory; what is kept for the backward pass is the
output and a number for each query. Tiles after the diagonal are not visited, tiles without a
document in common are skipped. `model.attention` is the reference.

Two things stay in vector memory for a head: its relative keys, and in the backward kernel their
gradient and that of the queries, in float32. That bounds the length. In bfloat16 with kv_size up
to 128 the compiler takes 4,096 tokens on v4 (8,192 with blocks of 256), 32,768 on v5p and tpu7x,
65,536 on v5e and v6e. Longer ones end in its RESOURCE_EXHAUSTED.

A kernel is of one device: on several, call it inside `jax.shard_map` over heads and sequences,
with check_vma=False.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from chinchilla_jax.errors import UserError
from chinchilla_jax.kernels import relative_tpu_blocks as blocks
from chinchilla_jax.kernels.relative_tpu_backward import backward
from chinchilla_jax.kernels.relative_tpu_blocks import Tiling
from chinchilla_jax.kernels.relative_tpu_forward import forward

BLOCK = 512
# Generations, by the names of `parallel.topology`, that rotate each row by its number in one
# instruction. v4 refuses to compile it. (v3 multiplies no bfloat16 in a kernel, float32 only.)
STRIDED = frozenset({"v5e", "v5p", "v6e", "tpu7x"})


def relative_attention(q_hbtk: jax.Array, k_hbtk: jax.Array, v_hbtk: jax.Array, r_hnk: jax.Array,
                       u_hk: jax.Array, v_hk: jax.Array, segments_bt: jax.Array | None, *,
                       divisor: float, block_q: int = BLOCK, block_k: int = BLOCK,
                       strided: bool = False, name: str | None = None,
                       interpret: bool = False) -> jax.Array:
  """Causal attention with relative positions.

  Products are made in the dtype of q and summed in float32; q + u and q + v are rounded to the
  dtype of q. Gradients of r, u and v are summed in float32 over everything that they sum over.

  Args:
    q_hbtk, k_hbtk, v_hbtk: of one dtype, bfloat16 or float32.
    r_hnk: relative keys of the distances n = t ... 0, like `Attention.relative_keys(t)`.
    u_hk, v_hk: biases of the content and of the position term, any float dtype.
    segments_bt: integers, the document of each token; None if each sequence is one document.
    divisor: of the scores, a constant.
    block_q, block_k: queries and keys of a tile, powers of two from 128 on. A short sequence
      takes smaller ones. By the compiler's schedules, tiles of 1,024 x 1,024 take a fifth fewer
      cycles than the default on v6e and tpu7x for 2,048 tokens of one document, and a tenth fewer
      on v5e; small ones skip more where documents are short. v4 has no memory for them.
    strided: the chip's generation is in STRIDED. A few plain instructions do the same on any, and
      take longer.
    name: under which `jax.checkpoint` policies find the output and the scores' logsumexp. Naming
      the result outside is not enough: the backward pass would run the forward kernel again.
    interpret: run without a TPU, in plain JAX; any power of two will do for a block.

  Returns:
    out_hbtk in the dtype of q.

  Raises:
    UserError: the blocks do not fit the TPU or each other.
  """
  t, least = q_hbtk.shape[2], 1 if interpret else blocks.LANES
  if block_q % least or block_k % least:
    raise UserError(f"relative attention: blocks of {block_q} queries and {block_k} keys; a TPU "
                    f"takes multiples of {least}")
  whole = max(least, 1 << (t - 1).bit_length())
  block_q, block_k = min(block_q, whole), min(block_k, whole)
  padded = -(-t // max(block_q, block_k)) * max(block_q, block_k)
  tiling = Tiling(padded, block_q, block_k, strided)
  if segments_bt is not None:
    segments_bt = segments_bt.astype(jnp.int32)
  return _attend((tiling, divisor, name, interpret), q_hbtk, k_hbtk, v_hbtk, r_hnk, u_hk, v_hk,
                 segments_bt)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q_hbtk, k_hbtk, v_hbtk, r_hnk, u_hk, v_hk, segments_bt):
  return _forward(static, q_hbtk, k_hbtk, v_hbtk, r_hnk, u_hk, v_hk, segments_bt)[0]


def _forward(static, *arrays):
  tiling, divisor, name, interpret = static
  t = arrays[0].shape[2]
  out_hbtk, logsumexp_hb1t = forward(*_whole_tiles(tiling, *arrays), tiling=tiling,
                                     divisor=divisor, interpret=interpret)
  out_hbtk, logsumexp_hbt = out_hbtk[:, :, :t], logsumexp_hb1t[:, :, 0, :t]
  if name is not None:
    out_hbtk, logsumexp_hbt = (checkpoint_name(x, name) for x in (out_hbtk, logsumexp_hbt))
  return out_hbtk, (arrays, out_hbtk, logsumexp_hbt)


def _backward(static, saved, grad_hbtk):
  tiling, divisor, _, interpret = static
  arrays, out_hbtk, logsumexp_hbt = saved
  q_hbtk, _, _, r_hnk, u_hk, v_hk, _ = arrays
  t, ahead = q_hbtk.shape[2], tiling.length - q_hbtk.shape[2]
  delta_hbt = jnp.sum(out_hbtk.astype(jnp.float32) * grad_hbtk.astype(jnp.float32), axis=-1)
  # A row that holds no token gets a logsumexp that makes its weights 0. With 0 they could be
  # infinite, and infinity times its gradient, which is 0, is no number.
  dq, dk, dv, dr_hnk, du_bias, dv_bias = backward(
      *_whole_tiles(tiling, *arrays), _pad(logsumexp_hbt, 2, 0, ahead, -blocks.MASKED)[:, :, None],
      _pad(delta_hbt, 2, 0, ahead)[:, :, None], _pad(grad_hbtk, 2, 0, ahead), tiling=tiling,
      divisor=divisor, interpret=interpret)
  dr_hnk = dr_hnk[:, ahead:ahead + r_hnk.shape[1]].astype(r_hnk.dtype)
  du_hk, dv_hk = ((grad[:, 0] / divisor).astype(bias.dtype)
                  for grad, bias in ((du_bias, u_hk), (dv_bias, v_hk)))
  return dq[:, :, :t], dk[:, :, :t], dv[:, :, :t], dr_hnk, du_hk, dv_hk, None


_attend.defvjp(_forward, _backward)


def _whole_tiles(tiling: Tiling, q_hbtk, k_hbtk, v_hbtk, r_hnk, u_hk, v_hk, segments_bt):
  """The kernels' arguments. A token that is not there is later than all others: none sees it."""
  ahead = tiling.length - q_hbtk.shape[2]
  r_hnk = _pad(r_hnk.astype(q_hbtk.dtype), 1, ahead,
               tiling.distances - ahead - r_hnk.shape[1])
  u_h1k, v_h1k = (bias.astype(jnp.float32)[:, None] for bias in (u_hk, v_hk))
  if segments_bt is not None:
    segments_bt = jnp.pad(segments_bt, ((0, 0), (0, ahead)), mode="edge")[:, None]
  return (*(_pad(x, 2, 0, ahead) for x in (q_hbtk, k_hbtk, v_hbtk)), r_hnk, u_h1k, v_h1k,
          segments_bt)


def _pad(x: jax.Array, axis: int, before: int, after: int, value: float = 0.0) -> jax.Array:
  widths = [(0, 0)] * x.ndim
  widths[axis] = (before, after)
  return jnp.pad(x, widths, constant_values=value) if before or after else x
