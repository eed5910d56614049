"""Which computations of a module run, and how often: those whose results are buffers in memory."""

import re
from collections.abc import Iterator

from chinchilla_jax.parallel import hlo_text
from chinchilla_jax.parallel.hlo_text import Computation, Frame, Instruction, Module


def branches(i: Instruction) -> list[str]:
  """The computations of a conditional."""
  listed = re.findall(r"(?:branch_computations=\{[^}]*|_computation=%\S*)", i.attributes)
  return re.findall(r"%([\w.\-]+)", " ".join(listed))


def unfused(module: Module) -> Iterator[tuple[Computation, int]]:
  """(computation, executions) of the entry and of what it calls; fusions are not entered.

  Every branch of a conditional counts as taken.

  Raises:
    ValueError: the trip count of a loop cannot be found.
  """
  waiting = [(Frame(module.computations[module.entry]), 1)]
  while waiting:
    frame, times = waiting.pop()
    yield frame.computation, times
    for i in frame.computation.instructions.values():
      if i.opcode == "while":
        name, trips = i.callee("body"), hlo_text.trip_count(module, frame, i)
        waiting.append((Frame(module.computations[name], frame, i, i.operands, name),
                        times * trips))
      elif i.opcode == "conditional":
        waiting += [(Frame(module.computations[name], frame, i, (operand,)), times)
                    for name, operand in zip(branches(i), i.operands[1:], strict=True)]
      elif i.opcode == "call":
        waiting.append((Frame(module.computations[i.callee("to_apply")], frame, i, i.operands),
                        times))
