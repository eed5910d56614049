"""The transformer: counts, names, what sees what, and layouts that must not change results."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from chinchilla_jax import config as schema
from chinchilla_jax.errors import UserError
from chinchilla_jax.model import layers, shapes, transformer

T = 12
TINY = schema.Model(n_layers=2, d_model=12, n_heads=2, kv_size=6, d_ff=16, vocab_size=29,
                    attention_block=5)
PATHS = [  # every way through attention: fields of TINY
    (("position", "relative"), ("attention_block", 0)),
    (("position", "relative"), ("attention_block", 5), ("qk_norm", True)),
    (("position", "rotary"), ("attention_block", 4)),
    (("position", "rotary"), ("attention_block", 5), ("qk_norm", True), ("activation", "swiglu")),
]


def published(shape):
  return schema.Model(shape.n_layers, shape.d_model, shape.n_heads, shape.kv_size, shape.d_ff,
                      shape.vocab_size)


def size(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def random_params(config, seed=0):
  """Parameters none of which is 0 or 1: an unused one would show."""
  leaves, tree = jax.tree.flatten(transformer.abstract(config, "float32"))
  rng = np.random.default_rng(seed)
  return tree.unflatten([jnp.asarray(rng.normal(size=p.shape, scale=0.3), jnp.float32)
                         for p in leaves])


@functools.cache
def path(fields):
  """(config, params, jitted logits, jitted gradient of the logits from `first` on)."""
  config = dataclasses.replace(TINY, **dict(fields))
  forward = jax.jit(lambda p, tokens, segments: transformer.apply(config, p, tokens, segments,
                                                                  "float32"))

  def tail(p, tokens, segments, first):
    log_p = jax.nn.log_softmax(forward(p, tokens, segments))
    return jnp.sum(jnp.where(jnp.arange(T)[None, :, None] >= first, log_p**2, 0))

  return config, random_params(config), forward, jax.jit(jax.grad(tail))


tokens_of = st.lists(st.integers(0, TINY.vocab_size - 1), min_size=T, max_size=T)


def row(tokens):
  return jnp.asarray(tokens)[None]


# ---- counts and names


@pytest.mark.parametrize("shape", [*shapes.TABLE_A9, *shapes.GOPHER, shapes.CHINCHILLA],
                         ids=lambda s: s.name)
def test_the_model_has_as_many_parameters_as_the_rule_says(shape):
  assert size(transformer.abstract(published(shape), "bfloat16")) == shapes.count_parameters(shape)


@pytest.mark.parametrize("fields", [
    dict(position="rotary"), dict(activation="swiglu"), dict(qk_norm=True),
    dict(position="rotary", activation="swiglu", qk_norm=True), dict(bias=False),
    dict(position="rotary", activation="swiglu", bias=False)], ids=str)
def test_switches_have_as_many_parameters_as_the_rule_says(fields):
  config = dataclasses.replace(published(shapes.CHINCHILLA), **fields)
  assert size(transformer.abstract(config, "bfloat16")) == shapes.count_parameters(config)


def test_names_and_axes():
  """The tree of a checkpoint: changing it breaks every checkpoint there is."""
  axes = transformer.logical_axes(dataclasses.replace(TINY, qk_norm=True, activation="swiglu"))
  flat = jax.tree_util.tree_flatten_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))[0]
  assert {"/".join(k.key for k in path): names for path, names in flat} == {
      "embedding/table": ("vocab", "embed"),
      "embedding/logit_bias": ("vocab",),
      "blocks/attention_norm/gain": ("layers", "embed"),
      "blocks/attention/w_query": ("layers", "embed", "heads", "head_dim"),
      "blocks/attention/w_key": ("layers", "embed", "heads", "head_dim"),
      "blocks/attention/w_value": ("layers", "embed", "heads", "head_dim"),
      "blocks/attention/w_relative": ("layers", "embed", "heads", "head_dim"),
      "blocks/attention/w_out": ("layers", "heads", "head_dim", "embed"),
      "blocks/attention/bias_out": ("layers", "embed"),
      "blocks/attention/u": ("layers", "heads", "head_dim"),
      "blocks/attention/v": ("layers", "heads", "head_dim"),
      "blocks/attention/query_norm/gain": ("layers", "head_dim"),
      "blocks/attention/key_norm/gain": ("layers", "head_dim"),
      "blocks/feed_forward_norm/gain": ("layers", "embed"),
      "blocks/feed_forward/w_in": ("layers", "embed", "mlp"),
      "blocks/feed_forward/bias_in": ("layers", "mlp"),
      "blocks/feed_forward/w_gate": ("layers", "embed", "mlp"),
      "blocks/feed_forward/bias_gate": ("layers", "mlp"),
      "blocks/feed_forward/w_out": ("layers", "mlp", "embed"),
      "blocks/feed_forward/bias_out": ("layers", "embed"),
      "final_norm/gain": ("embed",),
  }


@pytest.mark.parametrize("position", ["relative", "rotary"])
def test_axes_fit_the_arrays(position):
  config = dataclasses.replace(TINY, position=position)
  sizes = dict(layers=2, vocab=29, embed=12, heads=2, head_dim=6, mlp=16)
  shapes_by_axes = jax.tree.map(lambda names: tuple(sizes[n] for n in names),
                                transformer.logical_axes(config),
                                is_leaf=lambda x: isinstance(x, tuple))
  abstract = transformer.abstract(config, "bfloat16")
  assert jax.tree.map(lambda p: p.shape, abstract) == shapes_by_axes
  assert {p.dtype for p in jax.tree.leaves(abstract)} == {jnp.dtype("bfloat16")}


# ---- initialisation


def test_init_gpt2():
  config = schema.Model(n_layers=8, d_model=64, n_heads=4, kv_size=16, d_ff=256, vocab_size=500)
  draw = lambda key: [transformer.init(config, key, dtype) for dtype in ("float32", "bfloat16")]
  params, half = jax.jit(draw)(jax.random.key(0))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b), params, half)
  attention, dense = params["blocks"]["attention"], params["blocks"]["feed_forward"]
  for w in (attention["w_query"], attention["w_relative"], dense["w_in"],
            params["embedding"]["table"]):
    assert float(jnp.std(w)) == pytest.approx(0.02, rel=0.03)
  for w in (attention["w_out"], dense["w_out"]):
    assert float(jnp.std(w)) == pytest.approx(0.02 / 4, rel=0.03)
  assert not jnp.array_equal(attention["w_key"][0], attention["w_key"][1])
  assert not jnp.array_equal(attention["w_key"], attention["w_query"])
  for zero in (attention["u"], attention["bias_out"], dense["bias_in"],
               params["embedding"]["logit_bias"]):
    assert not zero.any()
  assert (params["final_norm"]["gain"] == 1).all()


def test_init_fan_in():
  config = schema.Model(n_layers=4, d_model=64, n_heads=4, kv_size=32, d_ff=256, vocab_size=500,
                        init="fan_in")
  params = jax.jit(transformer.init, static_argnums=(0, 2))(config, jax.random.key(0), "float32")
  cut = 0.8796  # standard deviation of a standard normal cut off at two
  for w, fan_in in ((params["blocks"]["attention"]["w_query"], 64),
                    (params["blocks"]["attention"]["w_out"], 128),
                    (params["blocks"]["feed_forward"]["w_out"], 256),
                    (params["embedding"]["table"], 64)):
    assert float(jnp.std(w)) == pytest.approx(cut / math.sqrt(fan_in), rel=0.03)
    assert float(jnp.max(jnp.abs(w))) <= 2 / math.sqrt(fan_in) + 1e-6


@pytest.mark.parametrize(("fields", "says"), [
    (dict(d_model=13), "model.d_model is 13"),
    (dict(position="rotary", kv_size=7), "model.kv_size is 7")])
def test_sizes_that_a_position_embedding_cannot_have(fields, says):
  with pytest.raises(UserError, match=says):
    transformer.abstract(dataclasses.replace(TINY, **fields), "float32")


# ---- what sees what


@pytest.mark.parametrize("fields", PATHS)
@settings(max_examples=12, deadline=None)
@given(tokens=tokens_of, other=tokens_of, t=st.integers(1, T - 1))
def test_causal(fields, tokens, other, t):
  """A token changes no logit before it."""
  _, params, forward, _ = path(fields)
  segments = jnp.zeros((1, T), int)
  before = forward(params, row(tokens), segments)
  after = forward(params, row(tokens[:t] + other[t:]), segments)
  np.testing.assert_array_equal(before[:, :t], after[:, :t])
  if tokens[t:] != other[t:]:
    assert not jnp.array_equal(before[:, t:], after[:, t:])


@pytest.mark.parametrize("fields", PATHS)
@settings(max_examples=12, deadline=None)
@given(tokens=tokens_of, other=tokens_of, t=st.integers(1, T - 1))
def test_documents_do_not_see_each_other(fields, tokens, other, t):
  """Nothing of document 1 reaches document 2's logits or their gradient."""
  _, params, forward, gradient = path(fields)
  segments = (jnp.arange(T) >= t).astype(int)[None]
  ours, theirs = row(tokens), row(other[:t] + tokens[t:])
  np.testing.assert_array_equal(forward(params, ours, segments)[:, t:],
                                forward(params, theirs, segments)[:, t:])
  # The look-up's gradient sums per token id, so ids of document 1 add exact zeros.
  jax.tree.map(np.testing.assert_array_equal, gradient(params, ours, segments, t),
               gradient(params, theirs, segments, t))


