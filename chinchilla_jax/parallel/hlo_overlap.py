"""Which collectives have work to hide behind, read from the schedule of an optimised program.

A compiled program lists its instructions in the order in which a device runs them. A collective
that is one instruction keeps the device waiting. One that has a start and a done travels while
everything between the two runs; that hides it if some of it is matrix products or a kernel, and
does not if start and done stand side by side. Its forms:

  x-start, x-done          collectives of GPUs, permutes of TPUs (also those that a product was
                           decomposed into: Wang et al. 2023, "Overlap Communication with Dependent
                           Computation via Decomposition")
  async-start, async-done  a computation that holds the collective
  fusions of a chain       TPUs: a fusion with an AsyncCollectiveStart, fusions that compute and
                           carry the collective on, a fusion with an AsyncCollectiveDone
  send, send-done          between slices
  custom-call-start, -done a collective that a SparseCore of v5p or v6e runs, in a computation that
                           the start calls. Its program may be loaded ahead: then the start has no
                           operands, and it begins at the custom-call-update that hands them over

Whether the work takes as long as the collective is not asked: this is the share that can overlap
at all.
"""

import functools
from collections.abc import Iterable

from chinchilla_jax.parallel import hlo_walk
from chinchilla_jax.parallel.hlo_text import Computation, Frame, Instruction, Module

_PRODUCTS = {"dot", "scaled-dot", "convolution"}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
         "ragged-all-to-all", "collective-broadcast")
# What hands a running collective on, on the way from its start to its done.
_CARRIES = {"get-tuple-element", "tuple", "bitcast", "optimization-barrier"}
# Custom calls that name a buffer or a view of one, and do nothing to it.
NO_OP_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding",
               "AsyncCollectiveStart", "AsyncCollectiveDone"}


def target(i: Instruction) -> str:
  """The target of a custom call; "" for any other instruction."""
  return (i.setting("custom_call_target") or "") if i.opcode.startswith("custom-call") else ""


def chain_of(i: Instruction) -> tuple[str | None, str | None]:
  """What the parts of one collective in a chain of fusions share."""
  return i.setting("channel_id"), i.setting("chain_id")


def offloaded(i: Instruction, module: Module) -> str | None:
  """The computation with the collective that a `custom-call-start` runs on another core."""
  name = i.callee("called_computations") if i.opcode == "custom-call-start" else None
  inner = module.computations[name].instructions.values() if name else ()
  return name if any(o.opcode in KINDS for o in inner) else None


class Windows:
  """The stretches of a schedule between starts and dones."""

  def __init__(self, module: Module):
    self._module = module
    self._works = functools.cache(self._computes)
    self._dones: dict[tuple[str | None, str | None], set[str]] = {}
    for c in module.computations.values():
      for i in c.instructions.values():
        if target(i) == "AsyncCollectiveDone":
          for operand in c.operands(i):
            if "chain_id=" in operand.attributes:
              self._dones.setdefault(chain_of(operand), set()).add(c.name)

  def hides(self, i: Instruction, frame: Frame) -> bool:
    """Whether matrix work stands between the start and the done of an asynchronous collective.

    Args:
      i: its instruction: a start, a send, or a collective inside an async computation, one of
        another core, or a fusion that begins a chain.
      frame: where it stands.
    """
    if i.opcode.endswith("-start") or i.opcode == "send":
      return self._between(frame.computation, i, lambda done: done.opcode.endswith("-done"))
    callees = self._dones.get(chain_of(i), ())
    while frame.caller:
      if frame.call.opcode == "async-start":
        return self._between(frame.caller.computation, frame.call,
                             lambda done: done.opcode == "async-done")
      if frame.call.opcode == "custom-call-start":
        users = (u for u in frame.caller.computation.instructions.values()
                 if u.opcode == "custom-call-update" and frame.call.name in u.operands)
        start = frame.call if frame.call.operands else next(users, frame.call)
        return self._between(frame.caller.computation, start,
                             lambda done: done.opcode == "custom-call-done")
      if frame.call.opcode == "fusion" and callees:
        return self._between(frame.caller.computation, frame.call,
                             lambda done: done.callee("calls") in callees)
      frame = frame.caller
    return False

  def _between(self, computation: Computation, start: Instruction, is_done) -> bool:
    """A done in another iteration of a loop: all that follows the start is between."""
    reached, begun, found = {start.name}, False, False
    for i in computation.instructions.values():
      if i.name == start.name:
        begun = True
        continue
      if not begun:
        continue
      if reached.intersection(i.operands):
        if is_done(i):
          return found
        if i.opcode in _CARRIES or i.opcode.endswith("-update") or i.opcode == "fusion":
          reached.add(i.name)
      found = found or self._is_work(i)
    return found

  def _is_work(self, i: Instruction) -> bool:
    if i.opcode in _PRODUCTS:
      return True
    if i.opcode == "custom-call":  # With a start, an update or a done: of a core without products.
      return target(i) not in NO_OP_CALLS
    return any(map(self._works, _callees(i)))

  def _computes(self, name: str) -> bool:
    return any(map(self._is_work, self._module.computations[name].instructions.values()))


def _callees(i: Instruction) -> Iterable[str]:
  if i.opcode == "conditional":
    return hlo_walk.branches(i)
  if i.opcode in ("fusion", "call", "while", "async-start"):
    return filter(None, [i.callee("body", "calls", "to_apply")])
  return ()
