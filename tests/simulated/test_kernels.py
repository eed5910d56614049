"""TPU kernels under shard_map: each device on its own heads and sequences, the step that of one."""

import dataclasses

import eight
import jax
import numpy as np
import pytest

from chinchilla_jax.kernels import choice
from chinchilla_jax.training import step


@pytest.mark.parametrize(("kernel", "position"), [("relative_tpu", "relative"),
                                                  ("splash", "rotary")])
def test_gradients_are_those_of_one_device_without_a_kernel(kernel, position):
  base = eight.experiment(model__position=position)
  name = "fsdp_tensor slice 2 x data 2 x tensor 2"
  layout, placed = eight.layout_of(name, base), eight.on(name, base)
  task = choice.Task.of(placed, layout.mesh)
  layout.placement = dataclasses.replace(
      layout.placement, attend=choice.attend(kernel, layout.mesh, task, interpret=True))
  params, batch = eight.fresh(base)["params"], eight.batch_of(base)
  gradients = jax.jit(lambda p, b: step.gradients(placed, p, b, layout)[0],
                      compiler_options=eight.QUICK)
  got = eight.flat(jax.device_get(gradients(
      jax.device_put(params, layout.state({"params": params})["params"]),
      jax.device_put(batch, layout.rows))))
  want = {path.removeprefix("grads/"): array
          for path, array in eight.one_step(base).grads.items()}
  assert got.keys() == want.keys()
  for path, array in want.items():
    assert np.abs(array).max() > 0, path
    np.testing.assert_allclose(got[path], array, rtol=0, atol=1e-6, err_msg=path)
