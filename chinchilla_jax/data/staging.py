"""A directory that appears whole or not at all.

It is made as a hidden sibling, `.NAME.preparing`, and renamed at the end. Whatever kills the
process, nothing is left under the final name; leftovers of a killed process are removed by the
next one. A lock tells leftovers from the work of a process that is alive.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator

from chinchilla_jax.errors import UserError

try:
  import fcntl
except ImportError:  # Windows: no lock, so do not prepare one store twice at once
  fcntl = None

_LOCK = ".lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def staging_path(path: str) -> str:
  """Where the directory `path` is made before it gets its name; beside the target of a link."""
  parent, name = os.path.split(os.path.realpath(path))
  return os.path.join(parent, f".{name}.preparing")


def _old_path(path: str) -> str:
  parent, name = os.path.split(os.path.realpath(path))
  return os.path.join(parent, f".{name}.old")


def recover(path: str):
  """Completes or undoes what a killed process left of a replacement of `path`."""
  old = _old_path(path)
  if os.path.isdir(old):
    if os.path.exists(path):
      shutil.rmtree(old)
    else:
      os.rename(old, path)


@contextlib.contextmanager
def staged(path: str) -> Iterator[str]:
  """Yields an empty directory that becomes `path` when the block ends without an exception.

  A directory at `path` is replaced; it stays in place until the new one is complete.

  Raises:
    UserError: another process is making the same directory, or the place cannot be written.
  """
  path = os.path.realpath(path)
  tmp = staging_path(path)
  missing = _missing(os.path.dirname(tmp))
  try:
    os.makedirs(tmp, exist_ok=True)
    lock = open(os.path.join(tmp, _LOCK), "w")
  except OSError as error:
    _remove_empty(missing)
    raise UserError(f"cannot write {path} ({error.strerror}): choose another place with "
                    f"--config.data.store") from error
  with lock:
    _lock(lock, path)
    try:
      _clear(tmp)
      yield tmp
      recover(path)
      os.unlink(os.path.join(tmp, _LOCK))
      if os.path.isdir(path):
        os.rename(path, _old_path(path))
      os.rename(tmp, path)
      recover(path)
    except BaseException as error:  # also KeyboardInterrupt: nothing may stay behind
      shutil.rmtree(tmp, ignore_errors=True)
      recover(path)
      _remove_empty(missing)
      if isinstance(error, OSError) and error.errno in _FULL:
        raise UserError(f"no space left to write {path} ({error.strerror}): free some, or choose "
                        f"another place with --config.data.store") from error
      raise


def _missing(folder: str) -> list[str]:
  """The folders that would have to be made for this one, innermost first."""
  missing = []
  while not os.path.lexists(folder):
    missing.append(folder)
    folder = os.path.dirname(folder)
  return missing


def _remove_empty(folders: list[str]):
  with contextlib.suppress(OSError):  # somebody else has put something there, or never made
    for folder in folders:
      if os.path.isdir(folder):
        os.rmdir(folder)


def _lock(file, path: str):
  if fcntl is None:
    return
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise UserError(f"another process is preparing {path}: wait for it, or choose another place "
                    f"with --config.data.store") from error
  except OSError:  # a file system without locks: go on without
    pass


def _clear(folder: str):
  for name in os.listdir(folder):
    if name != _LOCK:
      entry = os.path.join(folder, name)
      if os.path.isdir(entry):
        shutil.rmtree(entry)
      else:
        os.unlink(entry)
