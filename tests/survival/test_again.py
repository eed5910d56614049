"""Stops, hangs, second processes, other machines: what the next start must not notice."""

import signal
import time

from tiny import with_fields

from chinchilla_jax.errors import AGAIN
from chinchilla_jax.training import checkpoint
from chinchilla_jax.training.run_folder import RunFolder
from launch import STOP_AT_6, assert_same_run, finish, records, run, start

SLOW = """
import time
from chinchilla_jax.training import recorder
_step = recorder.Recorder.step
def step(self, step, values):
  time.sleep(0.2)
  _step(self, step, values)
recorder.Recorder.step = step
"""


def wait_for_step(process, step) -> None:
  end = time.monotonic() + 200
  for line in process.stdout:
    if line.startswith(f"step {step}/"):
      return
    assert time.monotonic() < end
  raise AssertionError("it ended before that")


def test_a_preempted_run_loses_no_step_and_is_bit_for_bit(tiny, tiny_run, tmp_path):
  _, whole = tiny_run
  workdir = tmp_path / "run"
  process = start(tiny, workdir, SLOW, ["--config.logging.console=1 steps"], PYTHONUNBUFFERED="1")
  wait_for_step(process, 5)
  process.send_signal(signal.SIGTERM)
  status, text = finish(process)
  assert status == AGAIN and "the same command goes on from there" in text, text
  logged = [r["step"] for r in records(workdir) if r["kind"] == "train"]
  assert checkpoint.newest_good(workdir / "checkpoints") == (logged[-1], {})
  assert 5 <= logged[-1] <= 8
  status, text = run(tiny, workdir)
  assert status == 0, text
  assert_same_run(workdir, whole, 12)
  assert [e["event"] for e in RunFolder(workdir).read_journal()] == [
      "start", "stop", "resume", "complete"]


def test_an_evaluation_that_a_stop_came_before_is_done_afterwards(tiny, tiny_run, tmp_path):
  """SIGTERM comes while step 6, whose evaluation is due, is computed: saved at once."""
  _, whole = tiny_run
  stop = SLOW + STOP_AT_6
  workdir = tmp_path / "run"
  status, text = run(tiny, workdir, stop)
  assert status == AGAIN and "saved at step 6" in text, text
  assert checkpoint.progress(workdir / "checkpoints", 6)["owed"] == ["evaluation"]
  assert not [r for r in records(workdir) if r["kind"] == "eval"]
  status, text = run(tiny, workdir)
  assert status == 0, text
  assert_same_run(workdir, whole, 12)


def test_a_sample_is_owed_too(tiny, tmp_path):
  """Texts at steps 6 and 12; the first is cut short by SIGTERM at its third piece."""
  sampled = with_fields(tiny, evaluation__sample_tokens=8, evaluation__sample_prompt="import ")
  status, text = run(sampled, tmp_path / "whole")
  assert status == 0 and "sample: import " in text, text
  lines = [r for r in records(tmp_path / "whole") if r["kind"] == "sample"]
  assert [r["step"] for r in lines] == [6, 12] and all(r["text"] for r in lines)
  stop = """
import os, signal
from chinchilla_jax.inference import generate
_generate = generate.generate
def cut(*args, **kwargs):
  for index, token in enumerate(_generate(*args, **kwargs)):
    if index == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    yield token
generate.generate = cut
"""
  status, text = run(sampled, tmp_path / "run", stop)
  assert status == AGAIN and "saved at step 6" in text, text
  assert checkpoint.progress(tmp_path / "run/checkpoints", 6)["owed"] == ["sample"]
  status, text = run(sampled, tmp_path / "run")
  assert status == 0, text
  assert_same_run(tmp_path / "run", tmp_path / "whole", 12)


def test_a_signal_during_an_evaluation_is_not_kept_waiting(tiny, tiny_run, tmp_path):
  """Step 6 is evaluated and not saved; SIGTERM comes with the third batch of the evaluation."""
  _, whole = tiny_run
  stop = """
import os, signal
from chinchilla_jax.data import batches
_rows, _calls = batches.ValidationBatches.rows, []
def rows(self, *args):
  _calls.append(1)
  if len(_calls) == 3:
    os.kill(os.getpid(), signal.SIGTERM)
  assert len(_calls) < 6
  return _rows(self, *args)
batches.ValidationBatches.rows = rows
"""
  workdir = tmp_path / "run"
  status, text = run(tiny, workdir, stop)
  assert status == AGAIN and "saved at step 6" in text, text
  assert checkpoint.progress(workdir / "checkpoints", 6)["owed"] == ["evaluation"]
  assert checkpoint.steps(workdir / "checkpoints") == [4, 6]
  status, text = run(tiny, workdir, stop)  # And again, before the first step.
  assert status == AGAIN and "saved at step 6" in text, text
  status, text = run(tiny, workdir)
  assert status == 0, text
  assert_same_run(workdir, whole, 12)


