import dataclasses
import itertools
import math
import subprocess
import sys

import pytest

from chinchilla_jax.parallel import roofline, topology
from chinchilla_jax.parallel.roofline import Link, Traffic, links

V4 = topology.CHIPS["v4"]
V5E = topology.CHIPS["v5e"]
V3 = topology.CHIPS["v3"]
TPU7X = topology.CHIPS["tpu7x"]
H100 = topology.CHIPS["h100"]
V4_LINK, V5E_LINK, V3_LINK = 45e9, 45e9, 70e9


def torus(*shape, cores=1):
  """Coordinates in row-major order, padded to three; each repeated for every core."""
  places = itertools.product(*map(range, shape))
  return [(*place, 0, 0, 0)[:3] for place in places for _ in range(cores)]


def test_axes_of_a_torus_of_whole_cubes():
  link = links({"data": 16, "tensor": 4}, torus(4, 4, 4), None, V4)
  assert link(("data",)).network == "ici"
  # data spans two wrapping dimensions, tensor one: two links each.
  assert link(("data",)).bandwidth == 4 * V4_LINK
  assert link(("tensor",)).bandwidth == 2 * V4_LINK
  assert link(("data", "tensor")).bandwidth == 6 * V4_LINK
  assert link(["tensor"]).neighbour == V4_LINK


def test_a_slice_smaller_than_a_cube_does_not_wrap():
  link = links({"data": 4, "tensor": 4}, torus(2, 2, 4), None, V4)
  assert link(("data",)).bandwidth == 2 * V4_LINK
  assert link(("tensor",)).bandwidth == V4_LINK


def test_v5e_wraps_at_sixteen_only():
  link = links({"data": 8, "tensor": 16}, torus(8, 16), None, V5E)
  assert link(("data",)).bandwidth == V5E_LINK
  assert link(("tensor",)).bandwidth == 2 * V5E_LINK


def test_part_of_a_ring_is_a_line_and_every_second_chip_shares_the_links():
  # z is 4 long and wraps: tensor takes two neighbours of it, data takes x, y and every second z.
  link = links({"data": 32, "tensor": 2}, torus(4, 4, 4), None, V4)
  assert link(("tensor",)).bandwidth == V4_LINK
  assert link(("data",)).bandwidth == (2 + 2 + 2 / 2) * V4_LINK
  assert link(("data",)).neighbour == V4_LINK / 2


def test_a_group_that_is_no_box_has_one_path():
  diagonal = [(0, 0, 0), (1, 1, 0), (0, 1, 0), (1, 0, 0)]
  link = links({"data": 2, "tensor": 2}, diagonal, None, V4)
  assert link(("tensor",)).bandwidth == V4_LINK
  assert link(("data", "tensor")).bandwidth == 2 * V4_LINK


def test_the_slowest_group_counts():
  # The second tensor group, chips 0 and 2 of a line, has every link shared.
  link = links({"data": 2, "tensor": 2}, [(0, 0), (1, 0), (0, 1), (2, 1)], None, V5E)
  assert link(("tensor",)).bandwidth == V5E_LINK / 2


def test_all_to_all_waits_for_the_middle_of_the_torus():
  # A ring of 16: what a device holds takes 16 / 8 link times; it sends 15/16 of that.
  link = links({"data": 16, "tensor": 16}, torus(16, 16), None, V5E)(("tensor",))
  assert link.all_to_all == pytest.approx(15 / 16 * V5E_LINK * 8 / 16)
  assert link.bandwidth / link.all_to_all == pytest.approx(16 / 4 * 16 / 15)
  # Two chips that exchange halves use one link, one way each.
  pair = links({"data": 2, "tensor": 2}, torus(2, 2), None, V5E)(("tensor",))
  assert pair.all_to_all == pair.bandwidth == V5E_LINK


def test_two_devices_of_a_chip_share_its_links():
  mesh, coords = {"data": 4, "tensor": 8}, torus(4, 4, cores=2)
  link = links(mesh, coords, None, V3)
  # tensor: one row of four chips, both cores. data: a column, one core; the other core's group
  # has the same links.
  assert link(("tensor",)).bandwidth == V3_LINK
  assert link(("data",)).bandwidth == V3_LINK / 2
  assert link(("tensor",)).neighbour == link(("data",)).neighbour == V3_LINK / 2


def test_two_devices_of_a_chip_have_a_path_of_their_own():
  link = links({"data": 64, "tensor": 2}, torus(4, 4, 4, cores=2), None, TPU7X)
  assert link(("tensor",)) == Link("ici", 540e9, 540e9, 540e9)
  assert link(("data",)).bandwidth == 6 * 90e9 / 2


def test_an_axis_across_slices_uses_the_data_centre_network():
  mesh = {"slice": 2, "data": 16, "tensor": 4}
  link = links(mesh, torus(4, 4, 4) * 2, [0] * 64 + [1] * 64, V4)
  assert link(("slice",)) == Link("dcn", 6.25e9, 6.25e9, 6.25e9)
  assert link(("data",)).network == link(("tensor",)).network == "ici"
  # Four chips of the group in each slice share what has to leave it.
  assert link(("slice", "tensor")).network == "dcn"
  assert link(("slice", "tensor")).bandwidth == 4 * 6.25e9
  # 64 of them could send 400 GB/s, but within the slice a chip sends 270.
  assert link(("slice", "data", "tensor")).bandwidth == 6 * V4_LINK
  # Half of an all-to-all's bytes leave the slice: S / 2 of the S * 7/8 sent.
  assert link(("slice", "tensor")).all_to_all == pytest.approx(6.25e9 * 7 / 4)


