"""Causal attention with relative (Transformer-XL) or rotary positions, and its KV cache.

Scores are made for a block of query rows at a time and against no key after the block, so
about half of the T x T pairs are never computed; the backward pass makes them again block by
block, so no array of T x T scores is ever kept. Softmax is float32.

Relative attention is Dai et al. 2019, section 3.3, per head and per layer:

  score(i, j) = ((q_i + u) . k_j + (q_i + v) . W_r R_(i-j)) / sqrt(kv_size)

with R_n the sinusoid of distance n (muP divides by another number: `parametrisation`).
(q_i + v) . W_r R_n is made for all n with one product, and row i of it is then moved so that
column j holds distance i - j: see `_shift`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from chinchilla_jax import config as schema
from chinchilla_jax.model import parametrisation
from chinchilla_jax.model.layers import DENSE, RMSNorm, add, dense, weight, zeros
from chinchilla_jax.model.placement import WHOLE, Placement, Rows
from chinchilla_jax.model.products import product

MIXED = "attention_mixed"  # what remat policies call the values mixed by attention
_MASKED = -1e30  # finite, so that a gradient through it is 0 and not NaN


class Layer(NamedTuple):
  """One layer's part of a KV cache of length S: a row per position, and the relative keys."""

  key_hbsk: jax.Array
  value_hbsk: jax.Array
  relative_hnk: jax.Array | None  # W_r R_n for n = S ... 0; None with rotary positions


def sinusoid(distances_n: jax.Array, d_model: int) -> jax.Array:
  """R_dn, float32: sines in the first half, cosines in the second (Dai et al.'s code).

  Vaswani et al. 2017, section 3.5, interleave them; W_r makes the two the same model.
  """
  frequency_d = 10_000.0 ** (-jnp.arange(0, d_model, 2, dtype=jnp.float32) / d_model)
  angle_dn = frequency_d[:, None] * distances_n.astype(jnp.float32)[None, :]
  return jnp.concatenate([jnp.sin(angle_dn), jnp.cos(angle_dn)], axis=0)


def rotate(x_hbtk: jax.Array, positions_t: jax.Array, base: float) -> jax.Array:
  """Rotary position embedding (Su et al. 2021) in its half-split form.

  Dimension i is paired with i + kv_size / 2, as in GPT-NeoX and Llama; the paper pairs 2i with
  2i + 1. The two differ by a permutation of the columns of W_q and W_k.
  """
  half = x_hbtk.shape[-1] // 2
  frequency_k = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_tk = positions_t.astype(jnp.float32)[:, None] * frequency_k[None, :]
  cos, sin = jnp.cos(angle_tk)[None, None], jnp.sin(angle_tk)[None, None]
  first, second = jnp.split(x_hbtk.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x_hbtk.dtype)


def _shift(scores_hbcn: jax.Array) -> jax.Array:
  """Moves row i of a block's C rows left by C - i: (..., C, S + 1) to (..., C, S).

  Going in, column m holds distance (block's last row) + 1 - m. Coming out, column j holds
  distance i - j. What row i lost at its start appears at the end of row i - 1, where the key is
  later than the query: the mask covers it. Reading the rows as one line and dropping its first
  C numbers does just this, with one copy and no gather (Dai et al. 2019, appendix B).
  """
  *batch, c, n = scores_hbcn.shape
  return scores_hbcn.reshape(*batch, c * n)[..., c:].reshape(*batch, c, n - 1)


def _position_scores(q_hbck, r_hnk):
  if r_hnk.ndim == 3:
    return _shift(product("hbck,hnk->hbcn", q_hbck, r_hnk, jnp.float32))
  h, b, _, k = q_hbck.shape
  # `_shift` moves numbers from row to row: it must not cross from one device's rows to another's.
  q_hbgck = q_hbck.reshape(h, b, r_hnk.shape[1], -1, k)
  scores_hbgcs = _shift(product("hbgck,hgnk->hbgcn", q_hbgck, r_hnk, jnp.float32))
  return scores_hbgcs.reshape(h, b, -1, scores_hbgcs.shape[-1])


def scores(q_hbck: jax.Array, k_hbsk: jax.Array, relative) -> jax.Array:
  """Float32 scores_hbcs before division and mask; arguments as those of `_attend`."""
  q_content = q_hbck
  if relative is not None:
    r_hnk, u_hk, v_hk = relative
    q_content = add(q_hbck, u_hk[:, None, None])
  scores_hbcs = product("hbck,hbsk->hbcs", q_content, k_hbsk, jnp.float32)
  if relative is not None:
    q_position = add(q_hbck, v_hk[:, None, None])
    scores_hbcs += _position_scores(q_position, r_hnk)
  return scores_hbcs


