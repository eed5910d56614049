"""Ends a process in which nothing happens any more: a hang costs as much as work does."""

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from chinchilla_jax.errors import AGAIN

_TICKS = 20  # Looks within the time limit.
_WORDS = 10.0  # Seconds that the last words may take: what hangs may be the place they go to.


class Watchdog:
  """Prints all stacks and ends the process with AGAIN when `beat` has not been called for too long.

  Its own thread watches. It sees a main thread that waits in a collective, in a read, in a lock;
  not one that never gives up Python's interpreter lock. Nothing that the last words meet, such as
  a full pipe or a callback that raises or hangs, keeps the process from ending.

  Time is counted in the thread's own looks, so that neither a changed clock nor a process that
  was stopped or a laptop that slept looks like a hang.
  """

  def __init__(self, seconds: float, first_seconds: float, describe: Callable[[], str],
               say: Callable[[str], None] = lambda text: None):
    """Watches from the start of the block.

    Args:
      seconds: between two beats at most; 0: never ends anything.
      first_seconds: until the first beat at most.
      describe: what is known of the progress, such as "last completed step 1,204".
      say: gets that line too, after the stacks, for a journal; what it raises is ignored.
    """
    self._seconds, self._first = seconds, first_seconds
    self._describe, self._say = describe, say
    self._beats = 0
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

  def __enter__(self) -> "Watchdog":
    if self._seconds:
      self._thread.start()
    return self

  def __exit__(self, *unused) -> None:
    self._over.set()
    if self._thread.is_alive():
      self._thread.join()

  def beat(self) -> None:
    """Says that something happened."""
    self._beats += 1

  def _watch(self) -> None:
    tick = min(self._seconds / _TICKS, 1.0)
    silent, seen, before = 0.0, 0, time.monotonic()
    while not self._over.wait(tick):
      now = time.monotonic()
      silent += min(now - before, 3 * tick)
      before = now
      if self._beats != seen:
        silent, seen = 0.0, self._beats
      if silent >= (self._seconds if seen else self._first):
        self._end(silent)

  def _end(self, silent: float) -> None:
    try:
      last = threading.Timer(_WORDS, os._exit, (AGAIN,))
      last.daemon = True
      last.start()
      try:
        progress = self._describe()
      except Exception as error:
        progress = f"progress unknown ({error!r})"
      text = (f"no step for {silent:,.0f} s (config.guard.hang_after), {progress}; the "
              f"stacks follow, and this process ends with status {AGAIN}: run it again")
      # Not through sys.stderr: the thread that hangs may hold its lock.
      with contextlib.suppress(Exception):
        os.write(2, f"chinchilla train: {text}\n".encode())
        os.write(2, _stacks())
      with contextlib.suppress(Exception):
        self._say(text)
      with contextlib.suppress(Exception):
        sys.stdout.flush()
    finally:
      os._exit(AGAIN)


def _stacks() -> bytes:
  """Of all threads. In memory first: faulthandler would wait for a full pipe with Python locked."""
  memory = hasattr(os, "memfd_create")
  with open(os.memfd_create("stacks"), "w+b") if memory else tempfile.TemporaryFile() as file:
    faulthandler.dump_traceback(file, all_threads=True)
    file.seek(0)
    return file.read()
