"""Locks and leases between real processes."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from tiny import ROOT

from chinchilla_jax.errors import UserError
from chinchilla_jax.training import run_lock

LEASE = 3.0  # Seconds: a busy machine must find the time to renew it.
KERNEL = "run_lock.KernelLock(folder)"
LEASED = f"run_lock.Lease(folder, force, seconds={LEASE})"
PROGRAM = """
import pathlib, sys, time
from chinchilla_jax.errors import UserError
from chinchilla_jax.training import run_lock
folder, force = pathlib.Path(sys.argv[1]), len(sys.argv) > 2
try:
  lock = {lock}
  print("held", flush=True)
  for line in sys.stdin:
    lock.check()
    print("checked", flush=True)
  lock.release()
except UserError as error:
  print(error, flush=True)
  sys.exit(2)
"""


HANGS = """
import pathlib, sys, threading
from chinchilla_jax.errors import UserError
from chinchilla_jax.training import run_lock
folder = pathlib.Path(sys.argv[1])
hanging, go, landed = threading.Event(), threading.Event(), threading.Event()
lock, write = {start}, run_lock.durable.write
def late(*args, **named):
  hanging.set()
  go.wait()
  write(*args, **named)
  landed.set()
run_lock.durable.write = late
hanging.wait()
print("hangs", flush=True)
sys.stdin.readline()
go.set()
landed.wait()
print("landed", flush=True)
try:
  lock.check()
  print("checked", flush=True)
except UserError as error:
  print(error, flush=True)
