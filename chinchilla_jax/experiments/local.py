"""Runs the members of a sweep on this machine, each as `chinchilla train` processes of its own.

A process that was preempted, hung or died is started again and resumes; one that ends with status
2 has failed, and the others go on. A first Ctrl-C or SIGTERM is passed on to all of them, and they
save; a second Ctrl-C ends them at once.
"""

import contextlib
import dataclasses
import datetime
import glob
import json
import os
import pathlib
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from chinchilla_jax.errors import UserError
from chinchilla_jax.experiments import results, run_state, sweep
from chinchilla_jax.training.interrupt import Interrupt
from chinchilla_jax.training.run_folder import RunFolder

_POLL = 0.2           # Seconds between two looks at the processes.
_PAUSE = 1.0          # Seconds before a process is started again.
_RESULTS_EVERY = 30.0  # Seconds at least between two writings of the results on the way.
_TAIL = 16_384        # Bytes at the end of a log that are looked at.


@dataclasses.dataclass(frozen=True)
class Slot:
  """What one member at a time may use.

  Attributes:
    cores: its own cores; None: all of them.
    environ: what its processes have in their environment besides.
  """

  cores: frozenset[int] | None = None
  environ: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def __str__(self) -> str:
    parts = [f"{name}={value}" for name, value in self.environ.items()]
    if self.cores is not None:
      parts.append(f"core{'s' if len(self.cores) > 1 else ''} {_ranges(self.cores)}")
    return " and ".join(parts) or "the whole machine"


def slots(parallel: int = 1, cores: int | None = None,
          environ: Mapping[str, str] = os.environ) -> list[Slot]:
  """Cuts this machine into parts that share no core and no GPU.

  Args:
    parallel: members at a time.
    cores: for each; by default all that there are, divided among them.
    environ: what says which accelerators may be used.

  Raises:
    UserError: there is not enough of something.
  """
  for name, value in (("parallel", parallel), ("cores", cores)):
    if value is not None and value < 1:
      raise UserError(f"--{name}: got {value}, allowed is at least 1")
  if not hasattr(os, "sched_getaffinity"):
    if parallel > 1 or cores:
      raise UserError("--parallel: this system cannot give each member cores of its own; leave it "
                      "(and --cores) out")
    return [Slot()]
  here = sorted(os.sched_getaffinity(0))
  each = cores or len(here) // parallel
  if not each or each * parallel > len(here):
    raise UserError(f"--parallel: {parallel} members at a time on {cores or 1} core"
                    f"{'s' if (cores or 1) > 1 else ''} each do not fit on the {len(here)} cores "
                    "that may be used here; give fewer")
  environs = [{} for _ in range(parallel)]
  if parallel > 1 and not environ.get("JAX_PLATFORMS", "").startswith("cpu"):
    environs = _accelerators(parallel, environ)
  if parallel == 1 and cores is None:
    return [Slot()]
  return [Slot(frozenset(here[k * each:(k + 1) * each]), environs[k]) for k in range(parallel)]


def _accelerators(parallel: int, environ: Mapping[str, str]) -> list[dict[str, str]]:
  """GPUs divided among members, since JAX takes all that it sees."""
  if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
    raise UserError("--parallel: a TPU belongs to one process at a time; leave --parallel out, or "
                    "set JAX_PLATFORMS=cpu")
  visible = environ.get("CUDA_VISIBLE_DEVICES")
  if visible is None:
    gpus = sorted((path.removeprefix("/dev/nvidia") for path in glob.glob("/dev/nvidia[0-9]*")),
                  key=int)
  else:
    gpus = [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]
  if not gpus:
    return [{} for _ in range(parallel)]
  if parallel > len(gpus):
    raise UserError(f"--parallel: {parallel} members at a time on {len(gpus)} GPU"
                    f"{'s' if len(gpus) > 1 else ''}; give at most {len(gpus)}, or set "
                    "JAX_PLATFORMS=cpu")
  each = len(gpus) // parallel
  return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[k * each:(k + 1) * each])}
          for k in range(parallel)]


def _ranges(numbers: frozenset[int]) -> str:
  """{0, 1, 2, 5} as "0-2,5"."""
  found: list[list[int]] = []
  for number in sorted(numbers):
    if found and number == found[-1][1] + 1:
      found[-1][1] = number
    else:
      found.append([number, number])
  return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


# -------------------------------------------------------------------- Running


@dataclasses.dataclass
class Status:
  """How far a member is, as far as this process knows.

  Attributes:
    state: one of `run_state.STATES`.
    here: whether a process that was started here trains it now.
    starts: processes that were started here.
    step: newest in its log; `loss` in nats per token and `tokens_per_second` are that step's.
    note: why it is in this state, in one line; may be empty.
  """

  member: sweep.Member
  state: str
  here: bool = False
  starts: int = 0
  step: int = 0
  loss: float | None = None
  tokens_per_second: float | None = None
  note: str = ""

  def look(self) -> None:
    """Reads the newest step from the run's folder."""
    newest = _newest_step(self.member.folder / "metrics.jsonl")
    self.step = newest.get("step", 0)
    self.loss, self.tokens_per_second = newest.get("loss"), newest.get("tokens_per_second")


def status_of(member: sweep.Member) -> Status:
  """How far a member is, from its run's folder."""
  found = sweep.state_of(member)
  status = Status(member, found.state, note=found.reason)
  status.note = status.note or _left_alone(status)
  status.look()
  return status


@dataclasses.dataclass
class _Child:
  status: Status
  slot: Slot
  process: subprocess.Popen
  log_start: int  # Where this process's part of the log begins.


