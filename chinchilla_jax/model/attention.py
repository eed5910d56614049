"""Causal attention with relative (Transformer-XL) or rotary positions, and its KV cache.

Queries, keys and values are made here; how they are mixed is in `blockwise`, or in one of the
`kernels`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from chinchilla_jax import config as schema
from chinchilla_jax.model import blockwise, parametrisation
from chinchilla_jax.model.layers import DENSE, RMSNorm, add, biases, dense, weight, zeros
from chinchilla_jax.model.placement import WHOLE, Placement, Rows

MIXED = "attention_mixed"  # what remat policies call the values mixed by attention


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


class Attention(nnx.Module):
  """Multi-head attention; kv_size per head is independent of d_model // n_heads.

  Query, key, value and relative-key projections have no bias, the output projection has one
  unless the config says none.
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
    self.bias_out = biases((d,), ("embed",), config)
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
    relative = None if r_hnk is None else (r_hnk, *self._u_v())
    if placement.attend is not None:
      mixed_hbtk = placement.attend(q_hbtk, k_hbtk, v_hbtk, relative, segments_bt, self.divisor,
                                    MIXED)
    else:
      how = blockwise.How(self.divisor, rows, placement, MIXED)
      mixed_hbtk = blockwise.attend(how, q_hbtk, k_hbtk, v_hbtk, relative, segments_bt)
    mixed_hbtk = placement.constrain(mixed_hbtk, ("heads", "batch", "length", None))
    return self._output(mixed_hbtk)

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
      out_hbck, _ = blockwise.attend_rows(
          self.divisor, q_hbtk[:, :, start:stop], cache.key_hbsk, cache.value_hbsk, mask_cs[None],
          relative)
      blocks.append(out_hbck)
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

  def _u_v(self):
    return self.u[...], self.v[...]

  def _output(self, mixed_hbtk):
    out_btd = dense("bthk,hkd->btd", jnp.moveaxis(mixed_hbtk, 0, 2), self.w_out)
    return out_btd if self.bias_out is None else add(out_btd, self.bias_out[...][None, None])
