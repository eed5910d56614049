"""Families of runs: how a config file writes one down, and what its members are.

A config file has `sweep()` (or `sweep(argument)`) beside `get_config`. It returns a list of
overrides, each a dict from dotted field to value, put together from these:

  over("optimizer.peak_lr", [1e-3, 3e-3])   one member a value
  fixed("seed", 1)                          one member
  product(a, b, ...)                        every a with every b
  chain(a, b, ...)                          the members of a, then those of b
  zipped(a, b, ...)                         the first of a with the first of b, and so on

A sweep's folder:

  sweep.json            the config file, its flags, and the ids of the members, in order
  runs/ID/member.json   overrides and resolved config of a member: `chinchilla train` gets this file
  runs/ID/train.log     what its processes printed, one after the other
  runs/ID/...           the run's own folder (`training.run_folder`)
  results.jsonl         `results`

None of them says how far a member is: its run does (`state_of`). What an executor needs is
`Member.argv`, run any number of times, and `state_of`.
"""

import dataclasses
import hashlib
import inspect
import itertools
import json
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from chinchilla_jax import config as schema
from chinchilla_jax import config_file, config_io
from chinchilla_jax.errors import UserError
from chinchilla_jax.experiments import run_state
from chinchilla_jax.training import durable
from chinchilla_jax.training.run_folder import RunFolder

Overrides = dict[str, Any]
FILE, MEMBER_FILE, LOG, RUNS = "sweep.json", "member.json", "train.log", "runs"
_SLUG, _VALUE = 72, 24  # Characters of an id that say what is overridden; of one value in it.

# -------------------------------------------------------------------- Algebra


def over(field: str, values: Iterable[Any]) -> list[Overrides]:
  """One member for each value of a field (dotted name)."""
  return [{field: value} for value in values]


def fixed(field: str, value: Any) -> list[Overrides]:
  """One member. In a product: a field that is the same in all."""
  return [{field: value}]


def product(*sweeps: Sequence[Overrides]) -> list[Overrides]:
  """Every combination; the last sweep varies fastest.

  Raises:
    UserError: two of them set the same field.
  """
  return [_merged("product", parts) for parts in itertools.product(*sweeps)]


def chain(*sweeps: Sequence[Overrides]) -> list[Overrides]:
  """One sweep after the other."""
  return [dict(one) for one in itertools.chain(*sweeps)]


def zipped(*sweeps: Sequence[Overrides]) -> list[Overrides]:
  """Members of equal place together.

  Raises:
    UserError: the sweeps are not equally long, or two of them set the same field.
  """
  if len({len(one) for one in sweeps}) > 1:
    raise UserError(f"zipped: the sweeps have {', '.join(str(len(one)) for one in sweeps)} "
                    "members; make them equally long, or use product")
  return [_merged("zipped", parts) for parts in zip(*sweeps, strict=True)]


def _merged(what: str, parts: Iterable[Overrides]) -> Overrides:
  merged: Overrides = {}
  for part in parts:
    if twice := sorted(merged.keys() & part.keys()):
      raise UserError(f"{what}: {twice[0]} is set by two of the sweeps; set it in one of them")
    merged |= part
  return merged


# -------------------------------------------------------------------- Members


@dataclasses.dataclass(frozen=True)
class Member:
  """One run of a sweep.

  Attributes:
    index: its place in the sweep, from 0.
    id: names its folder: a readable part, and 8 hex digits of `fingerprint`.
    overrides: by dotted field, as JSON has them.
    experiment: its whole config.
    folder: of the run: the --workdir of `chinchilla train`.
    argv: the command that trains it, from the start or from where it stands; its config is the
      member.json that `write` puts into the folder. Exit status: docs/reliability.md.
    total_steps, total_tokens: of the whole run.
    epoch_tokens: tokens of one pass over the training split.
    fingerprint: SHA-256 over the fields of the classes identity and length, and the store's.
    store_fingerprint: the token store's.
  """

  index: int
  id: str
  overrides: Overrides
  experiment: schema.Experiment
  folder: pathlib.Path
  total_steps: int
  total_tokens: int
  epoch_tokens: int
  fingerprint: str
  store_fingerprint: str

  @property
  def argv(self) -> tuple[str, ...]:
    return (sys.executable, "-m", "chinchilla_jax", "train",
            f"--config={self.folder / MEMBER_FILE}", f"--workdir={self.folder}")

  @property
  def log(self) -> pathlib.Path:
    return self.folder / LOG


