"""Devices to a mesh: one slice, many slices, or a slice that is not here.

Every mesh has the four axes of `AXES`, outermost first; an axis of size one shards nothing.
The order of devices within it comes from `jax.experimental.mesh_utils`, which knows the torus.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from chinchilla_jax import config as schema
from chinchilla_jax.errors import UserError

# Outermost first: what talks least is cut along the slowest network.
AXES = ("slice", "data", "context", "tensor")


def sizes(config: schema.Mesh, n_devices: int, n_slices: int = 1) -> dict[str, int]:
  """Sizes of the mesh's axes; works out the ones that the config leaves open.

  Args:
    config: `slice` 0 takes n_slices, `data` 0 takes the devices that the other axes leave. With
      `slice` 1 the data axis goes over all slices.
    n_devices: in all slices together.
    n_slices: that the devices say they lie in.

  Raises:
    UserError: the axes do not multiply to the number of devices; gives the numbers.
  """
  slices = config.slice or n_slices
  others = slices * config.context * config.tensor
  where = (f"config.mesh: slice {slices} x data {config.data or '(the rest)'} x context "
           f"{config.context} x tensor {config.tensor}")
  if slices % n_slices and slices != 1:
    raise UserError(f"{where} on {n_slices} slices; set config.mesh.slice to 0, to a multiple of "
                    f"{n_slices}, or to 1, which puts data across slices")
  if n_devices % others or (config.data and others * config.data != n_devices):
    product = others * (config.data or 1)
    raise UserError(f"{where} does not make {n_devices} devices (got {product}"
                    f"{'' if config.data else ' x data'}); change an axis"
                    f"{', or set config.mesh.data to 0' if config.data else ''}")
  data = n_devices // others
  if slices < n_slices and data % n_slices:
    raise UserError(f"{where}: data {data} does not divide among {n_slices} slices; set "
                    "config.mesh.slice to 0")
  return dict(zip(AXES, (slices, data, config.context, config.tensor), strict=True))


def make(config: schema.Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
  """The mesh of a config.

  Args:
    config: its mesh section.
    devices: all of this run, in whatever order; None for those that JAX finds. Devices of a
      topology description do too.

  Raises:
    UserError: the axes do not fit the devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  slices = sorted({getattr(device, "slice_index", None) or 0 for device in devices})
  shape = tuple(sizes(config, len(devices), len(slices)).values())
  try:
    if len(slices) > 1:
      across = tuple(len(slices) if axis == ("slice" if shape[0] > 1 else "data") else 1
                     for axis in AXES)
      inner = tuple(n // outer for n, outer in zip(shape, across, strict=True))
      array = mesh_utils.create_hybrid_device_mesh(
          inner, across, devices, allow_split_physical_axes=True)
    else:
      array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  except (NotImplementedError, ValueError):
    # No assignment to the physical axes of this torus is known: the order of the devices it is.
    ordered = sorted(devices, key=lambda d: (getattr(d, "slice_index", None) or 0, d.id))
    array = np.array(ordered).reshape(shape)
  return jax.sharding.Mesh(array, AXES,
                           axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def shape_text(mesh: jax.sharding.Mesh) -> str:
  """The axes that are longer than one, as "data 4 x tensor 2"; "one device" if none is."""
  parts = [f"{name} {size}" for name, size in mesh.shape.items() if size > 1]
  return " x ".join(parts) or "one device"


def on_one(device: Any = None) -> jax.sharding.Mesh:
  """A mesh of a single device."""
  return make(schema.Mesh(data=1, slice=1), [device or jax.devices()[0]])


def count(mesh: jax.sharding.Mesh) -> int:
  return math.prod(mesh.shape.values())
