"""The backward kernel of `relative_tpu`: every gradient from one recomputation of the scores."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from chinchilla_jax.kernels import relative_tpu_blocks as blocks
from chinchilla_jax.kernels.relative_tpu_blocks import Tiling


def _kernel(tiles_ref, q_ref, k_ref, value_ref, r_ref, u_ref, v_ref, segments_q_ref,
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

  q_qk, k_sk, grad_qk = q_ref[...], k_ref[...], grad_ref[...]
  content_qk = blocks.biased(q_qk, u_ref[...], divisor)
  position_qk = blocks.biased(q_qk, v_ref[...], divisor)
  scores_qs = blocks.scores(content_qk, position_qk, k_sk, r_ref, tiling, i, j)
  of_q, of_s = None, None
  if segments_q_ref is not None:
    of_q, of_s = blocks.column(segments_q_ref[...]), segments_s_ref[...]
  scores_qs = blocks.mask(scores_qs, of_q, of_s, tiling, i, j)
  column = lambda ref: blocks.spread(blocks.column(ref[...]), tiling.block_k)
  weights_qs = jnp.exp(scores_qs - column(logsumexp_ref))
  dvalue_sk[...] += blocks.dot(weights_qs.astype(grad_qk.dtype), grad_qk, 0, 0)
  dweights_qs = blocks.dot(grad_qk, value_ref[...], 1, 1)
  dscores_qs = weights_qs * (dweights_qs - column(delta_ref))
  low_qs = dscores_qs.astype(q_qk.dtype)
  dk_sk[...] += blocks.dot(low_qs, content_qk, 0, 0)
  # What reaches q + u by the content term is the gradient of u; by the position term, of v.
  dq_qk = blocks.dot(low_qs, k_sk, 1, 0)
  du_ref[...] += jnp.sum(dq_qk, axis=0, keepdims=True)
  dv_1k = jnp.zeros_like(du_ref)
  by_position = []
  for part in range(tiling.block_q // tiling.rows):
    rows = slice(part * tiling.rows, (part + 1) * tiling.rows)
    window = pl.ds(tiling.window_start(i, j, part), tiling.window)
    dproduct_qw = blocks.unshift(dscores_qs[rows], tiling).astype(q_qk.dtype)
    by_position.append(blocks.dot(dproduct_qw, r_ref[window, :], 1, 0))
    dv_1k += jnp.sum(by_position[-1], axis=0, keepdims=True)
    dr_ref[window, :] += blocks.dot(dproduct_qw, position_qk[rows], 0, 0)
  dv_ref[...] += dv_1k
  of_block = pl.ds(pl.multiple_of(i * tiling.block_q, tiling.block_q), tiling.block_q)
  dq_tk[of_block, :] += dq_qk + jnp.concatenate(by_position, axis=0)

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
  queries = lambda h, b, step, tiles: (h, b, tiles[0, step], 0)
  keys = lambda h, b, step, tiles: (h, b, tiles[1, step], 0)
  whole = lambda h, b, step, tiles: (h, b, tiles[5, step], 0)
  head = lambda h, b, step, tiles: (h, 0, 0)
  bq, bk = tiling.block_q, tiling.block_k
  block_q = pl.BlockSpec((None, None, bq, k), queries)
  block_k = pl.BlockSpec((None, None, bk, k), keys)
  row = pl.BlockSpec((None, None, 1, bq), lambda h, b, step, tiles: (h, b, 0, tiles[0, step]))
  # Buffered once: they change with the head only, and are the largest things here.
  relative = pl.BlockSpec((None, tiling.distances, k), head, pipeline_mode=pl.Buffered(1))
  bias = pl.BlockSpec((None, 1, k), head)
  segments = [None, None]
  if segments_b1t is not None:
    segments = [pl.BlockSpec((None, 1, bq), lambda h, b, step, tiles: (b, 0, tiles[0, step])),
                pl.BlockSpec((None, 1, bk), lambda h, b, step, tiles: (b, 0, tiles[1, step]))]
  size = q_hbtk.dtype.itemsize
  pairs = h * b * tiles.shape[1] * bq * bk
  like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  bias_shape = jax.ShapeDtypeStruct((h, 1, k), jnp.float32)
  return pl.pallas_call(
      functools.partial(_kernel, tiling=tiling, divisor=divisor),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1,
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
  )(tiles, q_hbtk, k_hbtk, v_hbtk, r_hnk, u_h1k, v_h1k, segments_b1t, segments_b1t,
    logsumexp_hb1t, delta_hb1t, grad_hbtk)
