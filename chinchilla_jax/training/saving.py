"""Writing checkpoints: while training goes on, whole or not at all, and on when a disk is full."""

import contextlib
import json
import pathlib
import re
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from chinchilla_jax import config as schema
from chinchilla_jax.errors import UserError
from chinchilla_jax.parallel import processes
from chinchilla_jax.storage import objects, paths
from chinchilla_jax.storage.paths import Place, Remote
from chinchilla_jax.training import checkpoint, durable, remote, seals
from chinchilla_jax.training.state import State

_PATIENCE = 600  # Seconds that processes wait for each other's part of a checkpoint.
_RETIRED = ".retired-"


class Saver:
  """Saves the checkpoints of one run, one at a time, and removes old ones.

  All processes call the same methods at the same steps. A save goes through

    740.partial/progress.json, 740.partial/state/ (Orbax), 740.partial/seals/, then 740/

  so that whatever is under its own name is complete. What fails on the way, on whatever process,
  is told, and cleared away; the checkpoints before it are untouched.

  For a bucket, every process writes 740.partial/ into a folder of its own on its machine, and puts
  it from there: see `remote`.
  """

  def __init__(self, path: Place, config: schema.Checkpoint, keep_every_steps: int,
               say: Callable[[str], None], note: Callable[..., None] = lambda *_, **__: None):
    """Clears away what a crash left half-written.

    Args:
      path: the folder of checkpoints; it is made.
      config: how many are kept, and how many saves may fail.
      keep_every_steps: a checkpoint at every multiple is kept for good; 0: none.
      say: takes a line for the user.
      note: takes an event for the journal, and facts about it.

    Raises:
      UserError: the bucket cannot be reached, or this machine has no room.
    """
    self._path, self._config, self._keep_every = path, config, keep_every_steps
    self._say, self._note = say, note
    self._remote = isinstance(path, Remote)
    self._scratch = paths.Scratch() if isinstance(path, Remote) else None
    self._newest = 0        # Step of the newest checkpoint in a bucket that is known of.
    self._writer = _writer(self._remote)
    self._thread: threading.Thread | None = None
    self._step = 0          # Of the save that `_thread` is busy with.
    self._problem = ""      # Why it failed, on this process.
    self._failures = 0      # In a row.
    if isinstance(path, Remote):
      if processes.is_main():
        remote.clear(path)
        self._newest = max(remote.steps(path), default=0)
    elif processes.is_main():
      path.mkdir(parents=True, exist_ok=True)
      for entry in path.iterdir():
        if entry.name.endswith(checkpoint.PARTIAL) or entry.name.startswith(_RETIRED):
          shutil.rmtree(entry, ignore_errors=True)

  def save(self, step: int, state: State, progress: dict[str, Any],
           before: Callable[[], None] = lambda: None) -> None:
    """Starts to save; returns once the arrays are copied, so that they may be donated.

    Args:
      step: of the checkpoint.
      state: the arrays.
      progress: `checkpoint.progress_of`.
      before: what must be on disk before this checkpoint is; may raise OSError.

    Raises:
      UserError: so many saves in a row have failed that the run is to stop.
    """
    self.settle()
    partial = (self._scratch.path if self._scratch else self._path) / f"{step}{checkpoint.PARTIAL}"
    problem = ""
    try:
      before()
      if self._remote and processes.is_main():
        remote.begin(self._path, step)
      if self._remote or processes.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
      if processes.is_main():
        durable.write(partial / "progress.json", json.dumps(progress, indent=1))
    except OSError as error:
      problem = _reason(error)
    self._step, self._problem = step, processes.first_problem(problem)
    self._thread = threading.Thread(target=self._finish, args=(partial,), name="save")
    if not self._problem:
      try:
        self._writer.save((partial / "state").absolute(), args=ocp.args.PyTreeSave(state))
      except Exception as error:  # Orbax wraps what the disk says in many ways.
        self._problem = _reason(error)
    self._thread.start()
    if not self._config.asynchronous:
      self.settle()

  def settle(self) -> None:
    """Waits for the save under way; afterwards all processes know how it ended.

    Raises:
      UserError: so many saves in a row have failed that the run is to stop.
    """
    if self._thread is None:
      return
    self._thread.join()
    self._thread = None
    problem = processes.first_problem(self._problem)
    self._failures = self._failures + 1 if problem else 0
    if problem and self._config.failures and self._failures >= self._config.failures:
      raise UserError(f"{self._failures} saves in a row failed, the last at step {self._step:,}: "
                      f"{problem}; {self._left()}, the same command goes on from there; make "
                      "room or mend the disk, or raise config.checkpoint.failures")

  def finish(self) -> None:
    """Waits for the last save.

    Raises:
      UserError: it failed.
    """
    self.settle()
    if self._failures:
      raise UserError(f"the last save, at step {self._step:,}, failed: {self._problem}; "
                      f"{self._left()}, the same command goes on from there; make room or mend "
                      "the disk first")

  def close(self) -> None:
    """Waits for the save under way, however it ends."""
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    try:
      self._writer.close()
    except Exception:  # What went wrong has been told.
      pass
    if self._scratch:
      self._scratch.remove()

  def _finish(self, partial: pathlib.Path) -> None:
    """Runs in a thread: waits for Orbax, seals, gives the folder its name, retires old ones."""
    try:
      if not self._problem:
        self._writer.wait_until_finished()
        seals.write(partial, processes.index(), processes.count(), alone=self._remote)
        if self._remote:
          remote.put(partial, self._path, self._step)
        if processes.is_main():
          self._commit(partial)
    except Exception as error:
      self._problem = _reason(error)
    if self._remote or (self._problem and processes.is_main()):
      shutil.rmtree(partial, ignore_errors=True)
    if self._problem:
      self._note("save failed", step=self._step, why=self._problem)
      self._say(f"the checkpoint of step {self._step:,} was not saved: {self._problem}; "
                f"{self._left()}, the next save tries again")

  def _commit(self, partial: pathlib.Path) -> None:
    end = time.monotonic() + _PATIENCE
    while not (remote.sealed(self._path, self._step, processes.count()) if self._remote
               else seals.complete(partial, processes.count())):
      if time.monotonic() > end:
        raise TimeoutError(f"not all processes had sealed their part after {_PATIENCE} s")
      time.sleep(1.0 if self._remote else 0.05)
    if self._remote:
      remote.commit(self._path, self._step)
      self._newest = self._step
    else:
      durable.rename(partial, self._path / str(self._step))
    with contextlib.suppress(OSError):  # The checkpoint stands, whatever becomes of old ones.
      self._retire()

  def _retire(self) -> None:
    for step in checkpoint.steps(self._path)[:-self._config.keep]:
      if not self._keep_every or step % self._keep_every:
        if self._remote:
          remote.remove(self._path, step)
          continue
        # Under another name first: what a crash leaves half-removed is not a damaged checkpoint.
        retired = self._path / f"{_RETIRED}{step}"
        (self._path / str(step)).rename(retired)
        shutil.rmtree(retired, ignore_errors=True)

  def _left(self) -> str:
    kept = [self._newest] * bool(self._newest) if self._remote else checkpoint.steps(self._path)
    return f"the newest checkpoint is of step {kept[-1]:,}" if kept else "there is none so far"


def _writer(for_bucket: bool) -> ocp.AsyncCheckpointer:
  """For a bucket, every process has a folder of its own: nothing is merged or renamed in there."""
  if not for_bucket:
    return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), timeout_secs=_PATIENCE)
  # Without a store of "array metadata" no process waits for, or looks into, another's folder.
  arrays = ocp.type_handlers.create_type_handler_registry(
      (jax.Array, ocp.type_handlers.ArrayHandler(array_metadata_store=None)))
  return ocp.AsyncCheckpointer(
      ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=arrays),
      timeout_secs=_PATIENCE, temporary_path_class=ocp.path.atomicity.CommitFileTemporaryPath)


def _reason(error: BaseException) -> str:
  """One line for what a library or the disk says."""
  if isinstance(error, objects.Unreachable):
    return f"{error.filename} cannot be reached ({error.strerror})"
  while (cause := error.__cause__ or error.__context__) is not None and not isinstance(
      error, OSError):
    error = cause
  text = (str(error).strip().splitlines() or [type(error).__name__])[0]
  said = re.search(r"([A-Z][^:\[\]]+) \[os_error_code", text)  # TensorStore, behind a long path.
  return said[1] if said else text[:300]
