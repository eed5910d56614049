"""Loss on the validation split, in nats per token and in bits per byte.

Bits per byte does not depend on the tokenizer: the bits of all targets over the true UTF-8
bytes of the pieces that are targets. The beginning of a document is a target of no bytes;
its bits count.
"""

import bz2
import dataclasses
import gzip
import lzma
import math
from typing import Any

import jax

from chinchilla_jax import config as schema
from chinchilla_jax.data import batches, tokens
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


class HeldOut:
  """The fixed validation set of an experiment."""

  def __init__(self, experiment: schema.Experiment, store: tokens.TokenStore,
               split: str = "validation"):
    self._split = store.split(split)
    self._data = experiment.data
    self._max_tokens = experiment.evaluation.max_tokens
    self._batch = experiment.evaluation.batch or experiment.batch.sequences
    self._piece_bytes_v = jax.device_put(store.tokenizer.piece_bytes_v)
    self._step = jax.jit(step_lib.make_eval_step(experiment))

  def __call__(self, params: Any) -> Result:
    """Evaluates every target of the set once, in float64 sums of float32 batches."""
    sums = []
    for batch in batches.validation_batches(
        self._split, seq_len=self._data.seq_len, batch_size=self._batch,
        max_tokens=self._max_tokens, document_mask=self._data.document_mask):
      sums.append(self._step(params, jax.device_put(batch), self._piece_bytes_v))
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
