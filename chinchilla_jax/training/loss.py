"""Cross-entropy in float32. Law 3: the loss is a sum and a count, never a mean.

The logits of a whole batch are the largest array of a step (tokens x 32,000 x 4 bytes), so
they are made for a piece of the tokens at a time. The gradient of a piece is taken while its
logits are there, which costs no second product with the embedding in the backward pass.

Every piece has as many tokens of each device as of every other, so the axes of a piece are
ibjtd: i devices along the batch, b sequences of each, j devices along the sequence, t tokens of
each. On one device i and j are 1.
"""

import functools

import jax
import jax.numpy as jnp

from chinchilla_jax.model.placement import WHOLE, Placement
from chinchilla_jax.model.products import on_one_cpu, over_rows

_TOKENS = ("batch", None, "length", None)  # Logical axes of ibjt.


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def cross_entropy(x_btd, embedding_vd, bias_v, targets_bt, weights_bt, z_loss: float, chunk: int,
                  placement: Placement = WHOLE):
  """Sums over tokens of weighted negative log-likelihood and of the z-loss.

  Args:
    x_btd: final hidden states, in the activation dtype.
    embedding_vd: tied embedding, any float dtype; multiplied in the dtype of x_btd.
    bias_v: output-logit bias, or None.
    targets_bt: int32, the token that follows.
    weights_bt: float32, 0 for targets that do not count.
    z_loss: coefficient of log²Z (PaLM, section 5); 0 for none.
    chunk: tokens whose logits a device holds at once, about; 0 for all at once.
    placement: how tokens and vocabulary lie over devices.

  Returns:
    (objective, nll): float32 scalars; nll in nats, objective = nll + z_loss · Σ w·log²Z.
    The gradient is that of the objective; nll is for the log and carries none.
  """
  pieces = _Pieces(x_btd.shape[:2], chunk, placement)

  def body(total, part):
    _, objective, nll = _forward(embedding_vd, bias_v, part, z_loss, placement)
    return (total[0] + objective, total[1] + nll), None

  parts = tuple(map(pieces.split, (x_btd, targets_bt, weights_bt)))
  return jax.lax.scan(body, (jnp.float32(0), jnp.float32(0)), parts)[0]


