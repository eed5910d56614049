"""A trained model, as evaluation and generation see it: parameters, config, store."""

import dataclasses
import os
import sys
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
    step: of the checkpoint; None for the newest that is whole.

  Raises:
    UserError: no run, no such checkpoint, none that is whole, or the store is gone or is another
      one.
  """
  folder = RunFolder(workdir)
  experiment = folder.read_config()
  step = _chosen(folder, step, experiment.checkpoint.verify)
  fingerprints = checkpoint.progress(folder.checkpoints, step)["fingerprints"]
  try:
    store = tokens.open_store(experiment.data.store, verify=experiment.data.verify)
  except UserError as error:
    raise UserError(f"{error} (if the run's store is elsewhere now, say so in data.store of "
                    f"{folder.config})") from error
  if fingerprints["store"] != store.fingerprint:
    raise UserError(f"config.data.store: {experiment.data.store} is not the store that "
                    f"{folder.path} was trained on; prepare that one again, or say in data.store "
                    f"of {folder.config} where it is")
  # Whatever it was trained on, this machine has its own devices.
  experiment = dataclasses.replace(
      experiment, mesh=schema.Mesh(),
      model=dataclasses.replace(experiment.model, attention_kernel="auto"))
  layout = Layout(experiment, mesh.make(experiment.mesh))
  wanted = transformer.abstract(experiment.model, jnp.dtype(experiment.precision.parameters))
  params = checkpoint.restore(folder.checkpoints, step, layout.placed({"params": wanted}))["params"]
  return Trained(experiment, store, step, layout, params)


def _chosen(folder: RunFolder, step: int | None, verify: str) -> int:
  """The step asked for, once its checkpoint is known to be whole; the newest such without one."""
  steps = checkpoint.steps(folder.checkpoints)
  if not steps:
    raise UserError(f"--workdir: {str(folder.path)!r} has no checkpoint yet; train it first")
  if step is None:
    step, problems = checkpoint.newest_good(folder.checkpoints, verify)
    if step is None:
      raise UserError(f"--workdir: {str(folder.path)!r} has no checkpoint that is whole "
                      f"({checkpoint.told(problems)}); bring back a copy")
    for at, why in problems.items():
      print(f"note: checkpoint {at:,} is damaged: {why}; using that of step {step:,}",
            file=sys.stderr)
    return step
  if step not in steps:
    raise UserError(f"--step: no checkpoint at step {step}; there are "
                    f"{', '.join(map(str, steps))}")
  if problem := checkpoint.problem(folder.checkpoints, step, verify):
    others = ", ".join(str(other) for other in steps if other != step)
    raise UserError(f"--step: the checkpoint of step {step} is damaged: {problem}; "
                    + (f"choose another of {others}" if others else "bring back a copy"))
  return step
