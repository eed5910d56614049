"""Objects behind a URL: whole, one by one, by way of fsspec. Every failure is told in one line.

A store of objects has no renaming, no appending, no locks and no folders: names only look as if
they lay in folders. What it has is enough: to put an object under its name whole or not at all,
and to list, so that whoever comes after a put sees it.
"""

import concurrent.futures
import contextlib
import errno
import functools
import importlib.util
import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from chinchilla_jax.errors import UserError

_EXTRAS = {"gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3"),
           "s3a": ("s3fs", "s3")}
_AT_ONCE = 16            # Requests.
_BLOCK = 16 << 20        # Bytes of one request of `blocks`.
_CONNECT, _READ = 6, 60  # Seconds that a connection, and one answer, may take.


class Unreachable(OSError, UserError):
  """An object could not be read or written, and so nothing is known of it. Waiting may help.

  What handles full disks handles it as an OSError; where nothing does, the user gets one line.
  """

  def __str__(self) -> str:
    return f"{self.filename} cannot be reached ({self.strerror}); mend that, and try again"


def scheme(url: str) -> str:
  """"gs" of "gs://bucket/run"; "" of a path."""
  head, mark, _ = url.partition("://")
  return head if mark else ""


@functools.lru_cache(maxsize=64)
def _file_system(name: str) -> Any:
  package, extra = _EXTRAS.get(name, ("fsspec", ""))
  if importlib.util.find_spec(package) is None:
    cure = f'pip install "chinchilla_jax[{extra}]"' if extra else f"pip install {package}"
    raise UserError(f"{name}:// needs the package {package}, which is not installed; {cure}")
  import fsspec
  for logger in ("gcsfs", "s3fs", "fsspec"):  # What fails is told here, in one line.
    logging.getLogger(logger).setLevel(logging.CRITICAL + 1)
  # What others put must be seen: nothing is remembered.
  options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
  if package == "gcsfs":
    import aiohttp
    from gcsfs.core import GCSFileSystem  # What `fsspec` gives asks by gRPC for each bucket's kind.
    return GCSFileSystem(requests_timeout=aiohttp.ClientTimeout(
        sock_connect=_CONNECT, sock_read=_READ), **options)
  if package == "s3fs":
    options["config_kwargs"] = {"connect_timeout": _CONNECT, "read_timeout": _READ,
                                "retries": {"max_attempts": 3, "mode": "standard"}}
  try:
    return fsspec.filesystem(name, **options)
  except (ImportError, ValueError, TypeError) as error:
    raise UserError(f"{name}:// is not understood here ({_line(error)}); use gs://, s3://, or "
                    "install the fsspec package of that scheme") from error


def _of(url: str) -> tuple[Any, str]:
  """(file system, the name that it has for a URL)."""
  system = _file_system(scheme(url))
  return system, system._strip_protocol(url)


def _for_writing(url: str) -> tuple[Any, str]:
  """The same, once the folder is there, where folders are real."""
  system, path = _of(url)
  if scheme(url) not in _EXTRAS:
    with _told(url):
      system.makedirs(system._parent(path), exist_ok=True)
  return system, path


def check(url: str) -> None:
  """Refuses a URL that nothing can lie at, or whose bucket does not answer. Creates nothing.

  Raises:
    UserError: no bucket in it, a package is missing, the bucket is not there, may not be read, or
      cannot be reached.
  """
  bucket = url.partition("://")[2].partition("/")[0]
  if not bucket and scheme(url) != "memory":
    raise UserError(f"{url!r} names no bucket; write {scheme(url)}://BUCKET/FOLDER")
  if "?" in url or "#" in url or "//" in url.partition("://")[2].rstrip("/"):
    raise UserError(f"{url!r} has '?', '#' or an empty name in it; choose plain names")
  try:
    system, path = _of(url)
    with _told(url):
      _ask(system, bucket, path)
  except FileNotFoundError as error:
    raise UserError(f"{url}: there is no bucket {bucket!r}; make it, or choose another "
                    "place") from error


def _ask(system: Any, bucket: str, path: str) -> None:
  """One small listing, which fails where the bucket does not answer."""
  name = _kind(system)
  if name == "gs":
    # Not by `info`: that asks for rights on the bucket that writing objects in it does not need.
    system.call("GET", "b/{}/o", bucket, maxResults=1, prefix=path.partition("/")[2] + "/",
                json_out=True)
  elif name == "s3":
    system.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1,
                   Prefix=path.partition("/")[2] + "/")
  else:
    system.exists(path)


