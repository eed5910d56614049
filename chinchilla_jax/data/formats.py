"""Reading documents out of files: text, JSON lines and Parquet, plain or compressed.

Every reader yields (id, text, first): text is valid UTF-8 bytes or a `Skip` saying why there is
none, and `first` is False for the second and later parts of one large document.
"""

import ast
import codecs
import dataclasses
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator

from chinchilla_jax.errors import UserError

PART_BYTES = 4 << 20  # documents above this are handed on in parts of at most this size
_ROWS = 256  # Parquet rows in memory at once


@dataclasses.dataclass(frozen=True)
class Skip:
  """Why a document has no text: a key of `corpus.SKIP_KINDS`."""

  kind: str


Item = tuple[str, bytes | Skip, bool]


class FieldCheck:
  """Remembers whether any record of a source had the text field, and which fields it saw."""

  def __init__(self, name: str):
    self.name = name
    self.found = False
    self.seen: set[str] = set()

  def take(self, record: dict) -> bytes | Skip:
    """The text of one record."""
    if self.name in record:
      self.found = True
      return to_utf8(record[self.name])
    if len(self.seen) < 20:
      self.seen.update(str(key) for key in record)
    return Skip("no_text")

  def raise_if_absent(self, where: str):
    if self.seen and not self.found:
      raise UserError(f"no record of {where} has a field {self.name!r} (found: "
                      f"{', '.join(sorted(self.seen)[:20])}): set config.corpus.text_field")


def to_utf8(value) -> bytes | Skip:
  """Text (str or bytes) as valid UTF-8."""
  try:
    if isinstance(value, str):
      return value.encode("utf-8")  # fails on lone surrogates, which JSON can spell
    if isinstance(value, bytes):
      value.decode("utf-8")
      return value
  except UnicodeError:
    return Skip("not_utf8")
  return Skip("no_text")


def read(id: str, path: str, fields: FieldCheck) -> Iterator[Item]:
  """The documents of one file, by its suffix.

  Raises:
    UserError: a compressed or Parquet file is damaged, or a Parquet file lacks the field.
  """
  if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited on for ever
    yield id, Skip("unreadable"), True
    return
  base = path.removesuffix(".gz").removesuffix(".zst")
  if path.endswith(".parquet"):
    reader = _parquet(id, path, fields)
  elif base.endswith(".jsonl"):
    reader = _jsonl(id, path, fields)
  else:
    reader = _text(id, path)
  try:
    yield from reader
  except (PermissionError, FileNotFoundError):  # also a link that points nowhere
    yield id, Skip("unreadable"), True
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise UserError(f"{path} is damaged ({error}): fetch it again or leave it out") from error
  except OSError as error:  # a failing disk, and Arrow's way of saying that data are wrong
    raise UserError(f"{path} cannot be read ({first_line(error)}): fetch it again or leave it "
                    f"out") from error


def first_line(error: Exception) -> str:
  """The first line of an error's message, for messages of one line."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _open(path: str):
  """A buffered binary stream of the file's content, decompressed."""
  if path.endswith(".gz"):
    return gzip.open(path, "rb")
  if path.endswith(".zst"):
    import pyarrow  # slow to import, and few corpora need it
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(path), "zstd"))
  return open(path, "rb")


def _text(id: str, path: str) -> Iterator[Item]:
  """A whole file as one document; bytes are kept as they are, a byte order mark too."""
  with _open(path) as stream:
    head = stream.read(PART_BYTES + 1)
  if len(head) <= PART_BYTES:
    yield id, to_utf8(head), True
    return
  # A large file is checked before its first part is handed over: a document is never half kept.
  decoder = codecs.getincrementaldecoder("utf-8")()
  try:
    with _open(path) as stream:
      while block := stream.read(PART_BYTES):
        decoder.decode(block)
      decoder.decode(b"", final=True)
  except UnicodeDecodeError:
    yield id, Skip("not_utf8"), True
    return
  first = True
  with _open(path) as stream:
    rest = b""
    while block := stream.read(PART_BYTES):
      block = rest + block
      cut = _cut(block)
      if cut:
        yield id, block[:cut], first
        first = False
      rest = block[cut:]
    if rest:
      yield id, rest, first


def parts(utf8: bytes) -> Iterator[bytes]:
  """Cuts a text into parts of at most `PART_BYTES`."""
  start = 0
  while len(utf8) - start > PART_BYTES:
    end = start + _cut(utf8[start:start + PART_BYTES])
    yield utf8[start:end]
    start = end
  yield utf8[start:] if start else utf8


def _cut(block: bytes) -> int:
  """Where to end a part: after the last line, else before the last character."""
  if (newline := block.rfind(b"\n")) >= 0:
    return newline + 1
  cut = len(block) - 1
  while cut > 0 and block[cut] & 0xC0 == 0x80:  # inside a character
    cut -= 1
  return cut


def topics(id: str, path: str) -> Iterator[Item]:
  """pydoc's help: a dictionary of prose, in Python source; each entry is a document."""
  with open(path, "rb") as stream:
    source = stream.read()
  try:
    (entries,) = (ast.literal_eval(node.value) for node in ast.parse(source).body
                  if isinstance(node, ast.Assign))
    entries = sorted(entries.items())
  except (SyntaxError, ValueError, AttributeError):  # another layout: it is still text
    yield id, to_utf8(source), True
    return
  for name, text in entries:
    yield f"{id}#{name}", to_utf8(text), True


def _jsonl(id: str, path: str, fields: FieldCheck) -> Iterator[Item]:
  """One JSON object a line; records are numbered by line, from 0. Blank lines are no records."""
  with _open(path) as stream:
    for number, line in enumerate(stream):
      if not line.strip():
        continue
      try:
        record = json.loads(line)
      except UnicodeDecodeError:
        item = Skip("not_utf8")
      except (ValueError, RecursionError):
        item = Skip("malformed_json")
      else:
        item = fields.take(record) if isinstance(record, dict) else Skip("malformed_json")
      yield f"{id}#{number}", item, True


def _parquet(id: str, path: str, fields: FieldCheck) -> Iterator[Item]:
  """One record a row, numbered from 0."""
  import pyarrow as pa
  import pyarrow.parquet as pq
  try:
    file = pq.ParquetFile(path)
  except pa.ArrowInvalid as error:
    raise UserError(f"{path} is no Parquet file ({first_line(error)}): fetch it again or leave "
                    f"it out") from error
  with file:
    if fields.name not in file.schema_arrow.names:
      raise UserError(f"{path} has no column {fields.name!r} (found: "
                      f"{', '.join(file.schema_arrow.names[:20])}): set config.corpus.text_field")
    fields.found = True
    number = 0
    batches = file.iter_batches(batch_size=_ROWS, columns=[fields.name])
    while True:
      try:
        batch = next(batches, None)
      except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): fetch it again or leave it out"
                        ) from error
      if batch is None:
        break
      column = batch.column(0)
      if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
      if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        # As bytes: one string that is not UTF-8 would make the whole batch fail.
        column = column.cast(pa.large_binary())
      for value in column.to_pylist():
        yield f"{id}#{number}", to_utf8(value), True
        number += 1
