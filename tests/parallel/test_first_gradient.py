"""`Placement.first`: what waits for the layers, and which gradient goes before theirs."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny import tiny_experiment, with_fields

from chinchilla_jax.parallel import wire_minimum
from chinchilla_jax.parallel.layout import Layout


def placement(devices: int):
  sizes = {"slice": 1, "data": devices, "context": 1, "tensor": 1}
  experiment = with_fields(tiny_experiment(), mesh__strategy="fsdp")
  return Layout(experiment, wire_minimum.abstract_mesh(sizes)).placement


def gradient(found):
  def objective(x, w):
    x, tree = found.first(x, {"table": w})
    return jnp.sum(jnp.sin(x) * tree["table"])

  return jax.grad(objective, (0, 1))


def test_the_numbers_are_the_same():
  x, w = jnp.arange(4.0), jnp.arange(4.0) + 1
  for one, other in zip(gradient(placement(1))(x, w), gradient(placement(8))(x, w), strict=True):
    np.testing.assert_array_equal(one, other)


def test_weights_wait_for_x():
  def value(found):
    return str(jax.make_jaxpr(lambda x, w: found.first(x, w))(jnp.arange(4.0), jnp.arange(4.0)))

  assert "optimization_barrier" in value(placement(8))
  assert "optimization_barrier" not in value(placement(1))


def test_only_several_devices_wait():
  x = jnp.arange(4.0)
  assert "optimization_barrier" in str(jax.make_jaxpr(gradient(placement(8)))(x, x))
  assert "optimization_barrier" not in str(jax.make_jaxpr(gradient(placement(1)))(x, x))
