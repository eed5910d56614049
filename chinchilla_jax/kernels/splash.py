"""Causal attention without relative positions on TPU: JAX's splash attention, in our shapes.

`jax.experimental.pallas.ops.tpu.splash_attention` (JAX 0.10 to 0.12) takes one sequence at a
time, whole tiles and scaled queries; here are the batch, the padding and the scale.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

BLOCK = 512
LANES = 128
# The fused backward kernel writes the gradient of q once per block of keys, in the dtype of q, and
# adds these up afterwards. Beyond so many blocks, two kernels and none of that.
FUSED_BLOCKS = 4


def attend(q_hbtk: jax.Array, k_hbtk: jax.Array, v_hbtk: jax.Array,
           segments_bt: jax.Array | None, *, divisor: float, name: str | None = None,
           interpret: bool = False) -> jax.Array:
  """Each position attends to itself and to earlier positions of its own segment.

  Args:
    q_hbtk, k_hbtk, v_hbtk: of one dtype; any length and head size. With rotary positions, rotated.
    segments_bt: integers, the document of each token; None if each sequence is one document.
    divisor: of the scores, a constant. Queries are divided by it, in float32, before they are
      multiplied.
    name: under which `jax.checkpoint` policies find what the backward pass needs.
    interpret: run without a TPU, in plain JAX.

  Returns:
    out_hbtk in the dtype of q.
  """
  h, _, t, _ = q_hbtk.shape
  unit = BLOCK if t > BLOCK else LANES
  whole = -(-t // unit) * unit
  block = min(BLOCK, whole)
  fused = whole // block <= FUSED_BLOCKS
  dq_block = None if fused else block
  kernel = splash.make_splash_mha(
      mask=masks.MultiHeadMask([masks.CausalMask((whole, whole))] * h),
      block_sizes=splash.BlockSizes(
          block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
          block_q_dq=dq_block, block_kv_dq=dq_block, use_fused_bwd_kernel=fused),
      head_shards=1, q_seq_shards=1, residual_checkpoint_name=name, interpret=interpret)
  q_hbtk = (q_hbtk.astype(jnp.float32) / divisor).astype(q_hbtk.dtype)
  # What is added is later than every token, so none sees it, whatever its segment.
  q_hbtk, k_hbtk, v_hbtk = (jnp.pad(x, ((0, 0), (0, 0), (0, whole - t), (0, 0)))
                            for x in (q_hbtk, k_hbtk, v_hbtk))
  if segments_bt is None:
    out_hbtk = jax.vmap(kernel, in_axes=1, out_axes=1)(q_hbtk, k_hbtk, v_hbtk)
  else:
    segments_bt = jnp.pad(segments_bt.astype(jnp.int32), ((0, 0), (0, whole - t)))
    of_sequence = lambda q, k, v, segments_t: kernel(
        q, k, v, segment_ids=splash.SegmentIds(q=segments_t, kv=segments_t))
    out_hbtk = jax.vmap(of_sequence, in_axes=(1, 1, 1, 0), out_axes=1)(
        q_hbtk, k_hbtk, v_hbtk, segments_bt)
  return out_hbtk[:, :, :t]
