"""How long a step must take at least, and which resource says so.

Pure Python on plain numbers: FLOPs, bytes to memory, bytes on the wire, and where the devices
sit. It is a bound, not a prediction: every resource runs at the figure of `topology`, latencies
count nothing, and only bytes of the step itself are seen.

How fast a collective goes (`Link`) follows the ring algorithms of the Scaling Book (Austin et al.
2025, "Sharded Matrices and How to Multiply Them"):
  - A torus dimension that wraps is a ring with both directions in use, 2 links a chip; one that
    does not wrap gives 1. A group that spans several dimensions uses all of them at once.
  - Mesh axes do not disturb each other. Groups of the same axis do: with every second chip in a
    group, two groups share each link.
  - Twisted tori count as plain ones, and collectives run one after another.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from chinchilla_jax.parallel import topology

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What one kind of collective over some mesh axes sends in one step.

  Attributes:
    kind: one of `KINDS`.
    axes: the mesh axes that its groups span.
    group_size: devices of one group.
    wire_bytes: bytes that one device sends in one step, over all executions. In a ring of g
      devices: (g - 1) / g of the full array for an all-gather or a reduce-scatter, twice that
      for an all-reduce, (g - 1) / g of what the device holds for an all-to-all, all of it for a
      permute.
  """

  kind: str
  axes: tuple[str, ...]
  group_size: int
  wire_bytes: float

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f"unknown collective {self.kind!r}; one of: {', '.join(KINDS)}")


@dataclasses.dataclass(frozen=True)
class Link:
  """What one device can send to the rest of its group, bytes/s one way.

  Attributes:
    network: "ici" (also between the two devices of one TPU chip), "nvlink" or "dcn".
    bandwidth: in a ring: all-gather, reduce-scatter, all-reduce.
    neighbour: to one other device: collective-permute, which goes one way along one dimension.
    all_to_all: all-to-all. On a torus the middle links carry most: a ring of n chips takes about
      n / 4 times as long as the same bytes of an all-gather.
  """

  network: str
  bandwidth: float
  neighbour: float
  all_to_all: float

  def seconds(self, traffic: Traffic) -> float:
    """Time of the traffic on this link alone."""
    rates = {"all-to-all": self.all_to_all, "collective-permute": self.neighbour}
    return traffic.wire_bytes / rates.get(traffic.kind, self.bandwidth)


