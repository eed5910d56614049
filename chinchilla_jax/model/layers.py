"""Parts of a block that are not attention: RMSNorm, the tied embedding, the feed-forward.

Modules hold float32 `nnx.Param`s whose metadata `logical` names their axes. Weights are cast
to the activation dtype where they are used, which is the dtype of the input.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from chinchilla_jax import config as schema


def weight(key: jax.Array, shape: tuple[int, ...], logical: tuple[str, ...], *, fan_in: int,
           config: schema.Model, residual: bool = False) -> nnx.Param:
  """A freshly drawn float32 matrix. The paper does not say how its weights are drawn.

  Args:
    key: of this matrix.
    shape: its axes, named by `logical`.
    fan_in: inputs that one output sums over.
    config: `init` "gpt2" draws N(0, init_std); "fan_in" draws a normal of standard deviation
      1/sqrt(fan_in) cut off at two of them and not rescaled (Haiku's default for linear layers).
    residual: this matrix writes to the residual stream; "gpt2" then divides by
      sqrt(2 * n_layers), since that many such outputs add up (Radford et al. 2019, section 2.3).
  """
  if config.init == "gpt2":
    std = config.init_std / (math.sqrt(2 * config.n_layers) if residual else 1.0)
    array = std * jax.random.normal(key, shape, jnp.float32)
  else:
    array = jax.random.truncated_normal(key, -2, 2, shape, jnp.float32) / math.sqrt(fan_in)
  return nnx.Param(array, logical=logical)


def zeros(shape: tuple[int, ...], logical: tuple[str, ...]) -> nnx.Param:
  """A float32 parameter that starts at zero."""
  return nnx.Param(jnp.zeros(shape, jnp.float32), logical=logical)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum_float32(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """Einsum of two arrays of one dtype that accumulates and returns float32.

  Its gradient is rounded to the dtype of the operands before the two products of the backward
  pass. Without this they would multiply float32 with bfloat16, which no matrix unit does fast.
  """
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _einsum_float32_fwd(spec, a, b):
  return einsum_float32(spec, a, b), (a, b)


def _einsum_float32_bwd(spec, operands, grad):
  _, vjp = jax.vjp(functools.partial(jnp.einsum, spec), *operands)
  return vjp(grad.astype(operands[0].dtype))


einsum_float32.defvjp(_einsum_float32_fwd, _einsum_float32_bwd)


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x²) + epsilon) * gain over the last axis (Zhang & Sennrich 2019); no bias.

  Statistics and gain are float32, the result has the dtype of x.
  """

  def __init__(self, size: int, axis: str, config: schema.Model):
    self.gain = nnx.Param(jnp.ones((size,), jnp.float32), logical=(axis,))
    self.epsilon = config.norm_epsilon

  def __call__(self, x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    gain = jnp.expand_dims(self.gain[...].astype(jnp.float32), range(x.ndim - 1))
    return (x32 * jax.lax.rsqrt(mean_square + self.epsilon) * gain).astype(x.dtype)


class Embedding(nnx.Module):
  """The table that is both input embedding and output projection, and the output-logit bias.

  The input is not scaled by sqrt(d_model): the paper does not say, and GPT-2 does not.
  """

  def __init__(self, config: schema.Model, key: jax.Array):
    v, d = config.vocab_size, config.d_model
    self.table = weight(key, (v, d), ("vocab", "embed"), fan_in=d, config=config)
    self.logit_bias = zeros((v,), ("vocab",))

  def encode(self, tokens_bt: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Vectors of the tokens, x_btd."""
    # The look-up is in float32 for its gradient: a frequent token's is a sum over very many
    # positions, and in bfloat16 such a sum stops growing at 256 times its terms.
    return jnp.take(self.table[...].astype(jnp.float32), tokens_bt, axis=0).astype(dtype)

  def decode(self, x_btd: jax.Array) -> jax.Array:
    """Float32 logits_btv."""
    logits_btv = einsum_float32("btd,vd->btv", x_btd, self.table[...].astype(x_btd.dtype))
    return logits_btv + self.logit_bias[...].astype(jnp.float32)[None, None, :]


def _activation(name: str, x: jax.Array) -> jax.Array:
  if name == "relu":
    return jax.nn.relu(x)
  return jax.nn.gelu(x, approximate=name == "gelu")


def _affine(x: jax.Array, w: nnx.Param, bias: nnx.Param) -> jax.Array:
  return x @ w[...].astype(x.dtype) + bias[...].astype(x.dtype)[None, None]


class FeedForward(nnx.Module):
  """d_model to d_ff to d_model with a bias on every matrix.

  `activation` "swiglu" (Shazeer 2020) has a third matrix, the gate: silu(gate) * in. d_ff is
  then what the config says, not two thirds of it.
  """

  def __init__(self, config: schema.Model, key: jax.Array):
    d, f = config.d_model, config.d_ff
    key_in, key_out, key_gate = jax.random.split(key, 3)
    inward = functools.partial(weight, shape=(d, f), logical=("embed", "mlp"), fan_in=d,
                               config=config)
    self.w_in, self.bias_in = inward(key_in), zeros((f,), ("mlp",))
    if config.activation == "swiglu":
      self.w_gate, self.bias_gate = inward(key_gate), zeros((f,), ("mlp",))
    self.w_out = weight(key_out, (f, d), ("mlp", "embed"), fan_in=f, config=config, residual=True)
    self.bias_out = zeros((d,), ("embed",))
    self.activation = config.activation

  def __call__(self, x_btd: jax.Array) -> jax.Array:
    x_btf = _affine(x_btd, self.w_in, self.bias_in)
    if self.activation == "swiglu":
      x_btf = jax.nn.silu(_affine(x_btd, self.w_gate, self.bias_gate)) * x_btf
    else:
      x_btf = _activation(self.activation, x_btf)
    return _affine(x_btf, self.w_out, self.bias_out)
