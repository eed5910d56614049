"""Attention block by block of query rows, in plain JAX: no T x T scores, none above the diagonal.

Scores are made for a block of rows at a time and against no key after the block, so about half of
the T x T pairs are never computed. The backward pass makes them again from what the forward pass
left: the mixed values and the logarithm of each row's sum of exponentials (Dao et al. 2022,
FlashAttention, section 3.1 and appendix B), so a row is neither searched for its largest score
nor summed a second time. Softmax is float32.

Relative attention is Dai et al. 2019, section 3.3, per head and per layer:

  score(i, j) = ((q_i + u) . k_j + (q_i + v) . W_r R_(i-j)) / sqrt(kv_size)

with R_n the sinusoid of distance n (muP divides by another number: `parametrisation`).
(q_i + v) . W_r R_n is made for all n with one product, and row i of it is then moved so that
column j holds distance i - j: see `shift`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from chinchilla_jax.model.layers import add
from chinchilla_jax.model.placement import Placement, Rows
from chinchilla_jax.model.products import over_rows, product

_MASKED = -1e30  # finite, so that a row's largest score less a masked one is a number


def shift(scores_hbcn: jax.Array) -> jax.Array:
  """Moves row i of a block's C rows left by C - i: (..., C, S + 1) to (..., C, S).

  Going in, column m holds distance (block's last row) + 1 - m. Coming out, column j holds
  distance i - j. What row i lost at its start appears at the end of row i - 1, where the key is
  later than the query: the mask covers it. Reading the rows as one line and dropping its first
  C numbers does just this, with one copy and no gather (Dai et al. 2019, appendix B).
  """
  *batch, c, n = scores_hbcn.shape
  return scores_hbcn.reshape(*batch, c * n)[..., c:].reshape(*batch, c, n - 1)


def _content_queries(q_hbck, relative):
  return q_hbck if relative is None else add(q_hbck, relative[1][:, None, None])


def _position_scores(q_hbck, r_hnk, u_hk, v_hk):
  del u_hk
  q_hbck = add(q_hbck, v_hk[:, None, None])
  if r_hnk.ndim == 3:
    return shift(product("hbck,hnk->hbcn", q_hbck, r_hnk, jnp.float32))
  h, b, _, k = q_hbck.shape
  # `shift` moves numbers from row to row: it must not cross from one device's rows to another's.
  q_hbgck = q_hbck.reshape(h, b, r_hnk.shape[1], -1, k)
  scores_hbgcs = shift(product("hbgck,hgnk->hbgcn", q_hbgck, r_hnk, jnp.float32))
  return scores_hbgcs.reshape(h, b, -1, scores_hbgcs.shape[-1])


def scores(q_hbck: jax.Array, k_hbsk: jax.Array, relative) -> jax.Array:
  """Float32 scores_hbcs before division and mask; arguments as those of `attend_rows`."""
  scores_hbcs = product("hbck,hbsk->hbcs", _content_queries(q_hbck, relative), k_hbsk, jnp.float32)
  return scores_hbcs if relative is None else scores_hbcs + _position_scores(q_hbck, *relative)


def _masked(scores_hbcs, mask_bcs, divisor):
  return jnp.where(mask_bcs[None], scores_hbcs / divisor, _MASKED)


def attend_rows(divisor, q_hbck, k_hbsk, v_hbsk, mask_bcs, relative):
  """Attention of one block of C query rows over S keys.

  Args:
    divisor: of the scores, a constant.
    q_hbck, k_hbsk, v_hbsk: queries, keys, values in the activation dtype.
    mask_bcs: who sees whom; a batch axis of 1 where every sequence has the same mask. Every
      row sees something.
    relative: (r_hnk, u_hk, v_hk), r for the S + 1 distances that `shift` asks for; or None.
      r_hgnk where the rows are cut among g devices: each has the distances of its own rows.

  Returns:
    (out_hbck, logsumexp_hbc): values mixed by the softmax; float32.
  """
  scores_hbcs = _masked(scores(q_hbck, k_hbsk, relative), mask_bcs, divisor)
  top_hbc = jax.lax.stop_gradient(jnp.max(scores_hbcs, axis=-1, keepdims=True))
  weights_hbcs = jnp.exp(scores_hbcs - top_hbc)
  # Dividing the mixed values, not the weights, saves a pass over the scores.
  total_hbc = jnp.sum(weights_hbcs, axis=-1, keepdims=True)
  mixed_hbck = product("hbcs,hbsk->hbck", weights_hbcs.astype(v_hbsk.dtype), v_hbsk, jnp.float32)
  out_hbck = (mixed_hbck / total_hbc).astype(q_hbck.dtype)
  return out_hbck, (top_hbc + jnp.log(total_hbc))[..., 0]


class How(NamedTuple):
  """What is known when `attend` is compiled.

  Attributes:
    divisor: of the scores.
    rows: in which blocks.
    placement: over devices.
    name: by which remat policies save what was mixed.
  """

  divisor: float
  rows: Rows
  placement: Placement
  name: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(how: How, q_hbtk, k_hbtk, v_hbtk, relative, segments_bt):
  """Causal attention of whole sequences, out_hbtk.

  Args:
    how: see `How`.
    q_hbtk: queries in the order of the devices (`Rows`).
    k_hbtk, v_hbtk: keys and values in the order of the text.
    relative: (r_hnk, u_hk, v_hk), r for the distances T ... 0; or None.
    segments_bt: int, in the order of the text; a row sees only keys of its own segment. Or None.
  """
  return _forward(how, q_hbtk, k_hbtk, v_hbtk, relative, segments_bt)[0]


def _forward(how, q_hbtk, k_hbtk, v_hbtk, relative, segments_bt):
  turns = []
  for turn in range(how.rows.rounds):
    start, stop = how.rows.span(turn, q_hbtk.shape[2])
    turns.append(attend_rows(
        how.divisor, how.rows.take(q_hbtk, 2, turn), k_hbtk[:, :, :stop], v_hbtk[:, :, :stop],
        _mask(segments_bt, start, stop), _of_rows(how, relative, start, stop)))
  out_hbtk, logsumexp_hbt = (how.rows.join(parts, axis=2) for parts in zip(*turns, strict=True))
  # Both, or the backward pass of a policy that saves one would run all of this for the other.
  out_hbtk, logsumexp_hbt = (checkpoint_name(x, how.name) for x in (out_hbtk, logsumexp_hbt))
  return out_hbtk, (q_hbtk, k_hbtk, v_hbtk, relative, segments_bt, out_hbtk, logsumexp_hbt)


def _backward(how, saved, d_out_hbtk):
  q_hbtk, k_hbtk, v_hbtk, relative, segments_bt, out_hbtk, logsumexp_hbt = saved
  # Of every row the sum of weight times its gradient: the same as out times the gradient of out.
  inner_hbt = jnp.sum(d_out_hbtk.astype(jnp.float32) * out_hbtk.astype(jnp.float32), axis=-1)
  d_q, d_k_hbkt, d_v_hbkt, d_relative = [], None, None, None
  for turn in reversed(range(how.rows.rounds)):  # The last block has all keys.
    start, stop = how.rows.span(turn, q_hbtk.shape[2])
    take = functools.partial(how.rows.take, axis=2, turn=turn)
    k_hbsk, v_hbsk, d_out_hbck = k_hbtk[:, :, :stop], v_hbtk[:, :, :stop], take(d_out_hbtk)
    q_content_hbck, pull_content = jax.vjp(_content_queries, take(q_hbtk), relative)
    scores_hbcs = product("hbck,hbsk->hbcs", q_content_hbck, k_hbsk, jnp.float32)
    if relative is not None:
      position_hbcs, pull_position = jax.vjp(
          lambda q, relative, start=start, stop=stop: _position_scores(
              q, *_of_rows(how, relative, start, stop)), take(q_hbtk), relative)
      scores_hbcs += position_hbcs
    weights_hbcs = jnp.exp(_masked(scores_hbcs, _mask(segments_bt, start, stop), how.divisor)
                           - take(logsumexp_hbt)[..., None])
    d_weights_hbcs = product("hbck,hbsk->hbcs", d_out_hbck, v_hbsk, jnp.float32)
    d_scores_hbcs = weights_hbcs * (d_weights_hbcs - take(inner_hbt)[..., None]) / how.divisor
    rounded_hbcs = d_scores_hbcs.astype(q_hbtk.dtype)
    d_q_hbck, d_relative_here = pull_content(product("hbcs,hbsk->hbck", rounded_hbcs, k_hbsk))
    if relative is not None:
      d_q_position_hbck, d_relative_position = pull_position(d_scores_hbcs)
      d_q_hbck += d_q_position_hbck
      d_relative_here = jax.tree.map(jnp.add, d_relative_here, d_relative_position)
    d_q.insert(0, d_q_hbck)
    # Keys last, as the products make them: they are turned once, when all is added up.
    d_k_hbkt = _add_up(d_k_hbkt, over_rows("hbcs,hbck->hbks", rounded_hbcs, q_content_hbck,
                                           jnp.float32))
    d_v_hbkt = _add_up(d_v_hbkt, over_rows("hbcs,hbck->hbks", weights_hbcs.astype(v_hbtk.dtype),
                                           d_out_hbck, jnp.float32))
    d_relative = (d_relative_here if d_relative is None else
                  jax.tree.map(jnp.add, d_relative, d_relative_here))
  d_k_hbtk, d_v_hbtk = (jnp.moveaxis(x.astype(k_hbtk.dtype), -1, -2) for x in (d_k_hbkt, d_v_hbkt))
  return how.rows.join(d_q, axis=2), d_k_hbtk, d_v_hbtk, d_relative, None


attend.defvjp(_forward, _backward)


def _add_up(sum_hbkt: jax.Array | None, part_hbks: jax.Array) -> jax.Array:
  """Adds to the first S keys. XLA does that in place; padded parts it would write out first."""
  if sum_hbkt is None:
    return part_hbks
  first = sum_hbkt[..., :part_hbks.shape[-1]] + part_hbks
  return jax.lax.dynamic_update_slice_in_dim(sum_hbkt, first, 0, axis=-1)


def _mask(segments_bt, start: int, stop: int) -> jax.Array:
  """mask_bcs of rows start ... stop - 1 over keys 0 ... stop - 1, all in the order of the text."""
  position_t = jnp.arange(stop)
  mask = position_t[None, start:, None] >= position_t[None, None, :]
  if segments_bt is not None:
    mask &= segments_bt[:, start:stop, None] == segments_bt[:, None, :stop]
  return mask


def _of_rows(how: How, relative: Any, start: int, stop: int):
  """`relative` with the keys that rows start ... stop - 1 need: see `shift`.

  Each device's rows g are a block of their own, whose last row is start + (g + 1) * block - 1;
  the keys after it have negative distances, which are masked, so zeros do.
  """
  if relative is None:
    return None
  (r_hnk, *u_v), rows = relative, how.rows
  longest = r_hnk.shape[1] - 1
  if rows.groups == 1:
    return r_hnk[:, longest - stop:], *u_v
  r_hnk = jnp.pad(r_hnk, ((0, 0), (0, (rows.groups - 1) * rows.block), (0, 0)))
  first_g = longest - start - rows.block * (1 + jnp.arange(rows.groups))
  first_g = how.placement.constrain(first_g, ("length",))
  window = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=stop + 1, axis=1)
  r_hgnk = jax.vmap(window, in_axes=(None, 0), out_axes=1)(r_hnk, first_g)
  return how.placement.constrain(r_hgnk, ("heads", "length", None, None)), *u_v
