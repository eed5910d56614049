#!/usr/bin/env python3
"""What Google Cloud calls the slices of `chinchilla_jax.parallel.topology`.

`v5e:4x4` of `chinchilla compile` is the accelerator type `v5litepod-16` of a TPU VM, and the
labels `tpu-v5-lite-podslice` and `4x4` of a GKE node. Needs nothing but Python 3.10:

  launch/tpu_names.py v5e:4x4            lines NAME=VALUE for a TPU VM, read by tpu_vm.sh
  launch/tpu_names.py v4-2048 2          two slices, named by accelerator type
"""

import dataclasses
import math
import pathlib
import re
import shlex
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from chinchilla_jax.errors import UserError  # noqa: E402
from chinchilla_jax.parallel import topology  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Names:
  """Of one generation.

  Attributes:
    vm: prefix of accelerator types, and --type; "" where TPU VMs of it are not known here.
    cores: whether the number in an accelerator type counts TensorCores, not chips.
    runtime: --runtime-version.
    gke: node label cloud.google.com/gke-tpu-accelerator; "" where GKE has none.
    gke_alone: the same for slices of one machine, where it differs.
    multislice: whether Cloud joins several slices of it.
  """

  vm: str
  cores: bool
  runtime: str
  gke: str
  gke_alone: str = ""
  multislice: bool = True


# Cloud TPU documentation, "TPU software versions" and "TPU configurations"; GKE documentation,
# "Plan TPUs in GKE".
NAMES = {
    "v2": Names("v2", True, "tpu-ubuntu2204-base", "", multislice=False),
    "v3": Names("v3", True, "tpu-ubuntu2204-base", "tpu-v3-slice", "tpu-v3-device",
                multislice=False),
    "v4": Names("v4", True, "tpu-ubuntu2204-base", "tpu-v4-podslice"),
    "v5e": Names("v5litepod", False, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    "v5p": Names("v5p", True, "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v6e": Names("v6e", False, "v2-alpha-tpuv6e", "tpu-v6e-slice"),
    "tpu7x": Names("", True, "", "tpu7x"),
}


def parse(text: str, slices: int = 1) -> topology.Slice:
  """A TPU slice by either name: "v5e:4x4" or "v5litepod-16".

  Raises:
    UserError: neither; or no TPU; or several slices of a generation that cannot be joined.
  """
  if ":" in text:
    found = topology.parse(text, slices)
  else:
    match = re.fullmatch(r"([a-z0-9]+)-([1-9]\d*)", text.strip().lower())
    generation = match and next((name for name, one in NAMES.items() if one.vm == match[1]), None)
    if not generation:
      types = ", ".join(f"{one.vm}-N" for one in NAMES.values() if one.vm)
      raise UserError(f"accelerator type {text!r} is unknown; one of: {types}; or a topology such "
                      "as v5e:4x4 (docs/launch.md)")
    shape = _usual_shape(generation, int(match[2]))
    if shape is None:
      form = "AxBxC" if _dims(generation) == 3 else "AxB"
      raise UserError(f"accelerator type {text!r}: there is no usual shape of that size; give one "
                      f"with --topology={generation}:{form}")
    found = topology.parse(f"{generation}:{'x'.join(map(str, shape))}", slices)
  if found.chip.name not in NAMES:
    raise UserError(f"{found.name} is no TPU; one of: {', '.join(NAMES)}")
  if slices > 1 and not NAMES[found.chip.name].multislice:
    raise UserError(f"{found.name}: Cloud joins slices from v4 on; use one larger slice")
  return found


def _dims(generation: str) -> int:
  return topology.CHIPS[generation].ici_dims


def _usual_shape(generation: str, number: int) -> tuple[int, ...] | None:
  """What Cloud makes of an accelerator type: powers of two, as equal as can be, rising."""
  chips, odd = divmod(number, 2) if NAMES[generation].cores else (number, 0)
  if odd or chips < 1 or chips & (chips - 1):
    return None
  exponent, dims = chips.bit_length() - 1, _dims(generation)
  if dims == 3 and chips == 4:
    return (2, 2, 1)
  if (dims == 3 and chips < 4) or chips == 2:
    return None
  each, more = divmod(exponent, dims)
  return tuple(2 ** (each + (i >= dims - more)) for i in range(dims))


def vm_flags(found: topology.Slice) -> list[str]:
  """Flags of `gcloud compute tpus ... create` that ask for this slice.

  Raises:
    UserError: no TPU VMs of this generation are known.
  """
  names = NAMES[found.chip.name]
  if not names.vm:
    raise UserError(f"{found.name}: no TPU VMs of {found.chip.name} are known to this version; use "
                    "GKE (launch/gke/render.py)")
  if found.shape == _usual_shape(found.chip.name, _number(found)):
    return [f"--accelerator-type={accelerator_type(found)}"]
  return [f"--type={names.vm}", f"--topology={'x'.join(map(str, found.shape))}"]


def accelerator_type(found: topology.Slice) -> str:
  """Its accelerator type, if it has the usual shape: "v4-2048" for v4:8x8x16."""
  return f"{NAMES[found.chip.name].vm}-{_number(found)}"


def _number(found: topology.Slice) -> int:
  return found.chips_per_slice * (2 if NAMES[found.chip.name].cores else 1)


def machines(found: topology.Slice) -> tuple[int, int]:
  """(machines of one slice, chips of one machine), as Cloud makes them.

  `Slice.hosts` counts what libtpu calls hosts: a machine of 8 chips of v5e or v6e is two. Cloud
  gives 8 chips as one such machine, and larger slices as machines of 4.
  """
  chips = found.chips_per_slice
  most = 8 if found.chip.name in ("v5e", "v6e") and chips == 8 else math.prod((2, 2))
  return -(-chips // most), min(chips, most)


def gke_labels(found: topology.Slice) -> dict[str, str]:
  """Node selector of GKE for one slice.

  Raises:
    UserError: GKE has no such nodes.
  """
  names = NAMES[found.chip.name]
  alone = machines(found)[0] == 1
  if not names.gke:
    raise UserError(f"{found.name}: GKE has no nodes of {found.chip.name}; use TPU VMs "
                    "(launch/tpu_vm.sh), or another generation")
  label = names.gke_alone if alone and names.gke_alone else names.gke
  return {"cloud.google.com/gke-tpu-accelerator": label,
          "cloud.google.com/gke-tpu-topology": "x".join(map(str, found.shape))}


def main(argv: list[str]) -> int:
  try:
    if len(argv) not in (1, 2):
      raise UserError("give a topology or accelerator type, and perhaps a number of slices")
    if len(argv) == 2 and not re.fullmatch(r"[1-9]\d{0,3}", argv[1]):
      raise UserError(f"--node-count: got {argv[1]!r}; give a number of slices from 1")
    found = parse(argv[0], int(argv[1]) if len(argv) == 2 else 1)
    facts = {"slice": found.name, "shape": found.topology, "flags": " ".join(vm_flags(found)),
             "kind": accelerator_type(found) if len(vm_flags(found)) == 1 else "",
             "generation": NAMES[found.chip.name].vm, "chips": str(found.chips),
             "machines": str(machines(found)[0] * found.slices),
             "runtime": NAMES[found.chip.name].runtime}
  except UserError as error:
    print(" ".join(str(error).split()), file=sys.stderr)
    return 2
  for name, value in facts.items():
    print(f"{name}={shlex.quote(value)}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
