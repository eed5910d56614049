"""Token stores in buckets. ArrayRecord reads local files best, so a store is copied here once.

  CACHE/stores/FINGERPRINT/           the whole store; a folder with its name is complete
  CACHE/stores/.FINGERPRINT.partial/  what has been copied so far; a file with its name is whole
  CACHE/stores/.FINGERPRINT.lock      held by the process that copies

Every file is compared with the ledger before it gets its name, so a copy that was cut off goes on
with the file that it was at. The fingerprint is of the ids, not of the files: the same store under
another name, or prepared anew with the same outcome, is not copied again.
"""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator

from chinchilla_jax.data import ledger as ledgers
from chinchilla_jax.errors import UserError
from chinchilla_jax.storage import objects, paths

try:
  import fcntl
except ImportError:  # Windows: no lock, so do not copy one store twice at once.
  fcntl = None

PREPARING = ".preparing"  # An object: what lies beside it was put by a `prepare` that was cut off.
_AT_ONCE = 4              # Files that are copied at the same time, each of up to 256 MB.


def here(url: str, verify: str = "sizes") -> str:
  """The folder on this machine with a copy of the store at a URL; copies it where there is none.

  Args:
    url: of the store.
    verify: how a copy that is there already is checked; see `ledger.verify`.

  Raises:
    UserError: no store there, it is damaged, or it cannot be reached; or no room here.
  """
  url = url.rstrip("/")
  ledger = ledgers.read(url)
  stores = paths.cache() / "stores"
  folder = stores / ledger["fingerprint"]
  try:
    stores.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(stores / f".{folder.name}.lock", url):
      if folder.is_dir() and (problem := _problem(folder, verify)):
        print(f"note: the copy of {url} on this machine is damaged ({problem}); copying it again",
              flush=True)
        shutil.rmtree(folder)
      if not folder.is_dir():
        _copy(url, ledger, stores / f".{folder.name}.partial", folder)
  except objects.Unreachable:
    raise
  except OSError as error:
    raise UserError(f"{folder} cannot be written ({error.strerror}); make room for {url}, or say "
                    f"with {paths.CACHE} where there is some") from error
  return str(folder)


def _problem(folder: pathlib.Path, verify: str) -> str:
  """What is wrong with a copy, by its own ledger; "" if nothing is."""
  try:
    ledgers.verify(str(folder), ledgers.read(str(folder)), verify)
  except UserError as error:
    return str(error).partition(":")[0]
  return ""


def _copy(url: str, ledger: dict, partial: pathlib.Path, folder: pathlib.Path) -> None:
  entries = ledgers.files(ledger)
  total = sum(entry["bytes"] for entry in entries)
  partial.mkdir(exist_ok=True)
  left = sum(entry["bytes"] for entry in entries if not _is_whole(partial / entry["name"], entry))
  room = shutil.disk_usage(partial).free
  if left > room:
    raise UserError(f"{url} needs {left / 1e9:,.1f} GB here and {partial.parent} has "
                    f"{room / 1e9:,.1f} GB; make room, or say with {paths.CACHE} where there is "
                    "some")
  print(f"copying {url} to this machine, {total / 1e6:,.1f} MB ...", flush=True)
  for start in range(0, len(entries), _AT_ONCE):
    objects.each(lambda entry: _copy_file(url, entry, partial), entries[start:start + _AT_ONCE])
  ledgers.write(str(partial), ledger)
  partial.rename(folder)


def _copy_file(url: str, entry: dict, partial: pathlib.Path) -> None:
  target, source = partial / entry["name"], f"{url}/{entry['name']}"
  if _is_whole(target, entry):
    return
  coming = target.with_name(f"{target.name}.coming")
  try:
    objects.download(source, coming)
  except FileNotFoundError as error:
    raise UserError(f"{source} is missing: put the store there again, or run `chinchilla prepare` "
                    "with --overwrite") from error
  found = ledgers.describe_file(str(coming))
  if (found["bytes"], found["sha256"]) != (entry["bytes"], entry["sha256"]):
    coming.unlink()
    raise UserError(f"{source} has changed (its checksum is not the ledger's): put the store there "
                    "again, or run `chinchilla prepare` with --overwrite")
  coming.rename(target)


def _is_whole(path: pathlib.Path, entry: dict) -> bool:
  return (path.is_file() and path.stat().st_size == entry["bytes"]
          and ledgers.sha256(str(path)) == entry["sha256"])


@contextlib.contextmanager
def _one_at_a_time(lock: pathlib.Path, url: str) -> Iterator[None]:
  """Waits until no other process on this machine copies the same store."""
  with open(lock, "w") as file:
    try:
      if fcntl is None:
        raise OSError
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        print(f"waiting for another process that copies {url} ...", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # A file system without locks: files get their names one by one, whole.
      pass
    yield


# -------------------------------------------------------------------- Putting one there


def refuse_foreign(url: str) -> None:
  """Refuses a place where something else lies than a store."""
  names = paths.names(paths.Remote(url))
  if names and ledgers.FILE not in names and PREPARING not in names:
    raise UserError(f"{url} holds objects but no token store: choose another --config.data.store, "
                    "or empty it yourself")


def exists(url: str) -> bool:
  """Whether there is a store; its ledger is put last."""
  return ledgers.FILE in paths.names(paths.Remote(url))


def check_sizes(url: str, ledger: dict) -> None:
  """Compares the sizes of a store's objects with its ledger. One listing.

  Raises:
    UserError: names the first object that is missing or has another size.
  """
  found = objects.sizes(url)
  for entry in ledgers.files(ledger):
    if (size := found.get(entry["name"], 0)) != entry["bytes"]:
      raise UserError(f"{url}/{entry['name']} has {size:,} bytes, its ledger says "
                      f"{entry['bytes']:,}: run `chinchilla prepare` with --overwrite")


def put(folder: str, ledger: dict, url: str) -> None:
  """Puts a store, its ledger last: cut off anywhere, there is the old store, none, or the new one.

  Raises:
    Unreachable: some of it could not be put; the next `prepare` begins anew.
  """
  objects.write(f"{url}/{PREPARING}", b"")
  objects.delete(f"{url}/{ledgers.FILE}")
  old = objects.sizes(url)
  names = [entry["name"] for entry in ledgers.files(ledger)]
  objects.each(lambda name: objects.upload(pathlib.Path(folder, name), f"{url}/{name}"), names)
  check_sizes(url, ledger)
  objects.each(lambda name: objects.delete(f"{url}/{name}"),
               [name for name in old if name not in (*names, PREPARING)])
  objects.upload(pathlib.Path(folder, ledgers.FILE), f"{url}/{ledgers.FILE}")
  objects.delete(f"{url}/{PREPARING}")