def test_gpus_stand_in_nodes_of_eight():
  link = links({"data": 4, "tensor": 4}, None, None, H100)
  assert link(("tensor",)) == Link("nvlink", 450e9, 450e9, 450e9)
  # data: GPUs 0, 4, 8, 12: two in each node.
  assert link(("data",)).network == "dcn"
  assert link(("data",)).bandwidth == 2 * 50e9
  assert link(("data", "tensor")).bandwidth == 8 * 50e9
  assert links({"data": 8}, None, None, H100)(("data",)).network == "nvlink"


def test_gpu_nodes_can_be_named():
  link = links({"data": 2, "tensor": 4}, None, [0] * 4 + [1] * 4, H100)
  assert link(("data",)) == Link("dcn", 50e9, 50e9, 50e9)
  assert link(("tensor",)).network == "nvlink"


@pytest.mark.parametrize("chip, coords", [(V4, torus(4, 1, 1)), (H100, None)])
def test_a_group_of_one_sends_nothing(chip, coords):
  link = links({"data": 4, "tensor": 1}, coords, None, chip)(("tensor",))
  assert math.isinf(link.bandwidth)
  assert link.seconds(Traffic("all-reduce", ("tensor",), 1, 0.0)) == 0.0


def test_what_cannot_be_right_is_refused():
  with pytest.raises(ValueError, match="4 devices"):
    links({"data": 4}, torus(2, 1, 1), None, V4)
  with pytest.raises(ValueError, match="coordinates"):
    links({"data": 4}, None, None, V4)
  with pytest.raises(ValueError, match="h100-pcie"):
    links({"data": 4}, None, None, topology.CHIPS["h100-pcie"])
  with pytest.raises(ValueError, match="no axis 'stage'"):
    links({"data": 4}, torus(4, 1, 1), None, V4)(("stage",))
  with pytest.raises(ValueError, match="all-scatter"):
    Traffic("all-scatter", ("data",), 4, 1.0)


RATES = {("data",): Link("ici", 100e9, 50e9, 25e9), ("slice",): Link("dcn", 5e9, 5e9, 5e9),
         ("data", "tensor"): Link("ici", 200e9, 50e9, 25e9)}


def step(flops=275e12, memory=600e9, traffic=(), model=None):
  return roofline.roofline(flops, memory, traffic, RATES.__getitem__, V4,
                           model or {"full": 220e12, "causal": 110e12})


def test_a_step_worked_out_by_hand():
  found = step(traffic=[
      Traffic("all-gather", ("data",), 16, 20e9),  # 0.2 s
      Traffic("collective-permute", ("data",), 16, 5e9),  # 0.1 s
      Traffic("all-to-all", ("data",), 16, 2.5e9),  # 0.1 s
      Traffic("reduce-scatter", ("data", "tensor"), 64, 20e9),  # 0.1 s
      Traffic("all-reduce", ("slice",), 2, 1e9)])  # 0.2 s
  assert found.compute_s == pytest.approx(1.0)
  assert found.hbm_s == pytest.approx(0.5)
  assert found.ici_s == pytest.approx(0.5)
  assert found.dcn_s == pytest.approx(0.2)
  assert found.axes_s == pytest.approx({"data": 0.4, "data+tensor": 0.1, "slice": 0.2})
  assert found.bound == "compute"
  assert found.step_s == pytest.approx(1.0)
  assert found.serial_s == pytest.approx(2.2)
  # Model FLOPs are 0.8 of the FLOPs done: the rest is recomputation.
  assert found.mfu_ceiling == pytest.approx({"full": 0.8, "causal": 0.4})
  assert found.mfu_serial == pytest.approx({"full": 0.8 / 2.2, "causal": 0.4 / 2.2})


@pytest.mark.parametrize("change, bound, seconds", [
    ({}, "compute", 1.0),
    ({"memory": 2400e9}, "hbm", 2.0),
    ({"traffic": [Traffic("all-gather", ("data",), 16, 400e9)]}, "ici", 4.0),
    ({"traffic": [Traffic("all-reduce", ("slice",), 2, 25e9)]}, "dcn", 5.0)])
def test_the_slowest_resource_bounds_the_step(change, bound, seconds):
  found = step(**change)
  assert (found.bound, found.step_s) == (bound, pytest.approx(seconds))
  assert found.mfu_ceiling["full"] == pytest.approx(0.8 / seconds)


def test_nvlink_counts_as_within_the_node():
  found = roofline.roofline(
      989e12, 0.0, [Traffic("all-reduce", ("tensor",), 8, 900e9)],
      links({"tensor": 8}, None, None, H100), H100, {"full": 989e12})
  assert (found.ici_s, found.dcn_s, found.bound) == (2.0, 0.0, "ici")
  assert found.mfu_ceiling == {"full": 0.5}


def test_a_device_is_half_a_chip_on_v3():
  found = roofline.roofline(61.5e12, 450e9, [], RATES.__getitem__, V3, {"full": 61.5e12})
  assert (found.compute_s, found.hbm_s) == (1.0, 1.0)


def test_an_empty_step_has_no_roofline():
  with pytest.raises(ValueError, match="no roofline"):
    step(flops=0.0, memory=0.0)


def test_figures_print_as_plain_data():
  assert dataclasses.asdict(step())["mfu_ceiling"] == pytest.approx({"full": 0.8, "causal": 0.4})


def test_needs_no_jax():
  code = "import sys, chinchilla_jax.parallel.roofline; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0
