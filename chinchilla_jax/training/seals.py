"""Seals: what proves that a checkpoint is whole.

A checkpoint is written under another name. Then every process writes down the size and SHA-256 of
each file that it wrote, `seals/PROCESS.json`; then the folder gets its name. So a folder with its
name has all seals, and one with a missing, cut or changed file is told from a good one before
anything is restored from it. What one process wrote, one process reads: no host reads it all.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from chinchilla_jax.config_io import shorten, shown
from chinchilla_jax.training import durable

FOLDER = "seals"
_WRITERS = 8  # Threads that hash: the interpreter's lock is free meanwhile.


def write(folder: pathlib.Path, process: int, processes: int) -> None:
  """Seals the files of a checkpoint that one process wrote.

  Args:
    folder: of the checkpoint.
    process: this one, from 0; process 0 also seals what belongs to nobody else.
    processes: that wrote this checkpoint, and so seals that it must have.

  Raises:
    OSError: the files could not be read, or the seal not be written.
  """
  names = [name for name in _files(folder) if _owner(name) == process]
  paths = [folder / name for name in names]
  with concurrent.futures.ThreadPoolExecutor(_WRITERS) as pool:
    digests = list(pool.map(_sha256, paths))
  files = {name: {"bytes": path.stat().st_size, "sha256": digest}
           for name, path, digest in zip(names, paths, digests, strict=True)}
  (folder / FOLDER).mkdir(exist_ok=True)
  durable.write(folder / FOLDER / f"{process}.json",
                json.dumps({"process": process, "processes": processes, "files": files}, indent=1))


def complete(folder: pathlib.Path, processes: int) -> bool:
  """Whether the seals of all processes are there."""
  return all((folder / FOLDER / f"{process}.json").is_file() for process in range(processes))


def problem(folder: pathlib.Path, how: str = "full", share: int = 0, shares: int = 1) -> str:
  """What is wrong with a checkpoint, in plain words; "" if nothing is.

  Args:
    folder: of the checkpoint.
    how: "full" compares checksums, "sizes" only looks at the files' sizes.
    share: which part of the checksums to compare, of `shares`: processes divide the work.
  """
  files: dict[str, dict[str, Any]] = {}
  try:
    processes = _read(folder, 0)["processes"]
    there = {path.name for path in (folder / FOLDER).glob("*.json")}
    # A flipped bit in the count must not leave seals unread, and so files unseen.
    if there > {f"{process}.json" for process in range(processes)}:
      return f"there are more seals in {FOLDER}/ than the {processes} that there should be"
    for process in range(processes):
      seal = _read(folder, process)
      if (seal["process"], seal["processes"]) != (process, processes):
        return f"the seals in {FOLDER}/ are not of one checkpoint"
      files |= seal["files"]
    expected = [(name, int(entry["bytes"]), str(entry["sha256"]))
                for name, entry in sorted(files.items())]
  except FileNotFoundError as error:
    return f"{FOLDER}/{pathlib.Path(error.filename).name} is missing"
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
    return f"a file in {FOLDER}/ is damaged"
  for name, size, _ in expected:
    if pathlib.PurePosixPath(name).is_absolute() or ".." in name.split("/"):
      return f"its seal names a file outside of it, {shown(name)}"
    if not os.path.isfile(folder / name):  # Not Path's, which fails for names too long.
      return f"{shorten(name)} is missing"
    if (now := (folder / name).stat().st_size) != size:
      return f"{name} has {now:,} bytes instead of {size:,}"
  if how == "full":
    mine = expected[share::shares]
    with concurrent.futures.ThreadPoolExecutor(_WRITERS) as pool:
      digests = pool.map(_digest_or_error, [folder / name for name, _, _ in mine])
      for (name, _, wanted), (digest, error) in zip(mine, digests, strict=True):
        if error:
          return f"{name} cannot be read ({error})"
        if digest != wanted:
          return f"{name} has changed (its checksum is not the seal's)"
  return ""


def _read(folder: pathlib.Path, process: int) -> dict[str, Any]:
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


def _digest_or_error(path: pathlib.Path) -> tuple[str, str]:
  try:
    return _sha256(path), ""
  except OSError as error:
    return "", error.strerror or str(error)
