"""How far along: a live bar on a terminal, a plain line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_LINE_EVERY = 30  # seconds between plain lines


class Progress:
  """Reports stages that are measured in bytes, on standard error."""

  def __init__(self, quiet: bool = False):
    self._quiet = quiet

  def say(self, line: str):
    if not self._quiet:
      print(line, file=sys.stderr, flush=True)

  @contextlib.contextmanager
  def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n_bytes)`.

    Args:
      total: bytes of the whole stage, where known.
    """
    if self._quiet:
      yield lambda n_bytes: None
    elif sys.stderr.isatty():
      with _bar(name, total) as advance:
        yield advance
    else:
      with self._lines(name, total) as advance:
        yield advance

  @contextlib.contextmanager
  def _lines(self, name: str, total: int | None) -> Iterator[Callable[[int], None]]:
    start = last = time.monotonic()
    done = 0

    def advance(n_bytes: int):
      nonlocal done, last
      done += n_bytes
      now = time.monotonic()
      if now - last >= _LINE_EVERY:
        last = now
        of = f" of {total / 1e6:,.0f}" if total else ""
        self.say(f"{name}: {done / 1e6:,.0f}{of} MB, {done / 1e6 / (now - start):.1f} MB/s")

    self.say(f"{name} ...")
    yield advance


@contextlib.contextmanager
def _bar(name: str, total: int | None) -> Iterator[Callable[[int], None]]:
  from rich import console, progress
  columns = (progress.TextColumn("{task.description}"), progress.BarColumn(),
             progress.DownloadColumn(), progress.TransferSpeedColumn(),
             progress.TimeRemainingColumn())
  with progress.Progress(*columns, console=console.Console(stderr=True), transient=True) as bar:
    task = bar.add_task(name, total=total)
    yield lambda n_bytes: bar.advance(task, n_bytes)
