"""Files that a power cut leaves whole: the old one or the new one, never half of it."""

import os
import pathlib

from chinchilla_jax.storage import objects
from chinchilla_jax.storage.paths import Place, Remote


def write(path: Place, text: str, suffix: str = ".partial") -> None:
  """Writes a sibling, flushes it to disk, and renames it over `path`; in a bucket, puts an object.

  Args:
    path: of the file.
    text: what it is to hold.
    suffix: of the sibling's name; where several processes may write, one of its own for each.

  Raises:
    OSError: `path` is then as it was, and no sibling is left.
  """
  if isinstance(path, Remote):
    objects.write(path.url, text.encode())
    return
  partial = path.with_name(path.name + suffix)
  try:
    with open(partial, "w") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    partial.replace(path)
  except OSError:
    partial.unlink(missing_ok=True)
    raise
  sync_folder(path.parent)


def rename(path: pathlib.Path, new: pathlib.Path) -> None:
  """Renames a folder, for good: after a power cut too it has the new name."""
  path.rename(new)
  sync_folder(new.parent)


def sync_folder(folder: pathlib.Path) -> None:
  """Makes what was created or renamed in a folder last, where the file system can."""
  try:
    descriptor = os.open(folder, os.O_RDONLY)
  except OSError:
    return
  try:
    os.fsync(descriptor)
  except OSError:
    pass
  finally:
    os.close(descriptor)
