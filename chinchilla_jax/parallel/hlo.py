"""What one device does in one step, read from the optimised HLO of a compiled SPMD program.

`compiled.cost_analysis()` counts the body of a scan once, whatever its length; everything
here is multiplied by the trip counts of the loops around it. Conventions:

- **FLOPs** are those of matrix products only (dot, convolution, cuBLAS calls): two for each
  multiply-add. A convolution counts those that meet data, not padding or the holes of a
  dilation, so a batched product that the TPU compiler wrote as one counts like the dot.
- **Wire bytes** are what a device sends with the ring algorithm: all-gather, reduce-scatter
  and all-to-all (n-1)/n of the full array, all-reduce twice that, a permute or broadcast its
  payload. The full array is the output of an all-gather and the input of the others.
- **HBM bytes**: each instruction of a computation that is not itself fused (a fusion is one
  instruction) reads its operands and writes its result once. Nothing is counted for
  parameters, constants, tuples, bitcasts, the -done half of a pair, and while, conditional
  and call themselves; their bodies are counted. A slice, dynamic-slice or gather, fused or
  not, reads only what it yields; a dynamic-update-slice or scatter writes only the update.
  Buffers outside HBM (`S(n)` in a TPU layout: VMEM, CMEM, scalars, host) count nothing.
- Of a conditional, the branch with the most FLOPs counts (of equals, the most HBM bytes).
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import numpy as np

from chinchilla_jax.parallel import hlo_flops, hlo_kernels, hlo_slices, hlo_text, hlo_walk
from chinchilla_jax.parallel.hlo_overlap import (
    KINDS,
    NO_OP_CALLS,
    Windows,
    chain_of,
    offloaded,
    target,
)
from chinchilla_jax.parallel.hlo_text import Computation, Frame, Instruction, Module

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while",
         "conditional", "call", "after-all", "partition-id", "replica-id",
         "optimization-barrier", "add-dependency", "domain"}
_SLICES = ("slice", "dynamic-slice", "gather")
_UPDATES = ("dynamic-update-slice", "scatter")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction.

  `axes` are in the order of the mesh; () for groups of one device, ("?",) for groups that lie
  along no set of axes. `payload_bytes` is the full array of one execution, `wire_bytes` what a
  device sends in a step. `asynchronous`: it has a start and a done, so other work may hide
  it. `where` is the tail of the source's op_name. `overlaps`: there is such work, see
  `hlo_overlap`.
  """
  kind: str
  axes: tuple[str, ...]
  group_size: int
  dtype: str
  payload_bytes: int
  executions: int
  wire_bytes: float
  asynchronous: bool
  where: str
  overlaps: bool = False


@dataclasses.dataclass(frozen=True)
class Program:
  """One step of one device.

  `loops` are (name, trip count), outer before inner. `opaque` are the custom calls, such as
  Pallas kernels, whose FLOPs the text does not show: (target, executions).
  """
  collectives: tuple[Collective, ...]
  matmul_flops: float
  hbm_bytes: float
  loops: tuple[tuple[str, int], ...]
  opaque: tuple[tuple[str, int], ...] = ()

  def by_axes(self) -> dict[tuple[str, tuple[str, ...]], tuple[int, float, float]]:
    """{(kind, axes): (executions, wire bytes, asynchronous share of the wire bytes)}."""
    merged = {}
    for c in self.collectives:
      row = merged.setdefault((c.kind, c.axes), [0, 0.0, 0.0])
      row[0] += c.executions
      row[1] += c.wire_bytes
      row[2] += c.wire_bytes * c.asynchronous
    return {key: (n, wire, hidden / wire if wire else 0.0)
            for key, (n, wire, hidden) in merged.items()}

  def overlap(self, *keys: tuple[str, tuple[str, ...]]) -> float:
    """Share of the wire bytes, of some (kind, axes) or of all, that has work to hide behind."""
    chosen = [c for c in self.collectives if not keys or (c.kind, c.axes) in keys]
    total = sum(c.wire_bytes for c in chosen)
    return sum(c.wire_bytes for c in chosen if c.overlaps) / total if total else 0.0


