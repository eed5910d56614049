"""One process on a run's folder: a lock of the kernel, or a lease where there is none.

The kernel's lock goes with its process, however that ends. Buckets, and file systems without locks
(some network disks), get a lease instead: a file that its holder renews all the time, and that
others may take over once it has stood still for as long as it is good. They measure that by their
own clock, so no two clocks have to agree.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from chinchilla_jax.errors import UserError
from chinchilla_jax.storage.paths import Place, Remote
from chinchilla_jax.training import durable

FILE, LEASE = ".lock", "lease.json"
SECONDS = 60.0  # That a lease is good for.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_LATE = "nobody: it could not be renewed in time"
_OTHER = "wait for it, stop it, or choose another --workdir"


class KernelLock:
  """Held until it is released or its process is gone. `folder` must be there.

  Raises:
    UserError: another process holds it; says which.
    OSError: with an errno of `_NO_LOCKS`: this file system has no locks.
  """

  def __init__(self, folder: pathlib.Path):
    self._path = folder / FILE
    # Python's descriptors are not inherited by the programs that it starts; by forks they are.
    self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      os.ftruncate(self._file, 0)
      os.pwrite(self._file, json.dumps(_me()).encode(), 0)
    except BlockingIOError:
      owner = _who(os.pread(self._file, 4096, 0))
      self.release()
      raise UserError(f"--workdir: {folder} is in use by {owner}; {_OTHER} (the kernel says that "
                      "it lives, so --force does not help)") from None
    except OSError:
      self.release()
      raise
    os.register_at_fork(after_in_child=self.release)  # The parent keeps it: it has its own.

  def check(self) -> None:
    """Nobody takes this lock from a process that lives."""

  def confirm(self) -> None:
    """It is held."""

  def release(self) -> None:
    file, self._file = self._file, -1
    if file >= 0:
      os.close(file)  # The file stays: removing it would let two processes lock two files.


class Lease:
  """Held as long as it is renewed, which a thread of its own does.

  Args:
    folder: must be there.
    force: take it over at once, whoever holds it.
    seconds: that it is good for without being renewed; `SECONDS` by default.

  Raises:
    UserError: another process holds it, and renews it; says which.
  """

  def __init__(self, folder: Place, force: bool = False, seconds: float | None = None):
    seconds = SECONDS if seconds is None else seconds
    self._path, self._seconds = folder / LEASE, seconds
    self._id, self._count = uuid.uuid4().hex, 0
    self._lost = ""  # To whom.
    # A bucket that is out of reach for a while is no reason to end a run: see `confirm`.
    self._patient, self._taking = isinstance(folder, Remote), threading.Lock()
    held = self._read()
    if held and not force:
      print(f"note: {folder} was last used by {_who(held)}; looking for {seconds:g} s whether it "
            "still is", flush=True)
      end = time.monotonic() + seconds
      while (now := self._read()) == held and time.monotonic() < end:
        time.sleep(seconds / 20)
      if now and now != held:
        raise UserError(f"--workdir: {folder} is in use by {_who(now)}; {_OTHER}, or take it over "
                        "with --force")
    self._renewed = time.monotonic()
    self._write()
    # Of several that write at once, the last one has it: all look again when all have written.
    time.sleep(seconds / 10)
    if self._owner() != self._id:
      raise UserError(f"--workdir: {folder} was taken by {_who(self._read())} at the same moment; "
                      f"{_OTHER}")
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
    self._thread.start()

  def check(self) -> None:
    """Call it before anything is written that another holder may not see changed.

    Raises:
      UserError: the lease has been taken over, or could not be renewed.
    """
    # Its age comes first: it needs no file system, and after a sleep this may run before `_renew`.
    if not self._lost and not self._good() and not self._patient:
      self._lost = _LATE
    if not self._lost and self._owner() not in (self._id, None):
      self._lost = _who(self._read())
    if self._lost:
      raise UserError(f"the lease on {self._path.parent} was lost to {self._lost}; this process "
                      "stops, its checkpoints stand")

  def confirm(self) -> None:
    """Call it right before anything is written for others to see; after `check`.

    Raises:
      OSError: it is not known whether another process has taken the lease over meanwhile.
    """
    if not self._good():
      self._retake()
    if not self._good():
      raise OSError(errno.EIO, "the lease could not be renewed in time", str(self._path))

  def release(self) -> None:
    self._over.set()
    self._thread.join()
    if not self._lost and self._owner() == self._id:
      with contextlib.suppress(OSError):
        self._path.unlink()

  def _good(self) -> bool:
    return time.monotonic() - self._renewed < self._seconds

  def _renew(self) -> None:
    while not self._over.wait(self._seconds / 3) and not self._lost:
      try:
        if self._owner() not in (self._id, None):
          self._lost = _who(self._read())
          return
        # A process that was stopped for longer may find it free, but must not take it back.
        if not self._good() and self._patient:
          self._retake()
        elif self._good():
          started = time.monotonic()
          self._write()
          if self._good():
            self._renewed = started  # Others may have seen it from then on.
          elif not self._patient and self._owner() == self._id:
            self._path.unlink()  # That was too late: whoever has it by now writes it again.
      except OSError:
        pass
      if not self._good() and not self._patient:
        self._lost = self._lost or _LATE

  def _retake(self) -> None:
    """Renews a lease that has run out, where the file is still this one's: nobody can have held it
    meanwhile. As at the start, of several that write now, the last one has it."""
    with self._taking:
      if self._good() or self._lost:
        return
      found = self._read()
      if _id_of(found) != self._id:
        self._lost = _who(found)
        return
      started = time.monotonic()
      self._write()
      time.sleep(self._seconds / 10)
      if self._owner() == self._id:
        self._renewed = started
      elif self._owner() is not None:
        self._lost = _who(self._read())

  def _write(self) -> None:
    self._count += 1
    durable.write(self._path, json.dumps(_me() | {"id": self._id, "renewals": self._count}),
                  suffix=f".{self._id}")

  def _read(self) -> bytes:
    try:
      return self._path.read_bytes()
    except FileNotFoundError:
      return b""

  def _owner(self) -> str | None:
    """The id in the file; None if there is none to be read."""
    try:
      return _id_of(self._read())
    except OSError:
      return None


@contextlib.contextmanager
def held(folder: Place, force: bool = False) -> Iterator[KernelLock | Lease]:
  """Holds a folder, which must be there, for this process.

  Args:
    folder: of a run.
    force: take over a lease at once; of a kernel's lock it changes nothing.

  Yields:
    Something with `check()` and `confirm()`, to be called before every save.

  Raises:
    UserError: another process holds it, or nothing can be written there.
  """
  try:
    lock: KernelLock | Lease
    if isinstance(folder, Remote):
      lock = Lease(folder, force)
    else:
      try:
        lock = KernelLock(folder)
      except OSError as error:
        if error.errno not in _NO_LOCKS:
          raise
        lock = Lease(folder, force)
  except OSError as error:
    raise UserError(f"--workdir: {folder} cannot be written ({error.strerror}); choose another "
                    "place") from error
  try:
    yield lock
  finally:
    lock.release()


def _id_of(content: bytes) -> str | None:
  try:
    return json.loads(content)["id"]
  except (ValueError, KeyError, TypeError):
    return None


def _me() -> dict[str, Any]:
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  return {"host": socket.gethostname(), "pid": os.getpid(), "since": now}


def _who(content: bytes) -> str:
  try:
    found = json.loads(content)
    return f"process {found['pid']} on {found['host']} (since {found['since']})"
  except (ValueError, KeyError, TypeError):
    return "another process"
