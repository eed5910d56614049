"""kill -9 again and again: the same command goes on, and ends where the uninterrupted run ends."""

import collections
import os
import random
import signal
import time

import pytest
from tiny import tiny_experiment, with_fields

from launch import assert_same_run, finish, start

PHASES = ("start-up", "steps", "save", "evaluation")

# Writes into a file what the process is busy with, so that a kill can be aimed.
MARK = """
import functools, os
_file = os.open({path!r}, os.O_WRONLY | os.O_CREAT)
_now = ["start-up"]
def _mark(phase):
  os.pwrite(_file, phase.ljust(16).encode(), 0)
  old, _now[0] = _now[0], phase
  return old
def _during(phase, function, after=None):
  @functools.wraps(function)
  def marked(*args, **kwargs):
    old = _mark(phase)
    try:
      return function(*args, **kwargs)
    finally:
      _mark(after or old)
  return marked
_mark("start-up")
from chinchilla_jax.evaluation import held_out
from chinchilla_jax.training import recorder, saving
held_out.HeldOut.__call__ = _during("evaluation", held_out.HeldOut.__call__, "steps")
saving.Saver._finish = _during("save", saving.Saver._finish, "steps")
recorder.Recorder.step = _during("steps", recorder.Recorder.step, "steps")
"""


def phase_of(path) -> str:
  try:
    return path.read_text().strip()
  except FileNotFoundError:
    return ""


def kill_in(process, path, target, chance) -> str:
  """Kills a process some time into a phase; the phase it died in, "" if it ended before."""
  longest = {"start-up": 4.0, "steps": 0.01, "save": 0.01, "evaluation": 0.03}[target]
  while process.poll() is None:
    if phase_of(path) == target:
      time.sleep(chance.random() * longest)
      if phase_of(path) != target and target != "start-up":
        continue  # It was over sooner than that: a phase that returns is waited for again.
      process.send_signal(signal.SIGKILL)
      process.wait()
      return phase_of(path) if process.returncode == -signal.SIGKILL else ""
    time.sleep(0.001)
  return ""


def storm(store, tmp_path, steps, kills, seed) -> collections.Counter:
  """Kills one run so many times; returns how often it died in which phase."""
  # A save is under way half of the time, and a few evaluations take as long as many steps.
  experiment = with_fields(
      tiny_experiment(store), run_length=f"{steps} steps", checkpoint__every="3 steps",
      evaluation__every="5 steps", evaluation__max_tokens=1500, evaluation__batch=1)
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  status, text = finish(start(experiment, whole), timeout=1200)
  assert status == 0, text
  chance, died = random.Random(seed), collections.Counter()
  path = tmp_path / "phase"
  while died.total() < kills:
    path.unlink(missing_ok=True)
    process = start(experiment, killed, MARK.format(path=str(path)))
    phase = kill_in(process, path, PHASES[died.total() % len(PHASES)], chance)
    text = process.stdout.read()
    assert process.returncode in (0, -signal.SIGKILL), text
    if phase:
      died[phase] += 1
    else:
      assert died.total() >= len(PHASES), text
      break  # It is complete.
  status, text = finish(start(experiment, killed), timeout=1200)
  assert status == 0, text
  assert_same_run(killed, whole, steps)
  leftovers = [name for name in os.listdir(killed / "checkpoints") if not name.isdecimal()]
  assert not leftovers  # A kill damages nothing, and what it leaves half-written is cleared away.
  print(f"died in {dict(died)}")
  return died


def test_killed_in_every_phase(tiny_store, tmp_path):
  died = storm(tiny_store, tmp_path, steps=150, kills=6, seed=0)
  assert died.total() == 6 and len(died) >= 3


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_thirty_times(tiny_store, tmp_path, seed):
  died = storm(tiny_store, tmp_path, steps=600, kills=30, seed=seed)
  assert died.total() >= 25 and set(died) == set(PHASES)
