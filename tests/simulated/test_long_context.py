"""Sequences of 8,192 and 32,768 tokens, cut among devices.

Against the same on one device: the loss within 1e-6 of itself, gradients within 1e-4 of their
norm. Both are sums over tens of thousands of tokens, in another order.
"""

import functools

import eight
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinchilla_jax.model import transformer
from chinchilla_jax.model.placement import Rows
from chinchilla_jax.parallel import mesh
from chinchilla_jax.parallel.layout import Layout
from chinchilla_jax.training import step


def long(length, block, heads, **fields):
  return eight.experiment(**(dict(
      data__seq_len=length, batch__sequences=1, model__n_layers=1, model__d_model=16,
      model__n_heads=heads, model__kv_size=8, model__d_ff=32, model__vocab_size=64,
      model__attention_block=block, loss__chunk=1024, mesh__data=1) | fields))


def placed(experiment):
  return Layout(experiment, mesh.make(experiment.mesh))


@pytest.mark.parametrize("length, heads, position, block, axes", [
    (8192, 2, "relative", 256, dict(mesh__context=4, mesh__tensor=2,
                                    mesh__strategy="fsdp_tensor")),
    (32768, 1, "rotary", 512, dict(mesh__context=8)),
])
def test_a_long_sequence_over_eight_devices_is_that_of_one(length, heads, position, block, axes):
  whole = long(length, 1024, heads, model__position=position)
  cut = long(length, block, heads, model__position=position, **axes)
  params = eight.fresh(whole)["params"]
  batch = eight.batch_of(whole)
  # Documents of very different lengths, the longest longer than any device's share.
  ends = [length // 100, length // 90, length // 10, length - 5]
  batch["segments_bt"] = np.searchsorted(ends, np.arange(length)).astype(np.int32)[None]
  want_grads, want_nll, weight = jax.device_get(
      jax.jit(functools.partial(step.gradients, whole))(params, batch))
  layout = placed(cut)
  share = layout.mesh.shape["context"]
  gradients = jax.jit(functools.partial(step.gradients, cut, layout=layout))
  grads, nll, got_weight = jax.device_get(gradients(
      jax.device_put(params, layout.state({"params": params})["params"]),
      jax.device_put(batch, layout.rows)))
  assert weight == got_weight == batch["weights_bt"].sum() and share > 1
  np.testing.assert_allclose(nll, want_nll, rtol=1e-6)
  norm = lambda tree: np.sqrt(sum(np.sum(np.square(a, dtype=np.float64))
                                  for a in jax.tree.leaves(tree)))
  difference = jax.tree.map(lambda a, b: a.astype(np.float64) - b, grads, want_grads)
  assert norm(difference) <= 1e-4 * norm(want_grads)


# ---- Law 2, where the sequence is cut

T = 32
_ids = st.lists(st.integers(0, 63), min_size=T, max_size=T)
_AXES = [("context 8, relative", "relative", 1, dict(mesh__context=8)),
         ("context 4 x tensor 2, rotary", "rotary", 2,
          dict(mesh__context=4, mesh__tensor=2, mesh__strategy="fsdp_tensor"))]


@functools.cache
def _forward(position, heads, axes):
  """Jitted (tokens_bt, segments_bt) -> logits_btv in the order of the text."""
  experiment = long(T, 2, heads, model__position=position, model__n_layers=2, **dict(axes))
  layout = placed(experiment)
  params = eight.fresh(long(T, 0, heads, model__position=position, model__n_layers=2))["params"]
  params = jax.device_put(params, layout.state({"params": params})["params"])
  rows = Rows.of(T, layout.placement.shards("length"), 2)
  assert rows.groups > 1 and rows.rounds > 1

  @jax.jit
  def forward(tokens_bt, segments_bt):
    dealt = (layout.placement.constrain(rows.deal(a, 1), ("batch", "length"))
             for a in (tokens_bt, segments_bt))
    x_btd = transformer.hidden(experiment.model, params, *dealt, "float32", layout.placement)
    return rows.collect(transformer.logits(experiment.model, params, x_btd), 1)

  return forward


@pytest.mark.parametrize("name, position, heads, axes", _AXES, ids=[row[0] for row in _AXES])
@settings(max_examples=12, deadline=None)
@given(tokens=_ids, other=_ids, t=st.integers(1, T - 1))
def test_documents_on_many_devices_do_not_see_each_other(name, position, heads, axes, tokens,
                                                         other, t):
  """Nothing of document 1 reaches document 2's logits; nothing later reaches what is before."""
  forward = _forward(position, heads, tuple(axes.items()))
  row = lambda ids: jnp.asarray(ids, jnp.int32)[None]
  two, one = (jnp.arange(T) >= t).astype(jnp.int32)[None], jnp.zeros((1, T), jnp.int32)
  ours, first, last = row(tokens), row(other[:t] + tokens[t:]), row(tokens[:t] + other[t:])
  np.testing.assert_array_equal(forward(ours, two)[:, t:], forward(first, two)[:, t:])
  np.testing.assert_array_equal(forward(ours, one)[:, :t], forward(last, one)[:, :t])
  if other[:t] != tokens[:t]:  # In one document it would be seen.
    assert not np.array_equal(forward(ours, one)[:, t:], forward(first, one)[:, t:])
