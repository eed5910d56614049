"""Where documents come from, and which of them are held out.

A corpus is a list of sources (`config.corpus.sources`), read in the order given:

  stdlib                 the standard library of the running Python: text on every machine
  FILE, FOLDER, GLOB     text (also .gz, .zst), .jsonl[.gz|.zst], .parquet
  tfds:NAME[/CONFIG][:VERSION][@SPLIT]

A document's id is its path relative to the root of its source, and `path#record` for a record
inside a file. The split follows from the id alone, so it is the same on every machine and stays
the same when documents are added.
"""

import dataclasses
import glob
import hashlib
import os
import sysconfig
import unicodedata
from collections.abc import Iterator

from chinchilla_jax.data import formats
from chinchilla_jax.errors import UserError

EXAMPLES = 3  # ids shown for each kind of skipped document
SKIP_KINDS = {
    "empty": "empty",
    "not_utf8": "not valid UTF-8",
    "malformed_json": "not a JSON object",
    "no_text": "field missing, null or not text",
    "unreadable": "could not be opened",
}
# Bytecode, tests (absent from some distributions' Python) and third-party packages.
_NOT_STDLIB = frozenset(
    ("__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"))


@dataclasses.dataclass(frozen=True)
class Document:
  """Text of one document, or of one part of a document too large to hold at once.

  Attributes:
    id: path relative to the source's root, `#record` appended for records.
    utf8: the text as valid UTF-8, byte for byte as in the source; never empty.
    first: False for the second and later parts of a document.
  """

  id: str
  utf8: bytes
  first: bool = True

  @property
  def text(self) -> str:
    return self.utf8.decode("utf-8")


@dataclasses.dataclass
class Skipped:
  """Documents left out, counted by kind (`SKIP_KINDS`), with the first ids of each kind."""

  counts: dict[str, int] = dataclasses.field(default_factory=dict)
  examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)

  def add(self, kind: str, id: str):
    self.counts[kind] = self.counts.get(kind, 0) + 1
    ids = self.examples.setdefault(kind, [])
    if len(ids) < EXAMPLES:
      ids.append(printable(id))

  def lines(self) -> list[str]:
    """One line a kind, for people."""
    return [f"{self.counts[kind]:,} skipped, {SKIP_KINDS[kind]}: {', '.join(self.examples[kind])}"
            + (", ..." if self.counts[kind] > len(self.examples[kind]) else "")
            for kind in sorted(self.counts)]


@dataclasses.dataclass(frozen=True)
class File:
  """One file of a source; `id` is stable across machines, `path` is not."""

  id: str
  path: str


def documents(config, skipped: Skipped | None = None) -> Iterator[Document]:
  """Streams the documents of a corpus in a fixed order; memory is bounded by one record.

  What is larger than `formats.PART_BYTES` comes in parts (`Document.first`).

  Args:
    config: the `corpus` section.
    skipped: filled with what is left out; pass one to see it.

  Raises:
    UserError: a source does not exist, matches nothing, cannot be read, or none of its records
      has the field `text_field`.
  """
  skipped = Skipped() if skipped is None else skipped
  for source in sources(config):
    for id, item, first in source:
      if isinstance(item, formats.Skip):
        skipped.add(item.kind, id)
      elif not item:
        skipped.add("empty", id)
      else:
        for part in formats.parts(item):
          yield Document(id, part, first)
          first = False


def sources(config) -> Iterator[Iterator[tuple[str, bytes | formats.Skip, bool]]]:
  """Yields one iterator of (id, text or why there is none, first part) a source."""
  files_by_source = list_files(config)
  for spec in config.sources:
    if spec.startswith("tfds:"):
      from chinchilla_jax.data import tfds_records  # imports tfds: slow
      yield tfds_records.read(spec, config.text_field, config.tfds_data_dir)
    else:
      yield _read_files(spec, files_by_source[spec], config.text_field)


def list_files(config) -> dict[str, list[File]]:
  """The files of every source that has files, sorted by id.

  Raises:
    UserError: see `documents`; also a file that two sources name.
  """
  if not config.sources:
    raise UserError("config.corpus.sources is empty: name a file, a folder, tfds:NAME or stdlib")
  files_by_source, seen = {}, {}
  for spec in config.sources:
    if spec.startswith("tfds:"):
      continue
    files_by_source[spec] = _stdlib_files() if spec == "stdlib" else _local_files(spec)
    for file in files_by_source[spec]:
      if (other := seen.setdefault(os.path.realpath(file.path), spec)) != spec:
        raise UserError(
            f"{file.path} is in two sources, {other!r} and {spec!r}: its text would count "
            f"twice; make config.corpus.sources disjoint")
  if len(set(config.sources)) < len(config.sources):
    raise UserError("config.corpus.sources names a source twice: name each once")
  return files_by_source


