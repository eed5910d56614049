"""The ledger of a token store: what is in it, and the checksums that prove it.

`ledger.json` is written last, so a directory without one is not a store. Its fingerprint covers
what a run computes from (ids, their counts, the tokenizer), and nothing of the machine, the time
or the file layout: the same corpus prepared elsewhere has the same fingerprint.
"""

import concurrent.futures
import difflib
import glob
import hashlib
import json
import os

from chinchilla_jax.data import staging
from chinchilla_jax.errors import UserError

FILE = "ledger.json"
VERSION = 1
FULL_CHECK_BYTES = 4 * 10**9  # verify="auto" reads every byte of stores up to this size


def fingerprint(ledger: dict) -> str:
  """SHA-256, in hex, of the part of a ledger that a training run depends on."""
  identity = {
      "version": ledger["version"],
      "vocab_size": ledger["vocab_size"],
      "bos_id": ledger["bos_id"],
      "pad_id": ledger["pad_id"],
      "tokenizer": ledger["tokenizer"],
      "splits": {name: {key: split[key] for key in ("documents", "tokens", "bytes", "sha256")}
                 for name, split in ledger["splits"].items()},
  }
  return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def refuse_remote(folder: str):
  """ArrayRecord reads local files only, and would wait for ever on some remote ones."""
  if "://" in folder:
    raise UserError(f"{folder} is remote: keep the token store on a local disk (copy it, and point "
                    f"--config.data.store there)")


def write(folder: str, ledger: dict):
  with open(os.path.join(folder, FILE), "w", encoding="utf-8") as file:
    json.dump(ledger, file, indent=2, sort_keys=True)
    file.write("\n")


def read(folder: str) -> dict:
  """The ledger of a store.

  Raises:
    UserError: no store there, or its ledger is damaged or of a newer version.
  """
  refuse_remote(folder)
  path = os.path.join(folder, FILE)
  try:
    with open(path, "rb") as file:
      ledger = json.load(file)
    if ledger["version"] > VERSION:
      raise UserError(f"{folder} has ledger version {ledger['version']}, this program knows "
                      f"{VERSION}: update chinchilla_jax")
    if ledger["fingerprint"] != fingerprint(ledger):
      raise UserError(f"{path} does not match its own fingerprint: it was edited; {_AGAIN}")
  except FileNotFoundError as error:
    raise UserError(f"no token store at {folder}: {_hint(folder)}") from error
  except NotADirectoryError as error:
    raise UserError(f"{folder} is a file, not a token store: {_hint(folder)}") from error
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{path} is damaged: {_AGAIN}") from error
  return ledger


_AGAIN = "copy the store again, or run `chinchilla prepare` with --overwrite"


def _hint(folder: str) -> str:
  make = f"make it with `chinchilla prepare --config.data.store={folder}`"
  if os.path.isdir(staging.staging_path(folder)):
    return f"a prepare is running or was cut off there; {make}"
  near = [os.path.dirname(path)
          for root in (folder, os.path.dirname(folder) or os.curdir)
          for path in sorted(glob.glob(os.path.join(glob.escape(root), "*", FILE)))]
  if near:
    best = difflib.get_close_matches(folder, near, n=1, cutoff=0) or near
    return f"did you mean {best[0]}? Or {make}"
  return make


def describe_file(path: str) -> dict:
  """Name, size and SHA-256 of a file, as the ledger keeps them."""
  return {"name": os.path.basename(path), "bytes": os.path.getsize(path), "sha256": sha256(path)}


def sha256(path: str) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def files(ledger: dict) -> list[dict]:
  """Every file of the store but the ledger."""
  return [*ledger["files"], *(f for split in ledger["splits"].values() for f in split["files"])]


def verify(folder: str, ledger: dict, how: str):
  """Checks a store's files against its ledger.

  Args:
    how: "full" (sizes and checksums), "sizes", or "auto": full up to `FULL_CHECK_BYTES`.

  Raises:
    UserError: naming the first file that is missing, of another size, or changed.
  """
  if how not in ("full", "sizes", "auto"):
    raise UserError(f"config.data.verify is {how!r}: it is one of full, sizes, auto")
  entries = files(ledger)
  for entry in entries:
    path = os.path.join(folder, entry["name"])
    if not os.path.isfile(path):
      raise UserError(f"{path} is missing: {_AGAIN}")
    if (size := os.path.getsize(path)) != entry["bytes"]:
      raise UserError(f"{path} has {size:,} bytes, its ledger says {entry['bytes']:,}: {_AGAIN}")
  if how == "auto":
    small = sum(entry["bytes"] for entry in entries) <= FULL_CHECK_BYTES
    how = "full" if small else "sizes"
  if how == "full":
    paths = [os.path.join(folder, entry["name"]) for entry in entries]
    # Threads, since hashing gives up the interpreter lock.
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
      for path, entry, digest in zip(paths, entries, pool.map(sha256, paths), strict=True):
        if digest != entry["sha256"]:
          raise UserError(f"{path} has changed (its checksum is not the ledger's): {_AGAIN}")
