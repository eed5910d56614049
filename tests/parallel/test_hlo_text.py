"""Tests of the reading of HLO text: groups of devices, loops, shapes, and speed."""

import time

import pytest

from chinchilla_jax.parallel import hlo, hlo_slices, hlo_text

MESH = {"slice": 1, "data": 4, "tensor": 2}


def module(body: str, partitions: int = 8, others: str = "") -> str:
  """A module whose entry has these lines."""
  return (f"HloModule made, is_scheduled=true, num_partitions={partitions}\n\n{others}\n"
          f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n")


def only(text: str, mesh: dict[str, int]) -> hlo.Collective:
  collective, = hlo.analyse(text, mesh).collectives
  return collective


# Groups of devices.

@pytest.mark.parametrize("groups, axes, size", [
    ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",), 2),
    ("{{0,2,4,6},{1,3,5,7}}", ("data",), 4),
    ("{{0,4,2,6},{5,1,3,7}}", ("data",), 4),
    ("{{0,1,2,3,4,5,6,7}}", ("data", "tensor"), 8),
    ("{}", ("data", "tensor"), 8),
    ("{{0},{1},{2},{3},{4},{5},{6},{7}}", (), 1),
    ("[4,2]<=[8]", ("tensor",), 2),
    ("[2,4]<=[4,2]T(1,0)", ("data",), 4),
    ("[1,8]<=[8]", ("data", "tensor"), 8),
    ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("data",), 4),
    ("mesh['axis_0'=4,'axis_1'=2] {'axis_1','axis_0'}", ("data", "tensor"), 8),
    ("mesh['axis_0'=8] {'axis_0':(4)2}", ("tensor",), 2),
    ("mesh[a=8] {a:(1)4}", ("data",), 4),
    ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ("data",), 4),
    ("mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}", ("data",), 4),
    ("{{0,3},{1,2},{4,7},{5,6}}", ("?",), 2),  # Pairs that no axis makes.
    ("[4,2]<=[2,4]T(1,0)", ("data",), 2),  # Half of an axis.
    ("{{0,1},{2,4},{3,5},{6,7}}", ("?",), 2),
    ("{{0,1,2,3},{4,5},{6,7}}", ("?",), 4),
])
def test_every_form_of_groups(groups, axes, size):
  c = only(module(f"  %p = f32[8]{{0}} parameter(0)\n  ROOT %r = f32[8]{{0}} all-reduce(%p), "
                  f"channel_id=1, replica_groups={groups}, use_global_device_ids=true, "
                  "to_apply=%add"), {"slice": 1, "data": 4, "tensor": 2})
  assert (c.axes, c.group_size) == (axes, size)
  assert c.wire_bytes == 32 * 2 * (size - 1) / size


def test_groups_in_an_unknown_form_raise():
  with pytest.raises(ValueError, match="replica_groups of %r"):
    only(module("  %p = f32[8] parameter(0)\n"
                "  ROOT %r = f32[8] all-reduce(%p), replica_groups=<new>, to_apply=%add"), MESH)


def test_ids_without_global_device_ids():
  """Partitions for an all-to-all with a channel; all partitions of the replicas otherwise."""
  line = "  %p = f32[8] parameter(0)\n  ROOT %r = f32[8] "
  exchange = line + "all-to-all(%p), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}"
  assert only(module(exchange), MESH).axes == ("tensor",)
  total = line + "all-reduce(%p), channel_id=1, replica_groups={{0}}, to_apply=%add"
  assert only(module(total), MESH).axes == ("data", "tensor")
  replicas = module(line + "all-reduce(%p), replica_groups={{0,1},{2,3}}, to_apply=%add", 1)
  replicas = replicas.replace("num_partitions=1", "replica_count=4")
  assert only(replicas, {"data": 2, "tensor": 2}).axes == ("tensor",)


def test_a_permute_names_every_axis_it_crosses():
  line = ("  %p = bf16[8] parameter(0)\n  ROOT %r = bf16[8] collective-permute(%p), channel_id=1, "
          "source_target_pairs={")
  assert only(module(line + "{0,0},{1,2},{2,1}}"), MESH).axes == ("data", "tensor")
  assert only(module(line + "{0,2},{2,4},{4,6}}"), MESH).axes == ("data",)
  assert only(module(line + "{0,0},{1,1}}"), MESH).wire_bytes == 0
  assert only(module(line + "{0,9}}"), MESH).axes == ("?",)


# Loops.

COUNTED = """\
%add_one (i: s32[]) -> s32[] {
  %i = s32[] parameter(0)
  %one = s32[] constant(1)
  ROOT %next = s32[] add(%i, %one)
}

%condition (state: (s32[], f32[8], s32[])) -> pred[] {
  %state.0 = (s32[], f32[8], s32[]) parameter(0)
  %i.0 = s32[] get-tuple-element(%state.0), index=0
  %limit.0 = s32[] get-tuple-element(%state.0), index=2
  ROOT %less = pred[] compare(%i.0, %limit.0), direction=LT
}

%body (state: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %state.1 = (s32[], f32[8], s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %x.1 = f32[8] get-tuple-element(%state.1), index=1
  %limit.1 = s32[] get-tuple-element(%state.1), index=2
  %i.2 = s32[] fusion(%i.1), kind=kLoop, calls=%add_one
  %sum = f32[8] all-reduce(%x.1), channel_id=1, replica_groups={}, use_global_device_ids=true, \
to_apply=%add
  ROOT %next.1 = (s32[], f32[8], s32[]) tuple(%i.2, %sum, %limit.1)
}
"""
LOOP = """\
  %p = f32[8] parameter(0)
  %start = s32[] constant({start})
  %copied = s32[] copy(%start)
  %limit = s32[] {limit}
  %state = (s32[], f32[8], s32[]) tuple(%copied, %p, %limit)
  %loop.7 = (s32[], f32[8], s32[]) while(%state), condition=%condition, body=%body
  ROOT %r = f32[8] get-tuple-element(%loop.7), index=1"""


