"""muP and CompleteP: the table of factors, what they do to the forward pass, what stays."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_experiment, with_fields

from chinchilla_jax import config as schema
from chinchilla_jax.model import parametrisation, transformer
from chinchilla_jax.model.parametrisation import Factors
from chinchilla_jax.training import optimizer, step
from chinchilla_jax.training import state as state_lib

SMALL = schema.Model(n_layers=6, d_model=48, n_heads=4, kv_size=16, d_ff=64, vocab_size=64,
                     attention_block=4, base_width=12, base_depth=2, base_kv_size=16)
VARIANTS = [dict(), dict(position="rotary", activation="swiglu", qk_norm=True)]
QUICK = {"xla_backend_optimization_level": 0}  # What runs once need not be fast.
TOKENS = jax.random.randint(jax.random.key(0), (2, 9), 0, SMALL.vocab_size)


def model(rule, **fields):
  return dataclasses.replace(SMALL, parametrisation=rule, **fields)


def paths(config):
  return ["/".join(k.key for k in path)
          for path, _ in jax.tree.leaves_with_path(transformer.abstract(config, "float32"))]


def random_params(config):
  leaves, tree = jax.tree.flatten(transformer.abstract(config, "float32"))
  rng = np.random.default_rng(0)
  return tree.unflatten([jnp.asarray(rng.normal(size=p.shape, scale=0.3), jnp.float32)
                         for p in leaves])


def logits(config, params):
  apply = jax.jit(transformer.apply, static_argnums=(0, 4), compiler_options=QUICK)
  return apply(config, params, TOKENS, None, "float32")


# ---- the table


def test_the_table():
  """d_model 4 times and n_layers 3 times the proxy's."""
  mup, complete = model("mup"), model("completep")
  assert (parametrisation.width_ratio(mup), parametrisation.depth_ratio(mup)) == (4, 1)
  assert (parametrisation.width_ratio(complete), parametrisation.depth_ratio(complete)) == (4, 3)
  assert parametrisation.logit_scale(mup) == parametrisation.logit_scale(complete) == 1 / 4
  assert parametrisation.residual_scale(mup) == 1
  assert parametrisation.residual_scale(complete) == pytest.approx(1 / 3)
  of = lambda config, path: next(factors for pattern, factors in parametrisation.groups(config)
                                 if re.search(pattern, path))
  for path, at_mup, at_complete in (
      ("embedding/table", Factors(eps=1 / 4), Factors(eps=1 / 4)),
      ("embedding/logit_bias", Factors(), Factors()),
      ("final_norm/gain", Factors(eps=1 / 4), Factors(eps=1 / 4)),
      ("blocks/attention/w_query", Factors(1 / 4, 4, 1 / 4), Factors(1 / 4, 4, 1 / 12)),
      ("blocks/attention/w_relative", Factors(1 / 4, 4, 1 / 4), Factors(1 / 4, 4, 1 / 12)),
      ("blocks/feed_forward/w_gate", Factors(1 / 4, 4, 1 / 4), Factors(1 / 4, 4, 1 / 12)),
      ("blocks/attention/u", Factors(eps=1 / 4), Factors(eps=1 / 12)),
      ("blocks/feed_forward/bias_in", Factors(eps=1 / 4), Factors(eps=1 / 12)),
      ("blocks/attention_norm/gain", Factors(eps=1 / 4), Factors(eps=1 / 12))):
    assert of(mup, path) == at_mup, path
    assert of(complete, path) == at_complete, path
  for _, factors in (*parametrisation.groups(mup), *parametrisation.groups(complete)):
    assert factors.lr * factors.decay == 1, "rate times decay is that of the proxy"


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_every_parameter_is_of_one_kind(fields):
  config = model("completep", **fields)
  for path in paths(config):
    kinds = [pattern for pattern, _ in parametrisation.groups(config) if re.search(pattern, path)]
    assert len(kinds) == 1, (path, kinds)
    [kind] = kinds
    assert ("w_" in kind) == path.rsplit("/", 1)[-1].startswith("w_"), (path, kind)


@pytest.mark.parametrize("rule, branches", [("mup", 12), ("completep", 4)])
def test_what_draws_are_divided_by(rule, branches):
  """Coordinates of the table are the proxy's; those of matrices shrink with the root of the width;
  completep draws residual outputs as the proxy's depth would."""
  divisor = lambda init, **words: parametrisation.init_divisor(model(rule, init=init), **words)
  assert divisor("gpt2", fan_in=48, embedding=True) == 1
  assert divisor("gpt2", fan_in=48) == 2
  assert divisor("gpt2", fan_in=64, residual=True) == pytest.approx(2 * math.sqrt(branches))
  assert divisor("fan_in", fan_in=48, embedding=True) == pytest.approx(math.sqrt(12))
  assert divisor("fan_in", fan_in=48) == pytest.approx(math.sqrt(48))
  assert divisor("fan_in", fan_in=64, residual=True) == pytest.approx(math.sqrt(64))


def test_initial_weights():
  drawn = jax.jit(transformer.init, static_argnums=(0, 2), compiler_options=QUICK)(
      model("completep", vocab_size=512), jax.random.key(0), "float32")
  blocks, residual = drawn["blocks"], 0.02 / 2 / math.sqrt(2 * 2)
  for want, w in ((0.02, drawn["embedding"]["table"]), (0.01, blocks["attention"]["w_query"]),
                  (0.01, blocks["attention"]["w_relative"]), (0.01, blocks["feed_forward"]["w_in"]),
                  (residual, blocks["attention"]["w_out"]),
                  (residual, blocks["feed_forward"]["w_out"])):
    assert float(jnp.std(w)) == pytest.approx(want, rel=0.03)


