"""A trained model, as evaluation and generation see it: parameters, config, store."""

import contextlib
import dataclasses
import os
from typing import Any

import jax.numpy as jnp

from chinchilla_jax import config as schema
from chinchilla_jax.data import tokens
from chinchilla_jax.errors import UserError
from chinchilla_jax.model import transformer
from chinchilla_jax.parallel import mesh
from chinchilla_jax.parallel.layout import Layout
from chinchilla_jax.training import checkpoint
from chinchilla_jax.training.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Trained:
  """One checkpoint of a run.

  Attributes:
    experiment: the run's config.
    store: its token store.
    step: of the checkpoint.
    layout: over the devices that are here, whatever mesh the run had: parameters are cut over
      all of them (fsdp).
    params: the nested dict of arrays that the model takes.
  """

  experiment: schema.Experiment
  store: tokens.TokenStore
  step: int
  layout: Layout
  params: Any


def load(workdir: str | os.PathLike, step: int | None = None) -> Trained:
  """Loads the parameters (and nothing else) of a run's checkpoint.

  Args:
    workdir: the run's folder.
    step: of the checkpoint; None for the newest.

  Raises:
    UserError: no run, no such checkpoint, or the store is gone or is another one.
  """
  folder = RunFolder(workdir)
  experiment = folder.read_config()
  if checkpoint.newest_step(folder.checkpoints) is None:
    raise UserError(f"--workdir: {str(folder.path)!r} has no checkpoint yet; train it first")
  with contextlib.closing(checkpoint.Checkpoints(folder.checkpoints)) as checkpoints:
    steps = checkpoints.steps()
    step = steps[-1] if step is None else step
    if step not in steps:
      raise UserError(f"--step: no checkpoint at step {step}; there are "
                      f"{', '.join(map(str, steps))}")
    store = tokens.open_store(experiment.data.store, verify=experiment.data.verify)
    if checkpoints.progress(step)["store_fingerprint"] != store.fingerprint:
      raise UserError(f"config.data.store: {experiment.data.store} is not the store that "
                      f"{folder.path} was trained on; prepare that one again")
    experiment = dataclasses.replace(experiment, mesh=schema.Mesh())
    layout = Layout(experiment, mesh.make(experiment.mesh))
    wanted = transformer.abstract(experiment.model, jnp.dtype(experiment.precision.parameters))
    params = checkpoints.restore(step, layout.placed({"params": wanted}))["params"]
  return Trained(experiment, store, step, layout, params)
