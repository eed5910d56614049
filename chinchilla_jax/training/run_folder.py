"""The folder of one run, on a disk or in a bucket.

  config.json                the resolved config, library versions and git commit; --config takes it
  metrics.jsonl              one line a step, one an evaluation, one for each odd event of a step
  metrics.rolled_back.jsonl  lines of steps that a rollback took back
  journal.jsonl              starts, resumptions, stops, failed saves, rollbacks, with their times
  rollbacks.json             the sequences that rollbacks left out, once there are any
  checkpoints/               see `checkpoint`
  tensorboard/               event files
  profile/                   a trace of some steps, if one was asked for (`profiling`)
  .lock                      held by the process that trains here

In a bucket, the logs are in parts (`storage.logs`), and a lease takes the place of the lock.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterable, Iterator
from typing import Any

import chinchilla_jax
from chinchilla_jax import config as schema
from chinchilla_jax import config_io
from chinchilla_jax.errors import UserError
from chinchilla_jax.storage import logs, objects, paths
from chinchilla_jax.storage.paths import Place, Remote
from chinchilla_jax.training import durable

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "sentencepiece",
              "tensorflow-datasets", "array-record", "ml-collections", "numpy")
_PATIENCE = 5.0  # Seconds that a line of the journal may hold up a run.


def versions() -> dict[str, str | None]:
  """Versions of Python, of this package with its git commit, and of the libraries."""
  found: dict[str, str | None] = {"python": platform.python_version(),
                                  "chinchilla_jax": chinchilla_jax.__version__,
                                  "git_commit": git_commit()}
  for name in _LIBRARIES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = None
  return found


def git_commit() -> str | None:
  """Commit of the checkout that the package lies in, "-dirty" if changed; None outside git."""
  root = pathlib.Path(chinchilla_jax.__file__).parent.parent
  if not (root / ".git").exists():
    return None
  def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True,
                          check=True, timeout=20).stdout.strip()
  try:
    return git("rev-parse", "HEAD") + (
        "-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
  except (OSError, subprocess.SubprocessError):
    return None


class RunFolder:
  """Paths in a run's folder, and its files.

  Raises:
    UserError: the path is remote, and there is no such bucket, or it cannot be reached.
  """

  def __init__(self, path: str | os.PathLike | Remote):
    try:
      self.path = paths.at(path)
    except UserError as error:
      raise UserError(f"--workdir: {error}") from error
    self.config = self.path / "config.json"
    self.metrics = self.path / "metrics.jsonl"
    self.rolled_back = self.path / "metrics.rolled_back.jsonl"
    self.journal = self.path / "journal.jsonl"
    self.rollbacks = self.path / "rollbacks.json"
    self.checkpoints = self.path / "checkpoints"
    self.tensorboard = self.path / "tensorboard"
    self.profile = self.path / "profile"
    self._notes: logs.Parts | None = None

  def create(self) -> None:
    """Makes the folder.

    Raises:
      UserError: it cannot be made, or is a file.
    """
    if isinstance(self.path, Remote):
      return  # Objects need no folder.
    if os.path.isfile(self.path):
      raise UserError(f"--workdir: {self.path} is a file; choose another place")
    with _telling(self.path):
      self.path.mkdir(parents=True, exist_ok=True)

  def write_config(self, experiment: schema.Experiment) -> None:
    """Writes config.json; a crash leaves the old one or the new one, never half of it."""
    self.create()
    text = json.dumps({"config": config_io.to_dict(experiment), "versions": versions()}, indent=2)
    with _telling(self.config):
      durable.write(self.config, text + "\n")

  def read_config(self) -> schema.Experiment:
    """The experiment of this run.

    Raises:
      UserError: the folder is not a run.
    """
    if not paths.is_file(self.config):
      raise UserError(f"--workdir: {str(self.path)!r} is not a run's folder (it has no "
                      "config.json); give the folder that `chinchilla train` wrote")
    try:
      return config_io.load(str(self.config))
    except UserError as error:
      if str(self.config) in str(error):
        raise
      raise UserError(f"{self.config} is of another version of chinchilla_jax, or was edited "
                      f"({error}); use that version, or bring back a copy") from error

  def rewind_metrics(self, step: int, keep: bool = False) -> None:
    """Cuts metrics.jsonl back to `step`: a restart repeats no line and loses none.

    Args:
      step: of the newest line that stays.
      keep: whether what is cut goes into metrics.rolled_back.jsonl.
    """
    with _telling(self.metrics):
      logs.fold(self.metrics)
      changed, all_cut = [], []
      for piece in reversed(logs.pieces(self.metrics)):
        kept, cut = [], []
        for record in _records(logs.lines_of(piece)):
          (kept if record.get("step", step + 1) <= step else cut).append(json.dumps(record) + "\n")
        if not cut and piece != self.metrics:
          break  # Older parts hold older steps.
        changed.append((piece, kept))
        all_cut[:0] = cut
      if keep and all_cut:
        log = logs.appending(self.rolled_back)
        log.write("".join(all_cut).encode())
        log.flush()
        log.close()
      for piece, kept in changed:
        if kept or piece == self.metrics:
          durable.write(piece, "".join(kept))
        else:
          piece.unlink()

  def read_metrics(self) -> list[dict[str, Any]]:
    """Every record of metrics.jsonl, in order, but for a line that a crash cut short."""
    return list(_records(logs.lines(self.metrics)))

  def note(self, event: str, **facts: Any) -> None:
    """Adds a line to the journal. A disk that has no room for it stops nothing."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = json.dumps({"event": event, "time": now, **facts}) + "\n"
    with contextlib.suppress(OSError):
      if isinstance(self.journal, Remote):
        self._notes = self._notes or logs.Parts(self.journal)
        self._notes.write_now(line.encode(), _PATIENCE)
      else:
        with open(self.journal, "a") as file:
          file.write(line)

  def read_journal(self) -> list[dict[str, Any]]:
    """Every event of the journal, in order."""
    return list(_records(logs.lines(self.journal)))

  def read_rollbacks(self) -> list[dict[str, Any]]:
    """The rollbacks of this run, in order; each has `skipped`, [first sequence, count].

    Raises:
      UserError: the file is damaged: which batches were left out is not known then.
    """
    if not paths.is_file(self.rollbacks):
      return []
    try:
      found = json.loads(self.rollbacks.read_text())
      if not all(isinstance(one["step"], int) and len(one["skipped"]) == 2
                 and min(one["skipped"]) >= 0 for one in found):
        raise ValueError
      return found
    except objects.Unreachable:
      raise
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise UserError(f"{self.rollbacks} is damaged, so it is not known which batches this run "
                      "left out; bring back a copy, or start a new run with another "
                      "--workdir") from error

  def add_rollback(self, rollback: dict[str, Any]) -> None:
    """Records a rollback. It has happened once this returns, whatever comes then."""
    with _telling(self.rollbacks):
      durable.write(self.rollbacks, json.dumps([*self.read_rollbacks(), rollback], indent=1))


@contextlib.contextmanager
def _telling(path: Place) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise UserError(f"--workdir: {path} cannot be written ({error.strerror or error}); make room, "
                    "or choose another place") from error


def _records(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
  for line in lines:
    try:
      record = json.loads(line.decode(errors="replace"))
    except json.JSONDecodeError:  # Cut short by a crash.
      continue
    if isinstance(record, dict):
      yield record