# ---- the forward pass, against the standard one with other weights


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_mup_divides_the_tables_product_and_not_the_bias(fields):
  params = random_params(model("mup", **fields))
  bias = params["embedding"]["logit_bias"][None, None]
  want = (logits(model("standard", **fields), params) - bias) / 4 + bias
  np.testing.assert_allclose(logits(model("mup", **fields), params), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_completep_divides_what_branches_write(fields):
  """As if every w_out and bias_out were a third: a branch is linear in them."""
  params = random_params(model("completep", **fields))
  third = jax.tree.map_with_path(
      lambda path, w: w / 3 if path[-1].key in ("w_out", "bias_out") else w, params)
  np.testing.assert_allclose(logits(model("completep", **fields), params),
                             logits(model("mup", **fields), third), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", ["relative", "rotary"])
def test_larger_heads_divide_scores_by_more(position):
  """kv_size 4 times the proxy's: as if queries, u and v were half of what they are."""
  mup = model("mup", base_kv_size=4, position=position)
  params = random_params(mup)
  half = jax.tree.map_with_path(
      lambda path, w: w / 2 if path[-1].key in ("w_query", "u", "v") else w, params)
  same = dataclasses.replace(mup, base_kv_size=16)
  np.testing.assert_allclose(logits(mup, params), logits(same, half), rtol=1e-5, atol=1e-5)
  assert np.abs(logits(mup, params) - logits(same, params)).max() > 1e-3


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_decoding_and_the_loss_know_of_it(fields):
  config = model("completep", base_kv_size=4, **fields)
  params = random_params(config)
  whole = logits(config, params)
  cache = transformer.init_cache(config, 2, TOKENS.shape[1], "float32")
  decode = jax.jit(transformer.decode, static_argnums=(0, 4), compiler_options=QUICK)
  decoded, _ = decode(config, params, TOKENS, cache, "float32")
  np.testing.assert_allclose(decoded, whole, rtol=1e-5, atol=2e-5)

  experiment = dataclasses.replace(tiny_experiment(), model=config)
  experiment = with_fields(experiment, precision__activations="float32")
  targets = jnp.roll(TOKENS, 1, axis=1)
  batch = {"inputs_bt": TOKENS, "targets_bt": targets, "segments_bt": jnp.zeros_like(TOKENS),
           "weights_bt": jnp.ones(TOKENS.shape)}
  _, nll = jax.jit(lambda p: step.loss_sums(experiment, p, batch), compiler_options=QUICK)(params)
  want = -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(whole), targets[..., None], -1))
  np.testing.assert_allclose(nll, want, rtol=1e-5)


# ---- what stays as it was


def lowered(**fields):
  """The text of the programs that draw weights, train and decode."""
  base = dict(model__base_width=32, model__base_depth=2, model__base_kv_size=16)
  made = with_fields(tiny_experiment(), **base | fields)
  adamw = optimizer.AdamW(made.optimizer, made.precision, lambda _: 1e-2)
  state = state_lib.abstract(made.model, adamw)
  ints = jax.ShapeDtypeStruct((4, made.data.seq_len), jnp.int32)
  batch = {"inputs_bt": ints, "targets_bt": ints, "segments_bt": ints,
           "weights_bt": jax.ShapeDtypeStruct(ints.shape, jnp.float32)}
  cache = transformer.init_cache(made.model, 1, 8, "bfloat16")
  return [
      jax.jit(lambda key: state_lib.init(made.model, adamw, key)).lower(
          jax.random.key(0)).as_text(),
      jax.jit(step.make_train_step(made, adamw)).lower(state, batch).as_text(),
      jax.jit(lambda params, tokens, cache: transformer.decode(
          made.model, params, tokens, cache, "bfloat16")).lower(
              state["params"], jax.ShapeDtypeStruct((1, 1), jnp.int32), cache).as_text()]


@pytest.mark.parametrize("fields", [
    {}, dict(model__position="rotary", model__qk_norm=True, model__activation="swiglu",
             model__init="fan_in")], ids=str)
def test_at_the_size_of_the_proxy_all_three_are_one_program(fields):
  standard = lowered(**fields)
  for rule in ("mup", "completep"):
    assert lowered(model__parametrisation=rule, **fields) == standard
  wider = lowered(**fields, **dict(model__parametrisation="mup", model__base_width=16))
  assert all(a != b for a, b in zip(wider, standard, strict=True)), "the comparison can fail"


def test_standard_reads_no_base():
  config = model("standard")
  assert parametrisation.groups(config) == ()
  for other in (config, model("standard", base_width=7, base_depth=5, base_kv_size=3)):
    assert parametrisation.width_ratio(other) == parametrisation.depth_ratio(other) == 1
    assert parametrisation.residual_scale(other) == parametrisation.logit_scale(other) == 1
    assert parametrisation.score_divisor(other) == math.sqrt(16)
    assert parametrisation.init_divisor(other, fan_in=48, residual=True) == math.sqrt(12)
    assert parametrisation.init_divisor(other, fan_in=48) == 1
