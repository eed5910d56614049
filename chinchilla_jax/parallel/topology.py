"""What the hardware can do: the only place that knows peaks, memory, links and slices.

Pure Python. A device that is not in the table has no figures, and no MFU is printed for it.

Conventions of the table:
  FLOP/s: dense (no sparsity) bfloat16 products with float32 sums, of one chip.
  Bytes of memory: of one chip; n GB on a sheet is n * 2**30 bytes, since memory stacks come in
    powers of two whatever the sheet calls them (Google's newer sheets do write GiB; the drivers
    of NVIDIA's "80GB" cards report close to 80 GiB). The runtime keeps some of it: libtpu gives a
    program 15.48 GiB a device on v3, 30.75 on v4, 15.75 on v5e, 31.24 on v6e, 95.73 on v5p and
    94.74 on tpu7x.
  Bytes per second: decimal, one way. A sheet's "bidirectional" figure is halved.
  ICI: of one link. Google Cloud's sheets give the sum over a chip's links; "Scaling Book" (Austin
    et al. 2025, "How to Think About TPUs", TPU specs) gives a link, about 10 % lower. The table
    takes the lower figure.
  DCN: of one chip, its share of the host's network cards.
"""

import dataclasses
import math
import re
from typing import Any

from chinchilla_jax.errors import UserError

