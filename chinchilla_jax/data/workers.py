"""Work in other processes: encoding documents in parallel, and a call that can be interrupted.

Processes are spawned, not forked: a forked copy of a process with threads can deadlock. They
import this module, NumPy and SentencePiece, and nothing heavier. Results come back in order, so
the output does not depend on the number of processes.
"""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from chinchilla_jax.data.tokenizer import Tokenizer
from chinchilla_jax.errors import UserError

_JOB_BYTES = 1 << 20  # text handed to a process at a time
_BYTES_A_WORKER = 8 << 20  # less text than this is not worth the start of a process

Work = tuple[bytes, Any]  # a text, and what belongs to it
_tokenizer: Tokenizer  # of a worker process


def default_workers(n_bytes: int) -> int:
  """How many processes a corpus of this size is worth: up to the cores this process may use."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return max(1, min(cores or 1, n_bytes // _BYTES_A_WORKER))


def encode(tokenizer: Tokenizer, items: Iterable[Work], n_workers: int
           ) -> Iterator[tuple[np.ndarray, Any]]:
  """Encodes texts, in order, with a bounded amount of them in memory.

  Args:
    items: (UTF-8 text, anything).
    n_workers: processes; 1: this one.

  Yields:
    (ids, what came with the text).

  Raises:
    UserError: a process was killed, as happens when memory runs out.
  """
  if n_workers == 1:
    for text, rest in items:
      yield _encode_checked(tokenizer, text), rest
    return
  pool = concurrent.futures.ProcessPoolExecutor(
      n_workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer.model,))
  in_flight = collections.deque()
  try:
    for texts, rests in _jobs(items):
      in_flight.append((pool.submit(_encode_job, texts), rests))
      if len(in_flight) > 2 * n_workers:  # a next job ready for each process
        yield from _results(in_flight.popleft())
    while in_flight:
      yield from _results(in_flight.popleft())
  except concurrent.futures.process.BrokenProcessPool as error:
    raise UserError("an encoding process was killed, probably for want of memory: free some and "
                    "run again") from error
  finally:
    pool.shutdown(cancel_futures=True)


def _jobs(items: Iterable[Work]) -> Iterator[tuple[list[bytes], list]]:
  texts, rests, size = [], [], 0
  for text, rest in items:
    texts.append(text)
    rests.append(rest)
    size += len(text)
    if size >= _JOB_BYTES:
      yield texts, rests
      texts, rests, size = [], [], 0
  if texts:
    yield texts, rests


def _results(job) -> Iterator[tuple[np.ndarray, Any]]:
  future, rests = job
  ids, lengths = future.result()
  yield from zip(np.split(ids, np.cumsum(lengths)[:-1]), rests, strict=True)


def _start_worker(model: bytes):
  global _tokenizer
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
  _end_with_parent()
  _tokenizer = Tokenizer(model)


def _end_with_parent():
  """Ends this process when its parent is gone, however that ended."""
  def watch():
    multiprocessing.parent_process().join()
    os._exit(1)
  threading.Thread(target=watch, daemon=True).start()


def _encode_job(texts: list[bytes]) -> tuple[np.ndarray, list[int]]:
  """The ids of all texts one after the other (one array crosses faster), and how many of each."""
  ids = [_encode_checked(_tokenizer, text) for text in texts]
  return np.concatenate(ids), [len(x) for x in ids]


def _encode_checked(tokenizer: Tokenizer, text: bytes) -> np.ndarray:
  ids = tokenizer.encode(text)
  # Bits per byte rest on this count, so a tokenizer that loses text must not get through.
  if int(tokenizer.piece_bytes_v[ids].sum()) != len(text):
    raise UserError(f"the tokenizer lost part of a document that starts with {text[:40]!r}: train "
                    f"another (leave config.tokenizer.path empty)")
  return ids


def call(function: Callable, *args):
  """`function(*args)` in a process of its own, which an exception here, Ctrl-C too, ends at once.

  Python handles signals between bytecodes, so a long call into C++ would make Ctrl-C wait.
  """
  context = multiprocessing.get_context("spawn")
  receiver, sender = context.Pipe(duplex=False)
  process = context.Process(target=_answer, args=(sender, function, args), daemon=True)
  process.start()
  sender.close()
  try:
    error, result = receiver.recv()
  except EOFError as error:
    raise UserError("the tokenizer's process was killed, probably for want of memory: lower "
                    "config.tokenizer.sample_bytes") from error
  finally:
    process.terminate()
    process.join()
  if error is not None:
    raise error
  return result


def _answer(sender, function: Callable, args: tuple):
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  _end_with_parent()
  with contextlib.closing(sender):
    try:
      sender.send((None, function(*args)))
    except Exception as error:
      sender.send((error, None))
