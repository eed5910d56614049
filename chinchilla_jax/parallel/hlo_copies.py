"""Whether a compiled step holds its train state once: what is donated, and what is copied.

A state of 14 bytes a parameter is most of a device's memory. A step updates it in place if every
array of it is donated, which shows as an entry of `input_output_alias`, and if the compiler finds
no reason to copy one on the way. Both are easily lost: by an output of another sharding or dtype,
by a use after the update, by a loop that wants another layout of a weight than the one that the
program was entered with.
"""

import dataclasses
import re
from collections.abc import Mapping

from chinchilla_jax.parallel import hlo_walk
from chinchilla_jax.parallel.hlo_text import Array, Computation, Instruction, Module

# Instructions of a fusion that does nothing but copy.
_MOVES = {"parameter", "copy", "bitcast", "transpose", "reshape", "tuple", "get-tuple-element"}
_COPIES = {"copy", "transpose"}
_FOLLOWED = {"copy", "bitcast", "transpose", "reshape", "copy-start", "copy-done"}


@dataclasses.dataclass(frozen=True)
class Copies:
  """What became of the train state.

  Attributes:
    leaves: arrays of the state that the program takes.
    not_donated: names of those that no output is written over.
    found: (name, dtype, dims, executions, bytes a step) of copies, in a device's main memory, of
      whole arrays of the state or of arrays like them. The name is that of the array that is
      copied where the copy can be followed back to it, and else of one of the same dtype and
      shape: a gradient, say, or an updated value.
  """

  leaves: int
  not_donated: tuple[str, ...]
  found: tuple[tuple[str, str, tuple[int, ...], int, int], ...]

  @property
  def bytes(self) -> int:
    """Written by copies in a step."""
    return sum(row[-1] for row in self.found)


def find(module: Module, argument: str = "state", at_least: int = 2**20) -> Copies:
  """Reads the optimised program of a step for copies of its state.

  Args:
    module: the program.
    argument: name of the step's argument that is the state; parameters of the program carry it.
    at_least: bytes from which an array counts among the copies; scalars and norms do not matter.

  Raises:
    ValueError: the program has no parameter of that name.
  """
  entry = module.computations[module.entry]
  state = {i.name: (int(i.inputs), _name(i)) for i in entry.instructions.values()
           if i.opcode == "parameter" and _name(i).split("[")[0] == argument}
  if not state:
    raise ValueError(f"HLO: no parameter of the program is part of {argument!r}")
  written = {int(n) for n in re.findall(r"\{[\d, ]*\}: \((\d+),", _aliases(module.header))}
  shapes: dict[tuple[str, tuple[int, ...]], str] = {}
  for name, (_, path) in state.items():
    array = entry.instructions[name].arrays[0]
    if array.bytes >= at_least:
      shapes.setdefault(_like(array), path)
  found: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
  for computation, times in hlo_walk.unfused(module):
    for i in computation.instructions.values():
      for array in _copied(i, computation, module):
        if _like(array) in shapes:
          from_state = state.get(_source(i, computation, entry))
          path = from_state[1] if from_state else f"like {shapes[_like(array)]}"
          row = found.setdefault((path, array.dtype, array.dims), [0, 0])
          row[0] += times
          row[1] += times * array.bytes
  return Copies(len(state),
                tuple(sorted(path for number, path in state.values() if number not in written)),
                tuple((*key, *row) for key, row in found.items()))


def facts(copies: Copies) -> Mapping[str, object]:
  """The same as plain data."""
  names = ("array", "dtype", "dims", "executions", "bytes")
  return {"leaves": copies.leaves, "not_donated": list(copies.not_donated),
          "copies": [dict(zip(names, row, strict=True)) for row in copies.found],
          "bytes": copies.bytes}


def _aliases(header: str) -> str:
  found = re.search(r"input_output_alias=\{(.*?)\}, \w+=|input_output_alias=\{(.*)\}", header)
  return (found[1] or found[2]) if found else ""


def _name(i: Instruction) -> str:
  """`state['params']['embedding']['table']`, whatever the compiler's text escapes."""
  found = re.search(r'op_name="([^"]*)"', i.attributes)
  return found[1].replace("\\'", "'") if found else ""


def _like(array: Array) -> tuple[str, tuple[int, ...]]:
  """What arrays have in common that could hold each other's numbers in a loop or a fusion."""
  return array.dtype, tuple(sorted(n for n in array.dims if n > 1))


def _copied(i: Instruction, computation: Computation, module: Module) -> list[Array]:
  """Arrays that this instruction copies from the device's main memory to itself."""
  if i.opcode in _COPIES or i.opcode == "copy-start":
    arrays = i.arrays[:1]
  elif i.opcode == "fusion":
    inner = module.computations[i.callee("calls")].instructions.values()
    if not all(x.opcode in _MOVES for x in inner) or not any(x.opcode in _COPIES for x in inner):
      return []
    arrays = i.arrays
  else:
    return []
  source = [array for operand in computation.operands(i) for array in operand.arrays]
  # To and from the memory on the chip is how a program works, not a copy.
  return [a for a in arrays if a.space == 0 and any(s.space == 0 and _like(s) == _like(a)
                                                    for s in source)]


def _source(i: Instruction, computation: Computation, entry: Computation) -> str:
  """The name of the program's parameter that is copied; "" if it is not one."""
  i = computation.operands(i)[0]
  while i.opcode in _FOLLOWED:
    i = computation.operands(i)[0]
  return i.name if i.opcode == "parameter" and computation is entry else ""
