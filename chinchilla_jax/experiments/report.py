"""What a report says of runs, read from their folders. `page` turns it into HTML.

Reads only: config.json, metrics.jsonl, journal.jsonl and the seals of checkpoints.
A run may be half written, damaged or going on while it is read; what cannot be read is counted.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from chinchilla_jax.config_io import shown
from chinchilla_jax.errors import UserError
from chinchilla_jax.experiments import page_summary, run_state, sweep
from chinchilla_jax.experiments.run_log import Curve, Event, Facts, Log, is_number, lines
from chinchilla_jax.storage import paths as places
from chinchilla_jax.storage.paths import Place
from chinchilla_jax.training.run_folder import RunFolder

_MOST_TICKS = 1_000  # Odd events of one run that are marked on its curves.
_MOST_SAMPLES, _SAMPLE_LENGTH = 40, 4_000


@dataclasses.dataclass(frozen=True)
class Run:
  """All that the page says of one run."""

  name: str
  path: str
  config: Facts     # {"model.d_model": 512, ...}
  train: Curve
  evals: Curve
  events: list[Event]    # The journal, as it was written.
  troubles: list[Event]  # Steps that were odd.
  summary: Facts
  checkpoints: list[Facts]
  samples: list[Facts]
  notes: list[str]  # What was not as it should be.


def read(paths: Sequence[str], names: Sequence[str] = ()) -> list[Run]:
  """Reads runs.

  Args:
    paths: their folders; of a sweep's, all runs that have begun.
    names: to call them by; the shortest ends of the paths that differ by default.

  Raises:
    UserError: a folder is no run, or is given twice; names do not fit.
  """
  paths = [run for path in paths for run in _members(path)]
  for path in paths:
    _check(path)
  real = [path.rstrip("/") if places.is_remote(path) else os.path.realpath(path)
          for path in paths]
  for index, path in enumerate(real):
    if path in real[:index]:
      raise UserError(f"RUN: {shown(paths[index])} is given twice; leave one of them out")
  if names and len(names) != len(paths):
    raise UserError(f"--names: {len(names)} for {len(paths)} runs; give one for each, with commas "
                    "between them")
  if len(set(names)) < len(names) or not all(name.strip() for name in names):
    raise UserError("--names: two are the same, or one is empty; give each run its own")
  return [_read(path, name) for path, name in zip(paths, names or _short(real), strict=True)]


def _members(path: str) -> list[str]:
  """The runs of a sweep that have begun; of another folder, itself."""
  if not os.path.isfile(os.path.join(path, sweep.FILE)):
    return [path]
  begun = [str(member.folder) for member in sweep.read(path)
           if os.path.isfile(member.folder / "config.json")]
  if not begun:
    raise UserError(f"RUN: no run of the sweep {shown(path)} has begun; start it with chinchilla "
                    f"sweep --workdir {path}")
  return begun


def _check(path: str) -> None:
  if places.is_remote(path):
    if not (places.at(path) / "config.json").is_file():
      raise UserError(f"RUN: {shown(path)} is not a run's folder (it has no config.json); give the "
                      "one that `chinchilla train` wrote")
    return
  if os.path.isfile(os.path.join(path, "config.json")):
    return
  if not os.path.isdir(path):
    what = "is a file" if os.path.isfile(path) else "does not exist"
    raise UserError(f"RUN: {shown(path)} {what}; give the folder that `chinchilla train` wrote")
  inside = sorted(pathlib.Path(path).glob("*/config.json"))
  cure = (f"it holds runs: give {path.rstrip('/')}/{inside[0].parent.name} and so on" if inside
          else "give the folder that `chinchilla train` wrote")
  raise UserError(f"RUN: {shown(path)} is not a run's folder (it has no config.json); {cure}")


def _short(paths: Sequence[str]) -> list[str]:
  """The shortest ends of paths that tell them apart."""
  parts = [pathlib.PurePath(path).parts for path in paths]
  for depth in range(1, max(map(len, parts)) + 1):
    names = ["/".join(part[-depth:]) for part in parts]
    if len(set(names)) == len(names):
      break
  return names


def _read(path: str, name: str) -> Run:
  folder = places.at(path)
  config, versions = _config(folder)
  log = Log(folder / "metrics.jsonl")
  journal, torn = [], 0
  for record in lines(folder / "journal.jsonl"):
    if record is None or not isinstance(record.get("event"), str):
      torn += 1
    else:
      journal.append(record)
  notes = list(log.notes)
  if torn:
    notes.append(f"{torn:,} lines of journal.jsonl cannot be read")
  checkpoints, problem = _checkpoints(folder / "checkpoints")
  samples, left_out = _samples(log.samples)
  notes += [note for note in (problem, left_out) if note]
  taken_back = sum(1 for _ in lines(folder / "metrics.rolled_back.jsonl"))
  if taken_back:
    notes.append(f"{taken_back:,} lines of steps that rollbacks took back are not shown; they are "
                 "in metrics.rolled_back.jsonl")
  summary = page_summary.summary(RunFolder(folder), config, log, journal)
  return Run(name, str(path), config | {f"versions.{key}": value for key, value in
                                        versions.items()},
             log.train, log.evals, [_event(record) for record in journal], log.troubles, summary,
             checkpoints, samples, notes)


# -------------------------------------------------------------------- Files


def _config(folder: Place) -> tuple[Facts, Facts]:
  """(flat config, versions) as they stand in the file: also of a run of another version."""
  path = folder / "config.json"
  try:
    tree = json.loads(path.read_bytes())
    config, versions = tree["config"], tree.get("versions", {})
    if not isinstance(config, dict) or not isinstance(versions, dict):
      raise ValueError
    return dict(_flat(config)), versions
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}); mend it, or leave this run "
                    "out") from None
  except (ValueError, KeyError, TypeError, RecursionError):
    raise UserError(f"{path} is not the config of a run; bring back a copy, or leave this run "
                    "out") from None


def _flat(tree: Facts, prefix: str = "") -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _flat(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def _event(record: Facts) -> Event:
  """A line of the journal; its facts become its text."""
  notes = record.get("notes") if isinstance(record.get("notes"), list) else []
  parts = [run_state.one_line(note) for note in notes]
  parts += [str(record[key]) for key in ("kind", "why") if record.get(key)]
  if record.get("to"):
    parts.append(f"kept as {record['to']}")
  if record.get("signal"):
    parts.append(run_state.signal_name(record["signal"]))
  if record.get("devices"):
    parts.append(f"on {record['devices']}, {record.get('processes', '?')} process(es)")
  step = record.get("step")
  return Event(record["event"], step if type(step) is int else None, str(record.get("time", "")),
               "; ".join(part for part in parts if part))


# -------------------------------------------------------------------- Checkpoints and samples


def _checkpoints(path: Place) -> tuple[list[Facts], str]:
  """(checkpoints, newest last, with those set aside; what kept them from being read)."""
  if not path.is_dir():
    return [], ""
  from chinchilla_jax.training import checkpoint
  rows = []
  try:
    for step in checkpoint.steps(path):
      row: Facts = {"step": step, "bytes": _size(path / str(step)), "tokens": None,
                    "problem": checkpoint.problem(path, step, "sizes")}
      try:
        tokens = json.loads((path / str(step) / "progress.json").read_bytes())["tokens"]
        row["tokens"] = tokens if is_number(tokens) else None
      except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
      rows.append(row)
    aside = path / checkpoint.ASIDE
    rows += [{"step": None, "name": name, "bytes": _size(aside / name), "tokens": None,
              "problem": "set aside"} for name in places.names(aside)]
  except (UserError, OSError) as error:
    return rows, f"checkpoints cannot be read: {error}"
  return rows, ""


def _size(folder: Place) -> int:
  """Bytes of all files; one that is being cleared away counts nothing."""
  return sum(places.sizes(folder).values())


def _samples(logged: Sequence[Facts]) -> tuple[list[Facts], str]:
  """(samples by step, first and newest always among them; what was left out)."""
  found = sorted(logged, key=lambda sample: sample["step"])
  note = ""
  if len(found) > _MOST_SAMPLES:
    note = f"{_MOST_SAMPLES} of {len(found):,} samples are shown; all are in metrics.jsonl"
    found = spread(found, _MOST_SAMPLES)
  for sample in found:
    if len(sample["text"]) > _SAMPLE_LENGTH:
      left = len(sample["text"]) - _SAMPLE_LENGTH
      sample["text"] = f"{sample['text'][:_SAMPLE_LENGTH]} ... ({left:,} characters more)"
  return found, note


def spread(things: Sequence[Any], most: int) -> list[Any]:
  """At most `most` of them, evenly, with the first and the last."""
  if len(things) <= most:
    return list(things)
  return [things[round(index * (len(things) - 1) / (most - 1))] for index in range(most)]


def ticks(run: Run) -> tuple[list[Event], int]:
  """(events to mark on the curves, how many more there are). A start and an end mark nothing."""
  journal = [event for event in run.events if event.step is not None
             and event.kind not in ("start", "complete")]
  marked = spread(journal, _MOST_TICKS) + spread(run.troubles, _MOST_TICKS)
  return marked, len(journal) + len(run.troubles) - len(marked)
