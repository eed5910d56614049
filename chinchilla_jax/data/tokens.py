"""The token store: reading.

A store is a directory that is also a TFDS dataset (`tfds.builder_from_directory`):

  tokens-SPLIT.array_record-00000-of-00002   records of CHUNK ids, raw little-endian bytes
  dataset_info.json, features.json           TFDS's description of them
  tokenizer.model                            the SentencePiece model that made the ids
  ledger.json                                counts and checksums (`ledger`)

The ids of a split are one stream: its documents in corpus order, each started by BOS. A record
holds one stretch of CHUNK ids, so where id i lies is arithmetic. The last record is filled up
with `pad_id`, which occurs nowhere else. Records are framed as tf.train.Example by hand: ids are
then a fixed distance from the record's start, and reading needs neither TFDS nor a parser.
"""

import collections
import hashlib
import itertools
import os
import threading
from collections.abc import Iterator

import numpy as np

from chinchilla_jax.data import ledger as ledgers
from chinchilla_jax.data import remote_store
from chinchilla_jax.data import tokenizer as tokenizers
from chinchilla_jax.errors import UserError
from chinchilla_jax.storage import paths

CHUNK = 4096  # ids in a record; measured in docs/data.md
DATASET = "tokens"
FEATURE = "ids"
SPLITS = ("train", "validation")
_OPEN_FILES = 512  # below the usual limit of 1,024 a process
_AGAIN = "copy the store again, or run `chinchilla prepare` with --overwrite"
_READER = "readahead_buffer_size:0,max_parallelism:0"  # random access


def dtype_for(vocab_size: int) -> np.dtype:
  """The smallest of uint16 and uint32 that holds every id."""
  return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def frame(n_bytes: int) -> bytes:
  """What precedes the payload in a tf.train.Example of one bytes feature.

  Example(features=Features(feature={FEATURE: Feature(bytes_list=BytesList(value=[payload]))}))
  """
  head = _field(1, n_bytes)  # BytesList.value
  head = _field(1, n_bytes + len(head)) + head  # Feature.bytes_list
  head = _field(2, n_bytes + len(head)) + head  # map entry: value
  name = FEATURE.encode()
  head = _field(1, len(name)) + name + head  # map entry: key
  head = _field(1, n_bytes + len(head)) + head  # Features.feature
  return _field(1, n_bytes + len(head)) + head  # Example.features


def _field(number: int, n_bytes: int) -> bytes:
  """Protobuf's tag and length of a length-delimited field."""
  out = [number << 3 | 2]
  while n_bytes >= 0x80:
    out.append(n_bytes & 0x7F | 0x80)
    n_bytes >>= 7
  return bytes((*out, n_bytes))


def open_store(path: str, verify: str = "auto") -> "TokenStore":
  """Opens a store after checking it against its ledger.

  Args:
    path: the store's directory, or where it lies in a bucket: then it is copied to this machine.
    verify: "full", "sizes" or "auto" (`ledger.verify`).

  Raises:
    UserError: no store there; a file missing, truncated or changed; a tokenizer that did not make
      the ids; ids that are not those of the ledger.
  """
  if paths.is_remote(path):
    path = remote_store.here(path, verify)
    ledger = ledgers.read(path)
    how = ledgers.depth(ledger, verify)
  else:
    path = os.path.expanduser(path)
    ledger = ledgers.read(path)
    how = ledgers.verify(path, ledger, verify)
  tokenizer = tokenizers.load(path)
  if tokenizer.fingerprint != ledger["tokenizer"]:
    raise UserError(f"{path}: tokenizer.model did not make these tokens (its checksum is not the "
                    f"ledger's): copy the store again, or run `chinchilla prepare`")
  made_with = (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.pad_id)
  if made_with != (ledger["vocab_size"], ledger["bos_id"], ledger["pad_id"]):
    raise UserError(f"{path}: ledger.json is damaged (it counts other pieces than tokenizer.model "
                    f"has): {_AGAIN}")
  store = TokenStore(path, ledger, tokenizer)
  if how == "full":
    for name in ledger["splits"]:
      store.split(name).verify()
  return store


