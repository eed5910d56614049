"""Einsum of two operands with a gradient written out: one form for every product of the model."""

import functools
import re

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(spec: str, x: jax.Array, w: jax.Array,
            dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
  """Einsum of x and w, multiplied in the dtype of x; the result is `dtype`, else that of x.

  The value is that of `jnp.einsum`. The gradient is written out for three reasons:
    - a float32 result of bfloat16 operands has a float32 gradient; it is rounded to the dtype
      of x first, since no matrix unit multiplies float32 with bfloat16 fast;
    - the gradient of w is accumulated and returned in the dtype of w, so float32 weights lose
      nothing to bfloat16 activations;
    - on a CPU the gradient of w needs one operand turned first: see `over_rows`.

  Args:
    spec: "X,W->OUT" where every letter is in two of the three, or in all.
  """
  return jnp.einsum(spec, x, w.astype(x.dtype), preferred_element_type=dtype)


def _product_fwd(spec, x, w, dtype):
  return product(spec, x, w, dtype), (x, w)


def _product_bwd(spec, dtype, operands, grad):
  del dtype
  x, w = operands
  x_axes, w_axes, out_axes = re.split(",|->", spec)
  grad = grad.astype(x.dtype)
  grad_x = jnp.einsum(f"{out_axes},{w_axes}->{x_axes}", grad, w.astype(x.dtype))
  return grad_x, over_rows(f"{x_axes},{out_axes}->{w_axes}", x, grad, w.dtype)


product.defvjp(_product_fwd, _product_bwd)


def over_rows(spec: str, a: jax.Array, b: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Einsum that sums over the rows of both operands, as gradients of weights do; in `dtype`.

  A matrix unit sums along rows of one operand and columns of the other, so one has to be turned.
  XLA's CPU backend (JAX 0.12) turns whichever stands first, at the same time as it recomputes
  it, and in bfloat16 multiplies the turned matrices in float32. There the smaller operand is
  turned here; docs/performance.md has the times. Other backends choose for themselves, and so does
  this one with several devices: it would gather halves of what lies cut among them.

  Args:
    spec: "A,B->OUT".
    a, b: of one dtype.
  """
  return on_one_cpu(functools.partial(_turned, spec, dtype),
                    functools.partial(jnp.einsum, spec, preferred_element_type=dtype), a, b)


def on_one_cpu(here, elsewhere, *args: jax.Array) -> jax.Array:
  """`here(*args)` in a program for a single CPU device, `elsewhere(*args)` in any other."""
  if jax.device_count() > 1:
    return elsewhere(*args)
  return jax.lax.platform_dependent(*args, cpu=here, default=elsewhere)


def _turned(spec: str, dtype: jax.typing.DTypeLike, a: jax.Array, b: jax.Array) -> jax.Array:
  a_axes, b_axes, out_axes = re.split(",|->", spec)
  free = lambda axes: [i for i in axes if i in out_axes and not (i in a_axes and i in b_axes)]
  # Of equal ones the one with a single free axis: d_model, which no layout cuts in activations.
  if (a.size, len(free(a_axes))) > (b.size, len(free(b_axes))):
    a_axes, b_axes, a, b = b_axes, a_axes, b, a
  summed = [i for i in a_axes if i not in out_axes]
  shared = [i for i in a_axes if i in b_axes and i in out_axes]
  order = "".join(shared + free(a_axes) + summed)
  # By sequences where there are several: then XLA makes one loop of all the pieces.
  several = len(summed) > 1 and a.shape[a_axes.index(summed[0])] > 1
  turned = _transpose(a, a_axes, order, *((summed[0], 8) if several else (free(a_axes)[-1], 2)))
  contract = ([order.index(i) for i in summed], [b_axes.index(i) for i in summed])
  batch = ([order.index(i) for i in shared], [b_axes.index(i) for i in shared])
  out = jax.lax.dot_general(turned, b, (contract, batch), preferred_element_type=dtype)
  made = "".join(shared + free(a_axes) + free(b_axes))
  return out if made == out_axes else _transpose(out, made, out_axes, free(a_axes)[-1])


def _transpose(x: jax.Array, axes: str, order: str, cut: str, pieces: int = 2) -> jax.Array:
  """x with its axes in another order, in pieces along `cut`.

  XLA makes a transpose part of the product before or after it, but it does not look for one in
  pieces. Its loop reads columns: of few rows at a time, a column stays in the cache.
  """
  at = axes.index(cut)
  parts = jnp.array_split(x, min(pieces, x.shape[at]), axis=at)
  return jnp.concatenate([jnp.transpose(part, [axes.index(i) for i in order])
                          for part in parts], axis=order.index(cut))