def test_the_evaluation_of_the_last_step_is_owed_too(tiny, tiny_run, tmp_path):
  _, whole = tiny_run
  die = """
import os, signal, time
from chinchilla_jax.evaluation import held_out
from chinchilla_jax.training import loop
_call, _calls = held_out.HeldOut.__call__, []
def call(self, *args):
  _calls.append(1)
  if len(_calls) == 2:  # Of step 12, which is being saved meanwhile.
    while not os.path.isdir(os.path.join(WORKDIR, "checkpoints", "12")):
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
  return _call(self, *args)
held_out.HeldOut.__call__ = call
"""
  workdir = tmp_path / "run"
  status, _ = run(tiny, workdir, f"WORKDIR = {str(workdir)!r}" + die)
  assert status == -signal.SIGKILL
  status, text = run(tiny, workdir)
  assert status == 0 and "step 12  validation" in text, text
  assert_same_run(workdir, whole, 12)
  status, text = run(tiny, workdir)
  assert status == 0 and "nothing to do" in text, text


def test_a_step_that_hangs_ends_with_the_stacks_and_run_me_again(tiny, tiny_run, tmp_path):
  _, whole = tiny_run
  hang = """
import time
from chinchilla_jax.data import batches
_batch = batches.Batches.batch
def a_disk_that_never_answers():
  time.sleep(10_000)
def batch(self, first, count):
  if first == 4 * 9:
    a_disk_that_never_answers()
  return _batch(self, first, count)
batches.Batches.batch = batch
"""
  workdir = tmp_path / "run"
  status, text = run(tiny, workdir, hang, ["--config.guard.hang_after=12"])
  assert status == AGAIN, text
  assert "a_disk_that_never_answers" in text and "last completed step 8" in text, text
  status, text = run(tiny, workdir)
  assert status == 0 and "resuming at step 8" in text, text
  assert_same_run(workdir, whole, 12)


def test_the_second_process_on_a_folder_refuses(tiny, tmp_path):
  workdir = tmp_path / "run"
  first = start(tiny, workdir, SLOW, ["--config.logging.console=1 steps",
                                      "--config.run_length=400 steps"], PYTHONUNBUFFERED="1")
  wait_for_step(first, 2)
  status, text = run(tiny, workdir, flags=["--config.run_length=400 steps"])
  assert status == 2 and str(first.pid) in text and "Traceback" not in text, text
  assert first.poll() is None
  first.send_signal(signal.SIGKILL)  # The kernel gives the lock back.
  finish(first)
  status, text = run(tiny, workdir)
  assert status == 0, text


def test_clock_name_hash_seed_and_prefetching_change_nothing(tiny, tiny_run, tmp_path):
  _, whole = tiny_run
  elsewhere = """
import random, socket, time
import numpy
_time = time.time
time.time = lambda: _time() + 3e8
socket.gethostname = lambda: "another-machine"
random.seed(7)
numpy.random.seed(7)
"""
  workdir = tmp_path / "elsewhere" / "run"
  workdir.parent.mkdir()
  status, text = run(tiny, workdir, elsewhere, ["--config.data.prefetch=7"],
                     PYTHONHASHSEED="77", TZ="Pacific/Apia", HOSTNAME="another-machine")
  assert status == 0, text
  assert_same_run(workdir, whole, 12)


def test_a_checkpoint_of_another_machine_is_resumed_and_the_log_says_what_differs(
    tiny, tiny_run, tmp_path):
  status, _ = run(tiny, tmp_path / "run", flags=["--config.run_length=8 steps"])
  assert status == 0
  status, text = run(tiny, tmp_path / "run", flags=["--config.mesh.whole_below=0"],
                     XLA_FLAGS="--xla_force_host_platform_device_count=2")
  assert status == 0, text
  assert "devices was 1 x cpu, is now 2 x cpu: results may differ in the last bits" in text
  assert "config.run_length was '8 steps', is now '12 steps'" in text
