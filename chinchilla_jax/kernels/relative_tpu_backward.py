"""The backward kernel of `relative_tpu`: every gradient from one recomputation of the scores."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from chinchilla_jax.kernels import relative_tpu_blocks as blocks
from chinchilla_jax.kernels.relative_tpu_blocks import Tiling


def _kernel(tiles_ref, meet_ref, q_ref, k_ref, value_ref, r_ref, u_ref, v_ref, segments_q_ref,
            segments_s_ref, logsumexp_ref, delta_ref, grad_ref, dq_ref, dk_ref, dvalue_ref,
            dr_ref, du_ref, dv_ref, dq_tk, dk_sk, dvalue_sk, *, tiling: Tiling, divisor: float):
  step = pl.program_id(2)
  i, j, first, last, q_whole = (tiles_ref[n, step] for n in range(5))

  @pl.when(step == 0)
  def _():
    dq_tk[...] = jnp.zeros_like(dq_tk)

  @pl.when((step == 0) & (pl.program_id(1) == 0))
  def _():
    dr_ref[...] = jnp.zeros_like(dr_ref)
    du_ref[...] = jnp.zeros_like(du_ref)
    dv_ref[...] = jnp.zeros_like(dv_ref)

  @pl.when(first == 1)
  def _():
    dk_sk[...] = jnp.zeros_like(dk_sk)
    dvalue_sk[...] = jnp.zeros_like(dvalue_sk)

  of_block = pl.ds(pl.multiple_of(i * tiling.block_q, tiling.block_q), tiling.block_q)

  @pl.when(meet_ref[pl.program_id(1) * pl.num_programs(2) + step] == 1)
  def _():
    q_qk, k_sk, values_sk, grad_qk = q_ref[...], k_ref[...], value_ref[...], grad_ref[...]
    content_qk = blocks.biased(q_qk, u_ref[...], divisor)
    position_qk = blocks.biased(q_qk, v_ref[...], divisor)
    logsumexp_ql, delta_ql = blocks.column(logsumexp_ref[...]), blocks.column(delta_ref[...])
    segmented = segments_q_ref is not None
    segments_ql = blocks.column(segments_q_ref[...]) if segmented else None

    # What has block_q x block_k numbers is made a part at a time, since no more of it fits into
    # registers, and multiplied whole, since the matrix unit likes it long.
    weights, dscores, dproducts = [], [], []
    for part, rows in tiling.parts:
      scores_qs = (blocks.dot(content_qk[rows], k_sk, 1, 1) + blocks.position_scores(
          position_qk[rows], r_ref[tiling.window_of(i, j, part), :], tiling))
      ahead = j * tiling.block_k - i * tiling.block_q - rows.start
      of_q, of_s = (segments_ql[rows], segments_s_ref[...]) if segmented else (None, None)
      scores_qs = blocks.mask(scores_qs, ahead, of_q, of_s)
      weights_qs = jnp.exp(scores_qs - blocks.spread(logsumexp_ql[rows], tiling.block_k))
      dweights_qs = blocks.dot(grad_qk[rows], values_sk, 1, 1)
      dscores_qs = weights_qs * (dweights_qs - blocks.spread(delta_ql[rows], tiling.block_k))
      weights.append(weights_qs.astype(grad_qk.dtype))
      dscores.append(dscores_qs.astype(q_qk.dtype))
      dproducts.append(blocks.unshift(dscores_qs, tiling).astype(q_qk.dtype))
    weights_qs, dscores_qs = (jnp.concatenate(x, axis=0) for x in (weights, dscores))
    dvalue_sk[...] += blocks.dot(weights_qs, grad_qk, 0, 0)
    dk_sk[...] += blocks.dot(dscores_qs, content_qk, 0, 0)

    # What reaches q + u by the content term is the gradient of u; by the position term, of v.
    dq_qk = blocks.dot(dscores_qs, k_sk, 1, 0)
    by_position = []
    for (part, rows), dproduct_qw in zip(tiling.parts, dproducts, strict=True):
      window = tiling.window_of(i, j, part)
      by_position.append(blocks.dot(dproduct_qw, r_ref[window, :], 1, 0))
      dr_ref[window, :] += blocks.dot(dproduct_qw, position_qk[rows], 0, 0)
    dq_position_qk = jnp.concatenate(by_position, axis=0)
    du_ref[...] += jnp.sum(dq_qk, axis=0, keepdims=True)
    dv_ref[...] += jnp.sum(dq_position_qk, axis=0, keepdims=True)
    dq_tk[of_block, :] += dq_qk + dq_position_qk

  @pl.when(q_whole == 1)
  def _():
    dq_ref[...] = (dq_tk[of_block, :] * (1 / divisor)).astype(dq_ref.dtype)

  @pl.when(last == 1)
  def _():
    dk_ref[...] = dk_sk[...].astype(dk_ref.dtype)
    dvalue_ref[...] = dvalue_sk[...].astype(dvalue_ref.dtype)


def backward(q_hbtk, k_hbtk, v_hbtk, r_hnk, u_h1k, v_h1k, segments_b1t, logsumexp_hb1t,
             delta_hb1t, grad_hbtk, *, tiling: Tiling, divisor: float, interpret: bool):
  """Gradients over whole tiles; arguments as those of `forward`, and

  Args:
    logsumexp_hb1t: of the forward pass.
    delta_hb1t: float32, out . grad.
    grad_hbtk: of the output, in the dtype of q; zeros where there is no token.

  Returns:
    (dq_hbtk, dk_hbtk, dv_hbtk) in the dtypes of q, k and v, and in float32
    (dr_hnk, du_h1k * divisor, dv_h1k * divisor)
  """
  h, b, t, k = q_hbtk.shape
  tiles = tiling.tiles_by_key()
  queries = lambda h, b, step, tiles, meet: (h, b, tiles[0, step], 0)
  keys = lambda h, b, step, tiles, meet: (h, b, tiles[1, step], 0)
  whole = lambda h, b, step, tiles, meet: (h, b, tiles[5, step], 0)
  head = lambda h, b, step, tiles, meet: (h, 0, 0)
  bq, bk = tiling.block_q, tiling.block_k
  block_q = pl.BlockSpec((None, None, bq, k), queries)
  block_k = pl.BlockSpec((None, None, bk, k), keys)
  row = pl.BlockSpec((None, None, 1, bq), lambda h, b, step, tiles, meet: (h, b, 0, tiles[0, step]))
  # Buffered once: they change with the head only, and are the largest things here.
  relative = pl.BlockSpec((None, tiling.distances, k), head, pipeline_mode=pl.Buffered(1))
  bias = pl.BlockSpec((None, 1, k), head)
  segments = [None, None]
  if segments_b1t is not None:
    segments = [pl.BlockSpec((None, 1, bq), lambda h, b, step, tiles, meet: (b, 0, tiles[0, step])),
                pl.BlockSpec((None, 1, bk), lambda h, b, step, tiles, meet: (b, 0, tiles[1, step]))]
  size = q_hbtk.dtype.itemsize
  pairs = h * b * tiles.shape[1] * bq * bk
  like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  bias_shape = jax.ShapeDtypeStruct((h, 1, k), jnp.float32)
  return pl.pallas_call(
      functools.partial(_kernel, tiling=tiling, divisor=divisor),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2,
          grid=(h, b, tiles.shape[1]),
          in_specs=[block_q, block_k, block_k, relative, bias, bias, *segments, row, row, block_q],
          out_specs=[pl.BlockSpec((None, None, bq, k), whole), block_k, block_k, relative, bias,
                     bias],
          scratch_shapes=[pltpu.VMEM((t, k), jnp.float32), pltpu.VMEM((bk, k), jnp.float32),
                          pltpu.VMEM((bk, k), jnp.float32)]),
      out_shape=[like(q_hbtk), like(k_hbtk), like(v_hbtk),
                 jax.ShapeDtypeStruct(r_hnk.shape, jnp.float32), bias_shape, bias_shape],
      # The gradient of r sums over sequences, so one core must see all of a head's.
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary", "arbitrary"),
          vmem_limit_bytes=blocks.VMEM_LIMIT),
      cost_estimate=pl.CostEstimate(
          flops=2 * k * pairs * (5 * bk + 3 * tiling.window) // bk,
          bytes_accessed=(h * b * (5 * t + 2 * tiles.shape[1] * bq) * k * size
                          + h * tiling.distances * k * (size + 4)),
          transcendentals=pairs),
      interpret=interpret,
      name="relative_attention_backward",
  )(tiles, blocks.meetings(tiles, segments_b1t, b, tiling), q_hbtk, k_hbtk, v_hbtk, r_hnk,
    u_h1k, v_h1k, segments_b1t, segments_b1t, logsumexp_hb1t, delta_hb1t, grad_hbtk)
