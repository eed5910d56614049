"""Batches as a pure function of (seed, first sequence index, count).

There is no iterator state. Resuming, another number of processes, a batch-size ramp, or reading
the batch that caused a spike on a laptop are all the same call with the same numbers.

Letters: b sequences in a batch, t positions in a sequence.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from chinchilla_jax.data import shuffle as shuffles
from chinchilla_jax.data.tokens import TokenSplit
from chinchilla_jax.errors import UserError

Batch = dict[str, np.ndarray]


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

  def batch(self, first: int, count: int, process_index: int = 0, process_count: int = 1) -> Batch:
    """Sequences first ... first + count - 1 of the run, or one process's share of them.

    Args:
      first: index of the first sequence since the start of training.
      count: sequences in the global batch; process p of P gets the p-th stretch of count / P.

    Returns:
      inputs_bt, targets_bt: int32, ids and the id after each.
      segments_bt: int32, equal where two inputs belong to one document; all 0 without
        document_mask. A document that began before the window is segment 0.
      weights_bt: float32, all 1.

    Raises:
      ValueError: count does not divide among the processes.
    """
    if count % process_count:
      raise ValueError(f"a batch of {count} sequences does not divide among {process_count} "
                       f"processes")
    local = count // process_count
    start = first + process_index * local
    window_b = self.windows(np.arange(start, start + local, dtype=np.int64))
    ids = self._split.windows(window_b * self._seq_len, self._seq_len + 1)
    return _batch(ids, self._split.bos_id, self._document_mask)


def validation_batches(split: TokenSplit, *, seq_len: int, batch_size: int, max_tokens: int = 0,
                       document_mask: bool = True) -> Iterator[Batch]:
  """Batches that cover every target of a split once, in order; all of one shape.

  What fills up the last window and the last batch has weight 0.

  Args:
    max_tokens: targets covered, from the start of the split; 0: all.

  Yields:
    Batches as `Batches.batch` gives them, [batch_size, seq_len].

  Raises:
    UserError: the split has no target.
  """
  n_targets = split.n_tokens - 1
  if n_targets < 1:
    raise UserError(f"{split.path}: the {split.name} split has {split.n_tokens} tokens, which is "
                    f"no text to predict: prepare more text")
  if max_tokens:
    n_targets = min(n_targets, max_tokens)
  for start in range(0, n_targets, batch_size * seq_len):
    ids = np.full(batch_size * seq_len + 1, split.pad_id, np.int32)
    n = min(batch_size * seq_len, n_targets - start)
    ids[:n + 1] = split.read(start, n + 1)
    rows = np.lib.stride_tricks.sliding_window_view(ids, seq_len + 1)[::seq_len]
    batch = _batch(rows, split.bos_id, document_mask)
    batch["weights_bt"].reshape(-1)[n:] = 0
    yield batch


def _batch(ids: np.ndarray, bos_id: int, document_mask: bool) -> Batch:
  """A batch from ids [b, t + 1]."""
  inputs_bt = ids[:, :-1].astype(np.int32)
  if document_mask:
    segments_bt = np.cumsum(inputs_bt == bos_id, axis=1, dtype=np.int32)
  else:
    segments_bt = np.zeros_like(inputs_bt)
  return {"inputs_bt": inputs_bt, "targets_bt": ids[:, 1:].astype(np.int32),
          "segments_bt": segments_bt, "weights_bt": np.ones(inputs_bt.shape, np.float32)}


def prefetch(batches: Batches, requests: Iterable[tuple[int, int]], depth: int,
             transform: Callable[[Batch], object] | None = None, process_index: int = 0,
             process_count: int = 1) -> Iterator[tuple[tuple[int, int], object]]:
  """Makes batches in a background thread, at most `depth` ahead.

  Args:
    requests: (first, count) of each batch; taken up to depth + 1 ahead of what was yielded.
    transform: applied to each batch in the thread, for instance the transfer to devices.

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
      for first, count in requests:
        batch = batches.batch(first, count, process_index, process_count)
        if not put(((first, count), transform(batch) if transform else batch)):
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
