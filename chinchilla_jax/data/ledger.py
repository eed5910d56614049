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
from chinchilla_jax.storage import objects, paths

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


def refuse_impossible(folder: str):
  """Refuses a place that no store can be at.

  An empty path would mean the current directory, which preparing would replace.
  """
  if not folder:
    raise UserError("config.data.store is empty: name the folder of a token store, such as "
                    "--config.data.store=stores/books")


def write(folder: str, ledger: dict):
  with open(os.path.join(folder, FILE), "w", encoding="utf-8") as file:
    json.dump(ledger, file, indent=2, sort_keys=True)
    file.write("\n")


def read(folder: str) -> dict:
  """The ledger of a store.

  Raises:
    UserError: no store there, or its ledger is damaged or of a newer version, contradicts itself,
      or names files outside the store.
  """
  refuse_impossible(folder)
  path = os.path.join(folder, FILE)
  try:
    ledger = json.loads((paths.at(folder) / FILE).read_bytes())
    if type(ledger["version"]) is not int:
      raise ValueError("its version is no number")
    if ledger["version"] > VERSION:
      raise UserError(f"{folder} has ledger version {ledger['version']}, this program knows "
                      f"{VERSION}: update chinchilla_jax")
    if ledger["fingerprint"] != fingerprint(ledger):
      raise UserError(f"{path} does not match its own fingerprint: it was edited; {_AGAIN}")
    _check(ledger)
  except FileNotFoundError as error:
    raise UserError(f"no token store at {folder}: {_hint(folder)}") from error
  except NotADirectoryError as error:
    raise UserError(f"{folder} is a file, not a token store: {_hint(folder)}") from error
  except objects.Unreachable:
    raise
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}): {_AGAIN}") from error
  except json.JSONDecodeError as error:
    raise UserError(f"{path} is damaged (no JSON at line {error.lineno}): {_AGAIN}") from error
  except (KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError) as error:
    raise UserError(f"{path} is damaged (it lacks {error} or holds another type): {_AGAIN}"
                    if isinstance(error, KeyError) else
                    f"{path} is damaged (no ledger): {_AGAIN}") from error
  except ValueError as error:
    raise UserError(f"{path} is damaged ({error}): {_AGAIN}") from error
  return ledger


def _check(ledger: dict):
  """Types, and what must agree. A fingerprint proves only that a ledger is as it was written."""
  # Imported here: `tokens` needs this module.
  from chinchilla_jax.data import tokens
  for name in ("vocab_size", "bos_id", "pad_id", "chunk"):
    _whole(ledger, name, "it")
  if ledger["chunk"] != tokens.CHUNK:
    raise ValueError(f"its chunks hold {ledger['chunk']} ids, this program reads {tokens.CHUNK}")
  if ledger["dtype"] != tokens.dtype_for(ledger["vocab_size"]).name:
    raise ValueError(f"its dtype is {ledger['dtype']!r:.40} with {ledger['vocab_size']} pieces")
  if not max(ledger["bos_id"], ledger["pad_id"]) < ledger["vocab_size"] < 2**31:
    raise ValueError("its control pieces are no pieces")
  if not ledger["splits"]:
    raise ValueError("it has no split")
  for name, split in ledger["splits"].items():
    for count in ("documents", "tokens", "bytes"):
      _whole(split, count, f"split {name}")
    for file in split["files"]:
      _whole(file, "chunks", f"a file of split {name}")
    chunks = sum(file["chunks"] for file in split["files"])
    if chunks != -(-split["tokens"] // tokens.CHUNK):
      raise ValueError(f"split {name} has {split['tokens']:,} tokens in {chunks:,} chunks of "
                       f"{tokens.CHUNK:,}")
    if split["documents"] > split["tokens"]:
      raise ValueError(f"split {name} has more documents than tokens")
  for file in files(ledger):
    _whole(file, "bytes", "a file")
    if not _is_plain(file["name"]):
      raise ValueError(f"it names the file {file['name']!r:.80}, which is not in the store's "
                       "folder")
  names = [file["name"] for file in files(ledger)]
  if len(set(names)) < len(names):
    raise ValueError("it names a file twice")


def _whole(section: dict, key: str, where: str):
  value = section[key]
  if type(value) is not int or not 0 <= value < 2**62:
    raise ValueError(f"{where} has {key} {value!r:.40}")


def _is_plain(name) -> bool:
  """Whether a name leads to a file right inside a folder, on any system."""
  return (isinstance(name, str) and name not in ("", ".", "..")
          and not any(mark in name for mark in "/\\:\0"))


def check_notes(folder: str, ledger: dict):
  """Checks the entries that only `prepare` reads.

  Raises:
    UserError: one is missing or of another type.
  """
  settings, corpus = ledger.get("settings"), ledger.get("corpus")
  kinds = {"documents": int, "bytes": int, "sha256": str, "inventory": str, "skipped": dict,
           "skipped_examples": dict}
  if (not isinstance(settings, dict) or not isinstance(corpus, dict)
      or not all(isinstance(settings.get(name), dict) for name in ("corpus", "tokenizer"))
      or not all(isinstance(corpus.get(name), kind) for name, kind in kinds.items())
      or set(corpus["skipped"]) != set(corpus["skipped_examples"])):
    raise UserError(f"{os.path.join(folder, FILE)} does not say what the store was made from: "
                    f"{_AGAIN}")


_AGAIN = "copy the store again, or run `chinchilla prepare` with --overwrite"


def _hint(folder: str) -> str:
  make = f"make it with `chinchilla prepare --config.data.store={folder}`"
  if paths.is_remote(folder):
    return make
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


def depth(ledger: dict, how: str) -> str:
  """"full" or "sizes": what "auto" means for a store.

  Raises:
    UserError: `how` is none of the three.
  """
  if how not in ("full", "sizes", "auto"):
    raise UserError(f"config.data.verify is {how!r}: it is one of full, sizes, auto")
  if how != "auto":
    return how
  small = sum(entry["bytes"] for entry in files(ledger)) <= FULL_CHECK_BYTES
  return "full" if small else "sizes"


def verify(folder: str, ledger: dict, how: str) -> str:
  """Checks a store's files against its ledger.

  Args:
    how: "full" (sizes and checksums), "sizes", or "auto": full up to `FULL_CHECK_BYTES`.

  Returns:
    What was done: "full" or "sizes".

  Raises:
    UserError: naming the first file that is missing, of another size, or changed.
  """
  how, entries = depth(ledger, how), files(ledger)
  for entry in entries:
    path = os.path.join(folder, entry["name"])
    if not os.path.isfile(path):
      raise UserError(f"{path} is missing: {_AGAIN}")
    if (size := os.path.getsize(path)) != entry["bytes"]:
      raise UserError(f"{path} has {size:,} bytes, its ledger says {entry['bytes']:,}: {_AGAIN}")
  if how == "full":
    paths = [os.path.join(folder, entry["name"]) for entry in entries]
    # Threads, since hashing gives up the interpreter lock.
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
      for path, entry, digest in zip(paths, entries, pool.map(sha256, paths), strict=True):
        if digest != entry["sha256"]:
          raise UserError(f"{path} has changed (its checksum is not the ledger's): {_AGAIN}")
  return how
