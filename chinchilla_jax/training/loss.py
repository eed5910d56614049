"""Cross-entropy in float32. Law 3: the loss is a sum and a count, never a mean.

The logits of a whole batch are the largest array of a step (tokens x 32,000 x 4 bytes), so
they are made a chunk of tokens at a time. The gradient of a chunk is taken while its logits
are there, which costs no second product with the embedding in the backward pass.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def cross_entropy(x_nd, embedding_vd, bias_v, targets_n, weights_n, z_loss: float, chunk: int):
  """Sums over tokens of weighted negative log-likelihood and of the z-loss.

  Args:
    x_nd: final hidden states, in the activation dtype.
    embedding_vd: tied embedding, any float dtype; multiplied in the dtype of x_nd.
    bias_v: output-logit bias.
    targets_n: int32, the piece that follows.
    weights_n: float32, 0 for targets that do not count.
    z_loss: coefficient of log²Z (PaLM, section 5); 0 for none.
    chunk: tokens per chunk; 0 for all at once.

  Returns:
    (objective, nll): float32 scalars; nll in nats, objective = nll + z_loss · Σ w·log²Z.
    The gradient is that of the objective; nll is for the log and carries none.
  """
  chunks = _chunks(chunk, x_nd, targets_n, weights_n)

  def body(total, part):
    _, objective, nll = _forward(embedding_vd, bias_v, part, z_loss)
    return (total[0] + objective, total[1] + nll), None

  return jax.lax.scan(body, (jnp.float32(0), jnp.float32(0)), chunks)[0]


def _chunks(chunk: int, x_nd, targets_n, weights_n):
  """Pads with tokens of weight 0 and splits into equal chunks: (n_chunks, chunk, ...)."""
  n = x_nd.shape[0]
  chunk = min(chunk or n, n)
  pad = -n % chunk
  split = lambda a: jnp.pad(a, ((0, pad),) + ((0, 0),) * (a.ndim - 1)).reshape(
      -1, chunk, *a.shape[1:])
  return split(x_nd), split(targets_n), split(weights_n)


def _forward(embedding_vd, bias_v, part, z_loss):
  x_nd, targets_n, weights_n = part
  logits_nv = jnp.einsum("nd,vd->nv", x_nd, embedding_vd.astype(x_nd.dtype),
                         preferred_element_type=jnp.float32)
  logits_nv += bias_v.astype(jnp.float32)[None, :]
  log_z_n = jax.nn.logsumexp(logits_nv, axis=-1)
  target_n = jnp.take_along_axis(logits_nv, targets_n[:, None], axis=-1)[:, 0]
  nll = jnp.sum(weights_n * (log_z_n - target_n))
  objective = nll + z_loss * jnp.sum(weights_n * log_z_n**2) if z_loss else nll
  return (logits_nv, log_z_n), objective, nll


def _cross_entropy_fwd(x_nd, embedding_vd, bias_v, targets_n, weights_n, z_loss, chunk):
  embedding = embedding_vd.astype(x_nd.dtype)
  vocab = embedding_vd.shape[0]

  def body(carry, part):
    objective_sum, nll_sum, d_embedding_vd, d_bias_v = carry
    (logits_nv, log_z_n), objective, nll = _forward(embedding, bias_v, part, z_loss)
    x, targets, weights = part
    scale_n = weights * (1 + 2 * z_loss * log_z_n) if z_loss else weights
    d_logits_nv = jnp.exp(logits_nv - log_z_n[:, None]) * scale_n[:, None]
    is_target_nv = targets[:, None] == jnp.arange(vocab)[None, :]
    d_logits_nv -= jnp.where(is_target_nv, weights[:, None], 0.0)
    d_bias_v += jnp.sum(d_logits_nv, axis=0)
    d_logits_nv = d_logits_nv.astype(x.dtype)
    d_x = jnp.einsum("nv,vd->nd", d_logits_nv, embedding)
    d_embedding_vd += jnp.einsum("nv,nd->vd", d_logits_nv, x, preferred_element_type=jnp.float32)
    return (objective_sum + objective, nll_sum + nll, d_embedding_vd, d_bias_v), d_x

  zero = jnp.float32(0)
  start = (zero, zero, jnp.zeros(embedding_vd.shape, jnp.float32),
           jnp.zeros(bias_v.shape, jnp.float32))
  (objective, nll, d_embedding_vd, d_bias_v), d_x = jax.lax.scan(
      body, start, _chunks(chunk, x_nd, targets_n, weights_n))
  d_x_nd = d_x.reshape(-1, x_nd.shape[1])[:x_nd.shape[0]]
  grads = (d_x_nd, d_embedding_vd.astype(embedding_vd.dtype), d_bias_v.astype(bias_v.dtype))
  return (objective, nll), grads


def _cross_entropy_bwd(z_loss, chunk, grads, cotangents):
  del z_loss, chunk
  scale = cotangents[0]
  return (*((g * scale).astype(g.dtype) for g in grads), None, None)


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)