def _attend(divisor, q_hbck, k_hbsk, v_hbsk, mask_bcs, relative):
  """Attention of one block of C query rows over S keys.

  Args:
    divisor: of the scores, a constant.
    q_hbck, k_hbsk, v_hbsk: queries, keys, values in the activation dtype.
    mask_bcs: who sees whom; a batch axis of 1 where every sequence has the same mask. Every
      row sees something.
    relative: (r_hnk, u_hk, v_hk), r for the S + 1 distances that `_shift` asks for; or None.
      r_hgnk where the rows are cut among g devices: each has the distances of its own rows.

  Returns:
    Values mixed by the softmax, out_hbck.
  """
  scores_hbcs = scores(q_hbck, k_hbsk, relative)
  scores_hbcs = jnp.where(mask_bcs[None], scores_hbcs / divisor, _MASKED)
  top_hbc = jax.lax.stop_gradient(jnp.max(scores_hbcs, axis=-1, keepdims=True))
  weights_hbcs = jnp.exp(scores_hbcs - top_hbc)
  # Dividing the mixed values, not the weights, saves a pass over the scores in each direction.
  total_hbc = jnp.sum(weights_hbcs, axis=-1, keepdims=True)
  mixed_hbck = product("hbcs,hbsk->hbck", weights_hbcs.astype(v_hbsk.dtype), v_hbsk, jnp.float32)
  return (mixed_hbck / total_hbc).astype(q_hbck.dtype)


