"""A signal while there is nothing to save: nobody waits for a compiler, nothing is left over."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest
from tiny import ROOT

from chinchilla_jax import config_io
from chinchilla_jax.training import checkpoint
from chinchilla_jax.training.run_folder import RunFolder
from launch import STOP_AT_6, assert_same_run, run

# What never comes back, not even for a signal, and lets other threads run: a compiler at work.
STUCK = """
import ctypes, pathlib, sys
def stuck(*unused, tell=True, **more):
  if tell:
    pathlib.Path("stuck").touch()
  mutex = ctypes.create_string_buffer(64)
  for _ in range(2):
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
  raise AssertionError
"""
# By where it sticks: in the thread that compiles the step, when the main thread waits for it; in
# the main thread, making the state; before the run's folder is made; in a duty that is done before
# the first step.
WHERE = {
    "thread": """
import functools, jax
from chinchilla_jax.training import early
begin = early.compiling
def compiling(*args):
  jax.stages.Lowered.compile = functools.partial(stuck, tell=False)
  wait = begin(*args)
  return lambda: (pathlib.Path("stuck").touch(), wait())[1]
early.compiling = compiling
""",
    "compiler": "import jax\njax.stages.Lowered.compile = stuck",
    "main": "from chinchilla_jax.training import start\nstart.state_of = stuck",
    "plan": "from chinchilla_jax.training import loop\nloop.plan = stuck",
    "evaluation": ("from chinchilla_jax.evaluation import held_out\n"
                   "held_out.HeldOut.__call__ = stuck"),
    "pieces": "from chinchilla_jax.inference import generate\ngenerate._pieces = stuck",
}
NO_LOCKS = """
import errno
from chinchilla_jax.training import run_lock
def no_locks(folder):
  raise OSError(errno.ENOLCK, "no locks")
run_lock.KernelLock, run_lock.SECONDS = no_locks, 1.0
"""
LINE = ("chinchilla train: ended by {} before a step was taken: nothing to save, the same command "
        "starts again\n")
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 75)]


def signalled(number, words, where, folder, prelude="") -> tuple[int, str, str]:
  """(status, stdout, stderr) of a command that got a signal where it stuck."""
  program = f"{STUCK}{prelude}\n{where}\nfrom chinchilla_jax import cli\ncli.leave()"
  # The tests' own cache, as in `launch.start`.
  environ = os.environ | {
      "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
      "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
  process = subprocess.Popen([sys.executable, "-c", program, *map(str, words)], cwd=folder,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)
  try:
    end = time.monotonic() + 240
    while not (pathlib.Path(folder) / "stuck").exists():
      assert process.poll() is None, process.communicate()
      assert time.monotonic() < end
      time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)  # It would never end.
    return process.returncode, out, err
  finally:
    process.kill()


def words_of(experiment, workdir) -> list:
  config = pathlib.Path(workdir).parent / "config.json"
  config.write_text(json.dumps(config_io.to_dict(experiment)))
  return ["train", f"--config={config}", "--workdir", workdir]


def files(folder) -> dict[str, bytes]:
  return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("number, status", SIGNALS)
@pytest.mark.parametrize("where", ["thread", "main", "plan"])
def test_before_the_first_step(tiny, tiny_run, tmp_path, number, status, where):
  _, whole = tiny_run
  workdir = tmp_path / "run"
  got, _, err = signalled(number, words_of(tiny, workdir), WHERE[where], tmp_path)
  assert got == status and err == LINE.format(number.name)
  begun = [event["event"] for event in RunFolder(workdir).read_journal()]
  assert begun == (["start", "stop"] if where == "thread" else [])
  assert workdir.exists() == (where != "plan")
  if number == signal.SIGTERM:
    status, text = run(tiny, workdir)
    assert status == 0 and "note:" not in text, text
    assert_same_run(workdir, whole, 12)


@pytest.mark.parametrize("where", ["thread", "evaluation"])
def test_before_the_first_step_of_a_resumed_run(tiny, tiny_run, tmp_path, where):
  """Stopped before the evaluation that belongs to step 6, so that it is owed."""
  _, whole = tiny_run
  workdir = tmp_path / "run"
  status, text = run(tiny, workdir, STOP_AT_6)
  assert status == 75 and "saved at step 6" in text, text
  before = files(workdir / "checkpoints")
  assert checkpoint.progress(workdir / "checkpoints", 6)["owed"] == ["evaluation"]
  got, out, err = signalled(signal.SIGINT, words_of(tiny, workdir), WHERE[where], tmp_path)
  assert got == 130 and err == LINE.format("SIGINT") and "resuming at step 6" in out
  assert files(workdir / "checkpoints") == before
  status, text = run(tiny, workdir)
  assert status == 0, text
  assert_same_run(workdir, whole, 12)


def test_a_lease_is_given_back(tiny, tmp_path):
  """Else the next start looks for a minute whether somebody is still there."""
  workdir = tmp_path / "run"
  got, _, err = signalled(signal.SIGTERM, words_of(tiny, workdir), WHERE["main"], tmp_path,
                          NO_LOCKS)
  assert got == 75 and err == LINE.format("SIGTERM")
  assert sorted(path.name for path in workdir.iterdir()) == []


@pytest.mark.parametrize("number, status", SIGNALS)
@pytest.mark.parametrize("command, where", [
    ("evaluate", "evaluation"), ("generate", "pieces"), ("compile", "compiler")])
def test_commands_that_save_nothing(tiny, tiny_run, tmp_path, command, where, number, status):
  _, whole = tiny_run
  words = [command, *(words_of(tiny, tmp_path / "run")[1:2] if command == "compile"
                      else ["--workdir", whole])]
  before = files(whole)
  got, out, err = signalled(number, words, WHERE[where], tmp_path)
  status = 143 if number == signal.SIGTERM else status
  assert (got, out, err) == (status, "", f"chinchilla {command}: interrupted by {number.name}\n")
  assert files(whole) == before


def test_what_hangs_on_the_way_out_keeps_nobody(tiny, tmp_path):
  """A lease in a bucket that does not answer, say."""
  hang = """
import time
from chinchilla_jax.training import run_lock
run_lock.KernelLock.release = lambda self: time.sleep(600)
"""
  got, _, _ = signalled(signal.SIGINT, words_of(tiny, tmp_path / "run"), WHERE["main"], tmp_path,
                        hang)
  assert got == 130


@pytest.mark.parametrize("number, status", [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "")])
def test_after_that_a_signal_does_what_it_always_did(tmp_path, number, status):
  program = f"""
import os, signal, time
from chinchilla_jax import leaving
with leaving.at_once("train"):
  leaving.no_longer()
  try:
    os.kill(os.getpid(), {int(number)})
    time.sleep(600)
  except KeyboardInterrupt:
    print("interrupted")
  assert signal.set_wakeup_fd(-1) == -1
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
"""
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                        timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)})
  assert done.stdout.strip() == status and done.stderr == ""
  assert done.returncode == (0 if status else -number)
