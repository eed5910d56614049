"""Which kernel attends, what is refused, and that each keeps documents apart in the whole model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_experiment, with_fields

from chinchilla_jax.errors import UserError
from chinchilla_jax.kernels import choice
from chinchilla_jax.model import transformer
from chinchilla_jax.parallel import mesh
from chinchilla_jax.parallel.layout import Layout
from chinchilla_jax.training import trained

V5P = choice.Task("relative", 128, "bfloat16", 2048, True, 1, "tpu", "TPU v5p")
H200 = dataclasses.replace(V5P, position="rotary", segmented=False, platform="gpu",
                           kind="NVIDIA H200")


def on(task, **fields):
  return dataclasses.replace(task, **fields)


@pytest.mark.parametrize(("task", "name"), [
    (V5P, "relative_tpu"),
    (on(V5P, position="rotary"), "splash"),
    (on(V5P, context=2), "blockwise"),
    (on(V5P, context=2, position="rotary"), "blockwise"),
    (on(V5P, kind="TPU v3"), "blockwise"),
    (on(V5P, kind="TPU v99"), "blockwise"),
    (on(V5P, kind="TPU v4", length=8_192), "relative_tpu"),
    (on(V5P, kind="TPU v4", length=8_193), "blockwise"),
    (on(V5P, length=32_768), "relative_tpu"),
    (on(V5P, length=32_768, dtype="float32"), "blockwise"),
    (on(V5P, length=32_768, kv_size=192), "blockwise"),
    (H200, "cudnn"),
    (on(H200, segmented=True), "blockwise"),
    (on(H200, dtype="float32"), "blockwise"),
    (on(H200, position="relative"), "blockwise"),
    (on(V5P, platform="cpu", kind="cpu"), "blockwise"),
    (on(H200, platform="cpu", kind="cpu"), "blockwise"),
])
def test_auto_takes_what_can_do_all_that_is_asked(task, name):
  assert choice.choose("auto", task) == name
  assert choice.choose("blockwise", task) == "blockwise"
  for other in ("relative_tpu", "splash", "cudnn"):
    if choice.problem(other, task):
      with pytest.raises(UserError, match=f"attention_kernel: {other} cannot be used here: .+"):
        choice.choose(other, task)
    else:
      assert other == name == choice.choose(other, task)


def test_a_layout_refuses_a_kernel_that_its_devices_cannot_run():
  experiment = with_fields(tiny_experiment(), model__attention_kernel="splash")
  with pytest.raises(UserError, match="it is for TPUs, and this is cpu"):
    Layout(experiment, mesh.make(experiment.mesh))


def test_a_run_of_other_devices_is_evaluated_here(tiny_run, tmp_path, monkeypatch):
  experiment, folder = tiny_run
  elsewhere = with_fields(experiment, model__attention_kernel="relative_tpu")
  monkeypatch.setattr(trained.RunFolder, "read_config", lambda self: elsewhere)
  assert trained.load(folder).layout.attention == "blockwise"


# -------------------------------------------------------------------- The whole model


def with_kernel(name, experiment):
  """A placement whose attention runs a TPU kernel in plain JAX; None for the model's own."""
  layout = Layout(experiment, mesh.make(experiment.mesh, jax.devices()[:1]))
  task = choice.Task.of(experiment, layout.mesh)
  return dataclasses.replace(layout.placement, attend=choice.attend(
      name, layout.mesh, task, interpret=True))


@pytest.mark.parametrize(("name", "position"), [("relative_tpu", "relative"),
                                                ("splash", "rotary"), ("blockwise", "relative")])
def test_documents_are_apart_and_gradients_those_of_the_reference(name, position):
  """Other tokens in the first document move nothing in the second; law 2."""
  experiment = with_fields(
      tiny_experiment(), model__position=position, precision__activations="float32",
      model__n_layers=2, data__seq_len=24)
  model = experiment.model
  rng = np.random.default_rng(0)
  leaves, tree = jax.tree.flatten(transformer.abstract(model, "float32"))
  params = tree.unflatten([jnp.asarray(rng.normal(size=p.shape, scale=0.3), jnp.float32)
                           for p in leaves])
  tokens = rng.integers(0, model.vocab_size, (1, 24))
  other = tokens.copy()
  other[:, :10] = (other[:, :10] + 1) % model.vocab_size
  segments = jnp.asarray([[0] * 10 + [1] * 14])
  weight = jnp.asarray(rng.normal(size=(1, 24, model.d_model)), jnp.float32)

  def gradient(placement, tokens):
    def loss(params):
      x = transformer.hidden(model, params, tokens, segments, "float32", placement)
      return jnp.sum(x * weight), x
    return jax.jit(functools.partial(jax.value_and_grad(loss, has_aux=True)))(params)

  placement = with_kernel(name, experiment)
  (_, x), grads = gradient(placement, jnp.asarray(tokens))
  (_, moved), _ = gradient(placement, jnp.asarray(other))
  np.testing.assert_array_equal(x[:, 10:], moved[:, 10:])
  assert np.abs(x[:, :10] - moved[:, :10]).max() > 0.1
  (_, want_x), want = gradient(with_kernel("blockwise", experiment), jnp.asarray(tokens))
  np.testing.assert_allclose(x, want_x, rtol=1e-4, atol=1e-4)
  for got, exact in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
    assert np.linalg.norm(got - exact) <= 1e-4 * np.linalg.norm(exact)