class TokenStore:
  """An open store.

  Attributes:
    path: its directory.
    ledger: the content of ledger.json.
    tokenizer: the tokenizer that made the ids.
    fingerprint: SHA-256 in hex over ids, counts and tokenizer (`ledger.fingerprint`).
  """

  def __init__(self, path: str, ledger: dict, tokenizer: tokenizers.Tokenizer):
    self.path = path
    self.ledger = ledger
    self.tokenizer = tokenizer
    self.fingerprint = ledger["fingerprint"]

  def split(self, name: str) -> "TokenSplit":
    """Opens "train" or "validation"."""
    if name not in self.ledger["splits"]:
      raise UserError(f"{self.path} has no split {name!r}: it has "
                      f"{', '.join(self.ledger['splits'])}")
    return TokenSplit(self.path, name, self.ledger)


class TokenSplit:
  """The token stream of one split; safe to read from several threads.

  Attributes:
    name: "train" or "validation".
    n_tokens: length of the stream, BOS pieces included.
    n_bytes: UTF-8 bytes of the text.
    n_documents: documents, and so BOS pieces.
    bos_id, pad_id, vocab_size: of the tokenizer.
  """

  def __init__(self, path: str, name: str, ledger: dict):
    split = ledger["splits"][name]
    self.path, self.name = path, name
    self.n_tokens = split["tokens"]
    self.n_bytes = split["bytes"]
    self.n_documents = split["documents"]
    self.bos_id, self.pad_id = ledger["bos_id"], ledger["pad_id"]
    self.vocab_size = ledger["vocab_size"]
    self._dtype = dtype_for(self.vocab_size)
    self._frame = frame(CHUNK * self._dtype.itemsize)
    self._files = [os.path.join(path, file["name"]) for file in split["files"]]
    # Chunks in the files before file k, for every k.
    self._ends = np.cumsum([0] + [file["chunks"] for file in split["files"]])
    self._chunks = [file["chunks"] for file in split["files"]]
    self._begun = [file.get("documents") for file in split["files"]]
    self._sha256 = split["sha256"]
    self._readers: collections.OrderedDict = collections.OrderedDict()
    self._lock = threading.Lock()

  def read(self, start: int, count: int) -> np.ndarray:
    """Ids start ... start + count - 1 of the stream: uint16 or uint32 [count]."""
    if count == 0:
      return np.empty(0, self._dtype)
    return self.windows(np.array([start]), count)[0]

  def windows(self, starts_n: np.ndarray, length: int) -> np.ndarray:
    """Stretches of the stream, one for each start: uint16 or uint32 [n, length].

    Args:
      starts_n: int64 [n], in any order.
      length: ids in each stretch.

    Raises:
      IndexError: a stretch that leaves the stream.
      UserError: a file that cannot be read.
    """
    starts_n = np.asarray(starts_n, np.int64)
    if not len(starts_n):
      return np.empty((0, length), self._dtype)
    if starts_n.min() < 0 or starts_n.max() + length > self.n_tokens:
      raise IndexError(f"ids {starts_n.min()} to {starts_n.max() + length} of a split of "
                       f"{self.n_tokens} tokens")
    first_n = starts_n // CHUNK
    span = (starts_n + length - 1) // CHUNK - first_n + 1
    chunk_m = np.unique(np.concatenate(
        [first_n[span > k] + k for k in range(span.max())]))
    # The chunks of one stretch are neighbours in the stream, and so in the sorted chunk_m.
    stream = self._read_chunks(chunk_m).reshape(-1)
    offset_n = np.searchsorted(chunk_m, first_n) * CHUNK + starts_n % CHUNK
    out = np.empty((len(starts_n), length), self._dtype)
    for row, offset in zip(out, offset_n.tolist(), strict=True):
      row[:] = stream[offset:offset + length]
    return out

  def verify(self):
    """Compares the ids themselves with the ledger: it might be a whole ledger of other files.

    Raises:
      UserError: they are not the ids that were written, or not so many documents.
    """
    sha256, documents, largest, block = hashlib.sha256(), 0, 0, 256 * CHUNK
    for start in range(0, self.n_tokens, block):
      ids = self.read(start, min(block, self.n_tokens - start))
      sha256.update(ids.tobytes())
      documents += int(np.count_nonzero(ids == self.bos_id))
      largest = max(largest, int(ids.max()))
    if (sha256.hexdigest() != self._sha256 or documents != self.n_documents
        or largest >= self.vocab_size):
      raise UserError(f"{self.path}: the {self.name} split does not hold the ids that its ledger "
                      f"tells of: {_AGAIN}")

  def documents(self) -> Iterator[np.ndarray]:
    """The ids of each document in turn, without its BOS."""
    block = 256 * CHUNK
    parts: list[np.ndarray] = []  # of the document that is not complete yet
    for start in range(0, self.n_tokens, block):
      ids = self.read(start, min(block, self.n_tokens - start))
      bounds = [*np.flatnonzero(ids == self.bos_id), len(ids)]
      if parts:
        parts.append(ids[:bounds[0]])
      for begin, end in itertools.pairwise(bounds):
        if parts:
          yield np.concatenate(parts)
        parts = [ids[begin + 1:end]]
    if parts:
      yield np.concatenate(parts)

  def document_counts(self) -> tuple[np.ndarray, np.ndarray] | None:
    """How many documents begin in each stretch of the stream, as the ledger counts them.

    Returns:
      (start_s, begun_s): int64, where each stretch begins, in tokens, and documents that begin in
      it. None where the ledger has no counts that can be right: they are only for logs, so
      opening a store does not check them.
    """
    starts: list[int] = []
    begun: list[int] = []
    try:
      for chunks, end, file in zip(self._chunks, self._ends[1:].tolist(), self._begun, strict=True):
        starts += range((end - chunks) * CHUNK, end * CHUNK, file["per_chunks"] * CHUNK)
        begun += file["begun"]
      start_s, begun_s = np.array(starts, np.int64), np.array(begun, np.int64)
    except (LookupError, TypeError, ValueError, OverflowError):
      return None
    if start_s.shape != begun_s.shape or begun_s.sum() != self.n_documents:
      return None
    return start_s, begun_s

  def _read_chunks(self, chunk_m: np.ndarray) -> np.ndarray:
    """Records by number, sorted: [m, CHUNK]."""
    out = np.empty((len(chunk_m), CHUNK), self._dtype)
    size = len(self._frame) + CHUNK * self._dtype.itemsize
    row = 0
    for file in range(len(self._files)):
      low, high = np.searchsorted(chunk_m, self._ends[file:file + 2])
      if low == high:
        continue
      for record in self._read_records(file, chunk_m[low:high] - self._ends[file]):
        if len(record) != size or not record.startswith(self._frame):
          raise UserError(f"{self._files[file]} holds a record that is no chunk of ids: copy the "
                          f"store again, or run `chinchilla prepare`")
        out[row] = np.frombuffer(record, self._dtype, CHUNK, len(self._frame))
        row += 1
    return out

  def _read_records(self, file: int, index_m: np.ndarray) -> list[bytes]:
    with self._lock:
      try:
        return self._reader(file).read(index_m.tolist())
      except (RuntimeError, ValueError, IndexError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{self._files[file]} cannot be read ({reason}): check it with "
                        f"--config.data.verify=full, or copy the store again") from error

  def _reader(self, file: int):
    """An open reader; the least recently used is closed when there are too many."""
    if file in self._readers:
      self._readers.move_to_end(file)
      return self._readers[file]
    from array_record.python import array_record_module
    if len(self._readers) >= _OPEN_FILES:
      self._readers.popitem(last=False)[1].close()
    reader = array_record_module.ArrayRecordReader(
        self._files[file], options=_READER, file_reader_buffer_size=4096)
    if (found := reader.num_records()) != self._chunks[file]:
      raise UserError(f"{self._files[file]} holds {found:,} chunks of ids, its ledger says "
                      f"{self._chunks[file]:,}: {_AGAIN}")
    self._readers[file] = reader
    return reader


def held_out_bytes(store: TokenStore, split: str = "validation") -> bytes:
  """The text of a split, its documents one after the other: what the source held, byte for byte."""
  return b"".join(store.tokenizer.decode_bytes(ids) for ids in store.split(split).documents())
