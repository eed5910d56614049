"""What may go wrong while a run goes on: a signal, or numbers that are no numbers."""

import signal
import threading

from chinchilla_jax.errors import UserError


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
    if self.signal is not None:
      raise KeyboardInterrupt
    self.signal = signal.Signals(number)


def stop_if_nonfinite(metrics: dict[str, float], limit: int, step: int, cursor: int,
                      sequences: int, seed: int) -> None:
  """Stops a run whose updates have been skipped `limit` times in a row.

  Args:
    metrics: of step `step`, with `nonfinite_run`.
    limit: skipped updates in a row that are too many.
    step: steps taken, this one included.
    cursor: index of the first sequence of the first skipped batch.
    sequences: of that batch.
    seed: of the data order.

  Raises:
    UserError: says where the first of them came from.
  """
  run = int(metrics["nonfinite_run"])
  if run >= limit:
    raise UserError(
        f"loss or gradient was not finite in {run} steps in a row up to step {step}; the first "
        f"batch was sequences {cursor} to {cursor + sequences - 1} of seed {seed}; lower "
        "config.optimizer.peak_lr, or look at that batch")
