"""How far a member of a sweep is, from its run's folder alone; `sweep` hands these names on."""

import os
from typing import TYPE_CHECKING, Any

from chinchilla_jax.errors import UserError
from chinchilla_jax.training.run_folder import RunFolder

if TYPE_CHECKING:
  from chinchilla_jax.experiments.sweep import Member

STATES = ("complete", "failed", "interrupted", "running", "pending")


def state_of(member: "Member") -> str:
  """One of `STATES`, from the run's folder alone.

    complete     a checkpoint of the last step is there, with files of the right sizes, and
                 nothing that belongs to the step is owed
    running      a process of this machine holds the folder
    failed       the newest event of its journal says so
    interrupted  it has begun, and none of these holds
    pending      it has not begun
  """
  folder = RunFolder(member.folder)
  if is_running(member):
    return "running"
  if _is_complete(folder, member.total_steps):
    return "complete"
  last = _last_event(folder)
  if last is not None and last["event"] == "failed":
    return "failed"
  return "interrupted" if last is not None or folder.checkpoints.exists() else "pending"


def reason(member: "Member") -> str:
  """Why a failed member failed, in one line; "" for others."""
  last = _last_event(RunFolder(member.folder))
  failed = last is not None and last["event"] == "failed"
  return " ".join(str(last.get("why", "")).split()) if failed else ""


def is_running(member: "Member") -> bool:
  """Whether a process of this machine holds the run's folder. Where it cannot be known: False.

  The kernel's table is read, and the lock itself is not tried: a `chinchilla train` that begins
  at that moment would take the folder for somebody else's.
  """
  try:
    lock = os.stat(member.folder / ".lock")
    with open("/proc/locks") as file:
      table = file.read()
  except OSError:
    return False
  device = f"{os.major(lock.st_dev):02x}:{os.minor(lock.st_dev):02x}:{lock.st_ino}"
  return any(" FLOCK " in line and " WRITE " in line and f" {device} " in line
             for line in table.splitlines())


def note_failure(member: "Member", why: str) -> None:
  """Records that a member failed, where its run has not done so itself."""
  folder = RunFolder(member.folder)
  last = _last_event(folder)
  if last is None or last["event"] != "failed":
    folder.note("failed", why=why, by="sweep")


def _last_event(folder: RunFolder) -> dict[str, Any] | None:
  kinds = ("start", "resume", "stop", "complete", "failed", "rollback")
  events = [event for event in folder.read_journal() if event.get("event") in kinds]
  return events[-1] if events else None


def _is_complete(folder: RunFolder, total_steps: int) -> bool:
  # Most folders are ruled out by names alone; what it takes to read a checkpoint takes seconds.
  try:
    names = os.listdir(folder.checkpoints)
  except OSError:
    return False
  if not any(name.isdecimal() and int(name) >= total_steps for name in names):
    return False
  from chinchilla_jax.training import checkpoint
  try:
    step, _ = checkpoint.newest_good(folder.checkpoints, "sizes")
    if step is None or step < total_steps:
      return False
    owed = checkpoint.progress(folder.checkpoints, step)["owed"]
  except (UserError, OSError, ValueError):
    return False
  done = {"evaluation"} if owed and any(
      record.get("kind") == "eval" and record.get("step") == step
      for record in folder.read_metrics()) else set()
  return not set(owed) - done
