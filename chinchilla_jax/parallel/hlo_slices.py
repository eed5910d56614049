"""Programs of several TPU slices: compiled for one slice, joined by transfers of the hosts.

libtpu cuts a collective over slices in two. What happens inside a slice stays a collective; what
happens between slices becomes a pair of `send` and `recv` to the Megascale runtime, whose
attributes say what it does and among which slices.
"""

import re
from collections.abc import Mapping

from chinchilla_jax.parallel.hlo_text import Instruction

_KINDS = {"ALL_REDUCE": "all-reduce", "ALL_GATHER": "all-gather", "ALL_TO_ALL": "all-to-all",
          "REDUCE_SCATTER": "reduce-scatter"}


def split(mesh_shape: Mapping[str, int], devices: int) -> tuple[dict[str, int], str]:
  """The part of a mesh that a program of so many devices runs on, and the axis that was cut.

  Returns:
    (sizes, axis): all of the mesh and "" where the program is for all of it.

  Raises:
    ValueError: the mesh is not a whole number of such parts along its first axis longer than one.
  """
  sizes, total = dict(mesh_shape), 1
  for size in sizes.values():
    total *= size
  if total == devices:
    return sizes, ""
  axis = next((name for name, size in sizes.items() if size > 1), "")
  parts = total // devices
  if not axis or total % devices or sizes[axis] % parts:
    raise ValueError(f"HLO: compiled for {devices} devices, but the mesh {sizes} has {total}")
  sizes[axis] //= parts
  return sizes, axis


def transfer(i: Instruction) -> tuple[str, int] | None:
  """(kind of collective, slices) of a `send` to other slices; None for any other instruction.

  Raises:
    ValueError: a transfer of a form that is not known.
  """
  name = i.setting("_xla_megascale_transfer_type") if i.opcode == "send" else None
  if name is None:
    return None
  target = re.search(r'_xla_megascale_target="\{([\d,:]+)\}x', i.attributes)
  if name not in _KINDS or target is None:
    raise ValueError(f"HLO: {i.name} is a transfer between slices of an unknown form, {name}")
  count = 0
  for word in target[1].split(","):
    first, _, last = word.partition(":")
    count += int(last or first) - int(first) + 1
  return _KINDS[name], count