def split_hash(id: str) -> int:
  """BLAKE2b, 64 bits, big-endian, of the id in UTF-8: the place of a document in the split."""
  return int.from_bytes(
      hashlib.blake2b(id.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


def validation_threshold(fraction: float) -> int:
  """Documents whose `split_hash` is below this are held out."""
  return int(fraction * 2**64)


def is_validation(id: str, fraction: float) -> bool:
  """Whether the document is held out: a pure function of its id, the same for ever."""
  return split_hash(id) < validation_threshold(fraction)


def printable(id: str) -> str:
  """The id with bytes that are not UTF-8 (file names may hold them) shown as escapes."""
  return id.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _read_files(spec: str, files: list[File], text_field: str):
  fields = formats.FieldCheck(text_field)
  for file in files:
    if spec == "stdlib" and file.id == "pydoc_data/topics.py":
      yield from formats.topics(file.id, file.path)
    else:
      yield from formats.read(file.id, file.path, fields)
  fields.raise_if_absent(spec)


def _stdlib_files() -> list[File]:
  # sysconfig, not os.__file__: inside a virtual environment too, this is the base interpreter's.
  root = sysconfig.get_paths()["stdlib"]
  # _sysconfigdata* holds the options that this build of Python was compiled with.
  files = [file for file in _walk(root, _NOT_STDLIB)
           if file.id.endswith(".py")
           and not os.path.basename(file.id).startswith("_sysconfigdata")]
  if not files:
    raise UserError(f"source 'stdlib': this Python keeps no .py files in {root}; name a folder of "
                    f"text in config.corpus.sources")
  return files


def _local_files(spec: str) -> list[File]:
  if "://" in spec:
    raise UserError(f"source {spec!r} is remote: copy it to a local disk and name the copy")
  path = os.path.expanduser(spec)
  if os.path.isdir(path):
    files = _walk(path, frozenset(("__pycache__",)))
  elif os.path.isfile(path):
    files = [File(_normal(os.path.basename(path)), path)]
  elif glob.has_magic(path):
    root = _glob_root(path)
    files = sorted((File(_id(match, root), match)
                    for match in glob.iglob(path, recursive=True) if os.path.isfile(match)),
                   key=lambda file: file.id)
  elif os.path.exists(path):
    raise UserError(f"source {spec!r} is neither a file nor a folder, and text is read twice: copy "
                    f"it into a file")
  else:
    raise UserError(f"source {spec!r} does not exist: name a file, a folder, a glob, tfds:NAME "
                    f"or stdlib in config.corpus.sources")
  if not files:
    raise UserError(f"source {spec!r} holds no files: mend it in config.corpus.sources")
  return files


def _walk(root: str, leave_out: frozenset[str]) -> list[File]:
  """Every file under a folder, but hidden ones; follows links to folders, each once."""
  files, visited = [], set()
  for folder, folders, names in os.walk(root, followlinks=True):
    real = os.path.realpath(folder)
    if real in visited:
      folders.clear()
      continue
    visited.add(real)
    # Sorted, so that of two links to one folder the same one is followed everywhere.
    folders[:] = sorted(f for f in folders if f not in leave_out and not f.startswith("."))
    for name in names:
      if not name.startswith("."):
        path = os.path.join(folder, name)
        files.append(File(_id(path, root), path))
  return sorted(files, key=lambda file: file.id)


def _glob_root(pattern: str) -> str:
  """The folders before the first wildcard."""
  folders = []
  for part in os.path.dirname(pattern).split(os.sep):
    if glob.has_magic(part):
      break
    folders.append(part)
  return os.sep.join(folders) or (os.sep if pattern.startswith(os.sep) else os.curdir)


def _id(path: str, root: str) -> str:
  return _normal(os.path.relpath(path, root))


def _normal(path: str) -> str:
  # macOS file systems may hand names over decomposed; ids must not depend on that.
  return unicodedata.normalize("NFC", path.replace(os.sep, "/"))