def run(found: Sequence[sweep.Member], folder: pathlib.Path, places: Sequence[Slot], *,
        retries: int = 3, show: Callable[[Sequence[Status]], None] = lambda statuses: None,
        ) -> tuple[list[Status], int | None]:
  """Trains what is not complete, as many at a time as there are places.

  Args:
    found: the members; their files are written (`sweep.write`).
    folder: the sweep's.
    places: from `slots`.
    retries: how often a member's process is started again after it was preempted, hung or died.
    show: called with the state of everything every now and then, and at the end.

  Returns:
    (how every member ended, the signal that ended the sweep early or None). The results are
    written.

  Raises:
    UserError: the folder cannot be written.
    KeyboardInterrupt: a second Ctrl-C. In both cases the processes have ended by then.
  """
  statuses = [status_of(member) for member in found]
  queue = [status for status in statuses if status.state not in ("complete", "running")]
  not_before: dict[str, float] = {}
  free, children = list(places), []
  show(statuses)
  passed_on, written = False, time.monotonic()
  with Interrupt() as interrupt:
    try:
      while queue or children:
        while free and not interrupt.signal and (
            ready := [one for one in queue if not_before.get(one.member.id, 0) < time.monotonic()]):
          queue.remove(ready[0])
          children.append(_start(ready[0], free.pop(0)))
        if interrupt.signal and not passed_on:
          passed_on = True
          queue.clear()
          _pass_on(children, interrupt.signal)
        for child in list(children):
          if child.process.poll() is None:
            child.status.look()
            continue
          children.remove(child)
          free.append(child.slot)
          if _ended(child, retries, stopping=interrupt.signal is not None):
            not_before[child.status.member.id] = time.monotonic() + _PAUSE
            queue.insert(0, child.status)
        if children and time.monotonic() - written > _RESULTS_EVERY:
          results.write(folder)
          written = time.monotonic()
        show(statuses)
        time.sleep(_POLL)
    except BaseException as error:
      hurry = isinstance(error, KeyboardInterrupt)
      _pass_on(children, signal.SIGINT if hurry else signal.SIGTERM)
      raise
    finally:
      for child in children:
        child.process.wait()
      results.write(folder)
  return statuses, interrupt.signal


def _left_alone(status: Status) -> str:
  return "by a process that this command did not start" if status.state == "running" else ""


def _start(status: Status, slot: Slot) -> _Child:
  member = status.member
  status.starts += 1
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  with contextlib.ExitStack() as stack:
    try:
      log = stack.enter_context(open(member.log, "a"))
      begin = log.tell()
      log.write(f"--- {now}: {shlex.join(member.argv)}, on {slot}\n")
      log.flush()
    except OSError as error:
      raise UserError(f"--workdir: {member.log} cannot be written ({error.strerror}); make room, "
                      "or mend it") from error
    if slot.cores is not None:
      # A process takes over the cores of the thread that starts it.
      stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
      os.sched_setaffinity(0, slot.cores)
    # In a session of its own: a terminal's Ctrl-C would reach it beside what is passed on, and
    # two of them end a run without saving.
    process = subprocess.Popen(
        member.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        env=os.environ | dict(slot.environ) | {"PYTHONUNBUFFERED": "1"})
  status.state, status.here, status.note = "running", True, ""
  return _Child(status, slot, process, begin)


def _pass_on(children: Sequence[_Child], number: int) -> None:
  for child in children:
    with contextlib.suppress(ProcessLookupError):
      child.process.send_signal(number)


def _ended(child: _Child, retries: int, stopping: bool) -> bool:
  """Takes note of how a process ended; says whether to start it again."""
  status, code = child.status, child.process.returncode
  status.here = False
  status.look()
  status.state = sweep.state_of(status.member).state
  if status.state == "running":  # Another process has it: this one was refused.
    status.note = _left_alone(status)
    return False
  if status.state == "complete":
    return False
  words = _words(code)
  last = _last_words(status.member.log, child.log_start)
  if code == 2:
    why = last.removeprefix("chinchilla train: ")
  elif stopping or code in (130, -signal.SIGINT):
    status.state, status.note = "interrupted", words
    return False
  elif status.starts <= retries:
    status.state, status.note = "interrupted", f"{words}; starting it again"
    return True
  else:
    why = f"{words} after {status.starts} start{'s' if status.starts > 1 else ''}: {last}"
  run_state.note_failure(RunFolder(status.member.folder), why)
  status.state, status.note = "failed", why
  return False


def _words(code: int) -> str:
  if code >= 0:
    return {75: "preempted or hung (status 75)", 130: "stopped by Ctrl-C"}.get(
        code, f"ended with status {code}")
  try:
    return f"killed by {signal.Signals(-code).name}"
  except ValueError:
    return f"killed by signal {-code}"


def _last_words(log: pathlib.Path, start: int) -> str:
  """The message of the command in its part of the log, else the last line there."""
  try:
    with open(log, "rb") as file:
      end = file.seek(0, os.SEEK_END)
      file.seek(max(start, end - _TAIL))
      text = file.read().decode(errors="replace")
  except OSError:
    return "its log cannot be read"
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  said = [line for line in lines if line.startswith("chinchilla train: ")]
  last = (said or [line for line in lines if not line.startswith("--- ")] or ["no word"])[-1]
  return last if len(last) <= 400 else f"{last[:400]} ..."


def _newest_step(path: pathlib.Path) -> dict[str, Any]:
  try:
    with open(path, "rb") as file:
      file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
      lines = file.read().splitlines()
  except OSError:
    return {}
  for line in reversed(lines):
    with contextlib.suppress(ValueError):
      record = json.loads(line)
      if isinstance(record, dict) and record.get("kind") == "train":
        return record
  return {}