@pytest.mark.parametrize("fields", PATHS)
def test_a_packed_document_is_as_if_alone(fields):
  config, params, forward, _ = path(fields)
  tokens = jax.random.randint(jax.random.key(0), (1, T), 0, TINY.vocab_size)
  packed = forward(params, tokens, (jnp.arange(T) >= 5).astype(int)[None])[:, 5:]
  alone = transformer.apply(config, params, tokens[:, 5:], None, "float32")
  np.testing.assert_allclose(packed, alone, rtol=1e-4, atol=1e-4)


def test_no_segments_is_one_document():
  config, params, forward, _ = path(PATHS[0])
  tokens = jax.random.randint(jax.random.key(0), (2, T), 0, TINY.vocab_size)
  np.testing.assert_allclose(forward(params, tokens, jnp.ones((2, T), int)),
                             transformer.apply(config, params, tokens, None, "float32"),
                             rtol=1e-5, atol=1e-5)


# ---- layouts and precision


def loss_and_grads(config, params, dtype="float32"):
  tokens = jax.random.randint(jax.random.key(1), (2, T), 0, config.vocab_size)
  segments = (jnp.arange(T)[None] >= jnp.array([[4], [9]])).astype(int)

  def loss(params):
    log_p = jax.nn.log_softmax(transformer.apply(config, params, tokens, segments, dtype))
    return -jnp.mean(jnp.take_along_axis(log_p, tokens[..., None], axis=-1))

  return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def reference():
  config = dataclasses.replace(TINY, attention_block=0)
  return loss_and_grads(config, random_params(config))


