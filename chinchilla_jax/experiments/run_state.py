"""How a run stands, from its folder alone: what a sweep goes by, and what a report says.

A run that goes on is only looked at.
"""

import dataclasses
import datetime
import json
import os
import signal
import time
from typing import Any

from chinchilla_jax.errors import UserError
from chinchilla_jax.storage import logs, paths
from chinchilla_jax.storage.paths import Remote
from chinchilla_jax.training import run_lock
from chinchilla_jax.training.run_folder import RunFolder

STATES = ("complete", "failed", "interrupted", "running", "pending")

# Events of the journal that begin or end a process's turn at the run.
BEGINNINGS, ENDINGS = ("start", "resume"), ("stop", "complete", "failed", "rollback")
_QUIET = 600.0  # Seconds without a line after which nobody elsewhere is taken to work at it.


@dataclasses.dataclass(frozen=True)
class RunState:
  """One of `STATES`, and what is known of how it came to that."""

  state: str
  last: dict[str, Any] | None = None  # The journal's newest event that began or ended a turn.
  elsewhere: bool = False  # A process of another machine took it, and wrote a little while ago.

  @property
  def reason(self) -> str:
    """Why it failed, in one line; "" where it has not."""
    return one_line(self.last.get("why", "")) if self.state == "failed" and self.last else ""


def of(folder: RunFolder, total_steps: int | None) -> RunState:
  """How a run stands.

    running      a process of this machine holds the folder
    complete     a checkpoint of the last step is there, with files of the right sizes, and nothing
                 that belongs to the step is owed; or its journal says complete, and no checkpoint
                 that could say otherwise is left: they were taken away to make room
    failed       the newest event of its journal says so
    interrupted  it has begun, and none of these holds
    pending      it has not begun

  Args:
    folder: of the run.
    total_steps: of the whole run; None: not known, and then the journal is believed.
  """
  last = _last_turn(folder)
  if is_running(folder):
    return RunState("running", last)
  if _is_complete(folder, last, total_steps):
    return RunState("complete", last)
  if last is not None and last["event"] == "failed":
    return RunState("failed", last)
  if last is not None or folder.checkpoints.exists() or logs.pieces(folder.metrics):
    begun = last is not None and last["event"] in BEGINNINGS
    return RunState("interrupted", last, begun and _written_elsewhere(folder))
  return RunState("pending")


def is_running(folder: RunFolder) -> bool:
  """Whether a process of this machine holds the run's folder. Where it cannot be known: False.

  The kernel's table is read, and the lock itself is not tried: a `chinchilla train` that begins
  at that moment would take the folder for somebody else's.
  """
  if isinstance(folder.path, Remote):
    return False
  try:
    lock = os.stat(folder.path / run_lock.FILE)
    with open("/proc/locks") as file:
      table = file.read()
  except OSError:
    return False
  device = f"{os.major(lock.st_dev):02x}:{os.minor(lock.st_dev):02x}:{lock.st_ino}"
  return any(" FLOCK " in line and " WRITE " in line and f" {device} " in line
             for line in table.splitlines())


def words(found: RunState, folder: RunFolder, step: int | None, total_steps: int | None) -> str:
  """What a person is told: "stopped by SIGTERM at step 300 of 1,000".

  Args:
    found: `of`.
    folder: of the run.
    step: the newest that was logged; None: there is none.
    total_steps: None where it is not known.
  """
  where = "before its first step" if step is None else f"at step {step:,}" + (
      f" of {total_steps:,}" if total_steps else "")
  event = found.last["event"] if found.last else None
  if found.state == "pending":
    return "no metrics yet"
  if found.state in ("complete", "failed"):
    why = f": {found.reason or 'no reason given'}" if found.state == "failed" else ""
    return f"{found.state} {where}{why}"
  if found.state == "running":
    return f"running, {where}"
  if event == "stop":
    by = f" by {signal_name(found.last['signal'])}" if found.last.get("signal") else ""
    return f"stopped{by} {where}"
  if event is None:
    return f"{where}; no journal says how it ended"
  if event == "complete":  # It is to be longer now, or its last checkpoint is damaged.
    return f"complete once, not any more, {where}"
  age = quiet_for(folder)
  if found.elsewhere:
    return f"running, it seems (its last line is {duration(age)} old), {where}"
  ago = "" if age is None else f"; its last line is {duration(age)} old"
  return f"ended without a word (killed, or its machine was) {where}{ago}"


def note_failure(folder: RunFolder, why: str) -> None:
  """Records that a run failed, where it has not done so itself."""
  last = _last_turn(folder)
  if last is None or last["event"] != "failed":
    folder.note("failed", why=why, by="sweep")


def quiet_for(folder: RunFolder) -> float | None:
  """Seconds since the run wrote a line; None if it has written none."""
  times = [changed for path in (folder.metrics, folder.journal)
           if (changed := logs.changed(path)) is not None]
  return time.time() - max(times) if times else None


def wall(folder: RunFolder, journal: list[dict[str, Any]]) -> tuple[float | None, int]:
  """(seconds between the journal's starts and ends, starts whose end is not known)."""
  seconds, unended, begin = 0.0, 0, None
  known = False
  for record in journal:
    try:
      now = datetime.datetime.fromisoformat(record["time"]).timestamp()
    except (KeyError, TypeError, ValueError):
      continue
    if record["event"] in BEGINNINGS:
      unended += begin is not None
      begin = now
    elif record["event"] in ENDINGS and begin is not None:
      seconds, begin, known = seconds + max(0.0, now - begin), None, True
  if begin is not None and (age := quiet_for(folder)) is not None:  # To its last line.
    seconds, known = seconds + max(0.0, time.time() - age - begin), True
  return (seconds if known else None), unended


def duration(seconds: float) -> str:
  """"3 d 04:05:06", "4:05:06" or "12.3 s"."""
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes, second = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  return (f"{days} d {hours:02d}:" if days else f"{hours}:") + f"{minutes:02d}:{second:02d}"


def signal_name(number: Any) -> str:
  """"SIGTERM" of 15."""
  try:
    return signal.Signals(number).name
  except ValueError:
    return f"signal {number}"


def one_line(text: Any) -> str:
  """A text without its line breaks."""
  return " ".join(str(text).split())


def _last_turn(folder: RunFolder) -> dict[str, Any] | None:
  turns = [event for event in folder.read_journal()
           if event.get("event") in BEGINNINGS + ENDINGS]
  return turns[-1] if turns else None


def _written_elsewhere(folder: RunFolder) -> bool:
  """Whether the process that took the folder is another machine's, and wrote a while ago."""
  age = quiet_for(folder)
  for name in (run_lock.FILE, run_lock.LEASE):
    try:
      holder = json.loads((folder.path / name).read_bytes())["host"]
    except (OSError, ValueError, KeyError, TypeError):
      continue
    # The kernel knows of this machine's; of a bucket it knows nothing.
    elsewhere = isinstance(folder.path, Remote) or holder != os.uname().nodename
    return elsewhere and age is not None and age < _QUIET
  return False


def _is_complete(folder: RunFolder, last: dict[str, Any] | None, total_steps: int | None) -> bool:
  said = last is not None and last["event"] == "complete"
  if total_steps is None:
    return said
  # Most folders are ruled out by names alone; what it takes to read a checkpoint takes seconds.
  try:
    names = paths.names(folder.checkpoints)
  except OSError:
    names = []
  if not any(name.isdecimal() for name in names):
    step = last.get("step") if said else None
    return type(step) is int and step >= total_steps
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