class _Pieces:
  """Cuts [b, t, ...] into equal pieces [n, i, b, j, t, ...] and puts them together again.

  What does not divide is padded with zeros: tokens of weight 0.
  """

  def __init__(self, shape: tuple[int, int], chunk: int, placement: Placement):
    (self._b, self._t), self._constrain = shape, placement.constrain
    self._i, self._j = placement.shards("batch"), placement.shards("length")
    b, t = self._b // self._i, self._t // self._j  # One device's.
    self._n_t = -(-t // min(chunk or t, t))
    self._n_b = -(-b // max(1, (chunk or b * t) // t))
    self._pad_b, self._pad_t = -b % self._n_b, -t % self._n_t

  def split(self, x):
    rest = x.shape[2:]
    x = self._constrain(x, ("batch", "length", *(None for _ in rest)))
    x = x.reshape(self._i, self._b // self._i, self._j, self._t // self._j, *rest)
    if self._pad_b or self._pad_t:
      x = jnp.pad(x, ((0, 0), (0, self._pad_b), (0, 0), (0, self._pad_t), *((0, 0) for _ in rest)))
    i, b, j, t = x.shape[:4]
    x = x.reshape(i, self._n_b, b // self._n_b, j, self._n_t, t // self._n_t, *rest)
    x = jnp.moveaxis(x, (1, 4), (0, 1))
    return x.reshape(-1, *x.shape[2:])

  def join(self, x):
    _, i, b, j, t, *rest = x.shape
    x = jnp.moveaxis(x.reshape(self._n_b, self._n_t, i, b, j, t, *rest), (0, 1), (1, 4))
    x = x.reshape(i, self._n_b * b, j, self._n_t * t, *rest)
    x = x[:, :self._b // self._i, :, :self._t // self._j]
    x = x.reshape(self._b, self._t, *rest)
    return self._constrain(x, ("batch", "length", *(None for _ in rest)))


def _forward(embedding_vd, bias_v, part, z_loss, placement):
  x, targets, weights = part
  logits = jnp.einsum("ibjtd,vd->ibjtv", x, embedding_vd.astype(x.dtype),
                      preferred_element_type=jnp.float32)
  logits = placement.constrain(logits, (*_TOKENS, "vocab"))
  if bias_v is not None:
    logits += bias_v.astype(jnp.float32)[None, None, None, None]
  log_z = jax.nn.logsumexp(logits, axis=-1)
  target = _at_target(logits, targets)
  nll = jnp.sum(weights * (log_z - target))
  objective = nll + z_loss * jnp.sum(weights * log_z**2) if z_loss else nll
  return (logits, log_z), objective, nll


def _at_target(logits, targets):
  """Of each token the logit of its target.

  A sum with one term, not a look-up: a vocabulary cut among devices then stays where it is, and
  matrix units have no look-up. On one CPU a look-up: it reads one logit a token, not all.
  """
  def sum_of_one(logits, targets):
    return jnp.sum(jnp.where(_is_target(targets, logits.shape[-1]), logits, 0.0), axis=-1)

  def look_up(logits, targets):
    return jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]

  return on_one_cpu(look_up, sum_of_one, logits, targets)


def _less_at_target(d_logits, targets, weights):
  """d_logits less the weight of each token at its target; on one CPU in place."""
  def everywhere(d_logits, targets, weights):
    return d_logits - jnp.where(_is_target(targets, d_logits.shape[-1]), weights[..., None], 0.0)

  def there(d_logits, targets, weights):
    d_logits_nv = d_logits.reshape(-1, d_logits.shape[-1])
    at = jnp.arange(d_logits_nv.shape[0]), targets.reshape(-1)
    return d_logits_nv.at[at].add(-weights.reshape(-1)).reshape(d_logits.shape)

  return on_one_cpu(there, everywhere, d_logits, targets, weights)


def _is_target(targets, n_vocab: int):
  return targets[..., None] == jnp.arange(n_vocab)[None, None, None, None]


def _cross_entropy_fwd(x_btd, embedding_vd, bias_v, targets_bt, weights_bt, z_loss, chunk,
                       placement):
  embedding = embedding_vd.astype(x_btd.dtype)
  pieces = _Pieces(x_btd.shape[:2], chunk, placement)
  parts = tuple(map(pieces.split, (x_btd, targets_bt, weights_bt)))
  # Sums over tokens stay apart by device, or every piece would add them up over all devices.
  per_device = lambda x, *names: placement.constrain(x, ("batch", "length", *names))

  def body(carry, part):
    objective_sum, nll_sum, d_embedding, d_bias = carry
    (logits, log_z), objective, nll = _forward(embedding, bias_v, part, z_loss, placement)
    x, targets, weights = part
    scale = weights * (1 + 2 * z_loss * log_z) if z_loss else weights
    d_logits = jnp.exp(logits - log_z[..., None]) * scale[..., None]
    d_logits = _less_at_target(d_logits, targets, weights)
    d_bias = jax.tree.map(lambda total: total + jnp.sum(d_logits, axis=(1, 3)), d_bias)
    d_logits = d_logits.astype(x.dtype)
    d_x = jnp.einsum("ibjtv,vd->ibjtd", d_logits, embedding)
    d_embedding += over_rows("ibjtd,ibjtv->ijdv", x, d_logits, jnp.float32)
    carry = (objective_sum + objective, nll_sum + nll, per_device(d_embedding, None, "vocab"),
             jax.tree.map(lambda total: per_device(total, "vocab"), d_bias))
    return carry, placement.constrain(d_x, (*_TOKENS, None))

  zero = jnp.float32(0)
  shards = parts[0].shape[1], parts[0].shape[3]
  start = (zero, zero,
           per_device(jnp.zeros((*shards, *embedding_vd.shape[::-1]), jnp.float32), None, "vocab"),
           # As all that is done with it: of no bias, None.
           jax.tree.map(lambda bias: per_device(jnp.zeros((*shards, *bias.shape), jnp.float32),
                                                "vocab"), bias_v))
  (objective, nll, d_embedding, d_bias), d_x = jax.lax.scan(body, start, parts)
  grads = (pieces.join(d_x), jnp.sum(d_embedding, axis=(0, 1)).T.astype(embedding_vd.dtype),
           jax.tree.map(lambda total, bias: jnp.sum(total, axis=(0, 1)).astype(bias.dtype),
                        d_bias, bias_v))
  return (objective, nll), grads


def _cross_entropy_bwd(z_loss, chunk, placement, grads, cotangents):
  del z_loss, chunk, placement
  scale = cotangents[0]
  return *jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads), None, None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)
