"""Logs that grow, line by line: a file on a disk; in a bucket, numbered objects.

  metrics.jsonl                 on a disk: appended to
  metrics.jsonl.parts/00000001  in a bucket: replaced by a longer one until it has a megabyte; then
                                comes the next number

A bucket appends to nothing, and to put a log of 200 MB anew for every line would not do. A put that
is repeated, since its answer was lost, puts the same lines: none is doubled. A log may have
both, where a run was copied: the parts are then the older lines on a disk, the newer in a bucket.
"""

import contextlib
import os
import pathlib
import threading
import time
from collections.abc import Iterator

from chinchilla_jax.storage import objects
from chinchilla_jax.storage.paths import Place, Remote

PARTS = ".parts"
_PART = 1 << 20  # Bytes from which on a part is left as it is.
_LATE = 60.0     # Seconds after which lines that nobody asked to flush are put, for readers.


def pieces(path: Place) -> list[Place]:
  """The files or objects that a log is made of, oldest first; [] where there is none."""
  folder = path.with_name(path.name + PARTS)
  if isinstance(path, Remote):
    numbers = objects.names(objects.entries(folder.url), folders=False)
    # What `fold` was cut off at stands in both.
    plain = [path] if f"{0:08d}" not in numbers and path.is_file() else []
    return plain + [folder / name for name in numbers]
  numbers = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
  return [folder / name for name in numbers] + [path] * os.path.isfile(path)


def lines(path: Place) -> Iterator[bytes]:
  """Every line of a log, the last one perhaps cut short by a crash.

  Raises:
    OSError: it cannot be read.
  """
  for piece in pieces(path):
    yield from lines_of(piece)


def lines_of(piece: Place) -> Iterator[bytes]:
  """Every line of one of the `pieces`."""
  if isinstance(piece, Remote):
    yield from piece.read_bytes().splitlines(keepends=True)
  else:
    with open(piece, "rb") as file:
      yield from file


def changed(path: Place) -> float | None:
  """When a log was last written, in seconds since 1970; None where there is none."""
  found = pieces(path)
  if not found:
    return None
  if isinstance(path, Remote):
    return objects.modified(found[-1].url)
  return found[-1].stat().st_mtime


def fold(path: Place) -> None:
  """Makes a log that was copied into a bucket as one object the first of its parts there."""
  if isinstance(path, Remote) and path.is_file():
    first = path.with_name(path.name + PARTS) / f"{0:08d}"
    objects.copy(path.url, first.url)
    path.unlink()


class File:
  """A log on a disk. While the disk is full, lines wait, and none is lost or written twice."""

  def __init__(self, path: pathlib.Path):
    self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    self._waiting = b""

  def write(self, line: bytes) -> None:
    self._waiting += line
    with contextlib.suppress(OSError):  # `flush` tells.
      self._push()

  def flush(self) -> None:
    """Returns when every line is on disk.

    Raises:
      OSError: the disk took no more; what it did not take still waits.
    """
    self._push()
    os.fsync(self._file)

  def close(self) -> None:
    with contextlib.suppress(OSError):
      self.flush()
    os.close(self._file)

  def _push(self) -> None:
    while self._waiting:
      self._waiting = self._waiting[os.write(self._file, self._waiting):]


class Parts:
  """A log in a bucket. Lines wait until `flush`, or a minute; several threads may write."""

  def __init__(self, path: Remote):
    fold(path)
    self._folder = path.with_name(path.name + PARTS)
    names = objects.names(objects.entries(self._folder.url), folders=False)
    self._number = 1 + max((int(name) for name in names if name.isdecimal()), default=0)
    self._part = self._waiting = b""
    self._put, self._lock = threading.Lock(), threading.Lock()
    self._last, self._late = time.monotonic(), None

  def write(self, line: bytes) -> None:
    with self._lock:
      self._waiting += line
    if time.monotonic() - self._last > _LATE and not (self._late and self._late.is_alive()):
      self._last = time.monotonic()
      self._late = threading.Thread(target=self._try, name="log", daemon=True)
      self._late.start()

  def flush(self) -> None:
    """Returns when every line is in the bucket.

    Raises:
      OSError: they could not be put, and wait.
    """
    with self._put:
      with self._lock:
        lines = self._waiting
      self._last = time.monotonic()
      if not lines:
        return
      objects.write((self._folder / f"{self._number:08d}").url, self._part + lines)
      self._part += lines
      with self._lock:
        self._waiting = self._waiting[len(lines):]
      if len(self._part) >= _PART:
        self._number, self._part = self._number + 1, b""

  def close(self) -> None:
    self._try()

  def write_now(self, line: bytes, patience: float) -> None:
    """Puts a line, and waits for that no longer than so many seconds. It goes with a later one
    where it could not be put."""
    self.write(line)
    thread = threading.Thread(target=self._try, name="log", daemon=True)
    thread.start()
    thread.join(patience)

  def _try(self) -> None:
    with contextlib.suppress(OSError):
      self.flush()


def appending(path: Place) -> File | Parts:
  """Something with `write(line)`, `flush()` and `close()` that adds to a log."""
  return Parts(path) if isinstance(path, Remote) else File(path)
