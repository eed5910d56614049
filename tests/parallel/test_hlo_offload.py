"""Collectives that a SparseCore runs. The lines are libtpu 0.0.52's for v5p, shortened."""

import pytest

from chinchilla_jax.parallel import hlo

MESH = {"slice": 1, "data": 4, "tensor": 2}
BACKEND = 'backend_config={"sparse_core_config":{"offload":"OFFLOAD_COLLECTIVE"}}'
OTHERS = """\
%called_computation.26 (param_0.1975: bf16[3,1024,512]) -> bf16[3,2048,512] {
  %param_0.1975 = bf16[3,1024,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %tuple.311 = (bf16[3,1024,512]{2,1,0:T(8,128)(2,1)}) tuple(%param_0.1975)
  %get-tuple-element.3408 = bf16[3,1024,512]{2,1,0:T(8,128)(2,1)} get-tuple-element(%tuple.311), \
index=0
  ROOT %all-gather.148 = bf16[3,2048,512]{2,1,0:T(8,128)(2,1)} \
all-gather(%get-tuple-element.3408), channel_id=3, \
replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, dimensions={1}, \
use_global_device_ids=true, metadata={op_name="jit(train_step)/jvp()/while/body/mul"}, \
backend_config={"device_type":"DEVICE_TYPE_SPARSECORE"}
}, execution_thread="sparsecore"

%called_computation.34 (param_0.2000: bf16[3,2048,512]) -> bf16[3,512,512] {
  %param_0.2000 = bf16[3,2048,512]{2,1,0} parameter(0)
  ROOT %reduce-scatter.85 = bf16[3,512,512]{2,1,0} reduce-scatter(%param_0.2000), channel_id=10, \
replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true, dimensions={1}, to_apply=%add.2
}, execution_thread="sparsecore"

%called_computation.40 (param_0.1: bf16[32000,512], param_1.1: s32[3072]) -> bf16[3072,512] {
  %param_0.1 = bf16[32000,512]{1,0} parameter(0)
  %param_1.1 = s32[3072]{0} parameter(1)
  ROOT %gather.1 = bf16[3072,512]{1,0} gather(%param_0.1, %param_1.1), offset_dims={1}, \
collapsed_slice_dims={0}, start_index_map={0}, index_vector_dim=1, slice_sizes={1,512}
}, execution_thread="sparsecore"

%product (a: f32[16,8], b: f32[8,16]) -> f32[16,16] {
  %a = f32[16,8] parameter(0)
  %b = f32[8,16] parameter(1)
  ROOT %c = f32[16,16] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
WORK = "  %work = f32[16,16] fusion(%x.0, %y.0), kind=kOutput, calls=%product\n"


def call(name: str, computation: str, source: str, shape: str, result: str) -> tuple[str, str, str]:
  """(start, update, done): the program is loaded by the start, its operands come by the update."""
  held = "(s32[8192]{0:T(1024)}, s32[39]{0:T(1)S(11)})"
  return (
      f'  %{name}.call-start = ((), (), {held}) custom-call-start(), '
      'async_execution_thread="sparsecore", custom_call_target="TODO(b/522284627)", '
      f"called_computations={{%{computation}}}, {BACKEND}\n",
      f"  %{name}.call-update = (({shape}), {result}, {held}) "
      f"custom-call-update(%{name}.call-start, %{source}), "
      "output_to_operand_aliasing={{2,0}: (0, {2,0}), {2,1}: (0, {2,1})}\n",
      f"  %{name}.call-done = {result} custom-call-done(%{name}.call-update)\n")


START, UPDATE, DONE = call("all-gather.121", "called_computation.26", "p",
                           "bf16[3,1024,512]{2,1,0}", "bf16[3,2048,512]{2,1,0}")
SCATTER = call("reduce-scatter.59", "called_computation.34", "q", "bf16[3,2048,512]{2,1,0}",
               "bf16[3,512,512]{2,1,0}")
AT_ONCE = ("  %s = ((bf16[3,1024,512]{2,1,0}), bf16[3,2048,512]{2,1,0}, s32[]) "
           'custom-call-start(%p), async_execution_thread="sparsecore", '
           'custom_call_target="TODO(b/522284627)", called_computations={%called_computation.26}\n',
           "  %d = bf16[3,2048,512]{2,1,0} custom-call-done(%s)\n")


def analysed(*lines: str) -> hlo.Program:
  given = ("  %p = bf16[3,1024,512] parameter(0)\n  %q = bf16[3,2048,512] parameter(1)\n"
           "  %x.0 = f32[16,8] parameter(2)\n  %y.0 = f32[8,16] parameter(3)\n")
  return hlo.analyse(f"HloModule made, is_scheduled=true, num_partitions=8\n\n{OTHERS}\n"
                     f"ENTRY %main (p: f32[8,8]) -> f32[8] {{\n{given}{''.join(lines)}}}\n", MESH)


def test_a_collective_of_a_sparse_core_counts_once():
  found = analysed(START, UPDATE, DONE)
  (c,) = found.collectives
  assert (c.kind, c.axes, c.group_size, c.executions) == ("all-gather", ("tensor",), 2, 1)
  assert c.payload_bytes == 3 * 2048 * 512 * 2 and c.wire_bytes == c.payload_bytes / 2
  assert c.asynchronous and c.where == "jvp()/mul"
  assert found.opaque == () and found.matmul_flops == 0
  assert found.hbm_bytes == (1024 + 2048) * 3 * 512 * 2  # Read once, written once.


def test_the_operands_of_a_scatter_are_the_full_array():
  (c,) = analysed(*SCATTER).collectives
  assert (c.kind, c.axes) == ("reduce-scatter", ("data",))
  assert c.wire_bytes == 3 * 2048 * 512 * 2 * 3 / 4


@pytest.mark.parametrize("lines, overlaps", [
    ((START, UPDATE, WORK, DONE), True),
    ((START, UPDATE, DONE), False),
    ((START, WORK, UPDATE, DONE), False),  # Only its program is loaded then.
    ((WORK, START, UPDATE, DONE), False),
    ((START, UPDATE, DONE, WORK), False),
    ((AT_ONCE[0], WORK, AT_ONCE[1]), True),
    ((WORK, *AT_ONCE), False),
])
def test_it_begins_when_it_has_its_operands(lines, overlaps):
  (c,) = analysed(*lines).collectives
  assert c.asynchronous and c.overlaps == overlaps


def test_a_collective_does_not_hide_behind_another():
  found = analysed(START, UPDATE, *SCATTER, DONE)
  assert len(found.collectives) == 2 and found.overlap() == 0


def test_other_work_of_a_sparse_core_stays_opaque():
  found = analysed(*call("gather", "called_computation.40", "p, %q", "bf16[32000,512]{1,0}",
                         "bf16[3072,512]{1,0}"))
  assert found.collectives == () and found.opaque == (("TODO(b/522284627)", 1),)
