"""Checkpoints as they are read: which there are, whether they are whole, what is in them.

  checkpoints/
    730/               one that is complete; the number is its step
      state/           the arrays (Orbax), bfloat16 and float32 as they are
      progress.json    step, tokens, config, store, mesh, versions, what is still owed
      seals/           sizes and checksums of all files, one file for each process that wrote
    740.partial/       one being written, or what a crash left of it; never restored
    aside/             what was damaged, or given up in a rollback; nothing deletes it

In a bucket the folder has its name from the start: see `remote`. `saving` writes them. Nothing
here writes anything.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from chinchilla_jax import config as schema
from chinchilla_jax import config_io
from chinchilla_jax.errors import UserError
from chinchilla_jax.storage.objects import Unreachable
from chinchilla_jax.storage.paths import Place, Remote
from chinchilla_jax.training import remote, run_folder, seals

PARTIAL = remote.PARTIAL
ASIDE = "aside"
DUTIES = ("evaluation", "sample")  # What can be owed.

# What progress.json must hold to be of use here, by dotted name.
_FIELDS = {"step": int, "tokens": int, "owed": list, "skipped": list, "config": dict,
           "fingerprints.store": str, "fingerprints.tokenizer": str,
           "surroundings.mesh": str, "surroundings.strategy": str, "surroundings.devices": str,
           "surroundings.processes": int, "surroundings.cores": int,
           "surroundings.versions": dict}


def steps(path: Place) -> list[int]:
  """Steps of the checkpoints in a folder, damaged ones included, ascending.

  Raises:
    UserError: it is a file, or cannot be read. Without it, there are none.
  """
  if isinstance(path, Remote):
    return remote.steps(path)
  if not os.path.lexists(path):  # Not Path's, which fails for names that are too long.
    return []
  try:
    return sorted(int(name) for name in os.listdir(path)
                  if name.isdecimal() and str(int(name)) == name)
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}), and a run's checkpoints should be "
                    "in there; mend it, or move it away") from error


def newest_good(path: Place, how: str = "full") -> tuple[int | None, dict[int, str]]:
  """The newest checkpoint that is whole, and what is wrong with the newer ones, by step."""
  problems: dict[int, str] = {}
  for step in reversed(steps(path)):
    problems[step] = problem(path, step, how)
    if not problems[step]:
      del problems[step]
      return step, problems
  return None, problems


def problem(path: Place, step: int, how: str = "full", share: int = 0,
            shares: int = 1) -> str:
  """What is wrong with a checkpoint, in plain words; "" if nothing is. See `seals.problem`."""
  if not (path / str(step)).is_dir():
    return "it is not a folder"
  found = seals.problem(path / str(step), how, share, shares)
  if not found:
    try:
      of = _json(path, step).get("step", step)  # Without one it is of another version.
      found = f"it is of step {of}" if of != step else ""
    except Unreachable:
      raise
    except (OSError, ValueError, AttributeError, RecursionError):
      found = "progress.json is damaged"
  return found


def told(problems: dict[int, str]) -> str:
  """What is wrong with checkpoints, in one line that can be read."""
  newest = [f"{step:,}: {why}" for step, why in sorted(problems.items(), reverse=True)[:3]]
  more = len(problems) - len(newest)
  return "; ".join([*newest, f"and {more:,} older ones"] if more else newest)


def progress(path: Place, step: int) -> dict[str, Any]:
  """What a checkpoint says of itself: `progress_of`.

  Raises:
    UserError: it is whole, but says something else than this program's checkpoints do.
    OSError, ValueError: it is not whole: see `problem`.
  """
  found = _json(path, step)
  if odd := _odd(found):
    raise UserError(f"checkpoint {path / str(step)} was written by another version of "
                    f"chinchilla_jax ({odd} in its progress.json); use that version")
  return found


def _json(path: Place, step: int) -> Any:
  return json.loads((path / str(step) / "progress.json").read_text())


def _odd(progress: dict[str, Any]) -> str:
  """What this program cannot make sense of; "" if nothing."""
  for name, kind in _FIELDS.items():
    value: Any = progress
    for key in name.split("."):
      value = value.get(key) if isinstance(value, dict) else None
    if value is None:
      return f"there is no {name}"
    if not isinstance(value, kind):
      return f"{name} is no {kind.__name__}"
  if unknown := [duty for duty in progress["owed"] if duty not in DUTIES]:
    return f"it owes {unknown[0]!r}"
  ranges = [one for one in progress["skipped"] if isinstance(one, list) and len(one) == 2
            and all(type(number) is int and number >= 0 for number in one)]
  return "" if len(ranges) == len(progress["skipped"]) else "skipped holds no ranges"


def restore(path: Place, step: int, wanted: Any, whole: bool = False) -> Any:
  """Restores the part of the state that `wanted` names.

  Args:
    path: the folder of checkpoints.
    step: of one of them.
    wanted: tree of ShapeDtypeStructs with shardings; a whole state or, say, only params.
    whole: whether the checkpoint may hold nothing else.

  Raises:
    UserError: names the first array that is missing or has another shape or dtype, or the
      checkpoint cannot be read.
  """
  where = path / str(step)
  check(path, step, wanted, whole)
  with (_here(where, wanted) as state, ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader):
    try:
      return reader.restore(state, args=ocp.args.PyTreeRestore(
          item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
          partial_restore=True))
    except Exception as error:  # Orbax wraps what it meets in many ways, Exception among them.
      raise UserError(_unreadable(where, error)) from error


def check(path: Place, step: int, wanted: Any, whole: bool = False) -> None:
  """Raises what `restore` would raise about shapes and dtypes; `wanted` needs no shardings."""
  where = path / str(step)
  stored = _tree(where)
  _compare(stored, wanted, str(where))
  if whole:
    _refuse_more(stored, wanted, str(where))


def restore_weights(path: Place, step: int, params: Any) -> Any:
  """Float32 weights for another run: the master copy where there is one, else the parameters.

  Args:
    path: the folder of checkpoints.
    step: of one of them.
    params: tree of ShapeDtypeStructs with shardings; its dtypes are not read.

  Raises:
    UserError: the model has another shape.
  """
  restored = restore(path, step, _weights(path, step, params))
  if "optimizer" in restored:
    return restored["optimizer"]["master"]
  return jax.tree.map(lambda w: w.astype("float32"), restored["params"])


def check_weights(path: Place, step: int, params: Any) -> None:
  """Raises what `restore_weights` would raise about shapes; `params` need no shardings."""
  where = path / str(step)
  _compare(_tree(where), _weights(path, step, params), str(where))


def _weights(path: Place, step: int, params: Any) -> Any:
  stored = _tree(path / str(step))
  if "master" in stored.get("optimizer", {}):
    return {"optimizer": {"master": _with_dtypes(params, stored["optimizer"]["master"])}}
  return {"params": _with_dtypes(params, stored.get("params", {}))}


def dtypes(path: Place, step: int) -> dict[str, list[str]]:
  """The dtypes of a checkpoint, by part of the state: {"params": ["bfloat16"], ...}."""
  found: dict[str, set[str]] = {}
  tree = _tree(path / str(step))
  for name, part in tree.items():
    parts = part.items() if name == "optimizer" else [("", part)]
    for inner, leaves in parts:
      kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(leaves)}
      found[f"{name}/{inner}".rstrip("/")] = kinds
  return {name: sorted(kinds) for name, kinds in found.items()}


# -------------------------------------------------------------------- What it says of itself


@dataclasses.dataclass(frozen=True)
class Surroundings:
  """Where a run computes. Results are bit for bit the same where this is."""

  mesh: str       # "data 4, tensor 2"
  strategy: str
  devices: str    # "8 x TPU v4"
  processes: int
  cores: int      # That this process may use: on CPUs, sums depend on it.
  versions: dict[str, str | None]


def surroundings(mesh_text: str, strategy: str) -> Surroundings:
  """Those of this process."""
  devices = jax.devices()
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return Surroundings(mesh_text, strategy, f"{len(devices)} x {devices[0].device_kind}",
                      jax.process_count(), cores or 1, run_folder.versions())


def progress_of(experiment: schema.Experiment, fingerprints: dict[str, str], step: int, tokens: int,
                where: Surroundings, skipped: list[list[int]], owed: list[str]) -> dict[str, Any]:
  """The content of progress.json.

  Args:
    experiment: its config.
    fingerprints: of the token "store" and its "tokenizer".
    step: taken.
    tokens: trained on.
    where: it was computed.
    skipped: [first, count] of the sequences that rollbacks left out.
    owed: what belongs to this step and has not been done when the checkpoint is written.
  """
  return {"step": step, "tokens": tokens, "owed": owed, "skipped": skipped,
          "fingerprints": fingerprints, "surroundings": dataclasses.asdict(where),
          "config": config_io.to_dict(experiment)}


def refuse_other_run(progress: dict[str, Any], experiment: schema.Experiment,
                     fingerprints: dict[str, str], where: str) -> list[tuple[str, Any, Any]]:
  """Checks that a checkpoint is of this run.

  Returns:
    (field, old, new) of what changed but may change.

  Raises:
    UserError: an identity field, the tokenizer or the store differs; names the first.
  """
  try:
    old = config_io.from_dict(progress["config"])
  except UserError as error:
    raise UserError(f"{where} holds a run of another version of chinchilla_jax ({error}); use "
                    "that version, or start a new run with another --workdir") from error
  for name, before, now in config_io.differences(old, experiment, "identity"):
    raise UserError(f"{where} holds a run with config.{name}={before!r}, not {now!r}; "
                    "keep the old value, or start a new run with another --workdir")
  for name, words in (("tokenizer", "with another tokenizer"), ("store", "on another token store")):
    before, now = progress["fingerprints"][name], fingerprints[name]
    if before != now:
      raise UserError(f"{where} holds a run {words} (fingerprint {before[:12]}, now {now[:12]}); "
                      "set config.data.store to the old store, or start a new run with another "
                      "--workdir")
  return config_io.differences(old, experiment, "length", "layout", "guard", "observation")


def moved(progress: dict[str, Any], now: Surroundings) -> list[str]:
  """What is not as it was when a checkpoint was written, in lines; results then differ in bits."""
  before, after = progress["surroundings"], dataclasses.asdict(now)
  pairs = [(name, before[name], after[name])
           for name in ("mesh", "strategy", "devices", "processes", "cores")]
  pairs += [(f"the version of {name}", before["versions"].get(name), version)
            for name, version in after["versions"].items()]
  return [f"{name} was {old}, is now {new}" for name, old, new in pairs if old != new]


# -------------------------------------------------------------------- Trees


@contextlib.contextmanager
def _here(where: Place, wanted: Any = None) -> Iterator[pathlib.Path]:
  """The folder of a checkpoint's arrays, on a disk; from a bucket, see `remote.fetched`."""
  if isinstance(where, Remote):
    with remote.fetched(where, wanted) as folder:
      yield folder / "state"
  else:
    yield (where / "state").absolute()