def analyse(text: str | Module, mesh_shape: Mapping[str, int]) -> Program:
  """What one device does in one execution of the program.

  Args:
    text: `compiled.as_text()` of a program lowered for that mesh, or what `hlo_text.parse` made
      of it. With several TPU slices it is the program of one, and what goes between them is read
      from its transfers.
    mesh_shape: size of each axis, in the order of `mesh.axis_names`. Device ids in the text
      index `mesh.devices.flat`, as they do for a program of `jax.jit` over the mesh.

  Raises:
    ValueError: the program was compiled for another number of devices, the trip count of a
      loop cannot be found, or a form is not known. Nothing is guessed.
  """
  module = hlo_text.parse(text) if isinstance(text, str) else text
  inside, outer = hlo_slices.split(mesh_shape, module.replica_count * module.num_partitions)
  t = _Tally()
  _Reader(module, inside, outer).walk(Frame(module.computations[module.entry]), 1, t)
  return Program(tuple(t.collectives), t.flops, t.hbm, tuple(t.loops), tuple(t.opaque.items()))


@dataclasses.dataclass
class _Tally:
  flops: float = 0.0
  hbm: float = 0.0
  collectives: list[Collective] = dataclasses.field(default_factory=list)
  loops: list[tuple[str, int]] = dataclasses.field(default_factory=list)
  opaque: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def add(self, other: "_Tally") -> None:
    for field in dataclasses.fields(self):
      setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class _Reader:
  """Walks the computations from the entry; holds what the walk looks up again and again."""

  def __init__(self, module: Module, mesh_shape: dict[str, int], outer: str):
    self.windows = Windows(module)
    self.outer = outer  # The axis over slices, where the program is that of one slice.
    self.module, self.mesh_shape = module, mesh_shape
    self.users, self.reads = functools.cache(self._users), functools.cache(self._reads)
    # The TPU compiler runs one collective through a chain of fusions: the first holds it with
    # an AsyncCollectiveStart, and each later one repeats the instruction to carry it on.
    self.starts, chained = {}, {}
    for c in module.computations.values():
      for i in c.instructions.values():
        if i.opcode == "custom-call" and target(i) == "AsyncCollectiveStart":
          self.starts |= {(c.name, o.name): chain_of(o) for o in c.operands(i)}
        elif "chain_id=" in i.attributes:
          chained[c.name, i.name] = chain_of(i)
    self.carried_on = {place for place, chain in chained.items()
                       if place not in self.starts and chain in self.starts.values()}

  def walk(self, frame: Frame, times: int, tally: _Tally, fused: bool = False,
           asynchronous: bool = False) -> None:
    """Adds `times` executions of a computation to the tally."""
    computation = frame.computation
    call = lambda name, arguments, body=None: Frame(
        self.module.computations[name], frame, i, arguments, body)
    for i in computation.instructions.values():
      opcode = i.opcode.removesuffix("-start")
      elsewhere = offloaded(i, self.module)
      if not fused and not elsewhere:
        tally.hbm += times * self.hbm_bytes(i, computation)
      if elsewhere:
        self.walk(call(elsewhere, i.operands), times, tally, fused, asynchronous=True)
      elif opcode == "while":
        trips = hlo_text.trip_count(self.module, frame, i)
        tally.loops.append((i.name, trips))
        body = i.callee("body")
        self.walk(call(body, i.operands, body), times * trips, tally)
      elif opcode == "conditional":
        branches = hlo_walk.branches(i)
        tallies = [_Tally() for _ in branches]
        for branch, operand, costs in zip(branches, i.operands[1:], tallies, strict=True):
          self.walk(call(branch, (operand,)), times, costs)
        tally.add(max(tallies, key=lambda t: (t.flops, t.hbm)))
      elif opcode == "send":
        tally.collectives += self.transfer(i, frame, times)
      elif opcode in KINDS:
        if not self.carries_on(i, computation):
          tally.collectives.append(self.collective(i, frame, times, fused, asynchronous))
      elif opcode in ("call", "fusion", "async"):
        self.walk(call(i.callee("to_apply", "calls"), i.operands), times, tally,
                  fused or opcode != "call", asynchronous or opcode == "async")
      elif opcode in ("dot", "scaled-dot", "convolution") or re.search("gemm|matmul", target(i)):
        tally.flops += times * hlo_flops.matmul(i, computation)
      elif opcode == "custom-call" and target(i) not in NO_OP_CALLS:
        if cost := hlo_kernels.cost(i):
          tally.flops += times * cost.flops
          # What it reads more than once.
          tally.hbm += times * max(0, cost.hbm_bytes - self.hbm_bytes(i, computation))
        else:
          tally.opaque[target(i)] += times

  def carries_on(self, i: Instruction, computation: Computation) -> bool:
    """Whether this is a later part of a collective that another fusion started."""
    return (computation.name, i.name) in self.carried_on or target(i) == "AsyncCollectiveDone"

  def collective(self, i: Instruction, frame: Frame, times: int, fused: bool,
                 asynchronous: bool) -> Collective:
    computation = frame.computation
    kind = i.opcode.removesuffix("-start")
    inputs = [array for operand in computation.operands(i) for array in operand.arrays]
    payload = sum(array.bytes for array in inputs)
    if kind == "collective-permute":
      axes, size, moved = self.permute_axes(i)
      sent = float(moved)
    else:
      groups = hlo_text.device_groups(i, self.module.replica_count, self.module.num_partitions)
      size = max(map(len, groups))
      axes = _axes_of(groups, tuple(self.mesh_shape.items()))
      if kind == "all-gather":
        payload *= size
      elif kind == "all-reduce" and fused and self.is_scattered(computation, i.name):
        kind = "reduce-scatter"
      sent = {"all-reduce": 2.0, "collective-broadcast": size / max(1, size - 1)}.get(kind, 1.0)
      sent *= (size - 1) / size
    if kind == "ragged-all-to-all" or "slice_sizes=" in i.attributes:
      payload = inputs[0].bytes  # A part of the first operand: this is an upper bound.
    # An all-reduce that the compiler fused has no op_name, but its fusion has one.
    where = _where(i) or (_where(frame.call) if frame.call else "")
    split = (asynchronous or i.opcode.endswith("-start")
             or (computation.name, i.name) in self.starts) and '"is_sync":true' not in i.attributes
    return Collective(kind, axes, size, inputs[0].dtype, payload, times, times * sent * payload,
                      split, where, split and self.windows.hides(i, frame))

  def transfer(self, i: Instruction, frame: Frame, times: int) -> list[Collective]:
    """What a `send` does between slices; nothing if it goes elsewhere."""
    if (found := hlo_slices.transfer(i)) is None:
      return []
    kind, size = found
    array = frame.computation.operands(i)[0].arrays[0]
    payload = array.bytes * (size if kind == "all-gather" else 1)
    sent = (2 if kind == "all-reduce" else 1) * (size - 1) / size * payload
    return [Collective(kind, (self.outer,), size, array.dtype, payload, times, times * sent, True,
                       _where(i), self.windows.hides(i, frame))]

  def permute_axes(self, i: Instruction) -> tuple[tuple[str, ...], int, bool]:
    """The axes along which any pair differs, their size, and whether any pair does."""
    listed = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", i.attributes)[1]
    pairs = np.array(re.findall(r"(\d+),(\d+)", listed), int).reshape(-1, 2)
    pairs *= 1 if "channel_id=" in i.attributes else self.module.num_partitions
    if (pairs >= math.prod(self.mesh_shape.values())).any():
      return ("?",), len(pairs), True
    where = np.array(np.unravel_index(pairs, tuple(self.mesh_shape.values())))
    differs = (where[..., 0] != where[..., 1]).any(1)
    axes = tuple(a for a, moves in zip(self.mesh_shape, differs, strict=True) if moves)
    return axes, math.prod(self.mesh_shape[a] for a in axes), bool(axes)

  def is_scattered(self, computation: Computation, name: str) -> bool:
    """Whether every use of an all-reduce is a dynamic-slice: a reduce-scatter on TPUs."""
    users = self.users(computation.name).get(name)
    return bool(users) and all(
        u.opcode == "dynamic-slice" or u.opcode == "bitcast" and self.is_scattered(
            computation, u.name) for u in users)

  def hbm_bytes(self, i: Instruction, computation: Computation) -> int:
    """What one execution of an instruction moves, by the convention of this module."""
    if i.opcode in _FREE or i.opcode.endswith(("-done", "-update")) or target(i) in NO_OP_CALLS:
      return 0
    operands, total = i.operands, self.written(i, computation)
    for name in dict.fromkeys(operands):
      whole = _hbm(computation.instructions[name].arrays)
      if whole:
        parts = [self.read(i, n) for n, operand in enumerate(operands) if operand == name]
        total += whole if None in parts else min(whole, sum(parts))
    return total

  def read(self, i: Instruction, position: int) -> int | None:
    """Bytes that an instruction reads of the operand at `position`; None: all of it."""
    if i.opcode.removesuffix("-start") in _SLICES and position == 0:
      return sum(array.bytes for array in _results(i))
    if i.opcode in _UPDATES and position < _updates(i)[0]:
      return 0
    if i.opcode == "fusion":
      return self.reads(i.callee("calls"), position)
    return None

  def _reads(self, callee: str, index: int) -> int | None:
    """Bytes that a fusion reads of its parameter `index`; None: all of it."""
    computation = self.module.computations[callee]

    def used(name: str) -> int | None:
      total = 0
      for user in self.users(callee).get(name, ()):
        if user.opcode == "tuple" and user.root or self.carries_on(user, computation):
          continue
        parts = ([used(user.name)] if user.opcode == "bitcast" and not user.root else
                 [self.read(user, n) for n, o in enumerate(user.operands) if o == name])
        if None in parts:
          return None
        total += sum(parts)
      return total

    return used(computation.parameter(index))

  def written(self, i: Instruction, computation: Computation) -> int:
    """Bytes that an instruction writes."""
    if i.opcode in _UPDATES:
      return _hbm(i.arrays[:1]) and self.update_bytes(i, computation)
    if i.opcode != "fusion":
      return _hbm(_results(i))
    inner = self.module.computations[i.callee("calls")]
    if target(inner.root) == "AsyncCollectiveStart":
      return _hbm(i.arrays[1:2])  # (operand, output, flags)
    outputs = inner.operands(inner.root) if inner.root.opcode == "tuple" else [inner.root]
    parts = [(self.output_bytes(output, inner), array)
             for output, array in zip(outputs, i.arrays, strict=False) if array.space == 0]
    return sum(array.bytes if part is None else min(part, array.bytes) for part, array in parts)

  def output_bytes(self, output: Instruction, computation: Computation) -> int | None:
    """Bytes that a fusion writes for one output; None: all of it."""
    while output.opcode == "bitcast":
      output = computation.instructions[output.operands[0]]
    if output.opcode == "parameter" or self.carries_on(output, computation):
      return 0
    if output.opcode in _UPDATES:
      below = self.output_bytes(computation.instructions[output.operands[0]], computation)
      return None if below is None else below + self.update_bytes(output, computation)
    return None

  def update_bytes(self, i: Instruction, computation: Computation) -> int:
    """Bytes of the update of a dynamic-update-slice, or of the updates of a scatter."""
    return sum(array.bytes for name in i.operands[_updates(i)[1]:_updates(i)[2]]
               for array in computation.instructions[name].arrays)

  def _users(self, name: str) -> dict[str, list[Instruction]]:
    users = {}
    for i in self.module.computations[name].instructions.values():
      for operand in dict.fromkeys(i.operands):
        users.setdefault(operand, []).append(i)
    return users