GIB = 2**30
GPUS_PER_NODE = 8
_HOST = (2, 2)  # Chips of a TPU host along the first two dimensions, as libtpu lays them out.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One kind of accelerator. The module's docstring says how each figure is counted.

  Attributes:
    name: as written in a slice's name.
    kinds: prefixes of JAX's `device.device_kind`.
    devices_per_chip: JAX devices on one chip.
    cores: TensorCores of a TPU chip; streaming multiprocessors of a GPU.
    hbm_bytes: memory of one chip, bytes.
    peak_bf16: FLOP/s of one chip.
    hbm_bandwidth: bytes/s between one chip and its memory.
    dcn_bandwidth: bytes/s of one chip to the outside of its slice (TPU) or node (GPU).
    ici_link: bytes/s of one inter-chip link, one way. 0: none, or no slices of this chip.
    ici_dims: dimensions of the torus. A chip has two links along each.
    wrap: see `wraps`.
    pod_chips: chips of the largest slice.
    core_link: bytes/s one way between the two JAX devices of a chip.
    nvlink: bytes/s one way of one GPU to the others of its node, all to all. 0: none.
    source: where the figures come from.
  """

  name: str
  kinds: tuple[str, ...]
  devices_per_chip: int = 1
  cores: int
  hbm_bytes: int
  peak_bf16: float
  hbm_bandwidth: float
  dcn_bandwidth: float
  ici_link: float = 0.0
  ici_dims: int = 0
  wrap: int = 0
  pod_chips: int = 0
  core_link: float = 0.0
  nvlink: float = 0.0
  source: str

  @property
  def peak_per_device(self) -> float:
    """Dense bfloat16 FLOP/s of one JAX device."""
    return self.peak_bf16 / self.devices_per_chip

  @property
  def hbm_bytes_per_device(self) -> int:
    """Bytes of memory of one JAX device."""
    return self.hbm_bytes // self.devices_per_chip

  @property
  def hbm_bandwidth_per_device(self) -> float:
    """Bytes/s between one JAX device and its memory."""
    return self.hbm_bandwidth / self.devices_per_chip

  @property
  def chips_per_host(self) -> int:
    """Chips that one process sees: the 4 of a TPU host as libtpu has it, the 8 of a GPU node.

    A v5e or v6e machine holds 8 chips; a slice of several hosts presents it as two hosts of 4.
    """
    return math.prod(_HOST) if self.ici_dims else GPUS_PER_NODE

  def wraps(self, shape: tuple[int, ...]) -> tuple[bool, ...]:
    """Per torus dimension of a slice of `shape` chips: does a link join its two ends?

    Two dimensions: only an axis as long as the pod's, `wrap`. Three: the ends are joined by
    optical switches, which sit between cubes of `wrap`**3 chips, so every dimension of a slice
    of whole cubes wraps, and none of any other. (Scaling Book, "How to Think About TPUs".)
    """
    if self.ici_dims == 3:
      return (all(size % self.wrap == 0 for size in shape),) * len(shape)
    return tuple(size == self.wrap for size in shape)


_CHIPS = (
    # The Scaling Book has 1.4e14 FLOP/s and 1e11 bytes/s a link for v3, and Jouppi et al. 2020
    # 656 Gbit/s (8.2e10). A v3 host's network cards are not published: 25 Gbit/s a chip is assumed
    # (v2 too; Cloud joins slices over DCN from v4 on only). Nor is the path between two cores of a
    # chip: one link's worth is assumed.
    Chip(name="v2", kinds=("TPU v2",), devices_per_chip=2, cores=2, hbm_bytes=16 * GIB,
         peak_bf16=46e12, hbm_bandwidth=700e9, dcn_bandwidth=3.125e9,
         ici_link=62e9, ici_dims=2, wrap=16, pod_chips=256, core_link=62e9,
         source="Jouppi et al. 2020, A Domain-Specific Supercomputer for Training DNNs"),
    Chip(name="v3", kinds=("TPU v3",), devices_per_chip=2, cores=2, hbm_bytes=32 * GIB,
         peak_bf16=123e12, hbm_bandwidth=900e9, dcn_bandwidth=3.125e9,
         ici_link=70e9, ici_dims=2, wrap=32, pod_chips=1024, core_link=70e9,
         source="Google Cloud TPU v3 documentation; links: Jouppi et al. 2023, Table 4"),
    # Inference only: here for its peak. It makes no slices that this project runs on.
    Chip(name="v4i", kinds=("TPU v4 lite",), cores=1, hbm_bytes=8 * GIB,
         peak_bf16=138e12, hbm_bandwidth=614e9, dcn_bandwidth=3.125e9,
         source="Jouppi et al. 2021, Ten Lessons From Three Generations"),
    # Jouppi et al. 2023, Table 4, has 5e10 bytes/s a link.
    Chip(name="v4", kinds=("TPU v4",), cores=2, hbm_bytes=32 * GIB,
         peak_bf16=275e12, hbm_bandwidth=1200e9, dcn_bandwidth=6.25e9,
         ici_link=45e9, ici_dims=3, wrap=4, pod_chips=4096,
         source="Google Cloud TPU v4 documentation; links and DCN: Scaling Book"),
    # Cloud: 400 GB/s bidirectional over 4 links, 5e10 a link. DCN: 2 x 100 Gbit/s for 8 chips.
    Chip(name="v5e", kinds=("TPU v5 lite", "TPU v5e"), cores=1, hbm_bytes=16 * GIB,
         peak_bf16=197e12, hbm_bandwidth=819e9, dcn_bandwidth=3.125e9,
         ici_link=45e9, ici_dims=2, wrap=16, pod_chips=256,
         source="Google Cloud TPU v5e documentation; links: Scaling Book"),
    # Cloud: 1,200 GB/s bidirectional over 6 links, 1e11 a link; DCN 50 Gbit/s a chip. Memory: 96 GB
    # in the Scaling Book.
    Chip(name="v5p", kinds=("TPU v5p", "TPU v5"), cores=2, hbm_bytes=95 * GIB,
         peak_bf16=459e12, hbm_bandwidth=2765e9, dcn_bandwidth=6.25e9,
         ici_link=90e9, ici_dims=3, wrap=4, pod_chips=8960,
         source="Google Cloud TPU v5p documentation; links: Scaling Book"),
    # Cloud: 800 GB/s bidirectional over 4 links (3,584 Gbit/s in an older edition), 1e11 a link;
    # memory bandwidth 1,600, 1,638 or 1,640 GB/s by edition. DCN: 4 x 200 Gbit/s for 8 chips.
    Chip(name="v6e", kinds=("TPU v6 lite", "TPU v6e"), cores=1, hbm_bytes=32 * GIB,
         peak_bf16=918e12, hbm_bandwidth=1638e9, dcn_bandwidth=12.5e9,
         ici_link=90e9, ici_dims=2, wrap=16, pod_chips=256,
         source="Google Cloud TPU v6e documentation; links: Scaling Book"),
    # Cloud: 1,200 GB/s bidirectional over 6 links, 1e11 a link; DCN 100 Gbit/s a chip. The two
    # chiplets are joined six times faster than by a link.
    Chip(name="tpu7x", kinds=("TPU7x",), devices_per_chip=2, cores=2, hbm_bytes=192 * GIB,
         peak_bf16=2307e12, hbm_bandwidth=7380e9, dcn_bandwidth=12.5e9,
         ici_link=90e9, ici_dims=3, wrap=4, pod_chips=9216, core_link=540e9,
         source="Google Cloud TPU7x (Ironwood) documentation; links: Scaling Book"),
    # GPUs: SXM boards in nodes of 8; DCN is one network card a GPU, as in NVIDIA's own DGX of that
    # generation (rented machines often have less). An A100 that does not name its memory counts
    # as the smaller one.
    Chip(name="a100-40gb", kinds=("NVIDIA A100",), cores=108, hbm_bytes=40 * GIB,
         peak_bf16=312e12, hbm_bandwidth=1555e9, dcn_bandwidth=25e9, nvlink=300e9,
         source="NVIDIA A100 data sheet; DGX A100: 200 Gbit/s a GPU"),
    Chip(name="a100-80gb", cores=108, hbm_bytes=80 * GIB,
         kinds=("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM-80GB", "NVIDIA A100 80GB"),
         peak_bf16=312e12, hbm_bandwidth=2039e9, dcn_bandwidth=25e9, nvlink=300e9,
         source="NVIDIA A100 data sheet; DGX A100: 200 Gbit/s a GPU"),
    # The PCIe card is here for its peak: it has no all-to-all NVLink.
    Chip(name="h100-pcie", kinds=("NVIDIA H100 PCIe",), cores=114, hbm_bytes=80 * GIB,
         peak_bf16=756e12, hbm_bandwidth=2000e9, dcn_bandwidth=50e9,
         source="NVIDIA H100 data sheet, PCIe"),
    Chip(name="h100", kinds=("NVIDIA H100",), cores=132, hbm_bytes=80 * GIB,
         peak_bf16=989e12, hbm_bandwidth=3350e9, dcn_bandwidth=50e9, nvlink=450e9,
         source="NVIDIA H100 data sheet, SXM; DGX H100: 400 Gbit/s a GPU"),
    Chip(name="h200", kinds=("NVIDIA H200",), cores=132, hbm_bytes=141 * GIB,
         peak_bf16=989e12, hbm_bandwidth=4800e9, dcn_bandwidth=50e9, nvlink=450e9,
         source="NVIDIA H200 data sheet, SXM; DGX H200: 400 Gbit/s a GPU"),
    # 1,440 GB for 8 GPUs in the DGX B200 guide; 192 GB in the Scaling Book.
    Chip(name="b200", kinds=("NVIDIA B200",), cores=148, hbm_bytes=180 * GIB,
         peak_bf16=2250e12, hbm_bandwidth=8000e9, dcn_bandwidth=50e9, nvlink=900e9,
         source="NVIDIA DGX B200 data sheet and user guide: 400 Gbit/s a GPU"),
)

CHIPS = {chip.name: chip for chip in _CHIPS}
# What a slice can be made of.
GENERATIONS = tuple(chip.name for chip in _CHIPS if chip.ici_dims or chip.nvlink)


def chip_of(device_kind: str) -> Chip | None:
  """The chip of a JAX `device_kind`, or None if the kind is unknown. The longest prefix wins."""
  matches = [(len(kind), chip) for chip in _CHIPS for kind in chip.kinds
             if device_kind.startswith(kind)]
  return max(matches, key=lambda match: match[0])[1] if matches else None


def peak_flops(device_kind: str) -> float | None:
  """Peak dense bfloat16 FLOP/s of one JAX device, or None if the kind is unknown."""
  chip = chip_of(device_kind)
  return None if chip is None else chip.peak_per_device


def hbm_bytes(device_kind: str) -> int | None:
  """Bytes of memory of one JAX device, or None if the kind is unknown."""
  chip = chip_of(device_kind)
  return None if chip is None else chip.hbm_bytes_per_device


@dataclasses.dataclass(frozen=True)
class Slice:
  """Chips joined by one fast network, once or `slices` times. `parse` makes them.

  Attributes:
    chip: the kind of chip.
    shape: chips along each torus dimension of one slice; (count,) for GPUs.
    slices: slices of that shape, joined by the data-centre network.
  """

  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def topology(self) -> str:
    """The name of one slice: "v4:8x8x16"."""
    return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

  @property
  def name(self) -> str:
    """The name of it all: "v4:8x8x16", or "2 x v4:8x8x16" for two slices."""
    return self.topology if self.slices == 1 else f"{self.slices} x {self.topology}"

  @property
  def chips_per_slice(self) -> int:
    return math.prod(self.shape)

  @property
  def chips(self) -> int:
    return self.chips_per_slice * self.slices

  @property
  def devices_per_slice(self) -> int:
    """JAX devices of one slice."""
    return self.chips_per_slice * self.chip.devices_per_chip

  @property
  def devices(self) -> int:
    """JAX devices in all."""
    return self.devices_per_slice * self.slices

  @property
  def hosts(self) -> int:
    """Processes in all, one a host."""
    return -(-self.chips_per_slice // self.chip.chips_per_host) * self.slices

  @property
  def networks(self) -> int:
    """Groups of devices that a fast network joins: TPU slices, GPU nodes (as JAX counts slices)."""
    return self.slices if self.chip.ici_dims else -(-self.chips // GPUS_PER_NODE)

  @property
  def wraps(self) -> tuple[bool, ...]:
    """Per torus dimension: does a link join its two ends? Empty for GPUs."""
    return self.chip.wraps(self.shape) if self.chip.ici_dims else ()

  def libtpu_options(self) -> dict[str, Any] | None:
    """Arguments of `jax.experimental.topologies.get_topology_desc(platform="tpu", ...)`.

    None for GPUs. v4 and v5p come as one device a chip (two cores working as one, "megacore")
    only when libtpu is told so; the others need their name alone.
    """
    if not self.chip.ici_dims:
      return None
    options: dict[str, Any] = {"topology_name": self.topology}
    if self.chip.cores > self.chip.devices_per_chip:
      options |= {"chip_config_name": "megacore", "chips_per_host_bounds": (*_HOST, 1)}
    if self.slices > 1:
      options["num_slices"] = self.slices
    return options


_FORM = 'write GENERATION:SHAPE in chips, such as "v4:8x8x16", "v5e:16x16" or "h100:8"'


def parse(text: str, slices: int = 1) -> Slice:
  """A slice by its name.

  Args:
    text: generation and chips along each dimension: "v4:8x8x16", "v5e:16x16", "tpu7x:4x4x4".
      Chips, not cores: "v3:16x16" is 256 chips and 512 JAX devices, as in libtpu. GPUs have a
      count: "h100:16" is two nodes of 8.
    slices: TPU slices of that shape.

  Raises:
    UserError: an unknown generation, another form, or a shape that no such slice can have.
  """
  match = re.fullmatch(r"([a-z0-9-]+):([1-9]\d*(?:x[1-9]\d*)*)", text.strip().lower())
  if match is None:
    raise UserError(f"topology {text!r} cannot be read; {_FORM}; "
                    f"generations: {', '.join(GENERATIONS)}")
  generation, shape = match[1], tuple(int(size) for size in match[2].split("x"))
  if generation not in GENERATIONS:
    raise UserError(f"topology {text!r}: unknown generation {generation!r}; one of: "
                    f"{', '.join(GENERATIONS)}")
  chip = CHIPS[generation]
  dims = chip.ici_dims or 1
  if len(shape) != dims:
    raise UserError(f"topology {text!r}: a shape of {generation} has {_count(dims, 'dimension')}, "
                    f"not {len(shape)}; write for example {_example(chip)!r}")
  if slices < 1:
    raise UserError(f"topology {text!r}: {slices} slices; use 1 or more")
  check = _check_torus if chip.ici_dims else _check_nodes
  check(text, chip, shape, slices)
  return Slice(chip, shape, slices)


def _check_torus(text: str, chip: Chip, shape: tuple[int, ...], slices: int) -> None:
  del slices
  chips = math.prod(shape)
  longest = math.isqrt(chip.pod_chips) if chip.ici_dims == 2 else chip.pod_chips
  if chips > chip.pod_chips or max(shape) > longest:
    pod = f"{longest}x{longest}" if chip.ici_dims == 2 else f"{chip.pod_chips} chips"
    raise UserError(f"topology {text!r}: the largest slice of {chip.name} is {pod}; "
                    "use a smaller shape and more slices")
  whole_hosts = all(size % host == 0 for size, host in zip(shape, _HOST, strict=False))
  # One or two chips of a host can be had where each of them is JAX's device or two.
  part_of_host = chips <= 2 and chip.cores == chip.devices_per_chip
  if not whole_hosts and not part_of_host:
    raise UserError(f"topology {text!r}: a host of {chip.name} is 2x2 chips; "
                    "use even numbers for the first two dimensions")


def _check_nodes(text: str, chip: Chip, shape: tuple[int, ...], slices: int) -> None:
  if slices > 1:
    raise UserError(f"topology {text!r}: {slices} slices, but only TPUs have slices; "
                    f"write '{chip.name}:{shape[0] * slices}'")
  if shape[0] > GPUS_PER_NODE and shape[0] % GPUS_PER_NODE:
    raise UserError(f"topology {text!r}: {shape[0]} GPUs are not whole nodes; use up to "
                    f"{GPUS_PER_NODE}, or a multiple of {GPUS_PER_NODE}")


def _count(number: int, noun: str) -> str:
  return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _example(chip: Chip) -> str:
  sizes = {0: "8", 2: "16x16", 3: "4x4x8"}
  return f"{chip.name}:{sizes[chip.ici_dims]}"
