"""The first pass over a corpus: what it holds, a sample for the tokenizer, where to split it."""

import dataclasses
import hashlib
import heapq
import os
from collections.abc import Callable, Iterator

from chinchilla_jax.data import corpus as corpora
from chinchilla_jax.errors import UserError


class Digest:
  """SHA-256 over ids and texts: equal for equal corpora, wherever they lie."""

  def __init__(self):
    self._sha256 = hashlib.sha256()

  def add(self, document: corpora.Document):
    id = document.id.encode("utf-8", "surrogateescape")
    # Lengths make the joints unambiguous.
    self._sha256.update(b"%d %d %d " % (document.first, len(id), len(document.utf8)))
    self._sha256.update(id)
    self._sha256.update(document.utf8)

  def hex(self) -> str:
    return self._sha256.hexdigest()


@dataclasses.dataclass
class Survey:
  """What the first pass found.

  Attributes:
    documents, bytes: of the whole corpus, without what was skipped.
    digest: of the corpus (`Digest`).
    skipped: what was left out.
    threshold: documents whose `corpus.split_hash` is below this are held out.
    sample: texts for the tokenizer, none of them held out, in corpus order.
  """

  documents: int
  bytes: int
  digest: str
  skipped: corpora.Skipped
  threshold: int
  sample: list[bytes]


class _Sample:
  """The documents that come first in the order of a hash, as many as fit into a size.

  One pass, bounded memory, and the same sample whatever the order of the sources.
  """

  def __init__(self, max_bytes: int):
    self._max_bytes = max_bytes
    self._bytes = 0
    self._heap: list[tuple[int, int, int, bytes]] = []  # the last in that order on top

  def add(self, place: int, document: corpora.Document):
    text = _head(document.utf8, self._max_bytes)
    rank = hashlib.blake2b(b"tokenizer sample %d " % place + text, digest_size=8).digest()
    heapq.heappush(self._heap, (-int.from_bytes(rank, "big"), place,
                                corpora.split_hash(document.id), text))
    self._bytes += len(text)
    while self._bytes > self._max_bytes:
      self._bytes -= len(heapq.heappop(self._heap)[-1])

  def texts(self, threshold: int) -> list[bytes]:
    """The sample without documents that are held out, in corpus order."""
    return [text for _, _, hash, text in sorted(self._heap, key=lambda entry: entry[1])
            if hash >= threshold]


def _head(utf8: bytes, max_bytes: int) -> bytes:
  """The start of a text, cut between characters."""
  return utf8 if len(utf8) <= max_bytes else utf8[:max_bytes].decode("utf-8", "ignore").encode()


def survey(config, sample_bytes: int, advance: Callable[[int], None]) -> Survey:
  """Reads the whole corpus once.

  Args:
    config: the `corpus` section.
    sample_bytes: upper limit of the sample; 0: none.
    advance: told the bytes of each document, for progress.

  Raises:
    UserError: what `corpus.documents` raises; a corpus with fewer than two documents.
  """
  skipped, digest, sample = corpora.Skipped(), Digest(), _Sample(sample_bytes)
  n_documents = n_bytes = 0
  lowest, highest = 2**64, -1
  for place, document in enumerate(corpora.documents(config, skipped)):
    digest.add(document)
    if sample_bytes:
      sample.add(place, document)
    hash = corpora.split_hash(document.id)
    lowest, highest = min(lowest, hash), max(highest, hash)
    n_documents += document.first
    n_bytes += len(document.utf8)
    advance(len(document.utf8))
  if not n_documents:
    raise UserError(f"no documents in {', '.join(config.sources)}: "
                    f"{'; '.join(skipped.lines()) or 'nothing was found'}; mend them, or name "
                    f"other text in config.corpus.sources")
  if lowest == highest:
    raise UserError(
        f"{', '.join(config.sources)} holds one document, and one more is needed to hold out: "
        f"split it into several files, or use JSON lines with one document a line")
  threshold = _threshold(config.validation_fraction, lowest, highest)
  return Survey(n_documents, n_bytes, digest.hex(), skipped, threshold, sample.texts(threshold))


def _threshold(fraction: float, lowest: int, highest: int) -> int:
  """Where the split lies: by the fraction, moved so far that neither side is empty."""
  return min(max(corpora.validation_threshold(fraction), lowest + 1), highest)


def inventory(config) -> str:
  """SHA-256 over names, sizes and times of change of the corpus's files, without reading them.

  While it stays the same, the corpus is taken to be the same.
  """
  entries = []
  for spec, files in corpora.list_files(config).items():
    for file in files:
      try:
        stat = os.stat(file.path)
      except OSError:  # a link that points nowhere
        entries.append((spec, file.id))
        continue
      entries.append((spec, file.id, stat.st_size, stat.st_mtime_ns))
  entries += _datasets(config)
  return hashlib.sha256("\n".join(map(repr, entries)).encode()).hexdigest()


def _datasets(config) -> Iterator[tuple[str, str]]:
  for spec in config.sources:
    if spec.startswith("tfds:"):
      from chinchilla_jax.data import tfds_records  # imports tfds: slow
      yield spec, tfds_records.identity(spec, config.tfds_data_dir)
