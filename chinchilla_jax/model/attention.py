"""Causal attention with relative (Transformer-XL) or rotary positions, and its KV cache.

Scores are made for a block of query rows at a time and against no key after the block, so
about half of the T x T pairs are never computed; the backward pass makes them again block by
block, so no array of T x T scores is ever kept. Softmax is float32.

Relative attention is Dai et al. 2019, section 3.3, per head and per layer:

  score(i, j) = ((q_i + u) . k_j + (q_i + v) . W_r R_(i-j)) / sqrt(kv_size)

with R_n the sinusoid of distance n. (q_i + v) . W_r R_n is made for all n with one product, and
row i of it is then moved so that column j holds distance i - j: see `_shift`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from chinchilla_jax import config as schema
from chinchilla_jax.model.layers import RMSNorm, einsum_float32, weight, zeros

MIXED = "attention_mixed"  # what remat policies call the values mixed by attention
_MASKED = -1e30  # finite, so that a gradient through it is 0 and not NaN


class Layer(NamedTuple):
  """One layer's part of a KV cache of length S: a row per position, and the relative keys."""

  key_bshk: jax.Array
  value_bshk: jax.Array
  relative_nhk: jax.Array | None  # W_r R_n for n = S ... 0; None with rotary positions


def sinusoid(distances_n: jax.Array, d_model: int) -> jax.Array:
  """R_nd, float32: sines in the first half, cosines in the second (Dai et al.'s code).

  Vaswani et al. 2017, section 3.5, interleave them; W_r makes the two the same model.
  """
  frequency_d = 10_000.0 ** (-jnp.arange(0, d_model, 2, dtype=jnp.float32) / d_model)
  angle_nd = distances_n.astype(jnp.float32)[:, None] * frequency_d[None, :]
  return jnp.concatenate([jnp.sin(angle_nd), jnp.cos(angle_nd)], axis=-1)


def rotate(x_bthk: jax.Array, positions_t: jax.Array, base: float) -> jax.Array:
  """Rotary position embedding (Su et al. 2021) in its half-split form.

  Dimension i is paired with i + kv_size / 2, as in GPT-NeoX and Llama; the paper pairs 2i with
  2i + 1. The two differ by a permutation of the columns of W_q and W_k.
  """
  half = x_bthk.shape[-1] // 2
  frequency_k = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_tk = positions_t.astype(jnp.float32)[:, None] * frequency_k[None, :]
  cos, sin = jnp.cos(angle_tk)[None, :, None, :], jnp.sin(angle_tk)[None, :, None, :]
  first, second = jnp.split(x_bthk.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x_bthk.dtype)


def _shift(scores_bhcn: jax.Array) -> jax.Array:
  """Moves row i of a block's C rows left by C - i: (..., C, S + 1) to (..., C, S).

  Going in, column m holds distance (block's last row) + 1 - m. Coming out, column j holds
  distance i - j. What row i lost at its start appears at the end of row i - 1, where the key is
  later than the query: the mask covers it. Reading the rows as one line and dropping its first
  C numbers does just this, with one copy and no gather (Dai et al. 2019, appendix B).
  """
  *batch, c, n = scores_bhcn.shape
  return scores_bhcn.reshape(*batch, c * n)[..., c:].reshape(*batch, c, n - 1)