def members(config: str, overrides: Sequence[tuple[str, str | None]] = (),
            workdir: str | os.PathLike | None = None) -> list[Member]:
  """Every member of the sweep in a config file, checked. Writes nothing.

  Args:
    config: PATH.py or PATH.py:ARGUMENT; the argument goes to get_config and, where it takes one,
      to sweep.
    overrides: (dotted field, text) for all members, as flags give them. They win: what sweep()
      says of such a field is left out.
    workdir: the sweep's folder; sweeps/NAME by default.

  Raises:
    UserError: the file has no sweep; a member is not a valid config, does not fit its store, or is
      the same run as another; a store is missing or damaged. Names the first such member.
  """
  base = config_io.load(config, overrides)
  # One store is checked once, whatever number of members reads it.
  stores: dict[str, str] = {}
  folder = pathlib.Path(workdir or pathlib.Path("sweeps") / base.name)
  for_all = {name for name, _ in overrides}
  found: list[Member] = []
  seen: dict[tuple[str, str], Member] = {}
  for index, one in enumerate(_family(config)):
    one = {name: value for name, value in one.items() if name not in for_all}
    where = f"member {index} ({told(one)})"
    try:
      experiment = _applied(base, one)
      if experiment.data.store not in stores:
        stores[experiment.data.store] = _check_store(experiment, config, overrides, one)
      member = _member(index, one, experiment, base.name, folder, for_all)
    except UserError as error:
      raise UserError(f"{where}: {error}") from error
    # The name is the member's own; what is only observed makes no other run.
    same = (member.fingerprint, config_io.fingerprint(experiment, "layout", "guard"))
    if same in seen:
      twin = seen[same]
      raise UserError(f"{where} is the same run as member {twin.index} ({told(twin.overrides)}); "
                      f"take one of them out of sweep() in {config}"
                      + (", or leave out the flags that make them the same" if for_all else ""))
    seen[same] = member
    found.append(member)
  return found


def told(overrides: Overrides) -> str:
  """Overrides in one line: "optimizer.peak_lr=0.001, seed=2"."""
  return config_io.shorten(", ".join(f"{name}={value}" for name, value in overrides.items())
                           or "no overrides")


def _family(config: str) -> list[Overrides]:
  """What sweep() of a config file returns, in plain values."""
  path, argument = config, None
  if not os.path.isfile(path) and ":" in config:
    path, argument = config.rsplit(":", 1)
  if not path.endswith(".py"):
    raise UserError(f"--config: {path} is one config; give a Python file that has a sweep function")
  file = pathlib.Path(path)
  sweep = getattr(config_file.run(file), "sweep", None)
  if not callable(sweep):
    raise UserError(f"--config: {path} has no sweep function; write def sweep(), which returns a "
                    "list of overrides (docs/sweeps.md), or use chinchilla train")
  with config_file.telling(file):
    family = sweep(*([argument] if _takes(sweep, argument) else []))
  if not isinstance(family, Sequence) or isinstance(family, str):
    raise UserError(f"--config: sweep of {path} returns {type(family).__name__}; return a list of "
                    "overrides such as sweep.over('seed', range(3))")
  if not family:
    raise UserError(f"--config: sweep of {path} returns no members; return at least one")
  for index, one in enumerate(family):
    if not isinstance(one, Mapping) or not all(isinstance(name, str) for name in one):
      raise UserError(f"--config: sweep of {path}: member {index} is {config_io.shown(one)}; give "
                      "a dict such as {'optimizer.peak_lr': 1e-3}")
  return [{name: _plain(value) for name, value in one.items()} for one in family]


def _takes(sweep: Callable, argument: str | None) -> bool:
  if argument is None:
    return False
  try:
    inspect.signature(sweep).bind(argument)
  except TypeError:
    return False
  return True


def _plain(value: Any) -> Any:
  """Values as JSON has them; those of numpy, such as np.logspace makes, become Python's."""
  if isinstance(value, (list, tuple)):
    return tuple(_plain(part) for part in value)
  return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value


def _applied(base: schema.Experiment, overrides: Overrides) -> schema.Experiment:
  tree = config_io.to_dict(base)
  for name, value in overrides.items():
    *path, leaf = name.split(".")
    node = tree
    for depth, key in enumerate(path):
      node = node.setdefault(key, {})
      if not isinstance(node, dict):
        raise UserError(f"config.{name}: no such field; {'.'.join(path[:depth + 1])} is a field "
                        "and no group")
    node[leaf] = value
  return config_io.from_dict(tree)


def _check_store(experiment: schema.Experiment, config: str,
                 flags: Sequence[tuple[str, str | None]], overrides: Overrides) -> str:
  """Validates a store as the config asks; returns its fingerprint."""
  from chinchilla_jax.data import tokens
  try:
    return tokens.open_store(experiment.data.store, verify=experiment.data.verify).fingerprint
  except UserError as error:
    if not str(error).startswith("no token store"):
      raise
    kinds = {name: field.metadata["kind"] for name, field in schema.fields()}
    wanted = [(name, text) for name, text in flags]
    wanted += [(name, str(value)) for name, value in overrides.items()
               if kinds[name] == "store" or name == "data.store"]
    command = ["chinchilla", "prepare", f"--config={config}"]
    command += [f"--config.{name}" + ("" if text is None else f"={text}") for name, text in wanted]
    raise UserError(f"no token store at {experiment.data.store}; make it once, for all members: "
                    f"{shlex.join(command)}") from error