@pytest.mark.parametrize("fields", [
    dict(remat="dots", scan_unroll=2), dict(remat="full", attention_block=7),
    dict(attention_block=4), dict(attention_block=1000)], ids=str)
def test_layout_changes_nothing(fields, reference):
  got = loss_and_grads(dataclasses.replace(TINY, **fields), random_params(TINY))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, reference)


def test_every_parameter_has_a_gradient(reference):
  for grad in jax.tree.leaves(reference[1]):
    assert jnp.any(grad != 0)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_remat_keeps_what_it_says(remat):
  config = dataclasses.replace(TINY, remat=remat, d_ff=40)
  tokens = jnp.zeros((3, T), int)
  kept = jax.eval_shape(
      lambda p: jax.vjp(lambda p: transformer.hidden(config, p, tokens, None, "float32"), p)[1],
      transformer.abstract(config, "float32"))
  hidden_layers = [a.shape for a in jax.tree.leaves(kept) if a.shape == (2, 3, T, 40)]
  assert len(hidden_layers) == {"none": len(hidden_layers), "dots": 1, "full": 0}[remat]
  assert hidden_layers or remat == "full"


@pytest.mark.parametrize(("fields", "parameters"), [
    (PATHS[1], "float32"), (PATHS[2], "bfloat16")], ids=str)
