"""Scattering a gradient over all chips of a TPU slice, in a form that libtpu takes for a scatter.

libtpu (0.0.52) turns a sum over all chips of a slice that is then cut, and an explicit
reduce-scatter too, into an all-reduce along every dimension of the torus and a cut after it: twice
the bytes, and the whole sum on every chip. Over fewer chips than all it scatters. So the sum is
scattered among lines of the torus first and along each line then, which sends as little as one
scatter over all.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from chinchilla_jax.parallel import rules


@dataclasses.dataclass(frozen=True)
class Lines:
  """The two steps of a scatter.

  Attributes:
    axis: of the array, the one that is cut.
    steps: shardings of the array with that axis first.
  """

  axis: int
  steps: tuple[NamedSharding, NamedSharding]

  def __call__(self, g: jax.Array) -> jax.Array:
    # The axis that is cut comes first: libtpu scatters rows, not columns.
    g = jnp.moveaxis(g, self.axis, 0)
    for step in self.steps:
      g = jax.lax.with_sharding_constraint(g, step)
    return jnp.moveaxis(g, 0, self.axis)


def by_lines(cut: NamedSharding) -> Lines | None:
  """The steps to a sharding that cuts one axis over all chips of a TPU slice; else None."""
  mesh = cut.mesh
  axis = [n for n, axes in enumerate(rules.axes_of(cut.spec)) if axes == ("data",)]
  if not axis or not isinstance(mesh, jax.sharding.Mesh) or mesh.shape["data"] < mesh.size:
    return None
  devices = list(mesh.devices.flat)
  slices = {getattr(device, "slice_index", None) or 0 for device in devices}
  if devices[0].platform != "tpu" or len(slices) > 1:
    return None
  length = line(devices)
  if length in (1, mesh.size) or mesh.size % length:
    return None
  lines = jax.sharding.Mesh(mesh.devices.reshape(-1, length), ("lines", "line"),
                            axis_types=(jax.sharding.AxisType.Auto,) * 2)
  return Lines(axis[0], (NamedSharding(lines, PartitionSpec("lines")),
                         NamedSharding(lines, PartitionSpec(("lines", "line")))))


def line(devices: Sequence[Any]) -> int:
  """How many of these devices, from the first on, lie on one line of the torus."""
  first, along = devices[0].coords, set()
  for n, device in enumerate(devices):
    along |= {axis for axis, at in enumerate(device.coords) if at != first[axis]}
    if len(along) > 1:
      return n
  return len(devices)
