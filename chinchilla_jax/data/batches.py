"""Batches as a pure function of (seed, first sequence index, count).

There is no iterator state. Resuming, another number of processes, a batch-size ramp, or reading
the batch that caused a spike on a laptop are all the same call with the same numbers: a
process's share of a batch is a shorter batch that begins later.

Letters: b sequences in a batch, t positions in a sequence.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

from chinchilla_jax.data import shuffle as shuffles
from chinchilla_jax.data.tokens import TokenSplit
from chinchilla_jax.errors import UserError

Batch = dict[str, np.ndarray]
Request, Made = TypeVar("Request"), TypeVar("Made")


class Batches:
  """Training batches from the token stream of a split.

  Window w is ids w*T ... w*T + T of the stream: inputs all but the last, targets all but the
  first. Windows share one id, so every id but the first is a target exactly once an epoch, but
  for a remainder of fewer than T at the end of the stream. Sequence i of the run is window
  i % n_windows, permuted anew in each epoch i // n_windows.

  Attributes:
    n_windows: sequences in an epoch.
  """

  def __init__(self, split: TokenSplit, *, seq_len: int, seed: int, shuffle: bool = True,
               document_mask: bool = True):
    self.n_windows = (split.n_tokens - 1) // seq_len
    if self.n_windows < 1:
      raise UserError(
          f"{split.path}: the {split.name} split has {split.n_tokens:,} tokens, one sequence takes "
          f"{seq_len + 1:,}: lower config.data.seq_len or prepare more text")
    self._split = split
    self._seq_len = seq_len
    self._seed = seed
    self._shuffle = shuffle
    self._document_mask = document_mask

  def epoch(self, index):
    """The epoch, from 0, that sequence `index` (an int or an array) belongs to."""
    return index // self.n_windows

  def windows(self, index_n: np.ndarray) -> np.ndarray:
    """The window of each sequence index: int64 [n]."""
    index_n = np.asarray(index_n, np.int64)
    epoch_n, window_n = np.divmod(index_n, self.n_windows)
    if self._shuffle:
      for epoch in np.unique(epoch_n):
        here = epoch_n == epoch
        window_n[here] = shuffles.permute(
            window_n[here], self.n_windows, self._seed, int(epoch))
    return window_n

  def batch(self, first: int, count: int) -> Batch:
    """Sequences first ... first + count - 1 of the run.

    Args:
      first: index of the first sequence since the start of training.
      count: sequences.

    Returns:
      inputs_bt, targets_bt: int32, ids and the id after each.
      segments_bt: int32, equal where two inputs belong to one document; all 0 without
        document_mask. A document that began before the window is segment 0.
      weights_bt: float32, all 1.
    """
    window_b = self.windows(np.arange(first, first + count, dtype=np.int64))
    ids = self._split.windows(window_b * self._seq_len, self._seq_len + 1)
    return _batch(ids, self._split.bos_id, self._document_mask)


class ValidationBatches:
  """Batches that cover every target of a split once, in order; all of one shape.

  What fills up the last window and the last batch has weight 0.
  """

  def __init__(self, split: TokenSplit, *, seq_len: int, batch_size: int, max_tokens: int = 0,
               document_mask: bool = True):
    """Covers max_tokens targets from the start of the split; all if 0.

    Raises:
      UserError: the split has no target.
    """
    self._n_targets = split.n_tokens - 1
    if self._n_targets < 1:
      raise UserError(f"{split.path}: the {split.name} split has {split.n_tokens} tokens, which is "
                      f"no text to predict: prepare more text")
    if max_tokens:
      self._n_targets = min(self._n_targets, max_tokens)
    self._split, self._seq_len, self._batch_size = split, seq_len, batch_size
    self._document_mask = document_mask

  def __len__(self) -> int:
    return -(-self._n_targets // (self._batch_size * self._seq_len))

  def rows(self, index: int, start: int, stop: int) -> Batch:
    """Rows start ... stop - 1 of batch `index`, as `Batches.batch` gives them."""
    first = (index * self._batch_size + start) * self._seq_len
    size = (stop - start) * self._seq_len
    ids = np.full(size + 1, self._split.pad_id, np.int32)
    n = max(0, min(size, self._n_targets - first))
    if n:
      ids[:n + 1] = self._split.read(first, n + 1)
    rows = np.lib.stride_tricks.sliding_window_view(ids, self._seq_len + 1)[::self._seq_len]
    batch = _batch(rows, self._split.bos_id, self._document_mask)
    batch["weights_bt"].reshape(-1)[n:] = 0
    return batch


def _batch(ids: np.ndarray, bos_id: int, document_mask: bool) -> Batch:
  """A batch from ids [b, t + 1]."""
  inputs_bt = ids[:, :-1].astype(np.int32)
  if document_mask:
    segments_bt = np.cumsum(inputs_bt == bos_id, axis=1, dtype=np.int32)
  else:
    segments_bt = np.zeros_like(inputs_bt)
  return {"inputs_bt": inputs_bt, "targets_bt": ids[:, 1:].astype(np.int32),
          "segments_bt": segments_bt, "weights_bt": np.ones(inputs_bt.shape, np.float32)}


def prefetch(make: Callable[[Request], Made], requests: Iterable[Request],
             depth: int) -> Iterator[tuple[Request, Made]]:
  """Makes batches in a background thread, at most `depth` ahead.

  Args:
    make: request -> batch; runs in the thread, so the transfer to devices belongs into it.
    requests: taken up to depth + 1 ahead of what was yielded.
    depth: batches.

  Yields:
    (request, batch), in order. What goes wrong in the thread is raised here. The thread ends when
    the generator is closed, is deleted, or is exhausted.
  """
  ready: queue.Queue = queue.Queue(maxsize=depth)
  stop = threading.Event()

  def put(item) -> bool:
    # A plain put would hang for ever once nobody takes from the queue.
    while not stop.is_set():
      try:
        ready.put(item, timeout=0.1)
        return True
      except queue.Full:
        continue
    return False

  def work():
    try:
      for request in requests:
        if not put((request, make(request))):
          return
      put(None)
    except BaseException as error:  # also what a signal handler raises: it belongs to the caller
      put(error)

  thread = threading.Thread(target=work, name="prefetch", daemon=True)
  thread.start()
  try:
    while (item := ready.get()) is not None:
      if isinstance(item, BaseException):
        raise item
      yield item
  finally:
    stop.set()
    thread.join()
