"""Orbax checkpoints: the train state and, beside it, what a restart must agree with."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from chinchilla_jax import config as schema
from chinchilla_jax import config_io
from chinchilla_jax.errors import UserError
from chinchilla_jax.training import run_folder
from chinchilla_jax.training.state import State


class Checkpoints:
  """The checkpoints of one run.

  A checkpoint has two items: `state`, the arrays (bfloat16 and float32 as they are), and
  `progress`, JSON with the step, the tokens seen, the config, the store's fingerprint and
  the library versions. Orbax commits it by renaming, so a crash leaves no half checkpoint.
  """

  def __init__(self, path: pathlib.Path, config: schema.Checkpoint | None = None,
               keep_every_steps: int = 0):
    """Opens for writing with a config, for reading only without."""
    self.path = path
    if config is None:
      options = ocp.CheckpointManagerOptions(read_only=True)
    else:
      options = ocp.CheckpointManagerOptions(
          max_to_keep=config.keep, keep_period=keep_every_steps or None,
          enable_async_checkpointing=config.asynchronous, create=True)
    self._manager = ocp.CheckpointManager(
        path.absolute(), options=options,
        item_handlers={"state": ocp.PyTreeCheckpointHandler(),
                       "progress": ocp.JsonCheckpointHandler()})

  def steps(self) -> list[int]:
    """Steps of all committed checkpoints, ascending."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: State, progress: dict[str, Any]) -> None:
    """Starts to save; returns once the arrays are copied, so that they may be donated."""
    self._manager.save(step, args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(state), progress=ocp.args.JsonSave(progress)))

  def progress(self, step: int) -> dict[str, Any]:
    """The JSON item of a checkpoint."""
    return self._manager.restore(
        step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())).progress

  def restore(self, step: int, wanted: Any) -> Any:
    """Restores the part of the state that `wanted` names.

    Args:
      step: of a committed checkpoint.
      wanted: tree of ShapeDtypeStructs with shardings; a whole state or, say, only params.

    Raises:
      UserError: names the first leaf that is missing or has another shape or dtype.
    """
    stored = self._manager.item_metadata(step).state.tree
    _compare(stored, wanted, f"{self.path}/{step}")
    return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(
        item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True))).state

  def restore_weights(self, step: int, params: Any) -> Any:
    """Float32 weights for another run: the master copy where there is one, else the parameters.

    Args:
      step: of a committed checkpoint.
      params: tree of ShapeDtypeStructs with shardings; its dtypes are not read.

    Raises:
      UserError: the model has another shape.
    """
    stored = self._manager.item_metadata(step).state.tree
    if "master" in stored["optimizer"]:
      wanted = {"optimizer": {"master": _with_dtypes(params, stored["optimizer"]["master"])}}
      return self.restore(step, wanted)["optimizer"]["master"]
    weights = self.restore(step, {"params": _with_dtypes(params, stored["params"])})["params"]
    return jax.tree.map(lambda w: w.astype("float32"), weights)

  def wait(self) -> None:
    """Blocks until every save has been committed."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()


def _compare(stored: Any, wanted: Any, where: str, path: str = "") -> None:
  for key, want in wanted.items():
    name = f"{path}{key}"
    if not isinstance(stored, dict) or key not in stored:
      raise UserError(f"checkpoint {where} has no {name}; it was written with other precision "
                      "or model settings: use the config.json of its run")
    have = stored[key]
    if isinstance(want, dict):
      _compare(have, want, where, f"{name}/")
    elif tuple(have.shape) != tuple(want.shape) or have.dtype != want.dtype:
      raise UserError(
          f"checkpoint {where}: {name} is {have.dtype}{list(have.shape)}, the config wants "
          f"{want.dtype}{list(want.shape)}; use the config.json of its run")


def _with_dtypes(wanted: Any, stored: Any) -> Any:
  """`wanted` with the dtypes of `stored`, where both have a leaf."""
  if not isinstance(wanted, dict):
    dtype = wanted.dtype if isinstance(stored, dict) else stored.dtype
    return jax.ShapeDtypeStruct(wanted.shape, dtype, sharding=wanted.sharding)
  inner = stored if isinstance(stored, dict) else {}
  return {key: _with_dtypes(value, inner.get(key, {})) for key, value in wanted.items()}


def newest_step(path: pathlib.Path) -> int | None:
  """Step of the newest committed checkpoint of a run, or None; creates nothing."""
  if not path.is_dir():
    return None
  checkpoints = Checkpoints(path)
  try:
    return max(checkpoints.steps(), default=None)
  finally:
    checkpoints.close()


def progress_of(experiment: schema.Experiment, store_fingerprint: str, step: int,
                tokens: int) -> dict[str, Any]:
  """What a checkpoint says of itself."""
  return {"step": step, "tokens": tokens, "config": config_io.to_dict(experiment),
          "store_fingerprint": store_fingerprint, "versions": run_folder.versions()}


def refuse_other_run(progress: dict[str, Any], experiment: schema.Experiment,
                     store_fingerprint: str, where: str) -> list[tuple[str, Any, Any]]:
  """Checks that a checkpoint is of this run.

  Returns:
    (field, old, new) of what changed but may change.

  Raises:
    UserError: an identity field or the store differs; names the first.
  """
  old = config_io.from_dict(progress["config"])
  for name, before, now in config_io.differences(old, experiment, "identity"):
    raise UserError(f"{where} holds a run with config.{name}={before!r}, not {now!r}; "
                    "keep the old value, or start a new run with another --workdir")
  if progress["store_fingerprint"] != store_fingerprint:
    raise UserError(f"{where} holds a run on another token store (fingerprint "
                    f"{progress['store_fingerprint'][:12]}, now {store_fingerprint[:12]}); "
                    "set config.data.store to the old one, or start a new run")
  return config_io.differences(old, experiment, "length", "layout", "observation")
