"""The token store: writing (`tokens` describes the format).

Streaming: one chunk of each split is in memory. TFDS writes its own description of the files, so
that plain TFDS reads the store; TensorFlow is not involved.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import platform

import numpy as np

import chinchilla_jax
from chinchilla_jax.data import ledger as ledgers
from chinchilla_jax.data import tokens
from chinchilla_jax.data.tokenizer import Tokenizer
from chinchilla_jax.errors import UserError

SHARD_BYTES = 1 << 30  # of one file
# Chunks whose documents are counted together: 2 MiB of uint16 to read to find a document's number,
# and 512 numbers in the ledger for a file of SHARD_BYTES.
COUNTED_CHUNKS = 256
_WRITER = "group_size:1,uncompressed"  # random access: no record waits for its neighbours
_PACKAGES = ("numpy", "sentencepiece", "array_record", "tensorflow-datasets")


class SplitWriter:
  """Writes the token stream of one split into shards."""

  def __init__(self, folder: str, name: str, tokenizer: Tokenizer, shard_bytes: int):
    self.name = name
    self.documents = self.tokens = self.bytes = 0
    self._folder = folder
    self._bos_id = tokenizer.bos_id
    self._bos = np.array([tokenizer.bos_id], np.int32)
    self._pad_id = tokenizer.pad_id
    self._dtype = tokens.dtype_for(tokenizer.vocab_size)
    chunk_bytes = tokens.CHUNK * self._dtype.itemsize
    self._frame = tokens.frame(chunk_bytes)
    self._shard_chunks = max(1, shard_bytes // chunk_bytes)
    self._rest = np.empty(0, self._dtype)
    self._sha256 = hashlib.sha256()
    self._chunks: list[int] = []  # in each shard
    self._begun: list[list[int]] = []  # documents in every COUNTED_CHUNKS of each shard
    self._writer = None

  def add(self, ids_n: np.ndarray, n_bytes: int, first: bool):
    """Appends a document, or a further part of one (`first` False).

    Args:
      ids_n: [n] without BOS.
      n_bytes: UTF-8 bytes that they stand for.
    """
    self.tokens += len(ids_n) + first
    self.bytes += n_bytes
    self.documents += first
    ids = np.concatenate([self._rest, self._bos[:int(first)], ids_n]).astype(self._dtype)
    whole = len(ids) - len(ids) % tokens.CHUNK
    for start in range(0, whole, tokens.CHUNK):
      self._write(ids[start:start + tokens.CHUNK])
    self._rest = ids[whole:]

  def finish(self) -> dict:
    """Writes the last chunk, names the files; returns the split's entry in the ledger."""
    if len(self._rest):
      chunk = np.full(tokens.CHUNK, self._pad_id, self._dtype)
      chunk[:len(self._rest)] = self._rest
      self._write(chunk, len(self._rest))
    self.close()
    files = []
    for shard, chunks in enumerate(self._chunks):
      path = os.path.join(self._folder, _file_name(self.name, shard, len(self._chunks)))
      os.rename(self._path(shard), path)
      begun = {"per_chunks": COUNTED_CHUNKS, "begun": self._begun[shard]}
      files.append({**ledgers.describe_file(path), "chunks": chunks, "documents": begun})
    return {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes,
            "sha256": self._sha256.hexdigest(), "files": files}

  def close(self):
    """Closes the open file; harmless where none is open."""
    writer, self._writer = self._writer, None
    if writer is not None:
      with self._telling_what_failed():
        writer.close()

  @contextlib.contextmanager
  def _telling_what_failed(self):
    try:
      yield
    except RuntimeError as error:  # how ArrayRecord says that a disk is full
      raise UserError(f"cannot write the token store in {os.path.dirname(self._folder)} "
                      f"({str(error).splitlines()[0]}): free some space, or choose another place "
                      f"with --config.data.store") from error

  def _path(self, shard: int) -> str:
    return os.path.join(self._folder, f"{self.name}-{shard}.partial")

  def _write(self, chunk: np.ndarray, n_ids: int = tokens.CHUNK):
    if self._writer is None or self._chunks[-1] == self._shard_chunks:
      from array_record.python import array_record_module
      self.close()
      self._writer = array_record_module.ArrayRecordWriter(
          self._path(len(self._chunks)), _WRITER)
      self._chunks.append(0)
      self._begun.append([])
    if self._chunks[-1] % COUNTED_CHUNKS == 0:
      self._begun[-1].append(0)
    self._begun[-1][-1] += int(np.count_nonzero(chunk == self._bos_id))
    with self._telling_what_failed():
      self._writer.write(self._frame + chunk.tobytes())
    self._sha256.update(chunk[:n_ids].tobytes())
    self._chunks[-1] += 1


