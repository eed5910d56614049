"""Where a batch comes from, for logs: an address finds it again, in whatever run.

JSON-able; `text` puts it into one line.
"""

from typing import Any

import numpy as np

from chinchilla_jax.data.batches import Batches
from chinchilla_jax.data.tokens import TokenSplit

_NAMED_IN_TEXT = 8  # documents


def of(batches: Batches, first: int, count: int, limit: int = 64) -> dict[str, Any]:
  """What `batches.batch(first, count)` is made of.

  Reads the batch, and for each of its first `limit` sequences up to `COUNTED_CHUNKS` chunks of
  the store (`token_writer`): a few milliseconds each.

  Args:
    batches: of the run.
    first, count: as for `Batches.batch`.
    limit: the most sequences, and documents, that are named one by one.

  Returns:
    seed: of the shuffle.
    sequences: [first, last] of all sequences, as often as a left-out range lies between.
    epochs: those they belong to.
    tokens: where each sequence begins in the split's stream; the first `limit` sequences.
    documents: numbers of the documents that the sequences touch, in order; 0 is the first of
      the split. Up to `limit`, of the sequences in `tokens`. Not there where the store's ledger
      has no counts of documents: it is an old one.
    n_documents: how many they are; an upper bound where `tokens` does not have all sequences.
  """
  split = batches.split
  index_b = batches.actual(np.arange(first, first + count))
  breaks = np.flatnonzero(np.diff(index_b) > 1) + 1
  start_b = batches.starts(index_b)
  ids = split.windows(start_b, batches.seq_len + 1)
  begun_b = np.count_nonzero(ids[:, 1:] == split.bos_id, axis=1)
  found = {"seed": batches.seed,
           "sequences": [[int(part[0]), int(part[-1])] for part in np.split(index_b, breaks)],
           "epochs": np.unique(batches.epoch(index_b)).tolist(),
           "tokens": start_b[:limit].tolist()}
  opening_b = _document_of(split, start_b[:limit])
  if opening_b is not None:
    numbers = sorted({int(opening) + k for opening, begun in zip(
        opening_b, begun_b[:limit], strict=True) for k in range(begun + 1)})
    found["documents"] = numbers[:limit]
    found["n_documents"] = len(numbers) + int(np.sum(begun_b[limit:] + 1))
  return found


def text(address: dict[str, Any]) -> str:
  """An address in one line: "sequences 128 to 255 of seed 0 (documents 17, 18, 40)"."""
  ranges = [str(first) if first == last else f"{first} to {last}"
            for first, last in address["sequences"]]
  line = " and ".join([", ".join(ranges[:-1]), ranges[-1]] if ranges[1:] else ranges)
  length = sum(last - first + 1 for first, last in address["sequences"])
  line = f"sequence{'' if length == 1 else 's'} {line} of seed {address['seed']}"
  if "documents" not in address:
    return line
  named, total = address["documents"][:_NAMED_IN_TEXT], address["n_documents"]
  numbers = ", ".join(map(str, named))
  if total > len(named):
    bound = "" if len(address["tokens"]) == length else "up to "
    numbers += f" and {bound}{total - len(named)} more"
  return f"{line} (document{'' if total == 1 else 's'} {numbers})"


def _document_of(split: TokenSplit, position_n: np.ndarray) -> np.ndarray | None:
  """Number of the document that each position of a stream belongs to: int64 [n].

  From the ledger's counts of documents that begin in every stretch of the stream, and the ids
  between the start of the stretch and the position. None where the ledger has no such counts.
  """
  if (stretches := split.document_counts()) is None:
    return None
  start_s, begun_s = stretches
  before_s = np.cumsum(begun_s) - begun_s
  stretch_n = np.searchsorted(start_s, position_n, side="right") - 1
  begins = zip(start_s[stretch_n].tolist(), position_n.tolist(), strict=True)
  here_n = [np.count_nonzero(split.read(start, position - start + 1) == split.bos_id)
            for start, position in begins]
  return before_s[stretch_n] + np.array(here_n, np.int64) - 1  # The first BOS is of document 0.