lock.release()
"""


def start(lock, folder, *words):
  return subprocess.Popen(
      [sys.executable, "-c", PROGRAM.format(lock=lock), str(folder), *words], text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=str(ROOT)))


@pytest.fixture
def holder(request, tmp_path):
  process = start(request.param, tmp_path)
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.wait()


both = pytest.mark.parametrize("holder", [KERNEL, LEASED], indirect=True, ids=["kernel", "lease"])
leased = pytest.mark.parametrize("holder", [LEASED], indirect=True, ids=["lease"])


def ask(process) -> str:
  process.stdin.write("check\n")
  process.stdin.flush()
  return last_word(process)


def last_word(process) -> str:
  """What it says about the lock, after the note that it is looking."""
  line = process.stdout.readline()
  return process.stdout.readline() if line.startswith("note: ") else line


def content_of(path) -> str:
  try:
    return path.read_text()
  except FileNotFoundError:
    return ""


def the_lock_of(holder):
  return LEASED if LEASED in holder.args[2] else KERNEL


@both
def test_the_second_is_told_who_has_it(holder, tmp_path):
  second = start(the_lock_of(holder), tmp_path)
  assert f"in use by process {holder.pid} on " in last_word(second)
  assert second.wait(timeout=30) == 2
  assert ask(holder) == "checked\n"


@both
def test_a_released_one_is_free(holder, tmp_path):
  holder.stdin.close()
  assert holder.wait(timeout=30) == 0
  started = time.monotonic()
  second = start(the_lock_of(holder), tmp_path)
  assert second.stdout.readline() == "held\n"
  second.kill()
  assert time.monotonic() - started < 20


@both
def test_a_killed_process_holds_nothing(holder, tmp_path):
  holder.kill()
  holder.wait()
  second = start(the_lock_of(holder), tmp_path)
  assert last_word(second) == "held\n"
  second.kill()


def test_the_kernel_s_lock_is_not_inherited(tmp_path):
  """A child that outlives the process does not keep the folder from the next one."""
  program = ("import pathlib, subprocess, sys\n"
             "from chinchilla_jax.training import run_lock\n"
             "lock = run_lock.KernelLock(pathlib.Path(sys.argv[1]))\n"
             "child = subprocess.Popen(['sleep', '60'])\n"
             "print(child.pid, flush=True)\n")
  process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], text=True,
                             stdout=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=str(ROOT)))
  child = int(process.stdout.readline())
  process.wait(timeout=60)
  try:
    run_lock.KernelLock(tmp_path).release()
  finally:
    os.kill(child, signal.SIGKILL)


def test_the_kernel_s_lock_is_not_kept_by_a_fork(tmp_path):
  program = ("import os, pathlib, sys, time\n"
             "from chinchilla_jax.training import run_lock\n"
             "lock = run_lock.KernelLock(pathlib.Path(sys.argv[1]))\n"
             "if not os.fork(): print(os.getpid(), flush=True)\n"
             "time.sleep(60)\n")
  process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], text=True,
                             stdout=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=str(ROOT)))
  child = int(process.stdout.readline())
  try:
    with pytest.raises(UserError, match=f"process {process.pid} "):
      run_lock.KernelLock(tmp_path)  # The fork has not let go of what its parent holds.
    process.kill()
    process.wait()
    run_lock.KernelLock(tmp_path).release()
  finally:
    process.kill()
    os.kill(child, signal.SIGKILL)


@leased
def test_force_takes_it_and_the_old_holder_stops(holder, tmp_path):
  second = start(LEASED, tmp_path, "force")
  assert last_word(second) == "held\n"
  assert f"was lost to process {second.pid} on" in ask(holder)
  assert holder.wait(timeout=30) == 2
  assert ask(second) == "checked\n"
  second.stdin.close()
  second.wait(timeout=30)
  assert not (tmp_path / run_lock.LEASE).exists()


@leased
def test_a_holder_that_slept_notices_that_it_lost_it(holder, tmp_path):
  holder.send_signal(signal.SIGSTOP)
  second = start(LEASED, tmp_path)
  assert last_word(second) == "held\n"
  holder.send_signal(signal.SIGCONT)
  assert "was lost to" in ask(holder)
  time.sleep(LEASE)
  assert ask(second) == "checked\n"
  second.kill()


@leased
def test_a_holder_that_slept_does_not_take_a_free_one_back(holder, tmp_path):
  holder.send_signal(signal.SIGSTOP)
  time.sleep(2 * LEASE)
  (tmp_path / run_lock.LEASE).unlink()
  holder.send_signal(signal.SIGCONT)
  time.sleep(LEASE)
  assert not (tmp_path / run_lock.LEASE).exists()
  assert "was lost to nobody" in ask(holder)


def test_check_knows_the_age_before_the_renewing_thread_runs(tmp_path):
  """As right after a sleep in which another process had the lease and gave it back."""
  lock = run_lock.Lease(tmp_path, seconds=0.5)
  lock._over.set()
  lock._thread.join()
  (tmp_path / run_lock.LEASE).unlink(missing_ok=True)
  time.sleep(0.6)
  with pytest.raises(UserError, match="could not be renewed in time"):
    lock.check()


def test_a_write_that_hung_takes_nothing_back(tmp_path):
  """Storage holds up a renewal, another takes over, then the renewal lands after all."""
  hung = HANGS.format(start=f"run_lock.Lease(folder, seconds={LEASE})")
  first = subprocess.Popen([sys.executable, "-c", hung, str(tmp_path)], text=True,
                           stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                           env=dict(os.environ, PYTHONPATH=str(ROOT)))
  second = None
  try:
    assert first.stdout.readline() == "hangs\n"
    second = start(LEASED, tmp_path)
    assert last_word(second) == "held\n"
    first.stdin.write("go on\n")
    first.stdin.flush()
    assert first.stdout.readline() == "landed\n"
    assert "was lost to" in first.stdout.readline()
    # What landed too late goes away again, or the second one would stop as well.
    end = time.monotonic() + 20
    while f'"pid": {first.pid},' in content_of(tmp_path / run_lock.LEASE):
      assert time.monotonic() < end
      time.sleep(0.05)
  finally:
    for process in filter(None, (first, second)):
      process.kill()
      process.wait()


def test_of_many_that_come_at_once_one_gets_it(tmp_path):
  for attempt in range(3):
    folder = tmp_path / str(attempt)
    folder.mkdir()
    (folder / run_lock.LEASE).write_text('{"id": "of a dead process"}')
    running = [start(LEASED, folder) for _ in range(4)]
    words = [last_word(process) for process in running]
    holders = [p for p, word in zip(running, words, strict=True) if word == "held\n"]
    checked = [ask(process) for process in holders]
    for process in running:
      process.kill()
    assert checked.count("checked\n") == 1, words


def test_a_file_system_without_locks_gets_a_lease(tmp_path, monkeypatch):
  def no_locks(*args):
    raise OSError(95, "Operation not supported")
  monkeypatch.setattr(run_lock.fcntl, "flock", no_locks)
  monkeypatch.setattr(run_lock, "SECONDS", LEASE)
  with run_lock.held(tmp_path) as lock:
    assert isinstance(lock, run_lock.Lease)
    lock.check()
    assert (tmp_path / run_lock.LEASE).exists()
  assert not (tmp_path / run_lock.LEASE).exists()


def test_a_place_that_cannot_be_written_is_one_line():
  with pytest.raises(UserError, match="/proc cannot be written.*another"):
    with run_lock.held(pathlib.Path("/proc")):
      pass