class Attention(nnx.Module):
  """Multi-head attention; kv_size per head is independent of d_model // n_heads.

  Query, key, value and relative-key projections have no bias, the output projection has one.
  `qk_norm` normalises queries (before u and v are added) and keys, not relative keys.
  """

  def __init__(self, config: schema.Model, key: jax.Array):
    d, h, k = config.d_model, config.n_heads, config.kv_size
    keys = jax.random.split(key, 5)
    inward = functools.partial(weight, shape=(d, h, k), logical=("embed", "heads", "head_dim"),
                               fan_in=d, config=config)
    self.w_query, self.w_key, self.w_value = map(inward, keys[:3])
    self.w_out = weight(keys[3], (h, k, d), ("heads", "head_dim", "embed"), fan_in=h * k,
                        config=config, residual=True)
    self.bias_out = zeros((d,), ("embed",))
    if config.position == "relative":
      self.w_relative = inward(keys[4])
      self.u = zeros((h, k), ("heads", "head_dim"))
      self.v = zeros((h, k), ("heads", "head_dim"))
    if config.qk_norm:
      self.query_norm = RMSNorm(k, "head_dim", config)
      self.key_norm = RMSNorm(k, "head_dim", config)
    self.config = config
    self.divisor = parametrisation.score_divisor(config)

  def __call__(self, x_btd: jax.Array, segments_bt: jax.Array | None,
               placement: Placement = WHOLE) -> jax.Array:
    """Each position attends to itself and to earlier positions of its own segment.

    With `placement.shards("length")` above 1 the tokens come in the order of `Rows`.
    """
    t = x_btd.shape[1]
    rows = Rows.of(t, placement.shards("length"), self.config.attention_block)
    q_hbtk, k_hbtk, v_hbtk = self._project(x_btd, jnp.asarray(rows.positions(t)))
    q_hbtk = placement.constrain(q_hbtk, ("heads", "batch", "length", None))
    k_hbtk, v_hbtk = (
        rows.collect(placement.constrain(x, ("heads", "batch", "keys", None)), axis=2)
        for x in (k_hbtk, v_hbtk))
    if segments_bt is not None:
      segments_bt = rows.collect(placement.constrain(segments_bt, ("batch", "keys")), axis=1)
    r_hnk = self.relative_keys(t, x_btd.dtype)
    if placement.attend is not None:
      relative = None if r_hnk is None else (r_hnk, *self._u_v())
      mixed_hbtk = placement.attend(q_hbtk, k_hbtk, v_hbtk, relative, segments_bt, self.divisor,
                                    MIXED)
    else:
      mixed_hbtk = checkpoint_name(self._blockwise(q_hbtk, k_hbtk, v_hbtk, r_hnk, segments_bt,
                                                   rows, placement), MIXED)
    mixed_hbtk = placement.constrain(mixed_hbtk, ("heads", "batch", "length", None))
    return self._output(mixed_hbtk)

  def _blockwise(self, q_hbtk, k_hbtk, v_hbtk, r_hnk, segments_bt, rows: Rows,
                 placement: Placement):
    """Attention in rounds of rows; keys, values and segments in the order of the text."""
    t = q_hbtk.shape[2]
    position_t = jnp.arange(t)
    attend = jax.checkpoint(functools.partial(_attend, self.divisor))
    turns = []
    for turn in range(rows.rounds):
      start = turn * rows.groups * rows.block
      stop = min(start + rows.groups * rows.block, t)
      mask = position_t[None, start:stop, None] >= position_t[None, None, :stop]
      if segments_bt is not None:
        mask &= segments_bt[:, start:stop, None] == segments_bt[:, None, :stop]
      relative = None
      if r_hnk is not None:
        relative = (self._distances(r_hnk, rows, start, stop, placement), *self._u_v())
      turns.append(attend(rows.take(q_hbtk, 2, turn), k_hbtk[:, :, :stop], v_hbtk[:, :, :stop],
                          mask, relative))
    return rows.join(turns, axis=2)

  def decode(self, x_btd: jax.Array, cache: Layer, position: jax.Array,
             context: int | None) -> tuple[jax.Array, Layer]:
    """Attention of T new tokens over a cache and themselves.

    Args:
      x_btd: T tokens at `position`, `position` + 1, ...
      cache: of length S, filled before `position`.
      position: int32 scalar, may be traced; position + T must not exceed S.
      context: a token sees at most this many, itself included; None for all.

    Returns:
      (out_btd, cache with the new rows).
    """
    t, s = x_btd.shape[1], cache.key_hbsk.shape[2]
    position_t = position + jnp.arange(t)
    q_hbtk, k_hbtk, v_hbtk = self._project(x_btd, position_t)
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=position, axis=2)
    cache = cache._replace(key_hbsk=write(cache.key_hbsk, k_hbtk),
                           value_hbsk=write(cache.value_hbsk, v_hbtk))
    r_hnk = cache.relative_hnk
    if r_hnk is not None:  # the S keys after the newest one have no distance: masked, so zeros do
      r_hnk = jnp.pad(r_hnk, ((0, 0), (0, s), (0, 0)))
    size = self.config.attention_block or t
    blocks = []
    for start in range(0, t, size):
      stop = min(start + size, t)
      distance_cs = position_t[start:stop, None] - jnp.arange(s)[None, :]
      mask_cs = distance_cs >= 0
      if context is not None:
        mask_cs &= distance_cs < context
      relative = None
      if r_hnk is not None:
        first = s - position - stop  # of the rows: the distance from the block's end to key -1
        window_hnk = jax.lax.dynamic_slice_in_dim(r_hnk, first, s + 1, axis=1)
        relative = (window_hnk, *self._u_v())
      blocks.append(_attend(self.divisor, q_hbtk[:, :, start:stop], cache.key_hbsk,
                            cache.value_hbsk, mask_cs[None], relative))
    return self._output(jnp.concatenate(blocks, axis=2)), cache

  def relative_keys(self, longest: int, dtype: jax.typing.DTypeLike) -> jax.Array | None:
    """W_r R_n for n = longest ... 0 as r_hnk; None with rotary positions."""
    if self.config.position != "relative":
      return None
    # d before n: XLA's CPU backend cannot multiply the gradient of "nd,dhk->hnk" in bfloat16 to
    # float32 (JAX 0.10 to 0.12).
    signal_dn = sinusoid(jnp.arange(longest, -1, -1), self.config.d_model).astype(dtype)
    return dense("dn,dhk->hnk", signal_dn, self.w_relative)

  def _project(self, x_btd, position_t):
    """Queries, keys and values, normalised and rotated where the config says so."""
    rotary = self.config.position == "rotary"
    # What a rotation is given, its gradient does not need: what it gives is saved in its place.
    early = rotary and not self.config.qk_norm
    # As the product makes them, then moved: XLA's CPU backend would move its operands instead.
    project = lambda w, saved: jnp.moveaxis(dense("btd,dhk->bthk", x_btd, w, saved), 2, 0)
    q_hbtk, k_hbtk = project(self.w_query, not early), project(self.w_key, not early)
    v_hbtk = project(self.w_value, True)
    if self.config.qk_norm:
      q_hbtk, k_hbtk = self.query_norm(q_hbtk), self.key_norm(k_hbtk)
    if rotary:
      q_hbtk, k_hbtk = (rotate(x, position_t, self.config.rotary_base) for x in (q_hbtk, k_hbtk))
    if early:
      q_hbtk, k_hbtk = (checkpoint_name(x, DENSE) for x in (q_hbtk, k_hbtk))
    return q_hbtk, k_hbtk, v_hbtk

  def _distances(self, r_hnk, rows: Rows, start: int, stop: int, placement: Placement):
    """The relative keys that rows start ... stop - 1 need: see `_shift`.

    Each device's rows g are a block of their own, whose last row is start + (g + 1) * block - 1;
    the keys after it have negative distances, which are masked, so zeros do.
    """
    longest = r_hnk.shape[1] - 1
    if rows.groups == 1:
      return r_hnk[:, longest - stop:]
    r_hnk = jnp.pad(r_hnk, ((0, 0), (0, (rows.groups - 1) * rows.block), (0, 0)))
    first_g = longest - start - rows.block * (1 + jnp.arange(rows.groups))
    first_g = placement.constrain(first_g, ("length",))
    window = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=stop + 1, axis=1)
    r_hgnk = jax.vmap(window, in_axes=(None, 0), out_axes=1)(r_hnk, first_g)
    return placement.constrain(r_hgnk, ("heads", "length", None, None))

  def _u_v(self):
    return self.u[...], self.v[...]

  def _output(self, mixed_hbtk):
    out_btd = dense("bthk,hkd->btd", jnp.moveaxis(mixed_hbtk, 0, 2), self.w_out)
    return add(out_btd, self.bias_out[...][None, None])