def _member(index: int, overrides: Overrides, experiment: schema.Experiment, name: str,
            folder: pathlib.Path, for_all: set[str]) -> Member:
  from chinchilla_jax.training import loop
  # The store's checksums have been compared; here it is only looked into.
  quick = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, verify="sizes"))
  made = loop.plan(quick)
  store = made.store.fingerprint
  fingerprint = hashlib.sha256(
      f"{config_io.fingerprint(experiment, 'identity', 'length')} {store}".encode()).hexdigest()
  id_ = f"{_slug(overrides)}_{fingerprint[:8]}"
  if "name" not in overrides and "name" not in for_all:
    # Trackers such as W&B tell runs apart by it.
    short = name.encode()[:80].decode(errors="ignore")
    experiment = dataclasses.replace(experiment, name=f"{short}-{id_}")
  total = made.clock.total_steps
  return Member(index, id_, overrides, experiment, folder / RUNS / id_, total,
                made.clock.tokens(total), made.clock.epoch_tokens, fingerprint, store)


def _slug(overrides: Overrides) -> str:
  """The readable part of an id; from a member's own overrides, so that adding members renames none.

  It need not be unique: the fingerprint after it is.
  """
  leaves = [name.rsplit(".", 1)[-1] for name in overrides]
  parts = []
  for leaf, (name, value) in zip(leaves, overrides.items(), strict=True):
    text = f"{value:g}" if isinstance(value, float) else str(value)
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-.")[:_VALUE]
    parts.append(f"{name if leaves.count(leaf) > 1 else leaf}={plain}")
  return "_".join(parts)[:_SLUG] or "base"


# -------------------------------------------------------------------- On disk


def state_of(member: Member) -> run_state.RunState:
  """How far a member is, from its run's folder alone."""
  return run_state.of(RunFolder(member.folder), member.total_steps)


def write(folder: str | os.PathLike, found: Sequence[Member], config: str,
          flags: Sequence[tuple[str, str | None]] = ()) -> None:
  """Writes sweep.json and every member.json; files that say the same already are left alone.

  Raises:
    UserError: the folder cannot be written.
  """
  folder = pathlib.Path(folder)
  RunFolder(folder).create()
  whole = {"config": config, "flags": [list(flag) for flag in flags],
           "members": [member.id for member in found]}
  files = {folder / FILE: whole}
  for member in found:
    files[member.folder / MEMBER_FILE] = {
        name: getattr(member, name) for name in _STORED} | {
            "config": config_io.to_dict(member.experiment)}
  for path, content in files.items():
    put(path, json.dumps(content, indent=1) + "\n")


_STORED = ("id", "overrides", "total_steps", "total_tokens", "epoch_tokens", "fingerprint",
           "store_fingerprint")


def put(path: pathlib.Path, text: str) -> None:
  """Writes a file whole or not at all; leaves one that holds the text already."""
  try:
    if path.is_file() and path.read_text() == text:
      return
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write(path, text, suffix=f".{os.uname().nodename}.{os.getpid()}.partial")
  except OSError as error:
    raise UserError(f"--workdir: {path} cannot be written ({error.strerror or error}); make room, "
                    "or choose another place") from error


def read(folder: str | os.PathLike) -> list[Member]:
  """The members that `write` wrote. Needs neither the config file nor the stores.

  Raises:
    UserError: the folder is not a sweep's, or one of the files is damaged.
  """
  folder = pathlib.Path(folder)
  path = folder / FILE
  if not os.path.isfile(path):
    raise UserError(f"--workdir: {str(folder)!r} is not a sweep's folder (it has no {FILE}); give "
                    "the folder that `chinchilla sweep` wrote, or --config")
  try:
    ids = json.loads(path.read_text())["members"]
    found = []
    for index, id_ in enumerate(ids):
      path = folder / RUNS / id_ / MEMBER_FILE
      stored = json.loads(path.read_text())
      found.append(Member(index=index, folder=path.parent,
                          experiment=config_io.from_dict(stored["config"]),
                          **{name: stored[name] for name in _STORED}))
    return found
  except (OSError, ValueError, KeyError, TypeError, UserError) as error:
    raise UserError(f"{path} is damaged or of another version of chinchilla_jax "
                    f"({type(error).__name__}: {error}); run the sweep again with its --config"
                    ) from error


def strangers(folder: str | os.PathLike, found: Sequence[Member]) -> list[str]:
  """Folders in runs/ that belong to no member: of a config that has changed since."""
  runs = pathlib.Path(folder) / RUNS
  known = {member.id for member in found}
  return sorted(path.name for path in runs.glob("*") if path.is_dir() and path.name not in known)
