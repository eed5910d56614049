import importlib.util
import json
import os
import subprocess
import sys

import pytest

from chinchilla_jax.errors import UserError
from chinchilla_jax.parallel import topology

GIB = 2**30


@pytest.mark.parametrize("kind, peak", [
    ("TPU v2", 23e12), ("TPU v3", 61.5e12), ("TPU v4 lite", 138e12), ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12), ("TPU v5e", 197e12), ("TPU v5p", 459e12), ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12), ("TPU v6e", 918e12), ("TPU7x", 1153.5e12),
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A100-SXM4-40GB", 312e12),
    ("NVIDIA B200", 2250e12)])
def test_known_devices(kind, peak):
  assert topology.peak_flops(kind) == peak


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA GeForce RTX 9090", "TPU v99", "", "AMD MI350X"])
def test_an_unknown_device_has_no_figures_rather_than_wrong_ones(kind):
  assert topology.chip_of(kind) is None
  assert topology.peak_flops(kind) is None
  assert topology.hbm_bytes(kind) is None


@pytest.mark.parametrize("kind, memory", [
    ("TPU v3", 16 * GIB),  # A device is half a chip.
    ("TPU v4", 32 * GIB), ("TPU v5 lite", 16 * GIB), ("TPU7x", 96 * GIB),
    ("NVIDIA A100-SXM4-80GB", 80 * GIB), ("NVIDIA A100 80GB PCIe", 80 * GIB),
    ("NVIDIA A100-SXM4-40GB", 40 * GIB), ("NVIDIA H200", 141 * GIB)])
def test_memory_is_per_device(kind, memory):
  assert topology.hbm_bytes(kind) == memory


# Per chip, as Google Cloud's documentation and NVIDIA's data sheets print them: dense TFLOP/s in
# bfloat16, GB or GiB of memory, GB/s of memory, GB/s of all links together and both ways (None:
# the sheet does not say), Gbit/s of network per chip.
SHEETS = [
    ("v3", 123, 32, 900, None, None),
    ("v4", 275, 32, 1200, 600, None),
    ("v5e", 197, 16, 819, 400, 2 * 100 / 8),
    ("v5p", 459, 95, 2765, 1200, 50),
    ("v6e", 918, 32, 1638, 800, 100),
    ("tpu7x", 2307, 192, 7380, 1200, 100),
    ("a100-40gb", 312, 40, 1555, 600, 200),
    ("a100-80gb", 312, 80, 2039, 600, 200),
    ("h100", 989, 80, 3350, 900, 400),
    ("h200", 989, 141, 4800, 900, 400),
    ("b200", 2250, 180, 8000, 1800, 400),
]


@pytest.mark.parametrize("name, tflops, memory, memory_rate, fabric, network", SHEETS)
def test_figures_are_those_of_the_sheets(name, tflops, memory, memory_rate, fabric, network):
  chip = topology.CHIPS[name]
  assert chip.peak_bf16 == tflops * 1e12
  assert chip.hbm_bytes == memory * GIB
  assert chip.hbm_bandwidth == memory_rate * 1e9
  if network is not None:
    assert chip.dcn_bandwidth == network * 1e9 / 8
  if fabric is not None:
    one_way = chip.nvlink or chip.ici_link * 2 * chip.ici_dims
    # The table keeps a TPU's usable rate (Scaling Book), a tenth below the sheet.
    assert one_way == pytest.approx(fabric / 2 * 1e9 * (1 if chip.nvlink else 0.9))


# Scaling Book (Austin et al. 2025), "How to Think About TPUs", TPU specs: one link, one way.
@pytest.mark.parametrize("name, link", [
    ("v4", 4.5e10), ("v5p", 9e10), ("v5e", 4.5e10), ("v6e", 9e10), ("tpu7x", 9e10)])
def test_links_are_those_of_the_scaling_book(name, link):
  assert topology.CHIPS[name].ici_link == link


def test_every_chip_states_its_source_and_has_kinds_of_its_own():
  kinds = [kind for chip in topology.CHIPS.values() for kind in chip.kinds]
  assert len(kinds) == len(set(kinds))
  for chip in topology.CHIPS.values():
    assert chip.source
    assert all(topology.chip_of(kind) is chip for kind in chip.kinds)