def test_bfloat16_is_near_float32(fields, parameters):
  config = dataclasses.replace(TINY, **dict(fields))
  params = jax.tree.map(lambda p: p.astype(parameters), random_params(config))
  exact_loss, exact = loss_and_grads(config, jax.tree.map(lambda p: p.astype(jnp.float32), params))
  loss, grads = loss_and_grads(config, params, "bfloat16")
  assert float(loss) == pytest.approx(float(exact_loss), rel=1e-2)
  norm = lambda tree: math.sqrt(sum(float(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(tree)))
  difference = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b, grads, exact)
  assert norm(difference) < 0.03 * norm(exact)
  assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(parameters)}


def test_activation_dtype_is_kept_and_logits_are_float32():
  params = random_params(TINY)
  x_btd = transformer.hidden(TINY, params, jnp.zeros((1, 3), int), None, "bfloat16")
  assert x_btd.dtype == jnp.bfloat16
  assert transformer.logits(TINY, params, x_btd).dtype == jnp.float32


def test_gradients_that_sum_over_tokens_do_not_saturate():
  """1,024 equal terms of one: a running bfloat16 sum would stop at 256."""
  module, state = nnx.split(layers.Embedding(TINY, jax.random.key(0)))
  encode = lambda p: nnx.merge(module, p).encode(jnp.zeros((1, 1024), int), jnp.bfloat16)
  out, vjp = jax.vjp(encode, jax.tree.map(lambda p: p.astype(jnp.bfloat16),
                                          nnx.to_pure_dict(state)))
  np.testing.assert_array_equal(vjp(jnp.ones_like(out))[0]["table"][0], 1024)

  out, vjp = jax.vjp(lambda b: layers.add(jnp.zeros((1024, 4), jnp.bfloat16), b[None]),
                     jnp.zeros(4, jnp.bfloat16))
  np.testing.assert_array_equal(vjp(jnp.ones_like(out))[0], 1024)


@pytest.mark.parametrize("name", ["gelu", "gelu_exact", "relu", "swiglu"])
def test_activation(name):
  config = schema.Model(n_layers=1, d_model=3, n_heads=1, kv_size=2, d_ff=4, vocab_size=5,
                        activation=name)
  module = layers.FeedForward(config, jax.random.key(0))
  rng = np.random.default_rng(0)
  draw = lambda shape: rng.normal(size=shape).astype(np.float32)
  w_in, w_gate, w_out, x = draw((3, 4)), draw((3, 4)), draw((4, 3)), draw((1, 2, 3))
  b_in, b_gate, b_out = draw(4), draw(4), draw(3)
  module.w_in[...], module.bias_in[...] = jnp.asarray(w_in), jnp.asarray(b_in)
  module.w_out[...], module.bias_out[...] = jnp.asarray(w_out), jnp.asarray(b_out)
  a = x @ w_in + b_in
  if name == "swiglu":
    module.w_gate[...], module.bias_gate[...] = jnp.asarray(w_gate), jnp.asarray(b_gate)
    gate = x @ w_gate + b_gate
    a = a * gate / (1 + np.exp(-gate))
  elif name == "relu":
    a = np.maximum(a, 0)
  elif name == "gelu_exact":
    a = a * 0.5 * (1 + np.vectorize(math.erf)(a / math.sqrt(2)))
  else:
    a = 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
  np.testing.assert_allclose(module(jnp.asarray(x)), a @ w_out + b_out, rtol=1e-4, atol=1e-5)