def _attend(q_bchk, k_bshk, v_bshk, mask_bcs, relative):
  """Attention of one block of C query rows over S keys.

  Args:
    q_bchk, k_bshk, v_bshk: queries, keys, values in the activation dtype.
    mask_bcs: who sees whom; a batch axis of 1 where every sequence has the same mask. Every
      row sees something.
    relative: (r_nhk, u_hk, v_hk), r for the S + 1 distances that `_shift` asks for; or None.

  Returns:
    Values mixed by the softmax, out_bchk.
  """
  q_content = q_bchk
  if relative is not None:
    r_nhk, u_hk, v_hk = relative
    q_content = q_bchk + u_hk[None, None]
  scores_bhcs = einsum_float32("bchk,bshk->bhcs", q_content, k_bshk)
  if relative is not None:
    scores_bhcs += _shift(einsum_float32("bchk,nhk->bhcn", q_bchk + v_hk[None, None], r_nhk))
  scores_bhcs = jnp.where(mask_bcs[:, None], scores_bhcs / math.sqrt(q_bchk.shape[-1]), _MASKED)
  top_bhc = jax.lax.stop_gradient(jnp.max(scores_bhcs, axis=-1, keepdims=True))
  weights_bhcs = jnp.exp(scores_bhcs - top_bhc)
  # Dividing the mixed values, not the weights, saves a pass over the scores in each direction.
  total_bch = jnp.swapaxes(jnp.sum(weights_bhcs, axis=-1), 1, 2)
  mixed_bchk = einsum_float32("bhcs,bshk->bchk", weights_bhcs.astype(v_bshk.dtype), v_bshk)
  return (mixed_bchk / total_bch[..., None]).astype(q_bchk.dtype)


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

  def __call__(self, x_btd: jax.Array, segments_bt: jax.Array | None) -> jax.Array:
    """Each position attends to itself and to earlier positions of its own segment."""
    t = x_btd.shape[1]
    position_t = jnp.arange(t)
    q_bthk, k_bthk, v_bthk = self._project(x_btd, position_t)
    r_nhk = self.relative_keys(t, x_btd.dtype)
    size = self.config.attention_block or t
    attend = jax.checkpoint(_attend)
    blocks = []
    for start in range(0, t, size):
      stop = min(start + size, t)
      mask = position_t[None, start:stop, None] >= position_t[None, None, :stop]
      if segments_bt is not None:
        mask &= segments_bt[:, start:stop, None] == segments_bt[:, None, :stop]
      blocks.append(attend(q_bthk[:, start:stop], k_bthk[:, :stop], v_bthk[:, :stop], mask,
                           self._relative(r_nhk, t - stop, stop)))
    return self._output(checkpoint_name(jnp.concatenate(blocks, axis=1), MIXED))

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
    t, s = x_btd.shape[1], cache.key_bshk.shape[1]
    position_t = position + jnp.arange(t)
    q_bthk, k_bthk, v_bthk = self._project(x_btd, position_t)
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=position, axis=1)
    cache = cache._replace(key_bshk=write(cache.key_bshk, k_bthk),
                           value_bshk=write(cache.value_bshk, v_bthk))
    r_nhk = cache.relative_nhk
    if r_nhk is not None:  # the S keys after the newest one have no distance: masked, so zeros do
      r_nhk = jnp.pad(r_nhk, ((0, s), (0, 0), (0, 0)))
    size = self.config.attention_block or t
    blocks = []
    for start in range(0, t, size):
      stop = min(start + size, t)
      distance_cs = position_t[start:stop, None] - jnp.arange(s)[None, :]
      mask_cs = distance_cs >= 0
      if context is not None:
        mask_cs &= distance_cs < context
      blocks.append(_attend(q_bthk[:, start:stop], cache.key_bshk, cache.value_bshk, mask_cs[None],
                            self._relative(r_nhk, s - position - stop, s)))
    return self._output(jnp.concatenate(blocks, axis=1)), cache

  def relative_keys(self, longest: int, dtype: jax.typing.DTypeLike) -> jax.Array | None:
    """W_r R_n for n = longest ... 0 as r_nhk; None with rotary positions."""
    if self.config.position != "relative":
      return None
    signal_nd = sinusoid(jnp.arange(longest, -1, -1), self.config.d_model).astype(dtype)
    return jnp.einsum("nd,dhk->nhk", signal_nd, self.w_relative[...].astype(dtype))

  def _project(self, x_btd, position_t):
    """Queries, keys and values, normalised and rotated where the config says so."""
    q_bthk, k_bthk, v_bthk = (
        jnp.einsum("btd,dhk->bthk", x_btd, w[...].astype(x_btd.dtype))
        for w in (self.w_query, self.w_key, self.w_value))
    if self.config.qk_norm:
      q_bthk, k_bthk = self.query_norm(q_bthk), self.key_norm(k_bthk)
    if self.config.position == "rotary":
      q_bthk = rotate(q_bthk, position_t, self.config.rotary_base)
      k_bthk = rotate(k_bthk, position_t, self.config.rotary_base)
    return q_bthk, k_bthk, v_bthk

  def _relative(self, r_nhk, start, n_keys: int):
    """What `_attend` needs for a block whose farthest distance is at row `start` of r."""
    if r_nhk is None:
      return None
    window_nhk = jax.lax.dynamic_slice_in_dim(r_nhk, start, n_keys + 1, axis=0)
    return window_nhk, self.u[...].astype(r_nhk.dtype), self.v[...].astype(r_nhk.dtype)

  def _output(self, mixed_bthk):
    dtype = mixed_bthk.dtype
    out_btd = jnp.einsum("bthk,hkd->btd", mixed_bthk, self.w_out[...].astype(dtype))
    return out_btd + self.bias_out[...].astype(dtype)[None, None]
