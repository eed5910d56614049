"""The watchdog, in processes that hang, that do not, and that were asleep."""

import os
import signal
import subprocess
import sys
import time

import pytest
from tiny import ROOT

from chinchilla_jax.errors import AGAIN

PROGRAM = """
import sys, time
from chinchilla_jax.training.watchdog import Watchdog
def stuck(seconds):
  time.sleep(seconds)
with Watchdog({seconds}, {first}, lambda: "last completed step 7") as dog:
  print("ready", flush=True)
  {body}
print("done", flush=True)
"""


def start(body, seconds=1.0, first=1.0):
  return subprocess.Popen(
      [sys.executable, "-c", PROGRAM.format(body=body, seconds=seconds, first=first)], text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=str(ROOT)))


def test_a_hang_ends_with_stacks_and_what_was_done():
  process = start("stuck(600)")
  out, err = process.communicate(timeout=60)
  assert process.returncode == AGAIN and "done" not in out
  assert "no step for 1 s" in err and "last completed step 7" in err and "run it again" in err
  assert "in stuck" in err  # The stack of the thread that hangs.


@pytest.mark.parametrize("body", [
    "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "import os; os.read(os.pipe()[0], 1)"], ids=["a lock", "a read"])
def test_it_sees_hangs_outside_of_python(body):
  process = start(body)
  process.communicate(timeout=60)
  assert process.returncode == AGAIN


def test_beats_keep_it_alive():
  process = start("for _ in range(30): dog.beat(); time.sleep(0.1)")
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0 and "done" in out, err


def test_the_first_beat_has_longer():
  process = start("time.sleep(2); dog.beat(); time.sleep(0.2)", first=30)
  assert process.wait(timeout=60) == 0
  process = start("dog.beat(); stuck(60)", first=30)
  assert process.wait(timeout=25) == AGAIN


@pytest.mark.parametrize("words", [
    "lambda: 1 / 0", "lambda: 'x', lambda text: 1 / 0", "lambda: 'x', lambda text: stuck(600)"],
    ids=["describe raises", "say raises", "say hangs"])
def test_no_callback_keeps_it_from_ending(words):
  program = PROGRAM.format(body="stuck(600)", seconds=1.0, first=1.0)
  program = program.replace('lambda: "last completed step 7"', words)
  process = subprocess.Popen([sys.executable, "-c", program], text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=str(ROOT)))
  try:
    _, err = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == AGAIN and "in stuck" in err


def test_a_reader_that_stopped_reading_does_not_keep_it_from_ending():
  """The main thread hangs in a write to stderr, and the last words cannot be written either."""
  reading, writing = os.pipe()
  body = "while True: print('y' * 1000, file=sys.stderr)"
  process = subprocess.Popen(
      [sys.executable, "-c", PROGRAM.format(body=body, seconds=1.0, first=1.0)],
      stdout=subprocess.DEVNULL, stderr=writing, env=dict(os.environ, PYTHONPATH=str(ROOT)))
  os.close(writing)
  try:
    assert process.wait(timeout=60) == AGAIN
  finally:
    process.kill()
    os.close(reading)


def test_off():
  assert start("time.sleep(2)", seconds=0, first=0.5).wait(timeout=60) == 0


def test_a_stopped_process_was_not_hanging():
  """As when a laptop sleeps: the time in between does not count."""
  process = start("for _ in range(20): dog.beat(); time.sleep(0.1)")
  assert process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGSTOP)
  time.sleep(3)
  process.send_signal(signal.SIGCONT)
  assert process.wait(timeout=60) == 0