@pytest.mark.parametrize("start, step, direction, trips", [
    (0, 1, "LT", 12), (3, 1, "LT", 9), (0, 5, "LT", 3), (0, 1, "LE", 13), (0, 4, "NE", 3),
    (20, -1, "GT", 8), (20, -4, "GE", 3), (30, 1, "LT", 0)])
def test_trip_counts_from_the_condition(start, step, direction, trips):
  """As the TPU compiler writes loops: no known_trip_count, a limit carried in the state."""
  loop = COUNTED.replace("constant(1)", f"constant({step})").replace("LT", direction)
  found = hlo.analyse(module(LOOP.format(start=start, limit="constant(12)"), others=loop), MESH)
  assert found.loops == (("loop.7", trips),)
  assert found.collectives[0].executions == trips


def test_a_known_trip_count_is_taken():
  lines = LOOP.format(start=0, limit="get-tuple-element(%q), index=0").replace(
      "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"31"}}')
  assert hlo.analyse(module(lines, others=COUNTED), MESH).loops == (("loop.7", 31),)


@pytest.mark.parametrize("change", [
    ("add(%i, %one)", "multiply(%i, %one)"), ("direction=LT", "direction=NE"),
    ("tuple(%i.2, %sum, %limit.1)", "tuple(%i.2, %sum, %i.2)")])
def test_other_loops_raise(change):
  limit = "constant(12)" if "NE" not in change[1] else "constant(-2)"
  with pytest.raises(ValueError, match="%loop.7"):
    hlo.analyse(module(LOOP.format(start=0, limit=limit), others=COUNTED.replace(*change)), MESH)


def test_shapes():
  assert hlo_text.parse_shape("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}") == ("bf16", (8, 128), 1)
  nested = hlo_text.parse_shape("((f32[2]{0}, s32[]), /*index=1*/pred[<=3], token[])")
  assert [a.bytes for a in hlo_text.leaves(nested)] == [8, 4, 3, 0]
  assert hlo_text.parse_shape("s4[3]").bytes == 2 and hlo_text.parse_shape("f8e4m3fn[3]").bytes == 3
  with pytest.raises(ValueError, match="q7"):
    _ = hlo_text.parse_shape("q7[2]").bytes


def test_long_text_is_read_in_a_few_seconds():
  shape = "f32[128,128]{1,0:T(8,128)}"
  line = "  %x.{} = {} add(%x.{}, %x.{}), metadata={{op_name=\"{}\"}}"
  lines = [f"  %x.0 = {shape} parameter(0)"]
  lines += [line.format(n + 1, shape, n, n, "a" * 120) for n in range(100_000)]
  text = module("\n".join(lines) + "\n  ROOT %r = f32[] constant(0)")
  assert len(text) > 20e6
  start = time.process_time()
  assert hlo.analyse(text, MESH).hbm_bytes == 100_000 * 2 * 65536
  assert time.process_time() - start < 20  # About 1 s on an idle core.


def test_transfers_between_slices():
  def send(kind, target):
    return hlo_text.Instruction(
        "send", "f32[8]", "send", "%x, %token",
        f'channel_id=2, is_host_transfer=true, frontend_attributes={{_xla_megascale_target='
        f'"{target}",_xla_megascale_transfer_type="{kind}"}}', False)
  assert hlo_slices.transfer(send("ALL_REDUCE", "{1,2}x{0:7}")) == ("all-reduce", 2)
  assert hlo_slices.transfer(send("ALL_GATHER", "{1:4}x{0:7}")) == ("all-gather", 4)
  assert hlo_slices.transfer(send("X", "{1:4}x{0:7}")._replace(opcode="add")) is None
  with pytest.raises(ValueError, match="unknown form"):
    hlo_slices.transfer(send("MANY_TO_ONE", "{1:4}x{0:7}"))


def test_the_part_of_a_mesh_that_is_one_slice():
  mesh = {"slice": 2, "data": 4, "tensor": 2}
  assert hlo_slices.split(mesh, 16) == (mesh, "")
  assert hlo_slices.split(mesh, 8) == (mesh | {"slice": 1}, "slice")
  assert hlo_slices.split({"slice": 1, "data": 8}, 4) == ({"slice": 1, "data": 4}, "data")
  with pytest.raises(ValueError, match="compiled for 3 devices"):
    hlo_slices.split(mesh, 3)


def test_an_instruction_may_go_over_several_lines():
  """As the TPU compiler prints splash attention's metadata."""
  module = hlo_text.parse("""HloModule m

%body (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %k = f32[2]{0} custom-call(%x), custom_call_target="k", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="a kernel"}
  ROOT %y = f32[2]{0} negate(%k)
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  ROOT %call = f32[2]{0} call(%x), to_apply=%body
}
""")
  body = module.computations["body"]
  assert list(body.instructions) == ["x", "k", "y"] and body.root.name == "y"
  assert 'op_name="a kernel"' in body.instructions["k"].attributes
