"""One step on eight devices is the step of one device: loss, gradients, new state, metrics.

Tolerances. With float32 activations only the order of sums differs: no gradient (the largest is
about 0.1) and no weight may differ by more than 1e-6 (seen: 1e-7), nor a metric by more than
1e-6 of itself. A bfloat16 gradient is rounded once on each device and once more when added up:
2**-8 of a number each time, so the difference's norm is bounded, and not each number.
"""

import eight
import numpy as np
import pytest

MOST = 1e-6
PARTS = ("params/", "optimizer/")


def assert_same(got, want, atol=MOST):
  assert got.keys() == want.keys()
  for name, array in want.items():
    assert got[name].dtype == array.dtype
    np.testing.assert_allclose(got[name].astype(np.float64), array.astype(np.float64), rtol=0,
                               atol=atol, err_msg=name)


def assert_metrics(got, want, rtol=MOST):
  assert got.keys() == want.keys() >= {
      "loss", "targets", "grad_norm", "param_norm", "update_norm", "learning_rate",
      "nonfinite_run", "nonfinite_total"}
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=rtol, err_msg=name)


def relative(got, want):
  """The norm of the difference of two trees, relative to the second's."""
  norm = lambda arrays: np.sqrt(sum(np.sum(np.square(a)) for a in arrays))
  wide = {name: array.astype(np.float64) for name, array in want.items()}
  return norm(got[name].astype(np.float64) - wide[name] for name in wide) / norm(wide.values())


def part(state, prefix):
  return {name: array for name, array in state.items() if name.startswith(prefix)}


@pytest.mark.parametrize("name, fields", [
    *((name, {}) for name in eight.LAYOUTS),
    ("fsdp data 2 x context 4", dict(model__position="rotary")),
    ("fsdp_tensor data 2 x context 2 x tensor 2", dict(model__position="rotary")),
    ("deepmind data 4 x tensor 2",
     dict(model__activation="swiglu", model__qk_norm=True, loss__z_loss=1e-2)),
    ("fsdp_tensor data 2 x context 2 x tensor 2", dict(model__bias=False)),
    ("fsdp_tensor slice 2 x data 2 x tensor 2", dict(batch__microbatches=2)),
    ("fsdp_tensor data 2 x context 2 x tensor 2", dict(batch__microbatches=2)),
    ("fsdp_tensor data 2 x context 2 x tensor 2",
     dict(model__parametrisation="completep", model__base_width=16, model__base_depth=1)),
], ids=str)
def test_a_step_on_eight_devices_is_the_step_of_one(name, fields):
  base = eight.experiment(**fields)
  got, want = eight.one_step(base, name), eight.one_step(base)
  assert max(np.abs(g).max() for g in want.grads.values()) > 0.01
  assert all(g.any() for g in want.grads.values()), "every parameter takes part"
  assert_same(got.grads, want.grads)
  assert_same(got.state, want.state)
  assert_metrics(got.metrics, want.metrics)
  moved = relative(part(want.state, "params/"), eight.flat({"params": eight.fresh(base)["params"]}))
  assert moved > 1e-3, "the step must change what is compared"


def test_microbatches_on_many_devices_are_the_whole_batch_of_one():
  """Law 3: every device's share of every microbatch has another number of targets."""
  got = eight.one_step(eight.experiment(batch__microbatches=2),
                       "fsdp_tensor slice 2 x data 2 x tensor 2")
  want = eight.one_step(eight.experiment())
  assert_same(got.grads, want.grads)
  assert_metrics(got.metrics, want.metrics)


def test_weights_too_small_to_cut_change_nothing():
  """The default of config.mesh.whole_below."""
  name, base = "fsdp_tensor data 2 x tensor 4", eight.experiment()
  whole = eight.experiment(mesh__whole_below=65_536)
  specs = lambda e: {entry.path: entry.resolved.spec
                     for entry in eight.layout_of(name, e).entries(eight.fresh(base))}
  assert specs(whole)["params/embedding/table"] != specs(base)["params/embedding/table"]
  got, want = eight.one_step(whole, name), eight.one_step(base)
  assert_same(got.grads, want.grads)
  assert_same(got.state, want.state)


def test_bfloat16_with_a_master():
  """The default precision. Gradients within 2 % in norm, as one device's are of float32's."""
  base = eight.experiment(precision__parameters="bfloat16", precision__activations="bfloat16")
  got = eight.one_step(base, "fsdp_tensor data 2 x context 2 x tensor 2")
  want = eight.one_step(base)
  assert relative(got.grads, want.grads) < 0.02
  assert_metrics(got.metrics, want.metrics, rtol=3e-3)
  assert relative(part(got.state, "optimizer/master"), part(want.state, "optimizer/master")) < 1e-3
  for name, params in part(got.state, "params/").items():
    master = got.state[name.replace("params", "optimizer/master", 1)]
    np.testing.assert_array_equal(params, master.astype(params.dtype), err_msg="law 4")


def test_stochastic_rounding_draws_the_same_bits_on_any_mesh():
  """So parameters differ only where the sum of weight and bits lies on the edge of a carry."""
  base = eight.experiment(precision__parameters="bfloat16", precision__rounding="stochastic",
                          precision__gradients="float32")
  got, want = eight.one_step(base, "fsdp data 8"), eight.one_step(base)
  # Parameters are read in bfloat16, so gradients travel in it: one rounding each.
  assert relative(got.grads, want.grads) < 2**-8
  params = part(want.state, "params/")
  same = [np.mean(part(got.state, "params/")[name] == params[name]) for name in params]
  assert np.mean(same) > 0.98
  assert relative(part(got.state, "params/"), params) < 1e-3
  nearest = eight.one_step(eight.experiment(precision__parameters="bfloat16"))
  assert np.mean([np.mean(nearest.state[name] == params[name]) for name in params]) < 0.9
