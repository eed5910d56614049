"""The forward kernel of `relative_tpu`: one pass over the tiles, with a running softmax."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from chinchilla_jax.kernels import relative_tpu_blocks as blocks
from chinchilla_jax.kernels.relative_tpu_blocks import Tiling


def _kernel(tiles_ref, meet_ref, q_ref, k_ref, value_ref, r_ref, u_ref, v_ref, segments_q_ref,
            segments_s_ref, out_ref, logsumexp_ref, content_qk, position_qk, segments_ql, top_ql,
            total_ql, mixed_qk, *, tiling: Tiling, divisor: float):
  step = pl.program_id(2)
  i, j, first, last = (tiles_ref[n, step] for n in range(4))

  @pl.when(first == 1)
  def _():
    content_qk[...] = blocks.biased(q_ref[...], u_ref[...], divisor)
    position_qk[...] = blocks.biased(q_ref[...], v_ref[...], divisor)
    if segments_q_ref is not None:
      segments_ql[...] = blocks.column(segments_q_ref[...])
    top_ql[...] = jnp.full_like(top_ql, blocks.MASKED)
    total_ql[...] = jnp.zeros_like(total_ql)
    mixed_qk[...] = jnp.zeros_like(mixed_qk)

  @pl.when(meet_ref[pl.program_id(1) * pl.num_programs(2) + step] == 1)
  def _():
    by_position = [
        blocks.position_scores(position_qk[rows], r_ref[tiling.window_of(i, j, part), :], tiling)
        for part, rows in tiling.parts]
    scores_qs = (blocks.dot(content_qk[...], k_ref[...], 1, 1)
                 + jnp.concatenate(by_position, axis=0))
    of_q, of_s = (None, None) if segments_q_ref is None else (segments_ql[...], segments_s_ref[...])
    ahead = j * tiling.block_k - i * tiling.block_q
    scores_qs = blocks.mask(scores_qs, ahead, of_q, of_s)
    # A row that has seen no key of its document yet mixes what it must not; the first key that it
    # may see, at the latest its own, takes all of that away again: exp(MASKED - score) is 0.
    before_ql = top_ql[...]
    now_ql = jnp.maximum(before_ql, jnp.max(scores_qs, axis=1, keepdims=True))
    fade_ql = jnp.exp(before_ql - now_ql)
    weights_qs = jnp.exp(scores_qs - blocks.spread(now_ql, tiling.block_k))
    top_ql[...] = now_ql
    total_ql[...] = total_ql[...] * fade_ql + jnp.sum(weights_qs, axis=1, keepdims=True)
    values_sk = value_ref[...]
    mixed_qk[...] = (mixed_qk[...] * blocks.spread(fade_ql, mixed_qk.shape[1])
                     + blocks.dot(weights_qs.astype(values_sk.dtype), values_sk, 1, 0))

  @pl.when(last == 1)
  def _():
    total_qk = blocks.spread(total_ql[...], mixed_qk.shape[1])
    out_ref[...] = (mixed_qk[...] / total_qk).astype(out_ref.dtype)
    logsumexp_ref[...] = blocks.row(top_ql[...] + jnp.log(total_ql[...]))


def forward(q_hbtk, k_hbtk, v_hbtk, r_hnk, u_h1k, v_h1k, segments_b1t, *, tiling: Tiling,
            divisor: float, interpret: bool) -> tuple[jax.Array, jax.Array]:
  """Attention over whole tiles.

  Args:
    q_hbtk, k_hbtk, v_hbtk: t is `tiling.length`.
    r_hnk: n is `tiling.distances`, the first of them that of distance `tiling.length`.
    u_h1k, v_h1k: float32.
    segments_b1t: int32 or None.

  Returns:
    (out_hbtk in the dtype of q, the scores' logsumexp_hb1t in float32)
  """
  h, b, t, k = q_hbtk.shape
  tiles = tiling.tiles()
  queries = lambda h, b, step, tiles, meet: (h, b, tiles[0, step], 0)
  keys = lambda h, b, step, tiles, meet: (h, b, tiles[1, step], 0)
  head = lambda h, b, step, tiles, meet: (h, 0, 0)
  bq, bk = tiling.block_q, tiling.block_k
  block_q = pl.BlockSpec((None, None, bq, k), queries)
  block_k = pl.BlockSpec((None, None, bk, k), keys)
  relative = pl.BlockSpec((None, tiling.distances, k), head, pipeline_mode=pl.Buffered(1))
  bias = pl.BlockSpec((None, 1, k), head)
  segments = [None, None]
  if segments_b1t is not None:
    segments = [pl.BlockSpec((None, 1, bq), lambda h, b, step, tiles, meet: (b, 0, tiles[0, step])),
                pl.BlockSpec((None, 1, bk), lambda h, b, step, tiles, meet: (b, 0, tiles[1, step]))]
  size = q_hbtk.dtype.itemsize
  pairs = h * b * tiles.shape[1] * bq * bk
  column = pltpu.VMEM((bq, blocks.LANES), jnp.float32)
  return pl.pallas_call(
      functools.partial(_kernel, tiling=tiling, divisor=divisor),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2,
          grid=(h, b, tiles.shape[1]),
          in_specs=[block_q, block_k, block_k, relative, bias, bias, *segments],
          out_specs=[block_q, pl.BlockSpec((None, None, 1, bq), lambda h, b, step, tiles, meet:
                                           (h, b, 0, tiles[0, step]))],
          scratch_shapes=[pltpu.VMEM((bq, k), q_hbtk.dtype), pltpu.VMEM((bq, k), q_hbtk.dtype),
                          pltpu.VMEM((bq, blocks.LANES), jnp.int32), column, column,
                          pltpu.VMEM((bq, k), jnp.float32)]),
      out_shape=[jax.ShapeDtypeStruct(q_hbtk.shape, q_hbtk.dtype),
                 jax.ShapeDtypeStruct((h, b, 1, t), jnp.float32)],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "parallel", "arbitrary"),
          vmem_limit_bytes=blocks.VMEM_LIMIT),
      cost_estimate=pl.CostEstimate(
          flops=2 * k * pairs * (2 * bk + tiling.window) // bk,
          bytes_accessed=size * k * (2 * h * b * (t + tiles.shape[1] * bk)
                                     + h * tiling.distances),
          transcendentals=pairs),
      interpret=interpret,
      name="relative_attention_forward",
  )(tiles, blocks.meetings(tiles, segments_b1t, b, tiling), q_hbtk, k_hbtk, v_hbtk, r_hnk,
    u_h1k, v_h1k, segments_b1t, segments_b1t)
