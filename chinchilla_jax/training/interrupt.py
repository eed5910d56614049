"""A request from outside to stop: Ctrl-C, or the SIGTERM that comes before a machine is taken."""

import signal
import threading


class Interrupt:
  """Turns the first Ctrl-C or SIGTERM into a request that the loop answers between steps.

  A second Ctrl-C ends the process at once. Outside the main thread, where Python allows no
  handlers, it does nothing.
  """

  def __init__(self):
    self.signal: signal.Signals | None = None

  def __enter__(self) -> "Interrupt":
    self._old = {}
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM):
        self._old[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *unused) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _handle(self, number, frame) -> None:
    del frame
    # A second SIGTERM says nothing new: schedulers send it to every process that they see.
    if self.signal is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.signal = signal.Signals(number)
