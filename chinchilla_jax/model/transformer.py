"""The transformer as pure functions over plain nested dicts of arrays.

Decoder-only, pre-norm, RMSNorm, tied embedding with an output-logit bias. The layers' arrays
are stacked on a leading `layers` axis and run by one `lax.scan`, so that the time to compile
does not grow with depth.

  params = init(config, key, dtype)
  x_btd = hidden(config, params, tokens_bt, segments_bt, dtype)
  logits_btv = logits(config, params, x_btd)

`config` is a `config.Model` (hashable: pass it as a static argument of `jax.jit`); `dtype`
is a dtype or its name.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from chinchilla_jax import config as schema
from chinchilla_jax.errors import UserError
from chinchilla_jax.model import attention, layers, parametrisation
from chinchilla_jax.model.attention import Attention
from chinchilla_jax.model.layers import Embedding, FeedForward, RMSNorm, scaled
from chinchilla_jax.model.placement import WHOLE, Placement

Tree = Any  # a nested dict of arrays
Cache = dict[str, jax.Array]

# What the backward pass finds saved of a block, by the name of `config.remat`.
_REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    # What attention mixed is saved too, or its scores would be computed three times.
    "dots": jax.checkpoint_policies.save_only_these_names(layers.DENSE, attention.MIXED),
}


class Block(nnx.Module):
  """x + attention(norm(x)), then x + feed_forward(norm(x)); completep scales both branches."""

  def __init__(self, config: schema.Model, key: jax.Array):
    key_attention, key_feed_forward = jax.random.split(key)
    self.attention_norm = RMSNorm(config.d_model, "embed", config)
    self.attention = Attention(config, key_attention)
    self.feed_forward_norm = RMSNorm(config.d_model, "embed", config)
    self.feed_forward = FeedForward(config, key_feed_forward)
    self.scale = parametrisation.residual_scale(config)

  def __call__(self, x_btd: jax.Array, segments_bt: jax.Array | None,
               placement: Placement = WHOLE) -> jax.Array:
    into = lambda x: placement.constrain(x, ("batch", "length", None))
    out_of = lambda x: placement.constrain(scaled(x, self.scale), ("batch", "residual", None))
    mixed_btd = self.attention(into(self.attention_norm(x_btd)), segments_bt, placement)
    x_btd = x_btd + out_of(mixed_btd)
    return x_btd + out_of(self.feed_forward(into(self.feed_forward_norm(x_btd)), placement))

  def decode(self, x_btd, cache: attention.Layer, position, context):
    mixed_btd, cache = self.attention.decode(self.attention_norm(x_btd), cache, position, context)
    x_btd = x_btd + scaled(mixed_btd, self.scale)
    return x_btd + scaled(self.feed_forward(self.feed_forward_norm(x_btd)), self.scale), cache


class Transformer(nnx.Module):
  """The whole model; `blocks` is one Block whose arrays have a leading layers axis."""

  def __init__(self, config: schema.Model, key: jax.Array):
    key_embedding, key_blocks = jax.random.split(key)
    self.embedding = Embedding(config, key_embedding)
    self.blocks = nnx.vmap(lambda key: Block(config, key))(
        jax.random.split(key_blocks, config.n_layers))
    self.final_norm = RMSNorm(config.d_model, "embed", config,
                              scale=parametrisation.logit_scale(config))


def init(config: schema.Model, key: jax.Array, dtype: jax.typing.DTypeLike) -> Tree:
  """Fresh parameters: drawn in float32, then cast to `dtype`. Jittable.

  Raises:
    UserError: a size that the position embedding cannot have.
  """
  _check(config)
  params = nnx.to_pure_dict(nnx.state(Transformer(config, key)))
  return jax.tree.map(lambda w: w.astype(dtype), params)


def abstract(config: schema.Model, dtype: jax.typing.DTypeLike) -> Tree:
  """The tree of `init` as `jax.ShapeDtypeStruct`s; no memory, any size."""
  return jax.eval_shape(lambda: init(config, jax.random.key(0), dtype))


def logical_axes(config: schema.Model) -> Tree:
  """The tree of `init` with a tuple of logical axis names at each leaf."""
  _, state = _abstract_module(config)
  axes = jax.tree.map(lambda p: p.get_metadata("logical"), state,
                      is_leaf=lambda x: isinstance(x, nnx.Variable))
  axes = nnx.to_pure_dict(axes)
  axes["blocks"] = jax.tree.map(lambda names: ("layers", *names), axes["blocks"],
                                is_leaf=lambda x: isinstance(x, tuple))
  return axes


def hidden(config: schema.Model, params: Tree, tokens_bt: jax.Array,
           segments_bt: jax.Array | None, dtype: jax.typing.DTypeLike,
           placement: Placement = WHOLE) -> jax.Array:
  """Final hidden states.

  Args:
    config: the model.
    params: from `init`, any float dtype.
    tokens_bt: int, ids.
    segments_bt: int, equal within a document; a token sees only its own document. None: each
      row is one document.
    dtype: of activations.
    placement: how activations and weights lie over devices. Where it cuts `length`, tokens,
      segments and the result are in the order of `placement.Rows`, which no other part of the
      model notices.

  Returns:
    x_btd after the final RMSNorm, in `dtype`: what the table multiplies, so muP's scale of the
    logits is in it.
  """
  ends = {name: placement.weights(name, params[name]) for name in ("embedding", "final_norm")}
  model = _module(config, params | ends)
  block, _ = nnx.split(model.blocks)

  def body(x_btd, layer):
    layer = placement.weights("blocks", layer)
    return nnx.merge(block, layer)(x_btd, segments_bt, placement), None

  if config.remat != "none":
    body = jax.checkpoint(body, policy=_REMAT[config.remat], prevent_cse=False)
  x_btd = placement.constrain(model.embedding.encode(tokens_bt, dtype, placement),
                              ("batch", "residual", None))
  x_btd, _ = jax.lax.scan(body, x_btd, params["blocks"], unroll=config.scan_unroll)
  return model.final_norm(x_btd)


def logits(config: schema.Model, params: Tree, x_btd: jax.Array) -> jax.Array:
  """Float32 logits_btv of final hidden states, multiplied in their dtype."""
  return _module(config, params).embedding.decode(x_btd)


def apply(config: schema.Model, params: Tree, tokens_bt: jax.Array,
          segments_bt: jax.Array | None, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Float32 logits_btv of tokens: `logits` of `hidden`."""
  return logits(config, params, hidden(config, params, tokens_bt, segments_bt, dtype))


