"""Ends a process in which nothing happens any more: a hang costs as much as work does."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

from chinchilla_jax.errors import AGAIN

_TICKS = 20  # Looks within the time limit.


class Watchdog:
  """Prints all stacks and ends the process with AGAIN when `beat` has not been called for too long.

  Its own thread watches. It sees a main thread that waits in a collective, in a read, in a lock;
  not one that never gives up Python's interpreter lock.

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
      say: also gets the line that says what happened, for a journal; what it raises is ignored.
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
    text = (f"no step for {silent:,.0f} s (config.guard.hang_after), {self._describe()}; the "
            f"stacks follow, and this process ends with status {AGAIN}: run it again")
    try:
      self._say(text)
      print(f"chinchilla train: {text}", file=sys.stderr, flush=True)
      sys.stdout.flush()
      faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
    finally:
      os._exit(AGAIN)