def _kind(system: Any) -> str:
  """"gs", "s3", or "" for any other file system."""
  names = system.protocol if isinstance(system.protocol, (tuple, list)) else (system.protocol,)
  return next((name for name in ("gs", "s3") if name in names), "")


# -------------------------------------------------------------------- One object


def read(url: str) -> bytes:
  """An object's bytes.

  Raises:
    FileNotFoundError: there is none.
    Unreachable: it is not known.
  """
  system, path = _of(url)
  with _told(url):
    return system.cat_file(path)


def modified(url: str) -> float:
  """When an object was put, in seconds since 1970, by the clock of its server."""
  system, path = _of(url)
  with _told(url):
    return system.modified(path).timestamp()


def blocks(url: str, size: int) -> Iterator[bytes]:
  """The first `size` bytes of an object, some at a time."""
  system, path = _of(url)
  for start in range(0, size, _BLOCK):
    with _told(url):
      yield system.cat_file(path, start=start, end=min(size, start + _BLOCK))


def write(url: str, content: bytes) -> None:
  """Puts an object, whole or not at all; one of that name is replaced."""
  system, path = _for_writing(url)
  with _told(url):
    system.pipe_file(path, content)


def delete(url: str) -> None:
  """Removes an object; harmless where there is none."""
  system, path = _of(url)
  with contextlib.suppress(FileNotFoundError), _told(url):
    system.rm_file(path)


def copy(url: str, new: str) -> None:
  """Copies an object inside its bucket; it does not pass through this machine."""
  (system, path), (_, target) = _of(url), _for_writing(new)
  with _told(url):
    system.cp_file(path, target)


def download(url: str, file: pathlib.Path) -> None:
  """Writes an object into a file; its folder must be there."""
  system, path = _of(url)
  with _told(url):
    system.get_file(path, str(file))


def upload(file: pathlib.Path, url: str) -> None:
  """Puts a file's bytes, whole or not at all."""
  system, path = _for_writing(url)
  with _told(url):
    system.put_file(str(file), path)


# -------------------------------------------------------------------- Many


def sizes(url: str) -> dict[str, int]:
  """Bytes of every object below a URL, by the rest of its name; {} where there is none."""
  system, path = _of(url)
  try:
    with _told(url):
      found = system.find(path, detail=True)
  except FileNotFoundError:
    return {}
  start = f"{path.rstrip('/')}/"
  return {name[len(start):]: int(entry["size"]) for name, entry in sorted(found.items())
          if name.startswith(start) and not name.endswith("/")}


def entries(url: str) -> list[tuple[str, bool]]:
  """(name, whether others lie below it) of what is right below a URL, sorted."""
  system, path = _of(url)
  try:
    with _told(url):
      found = system.ls(path, detail=True)
  except FileNotFoundError:
    return []
  start = f"{path.rstrip('/')}/"
  return sorted((name, entry["type"] == "directory") for entry in found
                if (name := entry["name"].rstrip("/")[len(start):])
                and entry["name"].startswith(start))


def delete_all(url: str) -> None:
  """Removes every object below a URL."""
  each(lambda name: delete(f"{url}/{name}"), list(sizes(url)))
  if scheme(url) not in _EXTRAS:
    system, path = _of(url)
    with contextlib.suppress(FileNotFoundError), _told(url):
      system.rm(path, recursive=True)


def each(do: Callable[[Any], Any], things: Sequence[Any]) -> list[Any]:
  """`do` of every thing, several at once; what the first that fails raises."""
  if len(things) < 2:
    return [do(thing) for thing in things]
  with concurrent.futures.ThreadPoolExecutor(min(_AT_ONCE, len(things))) as pool:
    jobs = [pool.submit(do, thing) for thing in things]
    try:
      return [job.result() for job in jobs]
    except BaseException:
      for job in jobs:
        job.cancel()
      raise


# -------------------------------------------------------------------- What went wrong


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
  """Turns what a library raises, of which each has its own kinds, into two that say one line."""
  try:
    yield
  except (FileNotFoundError, NotADirectoryError) as error:
    raise FileNotFoundError(errno.ENOENT, "it is not there", url) from error
  except Exception as error:
    raise Unreachable(errno.EIO, _line(error), url) from error


def _line(error: BaseException) -> str:
  """One line without a secret: URLs may carry signatures in their query."""
  text = " ".join(str(error).split()) or type(error).__name__
  words = (word.partition("?")[0] if "://" in word else word for word in text.split(" "))
  return " ".join(words)[:200]


def names(found: Iterable[tuple[str, bool]], folders: bool) -> list[str]:
  """Of `entries`: the names of folders, or of objects."""
  return [name for name, is_folder in found if is_folder == folders]