def _tree(where: Place) -> dict[str, Any]:
  with _here(where) as state, ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    try:
      if (found := reader.metadata(state).item_metadata) is None:
        raise ValueError("Orbax finds no arrays in it")
      return found.tree
    except Exception as error:  # As in `restore`.
      raise UserError(_unreadable(where, error)) from error


def _unreadable(where: Place, error: BaseException) -> str:
  while error.__cause__ is not None:  # What is on top is a page of TensorStore's settings.
    error = error.__cause__
  reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
  return f"checkpoint {where} cannot be read ({reason}); look at it with `chinchilla inspect`"


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


def _refuse_more(stored: Any, wanted: Any, where: str, path: str = "") -> None:
  for key, have in stored.items():
    if key not in wanted:
      raise UserError(f"checkpoint {where} has {path}{key}, the config wants none; use the "
                      "config.json of its run")
    if isinstance(have, dict):
      _refuse_more(have, wanted[key], where, f"{path}{key}/")


def _with_dtypes(wanted: Any, stored: Any) -> Any:
  """`wanted` with the dtypes of `stored`, where both have a leaf."""
  if not isinstance(wanted, dict):
    dtype = wanted.dtype if isinstance(stored, dict) else stored.dtype
    return jax.ShapeDtypeStruct(wanted.shape, dtype, sharding=wanted.sharding)
  inner = stored if isinstance(stored, dict) else {}
  return {key: _with_dtypes(value, inner.get(key, {})) for key, value in wanted.items()}
