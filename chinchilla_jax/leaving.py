"""Ctrl-C and SIGTERM while there is nothing to save: the process goes at once, with one line.

Python calls a signal's handler between two instructions of the main thread, and the compiler may
keep that thread for minutes. The handler in C, below it, writes the signal's number to a pipe
whatever the main thread does; a thread reads it and ends the process.

  with at_once("train"):   from here on, one signal ends it
    undo(...)              what is to be done before that
    no_longer()            from here on, signals are left to whoever else handles them

The exit status is 128 and the signal's number, as a shell says it: 130 and 143; or, after a
SIGTERM, another that the command asks for.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

INTERRUPTED = "interrupted by {}"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WORDS = 3.0  # Seconds that all that is to be done before may take.

_leaving: "_AtOnce | None" = None


@contextlib.contextmanager
def at_once(command: str, why: str = INTERRUPTED,
            terminated: int = 128 + signal.SIGTERM) -> Iterator[None]:
  """Signals end the process from here to the end of the block, or to `no_longer`.

  Outside the main thread, where Python allows no handlers, it does nothing.

  Args:
    command: of the command line, for the one line on stderr.
    why: what the line says, {} for the signal.
    terminated: the exit status after a SIGTERM.
  """
  global _leaving
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  _leaving = _AtOnce(command, why, terminated)
  try:
    yield
  finally:
    no_longer()
    _leaving.restore()
    _leaving = None


def undo(do: Callable[[int], object]) -> None:
  """Has `do(signal)` called before the process goes, the last first; what it raises is ignored.

  It is called from another thread, in the middle of whatever the main thread does.
  """
  if _leaving is not None:
    _leaving.undo.append(do)


def no_longer() -> None:
  """From now on there is something to save."""
  if _leaving is not None:
    _leaving.stop()


@contextlib.contextmanager
def by_exception(command: str) -> Iterator[None]:
  """In this block a signal raises SystemExit in the main thread, where it waits for a process.

  The line is said, and the status is that of `at_once`; what has to be ended first can be.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def handle(number, frame):
    _say(command, INTERRUPTED, number)
    raise SystemExit(128 + number)

  with _leaving.held() if _leaving is not None else contextlib.nullcontext():
    old = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
      yield
    finally:
      for number, handler in old.items():
        signal.signal(number, handler)


class _AtOnce:
  """The thread, the pipe and the handlers."""

  def __init__(self, command: str, why: str, terminated: int):
    self.undo: list[Callable[[int], object]] = []
    self._command, self._why, self._terminated = command, why, terminated
    self._lock = threading.RLock()  # Held while the process goes, and while it must not.
    self._active, self._held = True, False
    read, write = os.pipe()
    os.set_blocking(write, False)  # A handler may not wait.
    self._pipe = read, write
    self._old = {number: signal.signal(number, self._handle) for number in SIGNALS}
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=self._watch, name="leave", daemon=True).start()

  def stop(self) -> None:
    with self._lock:
      if self._active:
        self._active = False
        signal.set_wakeup_fd(-1)
        os.close(self._pipe[1])  # The thread ends with it.

  def restore(self) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  @contextlib.contextmanager
  def held(self) -> Iterator[None]:
    """What comes in this block is for other handlers."""
    with self._lock:
      active, self._active = self._active, False
      self._held = active
      if active:
        signal.set_wakeup_fd(-1)
    try:
      yield
    finally:
      with self._lock:
        self._active, self._held = active, False
        if active:
          signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)

  def _handle(self, number, frame) -> None:
    """Only that there is a handler makes the one in C write; after `stop`, what Python would do."""
    if self._active:
      return
    if number == signal.SIGINT:
      raise KeyboardInterrupt
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)

  def _watch(self) -> None:
    read, _ = self._pipe
    while number := os.read(read, 1):
      with self._lock:
        if self._active and number[0] in SIGNALS:
          self._go(number[0])
        elif self._held:  # It came right before that.
          os.kill(os.getpid(), number[0])
    os.close(read)

  def _go(self, number: int) -> None:
    status = self._terminated if number == signal.SIGTERM else 128 + number
    last = threading.Timer(_WORDS, os._exit, (status,))
    last.daemon = True
    last.start()
    for do in reversed(self.undo):
      with contextlib.suppress(Exception):
        do(number)
    _say(self._command, self._why, number)
    with contextlib.suppress(Exception):
      sys.stdout.flush()
    os._exit(status)


def _say(command: str, why: str, number: int) -> None:
  # A terminal has shown ^C in the line. Not through sys.stderr, whose lock somebody may hold.
  line = f"chinchilla {command}: {why.format(signal.Signals(number).name)}\n"
  with contextlib.suppress(OSError):
    os.write(2, ("\n" * os.isatty(2) + line).encode())
