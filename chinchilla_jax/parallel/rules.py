"""Logical axis -> mesh axis: one table per strategy, and one function that reads them.

A table is a list of rules (logical axis, mesh axes), tried in order. A rule cuts an array if
the array has that axis uncut, the mesh axes are not yet used for it, and its size divides;
else the next rule has its turn, and the report says which one could not be kept.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

from chinchilla_jax.errors import UserError

Rules = tuple[tuple[str, tuple[str, ...]], ...]
Names = Sequence[str | None]

# Data parallelism: who holds other sequences, or other parts of the same ones, needs the same
# weights, so weights can be cut over both. Not over slices: the network between them is slow.
_SHARDED_OVER = (("data", "context"), ("data",), ("context",))
_FSDP: Rules = tuple((name, axes) for name in ("embed", "mlp", "vocab", "heads", "head_dim")
                     for axes in _SHARDED_OVER)
# Megatron's cut of a layer (Shoeybi et al. 2019): columns of what goes in, rows of what comes out.
_TENSOR: Rules = (("heads", ("tensor",)), ("mlp", ("tensor",)), ("vocab", ("tensor",)))

ACTIVATIONS: Rules = (
    ("batch", ("slice", "data")),
    ("length", ("context",)),
    # Between layers nothing mixes tokens, so they can lie over tensor as well (Korthikanti et al.
    # 2022, section 4.2.2): what each layer leaves for the backward pass shrinks by that factor.
    ("residual", ("context", "tensor")),
    ("residual", ("context",)),
    *_TENSOR,
)


@dataclasses.dataclass(frozen=True)
class Strategy:
  """Where parameters lie between steps, and where optimizer state (and gradients) do."""

  parameters: Rules
  optimizer: Rules
  why: str


STRATEGIES: Mapping[str, Strategy] = {
    "replicated": Strategy((), (), "every device holds all; the batch is cut"),
    "fsdp": Strategy(_FSDP, _FSDP, "ZeRO-3 (Rajbhandari et al. 2020): weights are gathered a layer "
                     "at a time"),
    "deepmind": Strategy(_TENSOR, _TENSOR + _FSDP, "Hoffmann et al. 2022, section 4.1: "
                         "distributed optimizer state; parameters are gathered once a step"),
    "fsdp_tensor": Strategy(_TENSOR + _FSDP, _TENSOR + _FSDP, "both cuts for everything"),
}


@dataclasses.dataclass(frozen=True)
class Resolved:
  """How one array is cut.

  Attributes:
    spec: entry per axis.
    fell_back: rules that applied to it but whose mesh axes do not divide its size, as text.
  """

  spec: PartitionSpec
  fell_back: tuple[str, ...] = ()


def resolve(shape: Sequence[int], names: Names, rules: Rules, mesh_shape: Mapping[str, int],
            whole_below: int = 0) -> Resolved:
  """Cuts an array by rules.

  Args:
    shape: of the array.
    names: logical axis of each of its axes; None and unknown ones stay whole.
    rules: tried in order.
    mesh_shape: sizes of mesh axes; those of size one vanish.
    whole_below: an array of fewer elements than this (its layers axis not counted) is cut over
      tensor alone.
  """
  assert len(shape) == len(names), (shape, names)
  entries: list[tuple[str, ...]] = [()] * len(names)
  used: set[str] = set()
  failed: dict[int, str] = {}
  elements = math.prod(n for n, name in zip(shape, names, strict=True) if name != "layers")
  for name, axes in rules:
    axes = tuple(axis for axis in axes if mesh_shape.get(axis, 1) > 1)
    if not axes or name not in names or used & set(axes):
      continue
    if elements < whole_below and axes != ("tensor",):
      continue
    index = list(names).index(name)
    if entries[index]:
      continue
    pieces = math.prod(mesh_shape[axis] for axis in axes)
    if shape[index] % pieces:
      failed.setdefault(index, f"{name} {shape[index]} does not divide by {'+'.join(axes)} "
                               f"{pieces}")
      continue
    entries[index] = axes
    used |= set(axes)
  return Resolved(spec_of(entries), tuple(failed.values()))


def spec_of(entries: Sequence[tuple[str, ...]]) -> PartitionSpec:
  """A PartitionSpec in its shortest form: trailing whole axes are left out."""
  short = [axes[0] if len(axes) == 1 else (axes or None) for axes in entries]
  while short and short[-1] is None:
    short.pop()
  return PartitionSpec(*short)


def parse_spec(text: str, shape: Sequence[int], mesh_shape: Mapping[str, int],
               where: str) -> PartitionSpec:
  """Reads a sharding such as "tensor,-,data+context"; mesh axes of size one vanish.

  Raises:
    UserError: another number of axes than the array, an unknown mesh axis, one used twice, or
      one that does not divide.
  """
  words = [word.strip() for word in text.split(",")]
  if len(words) != len(shape):
    raise UserError(f"{where}: {text!r} has {len(words)} entries for an array of shape "
                    f"{list(shape)}; give one per axis, '-' for whole")
  entries = []
  for size, word in zip(shape, words, strict=True):
    axes = tuple(axis for axis in word.split("+") if axis not in ("", "-"))
    for axis in axes:
      if axis not in mesh_shape:
        raise UserError(f"{where}: {text!r} names {axis!r}; mesh axes are "
                        f"{', '.join(mesh_shape)}")
    axes = tuple(axis for axis in axes if mesh_shape[axis] > 1)
    pieces = math.prod(mesh_shape[axis] for axis in axes)
    if size % pieces:
      raise UserError(f"{where}: {text!r} cuts an axis of {size} into {pieces}; choose one that "
                      "divides")
    entries.append(axes)
  flat = [axis for axes in entries for axis in axes]
  if len(flat) != len(set(flat)):
    raise UserError(f"{where}: {text!r} uses a mesh axis twice")
  return spec_of(entries)


def axes_of(spec: PartitionSpec) -> tuple[tuple[str, ...], ...]:
  """Mesh axes of each entry of a spec."""
  return tuple(() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
               for entry in spec)


def pieces(spec: PartitionSpec, mesh_shape: Mapping[str, int]) -> int:
  """Into how many different parts a spec cuts an array."""
  return math.prod(mesh_shape[axis] for axes in axes_of(spec) for axis in axes)
