"""What a learning rate does must not depend on the size: the optimizer's factors, and the
coordinate check on real models (`coordinates`).

Bands of slopes. Seen at widths 64 to 512: muP's changes have exponents of -0.05 to 0,
those of the logits -0.21, since the part of them that initialisation draws fades as the root of
the width; standard's are 0.9 to 1.4. Over depths 2 to 16, CompleteP's are -0.08 to 0.08, muP's
last block has 0.87.
"""

import functools

import coordinates
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_optimizer import applied, grads_of, make, reference, run, weights

from chinchilla_jax import config_io, patterns
from chinchilla_jax.errors import UserError
from chinchilla_jax.model import parametrisation
from chinchilla_jax.model.parametrisation import Factors

FLAT, STEEP = 0.3, 0.5
WIDTHS, DEPTHS = (64, 160, 384), (2, 16)
MODERN = dict(model__position="rotary", model__qk_norm=True, model__activation="swiglu")


# ---- the optimizer


def apply(adamw, grads, steps=8, groups=()):
  params, state = adamw.init(weights())
  update = jax.jit(functools.partial(applied, adamw), static_argnames="groups")
  for count in range(steps):
    params, state, norms = update(grads(count), state, params, jnp.int32(count),
                                  jax.random.key(0), groups=groups)
  return params, state, norms


def test_factors_of_a_group_are_those_of_its_settings():
  """Each parameter as AdamW alone would move it with its own rate, decay and epsilon."""
  adamw = make(lr=1e-2, parameters="float32", weight_decay=0.1, eps=1e-2)
  groups = (("kernel", Factors(lr=0.25, decay=4.0, eps=0.5)), ("norm", Factors(lr=2.0)))
  params, state, norms = apply(adamw, grads_of, groups=groups)
  kernel, _ = reference(weights(), grads_of, 8, 2.5e-3, 0.9, 0.95, 5e-3, 0.4, np.inf)
  _, norm = reference(weights(), grads_of, 8, 2e-2, 0.9, 0.95, 1e-2, 0.1, np.inf)
  np.testing.assert_allclose(params["a"]["kernel"], kernel, rtol=2e-5, atol=2e-6)
  np.testing.assert_allclose(params["norm"], norm, rtol=2e-5, atol=2e-6)
  assert norms["learning_rate"] == np.float32(1e-2) and state["count"] == 8
  plain, _, _ = apply(adamw, grads_of)
  assert np.abs(plain["a"]["kernel"] - params["a"]["kernel"]).max() > 1e-2


def test_lr_patterns_scale_and_freeze():
  adamw = make(lr=1e-2, parameters="float32", weight_decay=0.1,
               lr_patterns=(("kernel", 0.0), ("norm", 0.5)))
  params, state, _ = apply(adamw, grads_of)
  np.testing.assert_array_equal(params["a"]["kernel"], weights()["a"]["kernel"])
  _, norm = reference(weights(), grads_of, 8, 5e-3, 0.9, 0.95, 1e-8, 0.1, np.inf)
  np.testing.assert_allclose(params["norm"], norm, rtol=2e-5, atol=2e-6)
  assert state["mu"]["a"]["kernel"].any(), "moments go on, so that thawing starts warm"


def test_without_patterns_that_match_nothing_changes():
  same, _, _ = run(make(lr_patterns=(("no such parameter", 0.0),)), weights(), grads_of, 5)
  want, _, _ = run(make(), weights(), grads_of, 5)
  jax.tree.map(np.testing.assert_array_equal, same, want)


def test_a_bad_pattern_is_refused():
  with pytest.raises(UserError, match="lr_patterns.*regular expression"):
    config_io.load(None, [("optimizer.lr_patterns", "(('(', 1.0),)")])


@pytest.mark.parametrize("rule", ["mup", "completep"])
def test_decay_per_step_does_not_depend_on_the_size(rule):
  """Without gradients a decayed weight shrinks by lr * weight_decay a step, at any width."""
  made = coordinates.experiment(rule, width=256, depth=8)
  names = ("embedding/table", "blocks/attention/w_query", "blocks/feed_forward/w_out")
  start = {name: jnp.ones((2, 2)) for name in names}
  adamw = make(lr=0.1, parameters="float32", weight_decay=0.5)
  params, state = adamw.init(start)
  zero = jax.tree.map(jnp.zeros_like, start)
  _, take = adamw.propose(zero, 1.0, state, params, jnp.int32(0), jax.random.key(0),
                          parametrisation.groups(made.model))
  params, _ = take(True)
  for name in names:
    np.testing.assert_allclose(params[name], 0.95, rtol=1e-6, err_msg=name)


# ---- the coordinate check


def test_mup_is_flat_in_width_and_standard_is_not():
  flat, _ = coordinates.over_width("mup", WIDTHS)
  steep, _ = coordinates.over_width("standard", (WIDTHS[0], WIDTHS[-1]))
  assert flat.keys() == steep.keys() == {"first block", "last block", "attention scores", "logits"}
  for name in flat:
    assert abs(flat[name]) < FLAT, (name, flat)
    assert steep[name] > STEEP, (name, steep)


def test_mup_is_flat_in_width_with_the_modern_switches():
  flat, _ = coordinates.over_width("mup", (64, 192), **MODERN)
  assert max(map(abs, flat.values())) < FLAT, flat


def test_completep_is_flat_in_depth_and_mup_is_not():
  flat, _ = coordinates.over_depth("completep", DEPTHS)
  steep, _ = coordinates.over_depth("mup", DEPTHS)
  for name in ("last block", "attention scores", "logits"):
    assert abs(flat[name]) < FLAT, (name, flat)
  assert steep["last block"] > STEEP, steep
  # One block's part of the sum of all of them gets smaller: that is what keeps the sum.
  assert flat["first block"] < -STEEP, flat


def exponents(rule, ratio):
  """How epsilon scales with a ratio of 2, by path."""
  made = coordinates.experiment(rule, **{name: 2 * size for name, size in ratio.items()})
  groups = parametrisation.groups(made.model)
  return lambda path: np.log2(patterns.match(path, groups, None).eps)


@pytest.mark.parametrize("rule, over, sizes, ratio", [
    ("mup", coordinates.over_width, WIDTHS, dict(width=coordinates.WIDTH)),
    ("completep", coordinates.over_depth, DEPTHS, dict(depth=coordinates.DEPTH))])
def test_epsilon_scales_as_the_gradient_does(rule, over, sizes, ratio):
  """So that what Adam divides by keeps its proportions; and how the global norm goes."""
  _, gradients = over(rule, sizes)
  expected = exponents(rule, ratio)
  norm = gradients.pop("global norm")
  assert {"embedding/table", "embedding/logit_bias", "blocks/attention/u",
          "blocks/attention/w_relative", "final_norm/gain"} <= gradients.keys()
  for path, slope in gradients.items():
    assert slope == pytest.approx(expected(path), abs=0.2), path
  # docs/parametrisation.md, on clip_norm: it falls, slowly.
  assert -0.5 < norm < 0, norm
