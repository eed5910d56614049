"""Paths of both kinds: pathlib's on disks, `Remote` in buckets; and what is kept of those here.

A `Remote` has the few methods of pathlib that reading a run needs, under the same names. It is no
`os.PathLike`: what would open it as a local file fails, and does not look for "gs:" on the disk.
"""

import dataclasses
import os
import pathlib
import shutil
import socket
import tempfile

from chinchilla_jax.errors import UserError
from chinchilla_jax.storage import objects

CACHE = "CHINCHILLA_CACHE"  # The environment variable that says where `cache` is.


@dataclasses.dataclass(frozen=True)
class Remote:
  """An object, or what lies below a name, as a URL without a slash at its end.

  Reading raises FileNotFoundError where nothing is, and OSError where it is not known.
  """

  url: str

  def __str__(self) -> str:
    return self.url

  def __truediv__(self, name: str) -> "Remote":
    return Remote(f"{self.url}/{name}")

  @property
  def name(self) -> str:
    return self.url.rpartition("/")[2]

  @property
  def parent(self) -> "Remote":
    return Remote(self.url.rpartition("/")[0])

  def with_name(self, name: str) -> "Remote":
    return self.parent / name

  def is_file(self) -> bool:
    return any(name == self.name and not folder
               for name, folder in objects.entries(self.parent.url))

  def is_dir(self) -> bool:
    return bool(objects.entries(self.url))

  def exists(self) -> bool:
    return self.is_dir() or self.is_file()

  def read_bytes(self) -> bytes:
    return objects.read(self.url)

  def read_text(self) -> str:
    return self.read_bytes().decode()

  def unlink(self, missing_ok: bool = True) -> None:
    objects.delete(self.url)


Place = pathlib.Path | Remote


def is_remote(path: str | os.PathLike | Remote) -> bool:
  """Whether a path is a URL."""
  return "://" in str(path)


def at(path: str | os.PathLike | Remote) -> Place:
  """The path that a user wrote.

  Raises:
    UserError: it is remote, and nothing there answers; see `objects.check`.
  """
  if isinstance(path, Remote):
    return path
  text = str(path)
  if not is_remote(text):
    return pathlib.Path(path)
  if text.startswith("file://"):
    return pathlib.Path(text.removeprefix("file://"))
  url = text.rstrip("/")
  objects.check(url)
  return Remote(url)


def is_file(path: Place) -> bool:
  """Unlike pathlib's, it takes a name that is too long."""
  return path.is_file() if isinstance(path, Remote) else os.path.isfile(path)


def names(folder: Place) -> list[str]:
  """What is right in a folder, sorted; [] where there is none."""
  if isinstance(folder, Remote):
    return [name for name, _ in objects.entries(folder.url)]
  return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def sizes(folder: Place) -> dict[str, int]:
  """Bytes of every file below a folder, by its name in there; one that vanishes is left out."""
  if isinstance(folder, Remote):
    return objects.sizes(folder.url)
  found = {}
  for root, _, files in os.walk(folder):
    for name in files:
      path = os.path.join(root, name)
      try:
        found[os.path.relpath(path, folder).replace(os.sep, "/")] = os.stat(path).st_size
      except OSError:
        pass
  return found


# -------------------------------------------------------------------- On this machine


def cache() -> pathlib.Path:
  """Where this machine keeps what it has read from buckets; made when something is put there."""
  if given := os.environ.get(CACHE):
    return pathlib.Path(given).expanduser()
  base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(base).expanduser() / "chinchilla_jax"


class Scratch:
  """A folder for as long as this process needs it; what processes that are gone left is removed.

  Raises:
    UserError: it cannot be made.
  """

  def __init__(self):
    folder, here = cache() / "scratch", f"{socket.gethostname()}-"
    try:
      folder.mkdir(parents=True, exist_ok=True)
      for entry in folder.iterdir():
        pid, _, rest = entry.name.partition("@")
        if rest.startswith(here) and not _alive(pid):  # Other machines may share the folder.
          shutil.rmtree(entry, ignore_errors=True)
      self.path = pathlib.Path(tempfile.mkdtemp(prefix=f"{os.getpid()}@{here}", dir=folder))
    except OSError as error:
      raise UserError(f"{folder} cannot be written ({error.strerror}); say with {CACHE} where this "
                      "machine has room for a checkpoint") from error

  def __enter__(self) -> pathlib.Path:
    return self.path

  def __exit__(self, *unused) -> None:
    self.remove()

  def remove(self) -> None:
    shutil.rmtree(self.path, ignore_errors=True)


def _alive(pid: str) -> bool:
  """Whether there is such a process; also if that cannot be known."""
  try:
    os.kill(int(pid), 0)
  except ProcessLookupError:
    return False
  except (ValueError, OverflowError, OSError):
    pass
  return True