def _updates(i: Instruction) -> tuple[int, int, int]:
  """(number of arrays updated in place, first and last + 1 of the updates) as operands."""
  if i.opcode == "dynamic-update-slice":
    return 1, 1, 2
  arrays = (len(i.operands) - 1) // 2  # scatter(arrays, indices, updates)
  return arrays, arrays + 1, len(i.operands)


def _results(i: Instruction) -> tuple[hlo_text.Array, ...]:
  """The arrays that an instruction makes, without the bookkeeping of a -start."""
  if i.opcode == "copy-start":  # (to, from, flag)
    return i.arrays[:1]
  if i.opcode.endswith("-start") and i.opcode != "all-reduce-start":  # (from, to, flags)
    return hlo_text.leaves(hlo_text.parse_shape(i.shape_text)[1])
  return i.arrays


def _hbm(arrays: tuple[hlo_text.Array, ...]) -> int:
  return sum(array.bytes for array in arrays if array.space == 0)


def _where(i: Instruction) -> str:
  """The end of op_name, without the parts that every instruction of a scan shares."""
  found = re.search(r'op_name="([^"]*)"', i.attributes)
  parts = (found[1] if found else "").split("/")
  dull = {"while", "body", "cond", "eval_jaxpr", "closed_call", "checkpoint", "shard_map"}
  return "/".join([p for p in parts if p not in dull and not p.startswith("jit(")][-4:])


@functools.lru_cache(maxsize=4096)
def _axes_of(groups: tuple[tuple[int, ...], ...],
             mesh_shape: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
  """The mesh axes along which these groups lie; ("?",) where no set of axes does.

  They are all devices along those axes, or some along one: a scatter over lines of it.
  """
  names, sizes = [name for name, _ in mesh_shape], [size for _, size in mesh_shape]
  if len(set(map(len, groups))) != 1:
    return ("?",)
  ids = np.array(groups)
  if ids.min() < 0 or ids.max() >= math.prod(sizes) or len(np.unique(ids)) != ids.size:
    return ("?",)
  where = np.array(np.unravel_index(ids, sizes))
  varies = (where != where[:, :, :1]).any(2)
  axes = [n for n in range(len(names)) if varies[n, 0]]
  whole = math.prod(sizes[n] for n in axes) == ids.shape[1]
  if (varies != varies[:, :1]).any() or not (whole or len(axes) == 1):
    return ("?",)
  return tuple(names[n] for n in axes)