class StoreWriter:
  """Writes both splits, then TFDS's description and the ledger, into an existing folder."""

  def __init__(self, folder: str, tokenizer: Tokenizer, shard_bytes: int = SHARD_BYTES):
    self.folder = folder
    self.splits = {name: SplitWriter(folder, name, tokenizer, shard_bytes)
                   for name in tokens.SPLITS}
    self._tokenizer = tokenizer

  def add(self, split: str, ids_n: np.ndarray, n_bytes: int, first: bool = True):
    """See `SplitWriter.add`."""
    self.splits[split].add(ids_n, n_bytes, first)

  def finish(self, notes: dict) -> dict:
    """Completes the store.

    Args:
      notes: further entries of the ledger (settings, corpus); no part of the fingerprint.

    Returns:
      The ledger.
    """
    model = os.path.join(self.folder, "tokenizer.model")
    with open(model, "wb") as file:
      file.write(self._tokenizer.model)
    splits = {name: writer.finish() for name, writer in self.splits.items()}
    _describe_to_tfds(self.folder, splits, tokens.dtype_for(self._tokenizer.vocab_size))
    ledger = {
        **notes,
        "version": ledgers.VERSION,
        "vocab_size": self._tokenizer.vocab_size,
        "bos_id": self._tokenizer.bos_id,
        "pad_id": self._tokenizer.pad_id,
        "tokenizer": self._tokenizer.fingerprint,
        "chunk": tokens.CHUNK,
        "dtype": tokens.dtype_for(self._tokenizer.vocab_size).name,
        "splits": splits,
        "files": [ledgers.describe_file(os.path.join(self.folder, name))
                  for name in ("tokenizer.model", "dataset_info.json", "features.json")],
        "versions": {"chinchilla_jax": chinchilla_jax.__version__,
                     "python": platform.python_version(),
                     **{name: importlib.metadata.version(name) for name in _PACKAGES}},
    }
    ledger["fingerprint"] = ledgers.fingerprint(ledger)
    ledgers.write(self.folder, ledger)
    return ledger

  def close(self):
    """Closes open files; harmless after `finish`."""
    for writer in self.splits.values():
      writer.close()


def _file_name(split: str, shard: int, n_shards: int) -> str:
  return f"{tokens.DATASET}-{split}.array_record-{shard:05d}-of-{n_shards:05d}"


def _describe_to_tfds(folder: str, splits: dict, dtype: np.dtype):
  """Writes dataset_info.json and features.json."""
  import tensorflow_datasets as tfds
  template = tfds.core.ShardedFileTemplate(
      data_dir=folder, dataset_name=tokens.DATASET, filetype_suffix="array_record")
  tfds.folder_dataset.write_metadata(
      data_dir=folder,
      features=tfds.features.FeaturesDict({tokens.FEATURE: tfds.features.Tensor(
          shape=(tokens.CHUNK,), dtype=dtype.type, encoding=tfds.features.Encoding.BYTES)}),
      split_infos=[
          tfds.core.SplitInfo(
              name=name, shard_lengths=[file["chunks"] for file in split["files"]],
              num_bytes=sum(file["bytes"] for file in split["files"]),
              filename_template=template.replace(split=name))
          for name, split in splits.items()],
      version="1.0.0",
      filename_template=template,
      description="Token ids of documents one after the other, each started by BOS, in chunks.",
      check_data=False)  # reading back is the ledger's business; TFDS would use TensorFlow
