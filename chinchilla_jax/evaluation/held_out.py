"""Loss on the validation split, in nats per token and in bits per byte.

Bits per byte does not depend on the tokenizer: the bits of all targets over the true UTF-8
bytes of the pieces that are targets. The beginning of a document is a target of no bytes;
its bits count.
"""

import bz2
import dataclasses
import functools
import gzip
import lzma
import math
from collections.abc import Callable
from typing import Any

import jax

from chinchilla_jax import config as schema
from chinchilla_jax.data import batches, tokens
from chinchilla_jax.parallel import processes
from chinchilla_jax.parallel.layout import Layout
from chinchilla_jax.training import step as step_lib


@dataclasses.dataclass(frozen=True)
class Result:
  """Sums over a fixed set of targets."""

  nll: float       # nats
  targets: float   # pieces
  bytes: float     # UTF-8 bytes that those pieces stand for

  @property
  def loss(self) -> float:
    """Nats per token."""
    return self.nll / self.targets

  @property
  def bits_per_byte(self) -> float:
    return self.nll / math.log(2) / self.bytes


class Stopped(Exception):
  """An evaluation was given up, for a signal."""

  def __init__(self, signal: int):
    super().__init__(f"by signal {signal}")
    self.signal = signal


class HeldOut:
  """The fixed validation set of an experiment."""

  def __init__(self, experiment: schema.Experiment, store: tokens.TokenStore, layout: Layout,
               split: str = "validation"):
    """Prepares the evaluation of parameters that lie as `layout` says."""
    size = experiment.evaluation.batch or experiment.batch.sequences
    size += -size % layout.placement.shards("batch")  # What fills it up has weight 0.
    self._layout, self._size = layout, size
    self._batches = batches.ValidationBatches(
        store.split(split), seq_len=experiment.data.seq_len, batch_size=size,
        max_tokens=experiment.evaluation.max_tokens,
        document_mask=experiment.data.document_mask)
    bytes_v = store.tokenizer.piece_bytes_v
    self._piece_bytes_v = processes.global_batch(
        lambda start, stop: {"v": bytes_v[start:stop]}, layout.replicated, len(bytes_v))["v"]
    evaluate = step_lib.make_eval_step(experiment, layout)

    def voted(params, batch, piece_bytes_v, vote):
      return evaluate(params, batch, piece_bytes_v) | {"stop_signal": processes.counted(vote)}

    self._step = jax.jit(voted, out_shardings=layout.replicated,
                         compiler_options=layout.compiler_options)

  def __call__(self, params: Any, beat: Callable[[], None] = lambda: None,
               ballot: Callable[[], int] = lambda: 0) -> Result:
    """Evaluates every target of the set once, in float64 sums of float32 batches.

    Args:
      params: laid out as the layout says.
      beat: called after every batch, so that a watchdog sees that it goes on.
      ballot: the signal by which this process asks all to stop, or 0 (`processes.vote`).

    Raises:
      Stopped: some process asked; on all of them, after the same batch.
    """
    sums: list[dict[str, jax.Array]] = []
    for index in range(len(self._batches)):
      batch = processes.global_batch(functools.partial(self._batches.rows, index),
                                     self._layout.rows, self._size)
      vote = processes.vote(self._layout.mesh, ballot())
      sums.append(self._step(params, batch, self._piece_bytes_v, vote))
      if index:  # One is computed while the next is made, no more.
        if signal := int(jax.device_get(sums[-2]["stop_signal"])):
          raise Stopped(signal)
      beat()
    sums = jax.device_get(sums)
    total = lambda name: sum(float(part[name]) for part in sums)
    return Result(total("nll"), total("targets"), total("bytes"))


def compressors(text: bytes) -> dict[str, float]:
  """Bits per byte of general compressors over the whole text at once.

  A model is charged for nothing but its predictions, and starts afresh at every document and
  sequence; a compressor starts knowing nothing, and sees all documents in one window.
  """
  packed = {"gzip -9": len(gzip.compress(text, 9)), "bzip2 -9": len(bz2.compress(text, 9)),
            "xz -9": len(lzma.compress(text, preset=9))}
  return {name: 8 * size / len(text) for name, size in packed.items()}
