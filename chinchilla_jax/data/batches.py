"""Batches as a pure function of (seed, first sequence index, count).

There is no iterator state. Resuming, another number of processes, a batch-size ramp, or reading
the batch that caused a spike on a laptop are all the same call with the same numbers: a
process's share of a batch is a shorter batch that begins later. After a rollback, ranges of
sequences are left out for good: then the sequences that are kept are counted.

Letters: b sequences in a batch, t positions in a sequence.
"""

import copy
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

from chinchilla_jax.data import shuffle as shuffles
from chinchilla_jax.data.tokens import TokenSplit
from chinchilla_jax.errors import UserError

Batch = dict[str, np.ndarray]
Ranges = Iterable[tuple[int, int]]  # (first, count)
Request, Made = TypeVar("Request"), TypeVar("Made")


class Batches:
  """Training batches from the token stream of a split.

  Window w is ids w*T ... w*T + T of the stream: inputs all but the last, targets all but the
  first. Windows share one id, so every id but the first is a target exactly once an epoch, but
  for a remainder of fewer than T at the end of the stream. Sequence i of the run is window
  i % n_windows, permuted anew in each epoch i // n_windows.

  Attributes:
    split: whose stream it is.
    seq_len: T, tokens.
    seed: of the shuffle.
    n_windows: sequences in an epoch.
    skipped: the sequences that are left out, as (first, count), in order and apart.
  """

  def __init__(self, split: TokenSplit, *, seq_len: int, seed: int, shuffle: bool = True,
               document_mask: bool = True, skipped: Ranges = ()):
    self.n_windows = (split.n_tokens - 1) // seq_len
    if self.n_windows < 1:
      raise UserError(
          f"{split.path}: the {split.name} split has {split.n_tokens:,} tokens, one sequence takes "
          f"{seq_len + 1:,}: lower config.data.seq_len or prepare more text")
    self.split = split
    self.seq_len = seq_len
    self.seed = seed
    self._shuffle = shuffle
    self._document_mask = document_mask
    self._leave_out(skipped)

  def skipping(self, skipped: Ranges) -> "Batches":
    """The same batches, but with these (first, count) left out, and no others.

    Args:
      skipped: of sequences of the run, in any order; they may overlap.

    Raises:
      ValueError: a range that begins before 0 or has a negative length.
    """
    other = copy.copy(self)
    other._leave_out(skipped)
    return other

  def _leave_out(self, skipped: Ranges):
    merged: list[list[int]] = []  # [first, end], apart: so every gap holds a kept sequence
    for first, count in sorted((int(first), int(count)) for first, count in skipped):
      if first < 0 or count < 0:
        raise ValueError(f"cannot leave out {count} sequences from {first} on")
      if merged and first <= merged[-1][1]:
        merged[-1][1] = max(merged[-1][1], first + count)
      elif count:
        merged.append([first, first + count])
    self.skipped = tuple((first, end - first) for first, end in merged)
    first_r, count_r = np.array(self.skipped, np.int64).reshape(-1, 2).T
    self._shift_r = np.concatenate([[0], np.cumsum(count_r)])  # before the first range, after each
    self._kept_r = first_r - self._shift_r[:-1]  # number of the first kept sequence after a range

  def actual(self, kept_n: np.ndarray) -> np.ndarray:
    """Index among all sequences of the run of each kept one's number: int64 [n]."""
    kept_n = np.asarray(kept_n, np.int64)
    return kept_n + self._shift_r[np.searchsorted(self._kept_r, kept_n, side="right")]

  def epoch(self, index):
    """The epoch, from 0, that a sequence (an int or an array; among all) belongs to."""
    return index // self.n_windows

  def windows(self, index_n: np.ndarray) -> np.ndarray:
    """The window of each sequence index (among all): int64 [n]."""
    index_n = np.asarray(index_n, np.int64)
    epoch_n, window_n = np.divmod(index_n, self.n_windows)
    if self._shuffle:
      for epoch in np.unique(epoch_n):
        here = epoch_n == epoch
        window_n[here] = shuffles.permute(
            window_n[here], self.n_windows, self.seed, int(epoch))
    return window_n

  def starts(self, index_n: np.ndarray) -> np.ndarray:
    """Where each sequence (among all) begins in the stream, in tokens: int64 [n]."""
    return self.windows(index_n) * self.seq_len

  def batch(self, first: int, count: int) -> Batch:
    """Sequences first ... first + count - 1 of those of the run that are kept.

    Args:
      first: number of the first sequence, counting kept ones from the start of training.
      count: sequences.

    Returns:
      inputs_bt, targets_bt: int32, ids and the id after each.
      segments_bt: int32, equal where two inputs belong to one document; all 0 without
        document_mask. A document that began before the window is segment 0.
      weights_bt: float32, all 1.
    """
    index_b = self.actual(np.arange(first, first + count))
    ids = self.split.windows(self.starts(index_b), self.seq_len + 1)
    return _batch(ids, self.split.bos_id, self._document_mask)


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
