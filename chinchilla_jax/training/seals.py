"""Seals: what proves that a checkpoint is whole.

A checkpoint is written under another name. Then every process writes down the size and SHA-256 of
each file that it wrote, `seals/PROCESS.json`; then the folder gets its name. So a folder with its
name has all seals, and one with a missing, cut or changed file is told from a good one before
anything is restored from it. What one process wrote, one process reads: no host reads it all.
"""

import concurrent.futures
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from chinchilla_jax.config_io import shorten, shown
from chinchilla_jax.storage import objects, paths
from chinchilla_jax.storage.paths import Place, Remote
from chinchilla_jax.training import durable

FOLDER = "seals"
_WRITERS = 8  # Threads that hash: the interpreter's lock is free meanwhile.


def write(folder: pathlib.Path, process: int, processes: int, alone: bool = False) -> None:
  """Seals the files of a checkpoint that one process wrote.

  Args:
    folder: of the checkpoint.
    process: this one, from 0; process 0 also seals what belongs to nobody else.
    processes: that wrote this checkpoint, and so seals that it must have.
    alone: whether no other process writes into this folder.

  Raises:
    OSError: the files could not be read, or the seal not be written.
  """
  names = [name for name in _files(folder) if alone or _owner(name) == process]
  with concurrent.futures.ThreadPoolExecutor(_WRITERS) as pool:
    digests = list(pool.map(_sha256, [folder / name for name in names]))
  entries = {name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
             for name, digest in zip(names, digests, strict=True)}
  (folder / FOLDER).mkdir(exist_ok=True)
  durable.write(folder / FOLDER / f"{process}.json", json.dumps(
      {"process": process, "processes": processes, "files": entries}, indent=1))


def complete(folder: pathlib.Path, processes: int) -> bool:
  """Whether the seals of all processes are there."""
  return all((folder / FOLDER / f"{process}.json").is_file() for process in range(processes))


def files(folder: Place) -> dict[str, dict[str, Any]]:
  """What the seals tell of every file, by its name: {"bytes": ..., "sha256": ...}.

  Raises:
    OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError: they are not whole.
  """
  processes = _read(folder, 0)["processes"]
  there = sum(name.endswith(".json") for name in paths.names(folder / FOLDER))
  # One that a flipped bit in the count asks for is missing, and says so when it is read.
  seals = objects.each(lambda one: _read(folder, one), range(min(processes, there + 1)))
  found: dict[str, dict[str, Any]] = {}
  for process, seal in enumerate(seals):
    if (seal["process"], seal["processes"]) != (process, processes):
      raise _Mixed
    found |= seal["files"]
  return found


class _Mixed(ValueError):
  """Seals of several checkpoints."""


def problem(folder: Place, how: str = "full", share: int = 0, shares: int = 1) -> str:
  """What is wrong with a checkpoint, in plain words; "" if nothing is.

  Args:
    folder: of the checkpoint.
    how: "full" compares checksums, "sizes" only looks at the files' sizes.
    share: which part of the checksums to compare, of `shares`: processes divide the work.
  """
  try:
    processes = _read(folder, 0)["processes"]
    there = {name for name in paths.names(folder / FOLDER) if name.endswith(".json")}
    # A flipped bit in the count must not leave seals unread, and so files unseen.
    if there > {f"{process}.json" for process in range(processes)}:
      return f"there are more seals in {FOLDER}/ than the {processes} that there should be"
    expected = [(name, int(entry["bytes"]), str(entry["sha256"]))
                for name, entry in sorted(files(folder).items())]
  except objects.Unreachable:  # That says nothing of the checkpoint.
    raise
  except FileNotFoundError as error:
    return f"{FOLDER}/{pathlib.Path(error.filename).name} is missing"
  except _Mixed:
    return f"the seals in {FOLDER}/ are not of one checkpoint"
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
    return f"a file in {FOLDER}/ is damaged"
  sizes = paths.sizes(folder)
  for name, size, _ in expected:
    if pathlib.PurePosixPath(name).is_absolute() or ".." in name.split("/"):
      return f"its seal names a file outside of it, {shown(name)}"
    if name not in sizes:
      return f"{shorten(name)} is missing"
    if sizes[name] != size:
      return f"{name} has {sizes[name]:,} bytes instead of {size:,}"
  if how == "full":
    mine = expected[share::shares]
    with concurrent.futures.ThreadPoolExecutor(_WRITERS) as pool:
      digests = pool.map(lambda entry: _digest_or_error(folder / entry[0], entry[1]), mine)
      for (name, _, wanted), (digest, error) in zip(mine, digests, strict=True):
        if error:
          return f"{name} cannot be read ({error})"
        if digest != wanted:
          return f"{name} has changed (its checksum is not the seal's)"
  return ""


def _read(folder: Place, process: int) -> dict[str, Any]:
  return json.loads((folder / FOLDER / f"{process}.json").read_text())


def _files(folder: pathlib.Path) -> Iterable[str]:
  for path in sorted(folder.rglob("*")):
    name = path.relative_to(folder).as_posix()
    if path.is_file() and not name.startswith(f"{FOLDER}/"):
      yield name


def _owner(name: str) -> int:
  """The process that wrote a file. Orbax gives each a folder of its own; 0 does the rest."""
  own = re.search(r"(?:^|/)ocdbt\.process_(\d+)/", name)
  return int(own[1]) if own else 0


def _sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_or_error(path: Place, size: int) -> tuple[str, str]:
  try:
    if not isinstance(path, Remote):
      return _sha256(path), ""
    digest = hashlib.sha256()
    for block in objects.blocks(path.url, size):
      digest.update(block)
    return digest.hexdigest(), ""
  except objects.Unreachable:
    raise
  except OSError as error:
    return "", error.strerror or str(error)
