"""Sizes of a mesh's axes, worked out and refused."""

import jax
import pytest

from chinchilla_jax import config as schema
from chinchilla_jax.errors import UserError
from chinchilla_jax.parallel import mesh


@pytest.mark.parametrize("fields, devices, slices, expected", [
    ({}, 1, 1, (1, 1, 1, 1)), ({}, 8, 1, (1, 8, 1, 1)), ({}, 8, 2, (2, 4, 1, 1)),
    (dict(tensor=4), 8, 1, (1, 2, 1, 4)), (dict(context=2, tensor=2), 8, 1, (1, 2, 2, 2)),
    (dict(slice=2, tensor=2), 8, 1, (2, 2, 1, 2)), (dict(data=8), 8, 1, (1, 8, 1, 1)),
    (dict(slice=4), 16, 2, (4, 4, 1, 1)), (dict(slice=1), 8, 2, (1, 8, 1, 1))])
def test_open_axes_take_what_is_left(fields, devices, slices, expected):
  sizes = mesh.sizes(schema.Mesh(**fields), devices, slices)
  assert sizes == dict(zip(mesh.AXES, expected, strict=True))


@pytest.mark.parametrize("fields, devices, slices, says", [
    (dict(tensor=3), 8, 1, r"tensor 3 does not make 8 devices \(got 3 x data\)"),
    (dict(data=4), 8, 1, r"data 4 x context 1 x tensor 1 does not make 8 devices \(got 4\)"),
    (dict(data=4, tensor=4), 8, 1, r"does not make 8 devices \(got 16\)"),
    (dict(tensor=16), 8, 1, r"got 16 x data"),
    (dict(slice=1, tensor=8), 8, 2, "data 1 does not divide among 2 slices; set config.mesh.slice"),
    (dict(slice=3), 12, 2, "slice 3 .* on 2 slices; set config.mesh.slice to 0"),
])
def test_axes_that_do_not_make_the_devices_are_refused(fields, devices, slices, says):
  with pytest.raises(UserError, match=says):
    mesh.sizes(schema.Mesh(**fields), devices, slices)


def test_a_mesh_of_one_device():
  made = mesh.on_one()
  assert dict(made.shape) == dict.fromkeys(mesh.AXES, 1)
  assert made.devices.flat[0] == jax.devices()[0]
  assert mesh.shape_text(made) == "one device" and mesh.count(made) == 1


class _Device:
  """Stands in for a device of a slice; of a kind whose torus nobody knows."""
  platform, device_kind, process_index = "other", "other", 0

  def __init__(self, number, slice_index):
    self.id, self.slice_index = number, slice_index


def test_a_slice_is_never_split_over_the_outer_axis():
  devices = [_Device(i, i % 2) for i in range(8)]
  made = mesh.make(schema.Mesh(tensor=2), devices)
  assert dict(made.shape) == {"slice": 2, "data": 2, "context": 1, "tensor": 2}
  for part in made.devices:
    assert len({device.slice_index for device in part.flat}) == 1
  assert mesh.shape_text(made) == "slice 2 x data 2 x tensor 2" and mesh.count(made) == 8
