"""Every way to attend, on shapes that nobody chose, against the formula in float64.

The reference is written out in NumPy, gradients too, and shares nothing with the package.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chinchilla_jax.kernels import splash
from chinchilla_jax.kernels.relative_tpu import relative_attention
from chinchilla_jax.model import blockwise
from chinchilla_jax.model.placement import WHOLE, Rows

SEEDS = (0, 7, 9, 13, 25, 31)  # One token; plain; alike ones; the largest scores; tokens apart.
NAMES = ("out", "dq", "dk", "dv", "dr", "du", "dv bias")


def exact(q, k, v, relative, segments_bt, divisor, grad):
  """(out, dq, dk, dv[, dr, du, dv bias]) of one dense softmax, float64; its largest score; and the
  size of the terms that gradients are sums of."""
  q, k, v, grad = (np.asarray(x, np.float64) for x in (q, k, v, grad))
  t = q.shape[2]
  i, j = np.indices((t, t))
  seen = (i >= j)[None, None] & (segments_bt[:, :, None] == segments_bt[:, None])[None]
  content = q
  if relative is not None:
    r, u, bias = (np.asarray(x, np.float64) for x in relative)
    at = np.clip(t - (i - j), 0, t)  # r is for the distances t ... 0.
    content, position = (q + x[:, None, None] for x in (u, bias))
    keys = r[:, at]  # h i j k
  scores = np.einsum("hbik,hbjk->hbij", content, k)
  if relative is not None:
    scores += np.einsum("hbik,hijk->hbij", position, keys)
  largest = np.abs(scores).max(where=np.broadcast_to(seen, scores.shape), initial=0) / divisor
  scores = np.where(seen, scores / divisor, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  out = np.einsum("hbij,hbjk->hbik", weights, v)
  d_weights = np.einsum("hbik,hbjk->hbij", grad, v)
  d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True)) / divisor
  d_content = np.einsum("hbij,hbjk->hbik", d_scores, k)
  found = [out, d_content, np.einsum("hbij,hbik->hbjk", d_scores, content),
           np.einsum("hbij,hbik->hbjk", weights, grad)]
  if relative is not None:
    d_position = np.einsum("hbij,hijk->hbik", d_scores, keys)
    d_keys = np.einsum("hbij,hbik->hijk", d_scores, position)
    d_r = np.zeros_like(r)
    np.add.at(d_r, (slice(None), at), d_keys)
    found[1] = d_content + d_position
    found += [d_r, d_content.sum((1, 2)), d_position.sum((1, 2))]
  row = lambda x: np.linalg.norm(x, axis=-1).max()
  terms = row(k) if relative is None else max(row(k), row(r), row(content), row(position))
  return found, largest, np.linalg.norm(grad) * row(v) * max(terms, row(content)) / divisor


def draw(seed, head_sizes=(1, 3, 8, 12, 96), longest=70):
  """(q, k, v), (r, u, bias), segments, divisor, gradient, block; documents of one token too."""
  rng = np.random.default_rng(seed)
  h, b, k = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.choice(head_sizes))
  t = 1 if seed % 10 == 0 else int(rng.integers(2, longest))
  normal = lambda *shape: np.asarray(rng.normal(size=shape), np.float32)
  starts = rng.random((b, t)) < rng.choice([0.0, 0.05, 0.5, 1.0])
  segments_bt = np.cumsum(starts, axis=1).astype(np.int32)
  if rng.random() < 0.3:  # Numbers in no order; equal ones are one document.
    segments_bt = rng.permutation(t + 1).astype(np.int32)[segments_bt % 7]
  size = np.float32(rng.choice([0.1, 3]))
  relative = normal(h, t + 1, k), size * normal(h, k), size * normal(h, k)
  divisor, block = float(rng.choice([1.0, math.sqrt(k), k])), int(rng.integers(0, t + 3))
  return ([normal(h, b, t, k) for _ in range(3)], relative, segments_bt, divisor,
          normal(h, b, t, k), block)


def check(f, arrays, relative, segments_bt, divisor, grad):
  """f(q, k, v, relative) against the formula."""
  def run(arrays, grad):
    out, pull = jax.vjp(f, *arrays)
    return out, pull(grad)
  got = jax.tree.leaves(jax.jit(run)((*arrays, relative), grad))
  want, largest, terms = exact(*arrays, relative, segments_bt, divisor, grad)
  for name, x, y in zip(NAMES[:len(want)], got, want, strict=True):
    assert x.shape == y.shape and x.dtype == jnp.float32, name
    error, size = np.linalg.norm(np.asarray(x, np.float64) - y), np.linalg.norm(y)
    # Float32 knows a weight no better than its score. A gradient may be 0 because large terms
    # cancel, as where a token sees none but itself: what is left of them is rounding.
    assert error < 1e-5 * max(1.0, largest) * size + 5e-7 * terms, (name, error, size, terms)


@pytest.mark.parametrize("position", ["relative", "rotary"])
@pytest.mark.parametrize("seed", SEEDS)
def test_blockwise(seed, position):
  arrays, relative, segments_bt, divisor, grad, block = draw(seed)
  relative = relative if position == "relative" else None
  how = blockwise.How(divisor, Rows.of(grad.shape[2], 1, block), WHOLE, "mixed")
  check(lambda *a: blockwise.attend(how, *a, jnp.asarray(segments_bt)), arrays, relative,
        segments_bt, divisor, grad)


@pytest.mark.parametrize("position", ["relative", "rotary"])
@pytest.mark.parametrize("seed", SEEDS)
def test_blockwise_of_a_sequence_that_is_dealt_out(seed, position):
  """Rows in the order of three devices, as `Attention` hands them over."""
  arrays, relative, segments_bt, divisor, grad, block = draw(seed, longest=24)
  # A length that three divide.
  arrays, grad = ([np.repeat(x, 3, axis=2) for x in some] for some in (arrays, [grad]))
  segments_bt = np.repeat(segments_bt, 3, axis=1)
  if position == "relative":
    r, *biases = relative
    relative = np.concatenate([r[:, :-1]] * 3 + [r[:, -1:]], axis=1), *biases
  else:
    relative = None
  rows = Rows.of(segments_bt.shape[1], 3, block)
  how = blockwise.How(divisor, rows, WHOLE, "mixed")

  def attend(q, *rest):
    out = blockwise.attend(how, rows.deal(q, 2), *rest, jnp.asarray(segments_bt))
    return rows.collect(out, 2)

  check(attend, arrays, relative, segments_bt, divisor, grad[0])


@pytest.mark.parametrize("seed", SEEDS)
def test_relative_tpu(seed):
  arrays, relative, segments_bt, divisor, grad, _ = draw(seed)
  block_q, block_k = (2 ** np.random.default_rng(seed).integers(3, 6, size=2)).tolist()
  f = functools.partial(relative_attention, divisor=divisor, block_q=block_q, block_k=block_k,
                        strided=bool(seed % 2), interpret=True)
  check(lambda q, k, v, relative: f(q, k, v, *relative, jnp.asarray(segments_bt)), arrays, relative,
        segments_bt, divisor, grad)


@pytest.mark.parametrize("seed", SEEDS)
def test_splash(seed, monkeypatch):
  monkeypatch.setattr(splash, "BLOCK", 128)
  arrays, _, segments_bt, divisor, grad, _ = draw(seed, longest=300)
  f = functools.partial(splash.attend, divisor=divisor, interpret=True)
  check(lambda q, k, v, _: f(q, k, v, jnp.asarray(segments_bt)), arrays, None, segments_bt, divisor,
        grad)
