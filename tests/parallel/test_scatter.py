"""Scattering a gradient by lines of a torus (`parallel.scatter`)."""

import importlib.util
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from chinchilla_jax.config import Mesh as MeshConfig
from chinchilla_jax.parallel import hlo, mesh, scatter, topology
from chinchilla_jax.training import ahead


def torus(*shape: int, cores: int = 1):
  return [types.SimpleNamespace(coords=coords) for coords in itertools.product(*map(range, shape))
          for _ in range(cores)]


@pytest.mark.parametrize("devices, length", [
    (torus(8, 8, 16), 16), (torus(16, 16, 1), 16), (torus(4, 2, 1, cores=2), 4),
    (torus(8, 1, 1), 8), (torus(1, 1, 1), 1),
    (torus(4, 4, 4)[::2], 2), (torus(4, 4)[::4], 4)])
def test_devices_on_one_line(devices, length):
  assert scatter.line(devices) == length


def test_only_a_tpu_slice_has_lines():
  here = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "tensor"))
  assert scatter.by_lines(NamedSharding(here, PartitionSpec("data"))) is None
  assert scatter.by_lines(NamedSharding(here, PartitionSpec())) is None


def test_part_of_an_axis_is_that_axis():
  text = """\
HloModule m, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

ENTRY %main (p: f32[32]) -> f32[16] {
  %p = f32[32]{0} parameter(0)
  ROOT %r = f32[16]{0} reduce-scatter(%p), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, \
use_global_device_ids=true, dimensions={0}, to_apply=%add
}
"""
  (found,) = hlo.analyse(text, {"data": 8, "tensor": 1}).collectives
  assert (found.axes, found.group_size, found.wire_bytes) == (("data",), 2, 64)
  (found,) = hlo.analyse(text, {"data": 2, "tensor": 4}).collectives
  assert found.axes == ("tensor",)


@pytest.mark.tpu_topology
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"),
                    reason="libtpu is not installed; make test installs it")
def test_libtpu_scatters_over_a_whole_slice():
  """A sum over all chips of a slice that is then cut, which it would reduce everywhere first."""
  devices = ahead.devices(topology.parse("v4:4x4x4"))
  placed = mesh.make(MeshConfig(), devices)
  cut = NamedSharding(placed, PartitionSpec(None, "data"))
  rows = NamedSharding(placed, PartitionSpec("data"))
  whole = NamedSharding(placed, PartitionSpec())
  x = jax.ShapeDtypeStruct((64, 256, 1024), jnp.bfloat16, sharding=rows)
  lines = scatter.by_lines(cut)
  assert lines.axis == 1 and [s.mesh.shape for s in lines.steps][0] == {"lines": 16, "line": 4}

  def at_once(g):
    return jax.lax.with_sharding_constraint(g, whole)

  def sent(how):
    product = lambda x, y: jax.lax.with_sharding_constraint(
        how(jnp.einsum("btd,btf->df", x, y)), cut)
    program = hlo.analyse(jax.jit(product).lower(x, x).compile().as_text(), placed.shape)
    return program.by_axes()

  payload = 1024 * 1024 * 2
  assert sent(at_once) == {("all-reduce", ("data",)): (1, 2 * payload * 63 / 64, 0.0)}
  (((kind, axes), (times, wire, _)),) = sent(lines).items()
  assert (kind, axes, times) == ("reduce-scatter", ("data",), 2)
  assert wire == pytest.approx(payload * 63 / 64)
