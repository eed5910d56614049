"""Whether attention scores of all pairs of tokens lie in memory: O(T²) a sequence and head.

A kernel keeps them on the chip (Dao et al. 2022). An array of the program is taken for scores of
one layer if all of this is so:

  - It is a result in the device's main memory; fusions are one instruction, what stays inside them
    or in VMEM or CMEM is not in memory. Parameters and tuples are nobody's result.
  - It holds floats. Masks, one per pair and sequence and shared by all heads, are not scores.
  - Two of its axes are rows and keys: T / C rows (C: context) and T or T + 1 keys, one more
    for relative positions before they are shifted; or one axis is the product of the two.
  - It has at least b h numbers for each such pair: b sequences and h heads of a device.
  - It does not have the shape of a weight or of its gradient, of one layer or of all.

Because of b h, an activation of b T d_model numbers is no hit where d_model is T, nor d_ff, unless
h is 1. In that one case the two cannot be told apart by shape, and the answer is not given.
With `model.attention_block` below T / C no array has two such axes: memory is then O(block T).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable

from chinchilla_jax import config as schema
from chinchilla_jax.model import transformer
from chinchilla_jax.parallel import hlo_walk, rules
from chinchilla_jax.parallel.hlo_text import Array, Module
from chinchilla_jax.parallel.layout import Layout

_FLOATS = ("f64", "f32", "bf16", "f16")
_NOT_MADE = {"parameter", "tuple", "get-tuple-element", "while", "conditional", "call", "bitcast",
             "constant", "optimization-barrier"}


@dataclasses.dataclass(frozen=True)
class Scores:
  """What was looked for.

  Attributes:
    rows, keys: tokens of a device, tokens of a sequence.
    pieces: sequences of a microbatch on a device times its heads.
    sequences: of a microbatch on a device.
    lookalikes: sizes that other axes of activations have on a device.
    weights: dims of weights that are no scores, whatever their axes.
  """

  rows: int
  keys: int
  pieces: int
  sequences: int
  lookalikes: tuple[int, ...] = ()
  weights: tuple[tuple[int, ...], ...] = ()

  @classmethod
  def of(cls, experiment: schema.Experiment, layout: Layout, at_a_time: int) -> "Scores":
    """Those of a config on a mesh, with `at_a_time` sequences of a microbatch on a device."""
    model, sizes, t = experiment.model, layout.mesh.shape, experiment.data.seq_len
    tensor = sizes["tensor"]
    state = {"params": transformer.abstract(model, "bfloat16"),
             "optimizer": {"mu": transformer.abstract(model, "float32")}}
    cut = lambda entry, axes: tuple(
        n // math.prod(sizes[axis] for axis in by if axis in axes)
        for n, by in itertools.zip_longest(
            entry.shape, rules.axes_of(entry.resolved.spec), fillvalue=()))
    weights = {cut(entry, axes) for entry in layout.entries(state)
               for axes in ((), ("tensor",), tuple(sizes))}
    axes = {model.d_model, model.d_ff, model.vocab_size, model.n_heads * model.kv_size}
    return cls(t // sizes["context"], t, at_a_time * model.n_heads // tensor, at_a_time,
               tuple(axes | {n // tensor for n in axes}), tuple(weights))

  @property
  def ambiguous(self) -> bool:
    """Whether an activation could have the shape of scores."""
    return self.pieces == self.sequences and bool(
        {self.rows, self.keys, self.keys + 1} & set(self.lookalikes))


def largest(module: Module, wanted: Scores) -> tuple[str, int] | None:
  """(shape, bytes) of the largest array of scores in memory; None where there is none.

  Raises:
    ValueError: they cannot be told from activations; says why.
  """
  if wanted.ambiguous:
    raise ValueError(f"an axis of activations is as long as a sequence ({wanted.keys:,}) and a "
                     "device has one head")
  hits = [array for computation, _ in hlo_walk.unfused(module)
          for i in computation.instructions.values() if i.opcode not in _NOT_MADE
          for array in i.arrays if _is_scores(array, wanted)]
  if not hits:
    return None
  array = max(hits, key=lambda a: a.bytes)
  return f"{array.dtype}[{','.join(map(str, array.dims))}]", array.bytes


def _is_scores(array: Array, wanted: Scores) -> bool:
  if array.space or array.dtype not in _FLOATS:
    return False
  dims = tuple(n for n in array.dims if n > 1)
  if array.size < wanted.pieces * wanted.rows * wanted.keys or _same(dims, wanted.weights):
    return False
  keys = {wanted.keys, wanted.keys + 1}
  if any(n in {wanted.rows * k for k in keys} for n in dims):
    return True
  for at, n in enumerate(dims):
    if n in keys and wanted.rows in dims[:at] + dims[at + 1:]:
      return True
  return False


def _same(dims: tuple[int, ...], weights: Iterable[tuple[int, ...]]) -> bool:
  plain = lambda ns: sorted(n for n in ns if n > 1)
  return any(plain(dims) == plain(w) or (len(w) > 1 and plain(dims) == plain(w[1:]))
             for w in weights)