def init_cache(config: schema.Model, batch: int, length: int,
               dtype: jax.typing.DTypeLike) -> Cache:
  """An empty KV cache for `batch` sequences of up to `length` tokens.

  Returns:
    A dict: `key` and `value` (layers, heads, batch, length, kv_size); `position`, int32 scalar,
    tokens seen so far; and with relative positions `relative` (layers, heads, length + 1,
    kv_size), the projected distances, which `decode` fills at position 0.
  """
  rows = (config.n_layers, config.n_heads, batch, length, config.kv_size)
  cache = {"key": jnp.zeros(rows, dtype), "value": jnp.zeros(rows, dtype),
           "position": jnp.int32(0)}
  if config.position == "relative":
    shape = (config.n_layers, config.n_heads, length + 1, config.kv_size)
    cache["relative"] = jnp.zeros(shape, dtype)
  return cache


def decode(config: schema.Model, params: Tree, tokens_bt: jax.Array, cache: Cache,
           dtype: jax.typing.DTypeLike, context: int | None = None) -> tuple[jax.Array, Cache]:
  """Logits of the next tokens of sequences whose past is in a cache.

  Prefill is a call with many tokens, generation one with a single token at a time. The caller
  keeps count: position + T must not exceed the cache's length, which a traced position cannot
  be checked against.

  Args:
    config: the model.
    params: from `init`.
    tokens_bt: ids, T of them per sequence.
    cache: from `init_cache` or an earlier call with the same parameters.
    dtype: of activations and of the cache.
    context: a token sees at most this many tokens, itself included, so that a model can go on
      beyond the length that it was trained at; None for all.

  Returns:
    (float32 logits_btv, the cache with T more positions).
  """
  model = _module(config, params)
  block, stack = nnx.split(model.blocks)
  position = cache["position"]
  relative = cache.get("relative")
  if relative is not None:
    # The projected distances depend on nothing but parameters: once is enough.
    project = jax.vmap(lambda layer: nnx.merge(block, layer).attention.relative_keys(
        relative.shape[2] - 1, dtype))
    relative = jax.lax.cond(position == 0, lambda: project(stack), lambda: relative)

  def body(x_btd, layer_and_cache):
    layer, rows = layer_and_cache
    x_btd, rows = nnx.merge(block, layer).decode(x_btd, rows, position, context)
    return x_btd, (rows.key_hbsk, rows.value_hbsk)

  rows = attention.Layer(cache["key"], cache["value"], relative)
  x_btd = model.embedding.encode(tokens_bt, dtype)
  x_btd, (key, value) = jax.lax.scan(body, x_btd, (stack, rows))
  new = {"key": key, "value": value, "position": position + tokens_bt.shape[1]}
  if relative is not None:
    new["relative"] = relative
  return model.embedding.decode(model.final_norm(x_btd)), new


def _check(config: schema.Model) -> None:
  if config.position == "relative" and config.d_model % 2:
    raise UserError(f"model.d_model is {config.d_model}: relative positions pair sines with "
                    "cosines, make it even")
  if config.position == "rotary" and config.kv_size % 2:
    raise UserError(f"model.kv_size is {config.kv_size}: rotary positions turn pairs of "
                    "dimensions, make it even")


@functools.cache
def _abstract_module(config: schema.Model):
  """(graph definition, abstract state) of the model: its structure without its arrays."""
  _check(config)
  return nnx.split(nnx.eval_shape(lambda: Transformer(config, jax.random.key(0))))


def _module(config: schema.Model, params: Tree) -> Transformer:
  graph, _ = _abstract_module(config)
  return nnx.merge(graph, params)
