"""The fewest bytes that a device can send in a step and still keep to its strategy and mesh.

Worked out from config and mesh alone, by what the strategies are defined to do; nothing compiled is
read. What a compiled program sends (`hlo`), divided by this, says how much of it is the
partitioner's doing: 1 is ideal, 2 sends everything twice.

S, D, C, T are the sizes of slice, data, context and tensor; M microbatches; b sequences of a
microbatch on one device; L its layers. A gather, or a scatter of sums, of an array of N bytes over
n devices makes each of them send N (n-1)/n, a sum for all of them twice that; no algorithm sends
less (Patarasuk & Yuan 2009).

Weights, each with its own cut by the layout (small ones may be whole). E: bytes of what a device
multiplies with, cut over tensor at most; p: pieces over data and context in which its parameter
lies; o: those of its optimizer state.

  gather for use   E (p-1)/p, M times, for forward, and M times for backward, because ZeRO-3 frees a
                   layer's weights after use (Rajbhandari et al. 2020, section 7). A rematerialised
                   forward pass shares the gather of the backward pass beside it. With
                   remat none the gathered weights are among what backward finds saved: M in all.
                   The embedding is held from look-up to logits, whose gradient is made on the spot,
                   and the final norm ends one pass and begins the other: M times in all.
  gather updated   E/p (o/p-1)/(o/p), once: parameters that lie coarser than their optimizer state
                   (`deepmind`) are made whole after the update.
  scatter gradient E (o-1)/o in the gradients' dtype, M times: a device keeps no gradient beyond its
                   piece, so every microbatch has to be handed over (ZeRO, stages 2 and 3). The two
                   uses of the embedding are added up before they travel.
  sum keys         2 K (o-1)/o, M times, K the bytes of all relative keys: W_r multiplies
                   sinusoids, which every device has. So its gradient can be summed before that
                   product, at the keys, and takes the place of W_r's part of `scatter gradient`
                   where it is less. Nor does backward gather W_r, but to make the keys again (remat
                   full).
  sum gradient     2 E/o (r-1)/r, once: the r = S D C / o devices that hold the same piece (slices,
                   or all of them with `replicated`) add up after the last microbatch.

Activations over tensor. Between blocks tokens lie over tensor, inside a block heads and
feed-forward do (Korthikanti et al. 2022, section 4.2.2). One move is a gather or scatter of
b t d_model numbers (t = seq_len / C): b t d_model (T-1)/T.

  forward          4 a layer: gather and scatter, of attention and of the feed-forward
  backward         4 a layer, their mirror images
  remat full       3 more: all of the forward pass but the last scatter, which nothing needs
  remat dots       2 more: the gathered inputs, for the gradients of the matrices that they go into;
                   outputs of matrices are saved after their scatter
  remat none       none more: the gathered inputs are saved
  ends             4: the look-up's scatter, the logits' gather, and their mirror images (the
                   vocabulary lies over tensor)

Where t does not divide by T the tokens are whole on every device between blocks, and a gather and
scatter become one sum for all, of two moves: 4, 4, and 2 more with full, 0 with dots.

Activations over context. Every query needs all keys and values: one move gathers both, of one
layer: 2 b seq_len (n_heads / T) kv_size (C-1)/C numbers.

  forward 1, backward 1 (scatter of their gradients), and with remat full or dots 1 more, since what
  is saved is not gathered

Not counted, less than a thousandth together: scalars (norms, metrics), softmax statistics of the
logits, segment ids. Gradients of gains and biases need nothing over tensor: they can be summed
where the tokens have been gathered anyway. With a custom sharding (`mesh.overrides`) the formulas
are the same, and its cuts count.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping

from jax.sharding import AbstractMesh, AxisType

from chinchilla_jax import config as schema
from chinchilla_jax import durations
from chinchilla_jax.model import transformer
from chinchilla_jax.parallel import rules
from chinchilla_jax.parallel.layout import Layout

_BYTES = {"bfloat16": 2, "float32": 4}
# Moves over tensor a layer, forward and backward and again, by remat; the second row: sums.
_MOVES = {True: {"none": 8, "dots": 10, "full": 11}, False: {"none": 8, "dots": 8, "full": 10}}
_ENDS = 4


@dataclasses.dataclass(frozen=True)
class Term:
  """One kind of traffic of a step.

  Attributes:
    name: as the module's docstring has it, such as "gather for use".
    kind: the collective: "all-gather", "reduce-scatter" or "all-reduce".
    axes: mesh axes of its groups, in the mesh's order.
    group_size: devices of a group.
    wire_bytes: that a device sends in a step.
  """

  name: str
  kind: str
  axes: tuple[str, ...]
  group_size: int
  wire_bytes: float


def terms(experiment: schema.Experiment, mesh_shape: Mapping[str, int],
          sequences: int | None = None) -> list[Term]:
  """The traffic of a step that the strategy cannot do without; terms of no bytes are left out.

  Args:
    experiment: model, strategy, remat, microbatches and dtypes are read.
    mesh_shape: size of each axis of `mesh.AXES`, in that order.
    sequences: in the batch; None for config.batch.sequences.

  Returns:
    One term a name, collective and mesh axes; sum(t.wire_bytes for t in terms) is the minimum.
  """
  sequences = sequences or experiment.batch.sequences
  parts = durations.microbatches(experiment.batch, sequences)
  found: dict[tuple[str, str, tuple[str, ...]], float] = {}
  for name, kind, axes, sent in (*_weights(experiment, mesh_shape, parts),
                                 *_over_tensor(experiment, mesh_shape, sequences),
                                 *_over_context(experiment, mesh_shape, sequences)):
    axes = tuple(axis for axis in mesh_shape if axis in axes and mesh_shape[axis] > 1)
    if sent > 0:
      found[name, kind, axes] = found.get((name, kind, axes), 0.0) + sent
  return [Term(name, kind, axes, math.prod(mesh_shape[axis] for axis in axes), sent)
          for (name, kind, axes), sent in found.items()]


def wire_bytes(experiment: schema.Experiment, mesh_shape: Mapping[str, int],
               sequences: int | None = None) -> float:
  """Bytes that a device sends in a step at least: the sum of `terms`, same arguments."""
  return sum(term.wire_bytes for term in terms(experiment, mesh_shape, sequences))


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
  """The mesh of these axes, without devices."""
  return AbstractMesh(tuple(sizes.values()), tuple(sizes),
                      axis_types=(AxisType.Auto,) * len(sizes))


_Row = tuple[str, str, tuple[str, ...], float]


def _weights(experiment: schema.Experiment, sizes: Mapping[str, int],
             parts: int) -> Iterator[_Row]:
  held = _BYTES[experiment.precision.parameters]
  handed = 4 if experiment.precision.gradients == "float32" else held
  abstract = _abstract(dataclasses.replace(experiment.model, remat="none"))
  layout = Layout(experiment, abstract_mesh(sizes))
  table = [rule for rule in rules.STRATEGIES[experiment.mesh.strategy].parameters
           if rule[1] == ("tensor",)]
  for param, moment in zip(layout.entries({"params": abstract}),
                           layout.entries({"optimizer": {"mu": abstract}}), strict=True):
    used = rules.pieces(rules.resolve(param.shape, param.names, tuple(table), sizes).spec, sizes)
    n = math.prod(param.shape) / used
    lies, updated = _beyond_tensor(param.resolved.spec), _beyond_tensor(moment.resolved.spec)
    pieces = lambda axes: math.prod(sizes[axis] for axis in axes)
    p, o = pieces(lies), pieces(updated)
    of_relative = param.path.endswith("/w_relative")
    again = param.path.startswith("params/blocks/") and experiment.model.remat in (
        ("full",) if of_relative else ("full", "dots"))
    times = parts * (2 if again else 1)
    yield ("gather for use", "all-gather", lies, times * n * held * (1 - 1 / p))
    late = tuple(axis for axis in updated if axis not in lies)
    yield ("gather updated", "all-gather", late, n / p * held * (1 - 1 / pieces(late)))
    scattered = parts * n * handed * (1 - 1 / o)
    keys = n / experiment.model.d_model * (experiment.data.seq_len + 1)
    summed = 2 * parts * keys * handed * (1 - 1 / o)
    if of_relative and summed < scattered:
      yield "sum keys", "all-reduce", updated, summed
    else:
      yield "scatter gradient", "reduce-scatter", updated, scattered
    alike = tuple(axis for axis in ("slice", "data", "context") if axis not in updated)
    yield ("sum gradient", "all-reduce", alike, 2 * n / o * handed * (1 - 1 / pieces(alike)))


@functools.lru_cache(maxsize=8)
def _abstract(model: schema.Model):
  return transformer.abstract(model, "bfloat16")


def _beyond_tensor(spec) -> tuple[str, ...]:
  return tuple(axis for axes in rules.axes_of(spec) for axis in axes if axis != "tensor")


def _over_tensor(experiment: schema.Experiment, sizes: Mapping[str, int],
                 sequences: int) -> Iterator[_Row]:
  model, tensor = experiment.model, sizes["tensor"]
  length = experiment.data.seq_len / sizes["context"]
  cut = length % tensor == 0
  # All microbatches together, so M is not in it.
  tokens = sequences / (sizes["slice"] * sizes["data"]) * length
  move = tokens * model.d_model * _BYTES[experiment.precision.activations] * (1 - 1 / tensor)
  moves = model.n_layers * _MOVES[cut][model.remat] + _ENDS
  if not cut:
    yield "tokens over tensor", "all-reduce", ("tensor",), moves * move
    return
  # Gathers and scatters mirror each other; what is done again is mostly gathers.
  scatters = model.n_layers * (5 if model.remat == "full" else 4) + _ENDS // 2
  yield "tokens over tensor", "all-gather", ("tensor",), (moves - scatters) * move
  yield "tokens over tensor", "reduce-scatter", ("tensor",), scatters * move


def _over_context(experiment: schema.Experiment, sizes: Mapping[str, int],
                  sequences: int) -> Iterator[_Row]:
  model, context = experiment.model, sizes["context"]
  tokens = sequences / (sizes["slice"] * sizes["data"]) * experiment.data.seq_len
  move = (2 * tokens * model.n_heads / sizes["tensor"] * model.kv_size
          * _BYTES[experiment.precision.activations] * (1 - 1 / context)) * model.n_layers
  gathers = 1 if model.remat == "none" else 2
  yield "keys and values over context", "all-gather", ("context",), gathers * move
  yield "keys and values over context", "reduce-scatter", ("context",), move