@pytest.mark.parametrize("text, shape, devices, hosts, wraps", [
    ("v4:8x8x16", (8, 8, 16), 1024, 256, (True, True, True)),
    ("v4:2x2x4", (2, 2, 4), 16, 4, (False, False, False)),  # Not whole cubes.
    ("v5p:8x8x8", (8, 8, 8), 512, 128, (True, True, True)),
    ("v5e:16x16", (16, 16), 256, 64, (True, True)),
    ("v5e:8x16", (8, 16), 128, 32, (False, True)),
    ("v5e:1x1", (1, 1), 1, 1, (False, False)),
    ("v6e:16x16", (16, 16), 256, 64, (True, True)),
    ("v3:16x16", (16, 16), 512, 64, (False, False)),  # Chips, two devices each.
    ("v3:32x32", (32, 32), 2048, 256, (True, True)),
    ("tpu7x:4x4x4", (4, 4, 4), 128, 16, (True, True, True)),
    ("h100:8", (8,), 8, 1, ()),
    ("H200:16 ", (16,), 16, 2, ()),
    ("a100-80gb:4", (4,), 4, 1, ()),
])
def test_slices_by_name(text, shape, devices, hosts, wraps):
  found = topology.parse(text)
  assert (found.shape, found.devices, found.devices_per_slice) == (shape, devices, devices)
  assert (found.hosts, found.wraps, found.slices) == (hosts, wraps, 1)
  assert found.name == text.strip().lower()


def test_several_slices():
  found = topology.parse("v4:4x4x4", slices=3)
  assert (found.chips_per_slice, found.chips, found.devices, found.hosts) == (64, 192, 192, 48)
  assert found.name == "3 x v4:4x4x4"
  assert found.topology == "v4:4x4x4"


@pytest.mark.parametrize("text, slices, says", [
    ("v4", 1, "v4:8x8x16"),  # The form.
    ("v4-128", 1, "tpu7x"),  # The generations.
    ("v4:8x0x16", 1, "cannot be read"),
    ("v4:8 x 8 x 16", 1, "cannot be read"),
    ("v7:4x4x4", 1, "unknown generation 'v7'"),
    ("v4i:2x2", 1, "unknown generation"),
    ("h100-pcie:8", 1, "unknown generation"),
    ("v4:8x8", 1, "3 dimensions, not 2"),
    ("v5e:4x4x4", 1, "2 dimensions, not 3"),
    ("h100:8x8", 1, "1 dimension, not 2"),
    ("v5e:16x32", 1, "16x16"),
    ("v5e:4x64", 1, "16x16"),
    ("v4:16x16x32", 1, "4096 chips"),
    ("v4:3x4x4", 1, "even numbers"),
    ("v4:1x1x1", 1, "even numbers"),
    ("v5e:3x3", 1, "even numbers"),
    ("v4:4x4x4", 0, "0 slices"),
    ("h100:12", 1, "multiple of 8"),
    ("h100:8", 2, "h100:16"),
])
def test_a_bad_name_is_one_clear_line(text, slices, says):
  with pytest.raises(UserError) as error:
    topology.parse(text, slices)
  message = str(error.value)
  assert says in message and repr(text) in message
  assert "\n" not in message


def test_options_for_libtpu():
  megacore = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
  assert topology.parse("v4:8x8x16").libtpu_options() == {
      "topology_name": "v4:8x8x16", **megacore}
  assert topology.parse("v5p:4x4x4", 2).libtpu_options() == {
      "topology_name": "v5p:4x4x4", "num_slices": 2, **megacore}
  for plain in ("v3:16x16", "v5e:16x16", "v6e:16x16", "tpu7x:4x4x4"):
    assert topology.parse(plain).libtpu_options() == {"topology_name": plain}
  assert topology.parse("h100:8").libtpu_options() is None


def test_needs_no_jax():
  code = "import sys, chinchilla_jax.parallel.topology; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0


_DESCRIBE = """
import json, sys
from jax.experimental import topologies
for options in json.load(sys.stdin):
  found = topologies.get_topology_desc(platform="tpu", **options).devices
  print(json.dumps([len(found), len({d.process_index for d in found}), found[0].device_kind,
                    len({tuple(d.coords) for d in found})]))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_libtpu_has_the_same_slices():
  slices = [topology.parse(text, count) for text, count in [
      ("v2:4x4", 1), ("v3:4x4", 1), ("v4:4x4x8", 1), ("v5e:16x16", 1), ("v5e:1x1", 1),
      ("v5p:2x2x1", 1), ("v6e:2x4", 1), ("tpu7x:4x4x4", 1), ("v4:4x4x4", 2), ("v3:2x2", 2)]]
  done = subprocess.run(
      [sys.executable, "-c", _DESCRIBE], capture_output=True, text=True, check=True,
      input=json.dumps([found.libtpu_options() for found in slices]),
      env={**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"})
  lines = [json.loads(line) for line in done.stdout.splitlines()]
  assert len(lines) == len(slices)
  for found, (devices, hosts, kind, places) in zip(slices, lines, strict=True):
    assert (found.devices, found.hosts) == (devices, hosts), found.name
    assert topology.chip_of(kind) is found.chip
    assert found.chips_per_slice == places, found.name
