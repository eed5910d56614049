"""Parts of a block that are not attention: RMSNorm, the tied embedding, the feed-forward.

Modules hold float32 `nnx.Param`s whose metadata `logical` names their axes. Weights are cast
to the activation dtype where they are used, which is the dtype of the input.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from chinchilla_jax import config as schema
from chinchilla_jax.model import parametrisation
from chinchilla_jax.model.placement import WHOLE, Placement
from chinchilla_jax.model.products import product

DENSE = "dense"  # what remat policies call a product with a weight


def weight(key: jax.Array, shape: tuple[int, ...], logical: tuple[str, ...], *, fan_in: int,
           config: schema.Model, residual: bool = False, embedding: bool = False) -> nnx.Param:
  """A freshly drawn float32 matrix. The paper does not say how its weights are drawn.

  Args:
    key: of this matrix.
    shape: its axes, named by `logical`.
    fan_in: inputs that one output sums over.
    config: `init` "gpt2" draws N(0, init_std); "fan_in" draws a normal of standard deviation
      1/sqrt(fan_in) cut off at two of them and not rescaled (Haiku's default for linear layers).
    residual: this matrix writes to the residual stream; "gpt2" then divides by
      sqrt(2 * n_layers), since that many such outputs add up (Radford et al. 2019, section 2.3).
    embedding: this matrix is the table. `model.parametrisation` scales it in its own way.
  """
  divisor = parametrisation.init_divisor(config, fan_in=fan_in, residual=residual,
                                         embedding=embedding)
  if config.init == "gpt2":
    array = config.init_std / divisor * jax.random.normal(key, shape, jnp.float32)
  else:
    array = jax.random.truncated_normal(key, -2, 2, shape, jnp.float32) / divisor
  return nnx.Param(array, logical=logical)


def zeros(shape: tuple[int, ...], logical: tuple[str, ...]) -> nnx.Param:
  """A float32 parameter that starts at zero."""
  return nnx.Param(jnp.zeros(shape, jnp.float32), logical=logical)


def scaled(x: jax.Array, factor: float) -> jax.Array:
  """x times a constant of the parametrisation, in the dtype of x; a factor of 1 costs nothing."""
  return x if factor == 1 else x * factor


def biases(shape: tuple[int, ...], logical: tuple[str, ...],
           config: schema.Model) -> nnx.Param | None:
  """A bias that starts at zero; None where the model has none."""
  return zeros(shape, logical) if config.bias else None


def add(x: jax.Array, bias: jax.Array) -> jax.Array:
  """x + bias in float32, as the dtype of x.

  The gradient of a bias is a sum over every position, and float32 is where it can be taken.
  """
  return (x.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def dense(spec: str, x: jax.Array, w: nnx.Param, saved: bool = True) -> jax.Array:
  """`product` with a weight, under the name by which remat policies save it (if `saved`).

  They cannot tell by the primitive: a product with its own gradient hides it from them.
  """
  out = product(spec, x, w[...])
  return checkpoint_name(out, DENSE) if saved else out


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x²) + epsilon) * gain over the last axis (Zhang & Sennrich 2019); no bias.

  Statistics, gain and the constant `scale` are float32, the result has the dtype of x.
  """

  def __init__(self, size: int, axis: str, config: schema.Model, scale: float = 1.0):
    self.gain = nnx.Param(jnp.ones((size,), jnp.float32), logical=(axis,))
    self.epsilon, self.scale = config.norm_epsilon, scale

  def __call__(self, x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    gain = jnp.expand_dims(self.gain[...].astype(jnp.float32), range(x.ndim - 1))
    normed = x32 * jax.lax.rsqrt(mean_square + self.epsilon) * gain
    return scaled(normed, self.scale).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def look_up(table_vd: jax.Array, tokens_bt: jax.Array, dtype: jnp.dtype,
            placement: Placement) -> jax.Array:
  """Rows of the table, x_btd in `dtype`.

  The gradient is summed in float32: a frequent token's has very many terms, and in bfloat16 such
  a sum stops growing at 256 times them. Each device sums over its own tokens; only the sums,
  and no token's gradient, go to others.
  """
  return jnp.take(table_vd, tokens_bt, axis=0).astype(dtype)


def _look_up_fwd(table_vd, tokens_bt, dtype, placement):
  return look_up(table_vd, tokens_bt, dtype, placement), (table_vd, tokens_bt)


def _look_up_bwd(dtype, placement, saved, grad_btd):
  del dtype
  table_vd, tokens_bt = saved
  i, j = placement.shards("batch"), placement.shards("length")
  by_device = lambda x: jnp.moveaxis(  # b and t of i x j devices: [i, j, b, t, ...].
      x.reshape(i, x.shape[0] // i, j, x.shape[1] // j, *x.shape[2:]), 2, 1)
  grad = by_device(placement.constrain(grad_btd, ("batch", "length", None)))
  zeros = jnp.zeros(table_vd.shape, jnp.float32)
  add_up = jax.vmap(jax.vmap(lambda tokens, grad: zeros.at[tokens].add(grad.astype(jnp.float32))))
  sums_ijvd = placement.constrain(add_up(by_device(tokens_bt), grad),
                                  ("batch", "length", "vocab", None))
  return jnp.sum(sums_ijvd, axis=(0, 1)).astype(table_vd.dtype), None


look_up.defvjp(_look_up_fwd, _look_up_bwd)


class Embedding(nnx.Module):
  """The table that is both input embedding and output projection, and the output-logit bias if any.

  The input is not scaled by sqrt(d_model): the paper does not say, and GPT-2 does not.
  """

  def __init__(self, config: schema.Model, key: jax.Array):
    v, d = config.vocab_size, config.d_model
    self.table = weight(key, (v, d), ("vocab", "embed"), fan_in=d, config=config, embedding=True)
    self.logit_bias = biases((v,), ("vocab",), config)

  def encode(self, tokens_bt: jax.Array, dtype: jax.typing.DTypeLike,
             placement: Placement = WHOLE) -> jax.Array:
    """Vectors of the tokens, x_btd."""
    return look_up(self.table[...], tokens_bt, jnp.dtype(dtype), placement)

  def decode(self, x_btd: jax.Array) -> jax.Array:
    """Float32 logits_btv."""
    logits_btv = product("btd,vd->btv", x_btd, self.table[...], jnp.float32)
    if self.logit_bias is None:
      return logits_btv
    return logits_btv + self.logit_bias[...].astype(jnp.float32)[None, None, :]


def _activation(name: str, x: jax.Array) -> jax.Array:
  if name == "relu":
    return jax.nn.relu(x)
  return jax.nn.gelu(x, approximate=name == "gelu")


class FeedForward(nnx.Module):
  """d_model to d_ff to d_model with a bias on every matrix, unless the config says none.

  `activation` "swiglu" (Shazeer 2020) has a third matrix, the gate: silu(gate) * in. d_ff is
  then what the config says, not two thirds of it.
  """

  def __init__(self, config: schema.Model, key: jax.Array):
    d, f = config.d_model, config.d_ff
    key_in, key_out, key_gate = jax.random.split(key, 3)
    inward = functools.partial(weight, shape=(d, f), logical=("embed", "mlp"), fan_in=d,
                               config=config)
    self.w_in, self.bias_in = inward(key_in), biases((f,), ("mlp",), config)
    if config.activation == "swiglu":
      self.w_gate, self.bias_gate = inward(key_gate), biases((f,), ("mlp",), config)
    self.w_out = weight(key_out, (f, d), ("mlp", "embed"), fan_in=f, config=config, residual=True)
    self.bias_out = biases((d,), ("embed",), config)
    self.activation = config.activation

  def __call__(self, x_btd: jax.Array, placement: Placement = WHOLE) -> jax.Array:
    x_btf = self._affine("btd,df->btf", x_btd, self.w_in, self.bias_in)
    x_btf = placement.constrain(x_btf, ("batch", "length", "mlp"))
    if self.activation == "swiglu":
      gate_btf = self._affine("btd,df->btf", x_btd, self.w_gate, self.bias_gate)
      x_btf = jax.nn.silu(gate_btf) * x_btf
    else:
      x_btf = _activation(self.activation, x_btf)
    return self._affine("btf,fd->btd", x_btf, self.w_out, self.bias_out)

  def _affine(self, spec: str, x, w, bias):
    out = dense(spec, x, w)
    return out if bias is None else add(out, bias[...][None, None])
