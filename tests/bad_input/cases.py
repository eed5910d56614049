"""The table of bad input: what a case is, and what must come of it."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shlex
import shutil
from collections.abc import Callable

from tiny import tiny_experiment

from chinchilla_jax import config_io

TEXT = "Of the making of many books there is no end.\n"
READING = "reading the corpus ...\n"  # progress of `prepare`, which is no message


@dataclasses.dataclass(frozen=True)
class Room:
  """What a case may use.

  Attributes:
    path: the folder that the command runs in.
    stores: path of a good store, which must not be changed.
    runs: gives the path of a whole run on it, which must not be changed either.
    ending: what is to be done when the case is over.
  """

  path: pathlib.Path
  stores: str
  runs: Callable[[], pathlib.Path]
  ending: contextlib.ExitStack

  def write(self, name: str, content: str | bytes) -> pathlib.Path:
    path = self.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path

  def store(self, name: str = "store") -> pathlib.Path:
    """A copy of the good store, to be damaged."""
    return pathlib.Path(shutil.copytree(self.stores, self.path / name))

  def run(self, name: str = "run") -> pathlib.Path:
    """A copy of the whole run, to be damaged; its checkpoints are of steps 4, 8 and 12."""
    return pathlib.Path(shutil.copytree(self.runs(), self.path / name))

  def config(self, **sections) -> None:
    """Writes tiny.json, a config that trains on ./store, with some of its fields changed."""
    tree = config_io.to_dict(tiny_experiment("store"))
    for name, fields in sections.items():
      tree[name] = tree[name] | fields if isinstance(fields, dict) else fields
    self.write("tiny.json", json.dumps(tree))


@dataclasses.dataclass(frozen=True)
class Case:
  name: str
  argv: tuple[str, ...]
  cause: str
  cure: str
  make: Callable[[Room], object]
  progress: str = ""  # what stands on stderr before the message
  devices: int = 1    # simulated ones; more than one takes a process of its own


CASES: list[Case] = []


def case(name: str, argv: str | tuple[str, ...], cause: str, cure: str,
         make: Callable[[Room], object] = lambda room: None, progress: str = "",
         devices: int = 1) -> None:
  assert name not in [known.name for known in CASES], f"two cases are called {name}"
  words = tuple(shlex.split(argv)) if isinstance(argv, str) else argv
  CASES.append(Case(name, words, cause, cure, make, progress, devices))


def snapshot(folder: pathlib.Path) -> dict[str, tuple]:
  """Everything under a folder: kinds, sizes, contents, times of change."""
  found = {}
  for path in sorted(folder.rglob("*")):
    name, stat = str(path.relative_to(folder)), path.lstat()
    if path.is_symlink():
      found[name] = ("link", os.readlink(path))
    elif path.is_file():
      found[name] = ("file", stat.st_size, stat.st_mtime_ns, stat.st_mode,
                     hashlib.sha256(path.read_bytes()).hexdigest())
    else:
      found[name] = ("folder", stat.st_mode)
  return found


def check(case: Case, status: int, err: str) -> None:
  assert "Traceback" not in err
  assert err.startswith(case.progress)
  message = err.removeprefix(case.progress)
  assert message.count("\n") == 1 and message.endswith("\n"), message
  assert message.startswith(f"chinchilla {case.argv[0]}: "), message
  assert re.search(case.cause, message), message
  assert re.search(case.cure, message), message
  assert len(message) < 1000, "a line that can be read"
  assert status == 2