def links(mesh_shape: Mapping[str, int], coords: Iterable[Sequence[int]] | None,
          slice_of: Sequence[int | None] | None,
          chip: topology.Chip) -> Callable[[Iterable[str]], Link]:
  """The link of any mesh axes, from where the mesh puts its devices.

  Args:
    mesh_shape: size of each mesh axis, in the mesh's order.
    coords: torus coordinates of each device, in the mesh's row-major order
      (`[d.coords for d in mesh.devices.flat]`). Two devices of one chip have the same. Not read
      for GPUs, which stand in nodes of 8 in the same order; may be None for them.
    slice_of: slice of each device, same order (`device.slice_index`). None: one slice.
    chip: what the devices are.

  Returns:
    A function of axis names. It takes the slowest of the axes' groups:
      ici: the links along the torus dimensions that the group spans, as the module says. Two
        devices of one chip share its links when they are in different groups; in one group they
        make one stop of the ring. A group within one chip has the chip's own path.
      nvlink: the GPU's own figure, whatever the group, since every pair is switched.
      dcn: a group over several slices (nodes). The inside of a slice shares the bytes that have
        to leave it (a hierarchical ring), so n chips of the group in a slice leave n times as
        fast as one; but not faster than the slice's own links.
    A group of one device sends nothing: infinitely fast.

  Raises:
    ValueError: a count of devices that is not the mesh's, no coordinates for TPUs, a chip that
      makes no slices, or (from the function) an axis that the mesh does not have.
  """
  count = math.prod(mesh_shape.values())
  if not (chip.ici_dims or chip.nvlink):
    raise ValueError(f"no links are known for {chip.name}")
  slice_of = [0] * count if slice_of is None else [int(index or 0) for index in slice_of]
  if chip.ici_dims:
    if coords is None:
      raise ValueError("TPU links need the devices' coordinates")
    # libtpu gives three coordinates to a torus of two dimensions as well.
    places = [tuple(int(x) for x in place)[:chip.ici_dims] for place in coords]
    parts = slice_of
  else:
    places = [(position,) for position in range(count)]
    ranks: dict[int, itertools.count] = {}
    parts = [(index, next(ranks.setdefault(index, itertools.count())) // topology.GPUS_PER_NODE)
             for index in slice_of]
  if len(places) != count or len(parts) != count:
    raise ValueError(f"the mesh has {count} devices; got {len(places)} coordinates and "
                     f"{len(parts)} slice indices")
  shape = tuple(max(x) - min(x) + 1 for x in zip(*places, strict=True))

  @functools.cache
  def link(axes: tuple[str, ...]) -> Link:
    slowest = None
    for group in _groups(mesh_shape, axes):
      by_part: dict[object, list[tuple[int, ...]]] = {}
      for position in group:
        by_part.setdefault(parts[position], []).append(places[position])
      found = _link(chip, shape, list(by_part.values()))
      if slowest is None or found.bandwidth < slowest.bandwidth:
        slowest = found
    return slowest

  return lambda axes: link(tuple(axes))


def _groups(mesh_shape: Mapping[str, int], axes: tuple[str, ...]) -> list[list[int]]:
  """Positions of the devices that differ along `axes` alone."""
  unknown = [axis for axis in axes if axis not in mesh_shape]
  if unknown:
    raise ValueError(f"the mesh has no axis {unknown[0]!r}; its axes: {', '.join(mesh_shape)}")
  fixed = [i for i, axis in enumerate(mesh_shape) if axis not in axes]
  groups: dict[tuple[int, ...], list[int]] = {}
  for position, index in enumerate(itertools.product(*map(range, mesh_shape.values()))):
    groups.setdefault(tuple(index[i] for i in fixed), []).append(position)
  return list(groups.values())


def _link(chip: topology.Chip, shape: tuple[int, ...], parts: list[list[tuple[int, ...]]]) -> Link:
  """The link of one group, given as the places of its devices in each slice or node."""
  within = _torus_link if chip.ici_dims else _node_link
  inner = [within(chip, shape, places) for places in parts]
  if len(parts) == 1:
    return inner[0]
  stops = min(len(set(places)) for places in parts)
  devices = sum(map(len, parts))
  outside = devices - max(map(len, parts))
  leaving = chip.dcn_bandwidth * stops / _groups_per_chip(chip, parts[0])
  each = chip.dcn_bandwidth / chip.devices_per_chip
  return Link("dcn", min(leaving, *(link.bandwidth for link in inner)), each,
              each * (devices - 1) / outside)


def _groups_per_chip(chip: topology.Chip, places: list[tuple[int, ...]]) -> float:
  """Groups that share one chip's links: 1, or 2 where a group has one of a chip's 2 devices."""
  return chip.devices_per_chip * len(set(places)) / len(places)


def _node_link(chip: topology.Chip, shape: tuple[int, ...], places: list[tuple[int, ...]]) -> Link:
  del shape
  rate = chip.nvlink if len(places) > 1 else math.inf
  return Link("nvlink", rate, rate, rate)


def _torus_link(chip: topology.Chip, shape: tuple[int, ...],
                places: list[tuple[int, ...]]) -> Link:
  stops = set(places)
  if len(stops) == 1:
    rate = chip.core_link if len(places) > 1 else math.inf
    return Link("ici", rate, rate, rate)
  spans = [sorted(set(x)) for x in zip(*stops, strict=True)]
  ring, widest, middle = 0.0, 1.0, math.inf
  for span, size, wraps in zip(spans, shape, chip.wraps(shape), strict=True):
    if len(span) == 1:
      continue
    stride = (span[-1] - span[0]) / (len(span) - 1)
    closed = wraps and len(span) * stride == size
    rate = chip.ici_link * (2 if closed else 1) / stride
    ring += rate
    widest = max(widest, stride)
    # Half of what each chip holds crosses the middle of the dimension, half of it each way.
    middle = min(middle, 4 * rate / len(span))
  if len(stops) != math.prod(map(len, spans)):
    # Not a box of chips (a diagonal, say): no more than one path can be counted on.
    ring = min(ring, chip.ici_link / widest)
    middle = min(middle, 4 * ring / len(stops))
  middle *= (len(places) - 1) / len(places)
  return Link("ici", ring / _groups_per_chip(chip, places),
              chip.ici_link / widest / chip.devices_per_chip, middle / chip.devices_per_chip)


@dataclasses.dataclass(frozen=True)
class Roofline:
  """The least time of one step, by resource.

  Attributes:
    compute_s: FLOPs that the device does, at peak.
    hbm_s: bytes to and from its memory, at the memory's bandwidth.
    ici_s: collectives within a slice (ICI) or a node (NVLink), one after another.
    dcn_s: collectives that leave the slice or node, one after another.
    axes_s: the seconds of the collectives by mesh axes, "data" or "data+tensor".
    bound: the largest of the four: "compute", "hbm", "ici" or "dcn".
    step_s: that largest: all four overlap perfectly.
    serial_s: their sum: nothing overlaps.
    mfu_ceiling: by convention, model FLOPs / (peak * step_s).
    mfu_serial: by convention, model FLOPs / (peak * serial_s).
  """

  compute_s: float
  hbm_s: float
  ici_s: float
  dcn_s: float
  axes_s: dict[str, float]
  bound: str
  step_s: float
  serial_s: float
  mfu_ceiling: dict[str, float]
  mfu_serial: dict[str, float]


def roofline(flops_per_device: float, hbm_bytes_per_device: float, traffic: Iterable[Traffic],
             links: Callable[[Iterable[str]], Link], chip: topology.Chip,
             model_flops_per_device: Mapping[str, float]) -> Roofline:
  """The least time of one step on one JAX device.

  Args:
    flops_per_device: FLOPs done in one step, recomputation included.
    hbm_bytes_per_device: bytes read from and written to memory in one step.
    traffic: the step's collectives.
    links: what `links` returned.
    chip: what the device is.
    model_flops_per_device: FLOPs of one step by the name of their convention, recomputation not
      included: `flops.matmul` (attention over all pairs) and `flops.matmul_causal` (over visible
      pairs), times the step's tokens, divided by the devices. Peak is dense bfloat16.

  Raises:
    ValueError: nothing takes any time, so that MFU means nothing.
  """
  seconds = {"compute": flops_per_device / chip.peak_per_device,
             "hbm": hbm_bytes_per_device / chip.hbm_bandwidth_per_device, "ici": 0.0, "dcn": 0.0}
  axes_s: dict[str, float] = {}
  for item in traffic:
    link = links(item.axes)
    took = link.seconds(item)
    seconds["dcn" if link.network == "dcn" else "ici"] += took
    name = "+".join(item.axes)
    axes_s[name] = axes_s.get(name, 0.0) + took
  bound = max(seconds, key=seconds.__getitem__)
  step_s, serial_s = seconds[bound], sum(seconds.values())
  if not step_s > 0:
    raise ValueError("a step with no FLOPs and no bytes has no roofline")
  work = {name: n / chip.peak_per_device for name, n in model_flops_per_device.items()}
  return Roofline(
      **{f"{name}_s": s for name, s in seconds.items()}, axes_s=axes_s, bound=bound,
      step_s=step_s, serial_s=serial_s,
      mfu_ceiling={name: s / step_s for name, s in work.items()},
      mfu_serial={name: s / serial_s for name, s in work.items()})
