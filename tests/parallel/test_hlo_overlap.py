"""Has a collective work to hide behind? Read from schedules written by hand."""

import pytest

from chinchilla_jax.parallel import hlo

MESH = {"slice": 1, "data": 4, "tensor": 2}
GROUPS = "channel_id=7, replica_groups={{0,2,4,6},{1,3,5,7}}, use_global_device_ids=true"

OTHERS = f"""\
%product (a: f32[16,8], b: f32[8,16]) -> f32[16,16] {{
  %a = f32[16,8] parameter(0)
  %b = f32[8,16] parameter(1)
  ROOT %c = f32[16,16] dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}

%sine (s: f32[16,8]) -> f32[16,8] {{
  %s = f32[16,8] parameter(0)
  ROOT %t = f32[16,8] sine(%s)
}}

%scatter (q: f32[32]) -> f32[8] {{
  %q = f32[32] parameter(0)
  ROOT %rs = f32[8] reduce-scatter(%q), {GROUPS}, dimensions={{0}}, to_apply=%add
}}

%begin (d: f32[8,8]) -> (f32[8,8], f32[32,8], u32[]) {{
  %d = f32[8,8] parameter(0)
  %all-gather.1 = f32[32,8] all-gather(%d), {GROUPS}, dimensions={{0}}, \
frontend_attributes={{chain_id="1"}}
  ROOT %begun = (f32[8,8], f32[32,8], u32[]) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}}

%end (e: f32[8,8], f: f32[32,8], g: u32[]) -> f32[32,8] {{
  %e = f32[8,8] parameter(0)
  %f = f32[32,8] parameter(1)
  %all-gather.2 = f32[32,8] all-gather(%e), {GROUPS}, dimensions={{0}}, \
frontend_attributes={{chain_id="1"}}
  %g = u32[] parameter(2)
  ROOT %ended = f32[32,8] custom-call(%e, %f, %all-gather.2, %g), \
custom_call_target="AsyncCollectiveDone"
}}

%test (v: (s32[], f32[16,8])) -> pred[] {{
  %v = (s32[], f32[16,8]) parameter(0)
  %n = s32[] get-tuple-element(%v), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%n, %three), direction=LT
}}

%body (w: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {{
  %w = (s32[], f32[16,8]) parameter(0)
  %m = s32[] get-tuple-element(%w), index=0
  %one = s32[] constant(1)
  %m1 = s32[] add(%m, %one)
  %x = f32[16,8] get-tuple-element(%w), index=1
  %y = f32[8,16] constant(0)
  %p.1 = (f32[16,8], f32[16,8], u32[]) collective-permute-start(%x), channel_id=9, \
source_target_pairs={{{{0,2}},{{2,0}}}}
  %z = f32[16,16] fusion(%x, %y), kind=kOutput, calls=%product
  %p.2 = f32[16,8] collective-permute-done(%p.1)
  ROOT %both = (s32[], f32[16,8]) tuple(%m1, %p.2)
}}
"""
WORK = "  %work = f32[16,16] fusion(%x.0, %y.0), kind=kOutput, calls=%product\n"
IDLE = "  %idle = f32[16,8] fusion(%x.0), kind=kLoop, calls=%sine\n"
KERNEL = '  %kernel = f32[16,8] custom-call(%x.0), custom_call_target="tpu_custom_call"\n'
NO_OP = '  %buffer = f32[16,8] custom-call(), custom_call_target="AllocateBuffer"\n'
BARE = ("  %bare = f32[16,16] convolution(%x.0, %y.0), dim_labels=bf_io->bf\n")


def analysed(lines: str) -> hlo.Program:
  given = ("  %p = f32[8,8] parameter(0)\n  %q = f32[32] parameter(1)\n"
           "  %x.0 = f32[16,8] parameter(2)\n  %y.0 = f32[8,16] parameter(3)\n")
  return hlo.analyse(f"HloModule made, is_scheduled=true, num_partitions=8\n\n{OTHERS}\n"
                     f"ENTRY %main (p: f32[8,8]) -> f32[8] {{\n{given}{lines}}}\n", MESH)


PAIR = (f"  %s = (f32[8,8], f32[32,8]) all-gather-start(%p), {GROUPS}, dimensions={{0}}\n",
        "  %d = f32[32,8] all-gather-done(%s)\n")
WRAPPED = ("  %s = ((f32[32]), f32[8], u32[]) async-start(%q), calls=%scatter\n"
           "  %u = ((f32[32]), f32[8], u32[]) async-update(%s), calls=%scatter\n",
           "  %d = f32[8] async-done(%u), calls=%scatter\n")
CHAIN = ("  %s = (f32[8,8], f32[32,8], u32[]) fusion(%p), kind=kCustom, calls=%begin\n"
         "  %s0 = f32[8,8] get-tuple-element(%s), index=0\n"
         "  %s1 = f32[32,8] get-tuple-element(%s), index=1\n"
         "  %s2 = u32[] get-tuple-element(%s), index=2\n",
         "  %d = f32[32,8] fusion(%s0, %s1, %s2), kind=kCustom, calls=%end\n")
PERMUTE = ("  %s = (f32[8,8], f32[8,8], u32[]) collective-permute-start(%p), channel_id=9, "
           "source_target_pairs={{0,2},{2,0}}\n", "  %d = f32[8,8] collective-permute-done(%s)\n")


@pytest.mark.parametrize("start, done", [PAIR, WRAPPED, CHAIN, PERMUTE],
                         ids=["pair", "wrapped", "chain", "permute"])
@pytest.mark.parametrize("between, overlaps", [
    (WORK, True), (KERNEL, True), (BARE, True), (IDLE + WORK, True),
    ("", False), (IDLE, False), (NO_OP, False)])
def test_only_matrix_work_between_start_and_done_hides(start, done, between, overlaps):
  found = analysed(start + between + done)
  (c,) = found.collectives
  assert c.asynchronous and c.overlaps == overlaps
  assert found.overlap() == float(overlaps)


@pytest.mark.parametrize("start, done", [PAIR, WRAPPED, CHAIN, PERMUTE],
                         ids=["pair", "wrapped", "chain", "permute"])
def test_work_before_or_after_does_not_hide(start, done):
  (c,) = analysed(WORK + start + done + BARE).collectives
  assert c.asynchronous and not c.overlaps


def test_one_instruction_hides_behind_nothing():
  line = f"  %g = f32[32,8] all-gather(%p), {GROUPS}, dimensions={{0}}\n"
  (c,) = analysed(line + WORK).collectives
  assert not c.asynchronous and not c.overlaps


def test_a_pair_that_the_compiler_calls_synchronous_does_not_hide():
  start = PAIR[0].rstrip() + ', backend_config={"collective_backend_config":{"is_sync":true}}\n'
  (c,) = analysed(start + WORK + PAIR[1]).collectives
  assert not c.overlaps


def test_a_loop_around_products_counts_as_work_and_its_permute_overlaps_in_each_turn():
  loop = ("  %i = s32[] constant(0)\n  %t.0 = (s32[], f32[16,8]) tuple(%i, %x.0)\n",
          "  %loop = (s32[], f32[16,8]) while(%t.0), condition=%test, body=%body\n")
  found = analysed(loop[0] + PAIR[0] + loop[1] + PAIR[1])
  by_kind = {c.kind: c for c in found.collectives}
  assert by_kind["all-gather"].overlaps
  permute = by_kind["collective-permute"]
  assert permute.overlaps and permute.executions == 3


def test_the_share_is_of_bytes():
  found = analysed(PAIR[0] + WORK + PAIR[1]
                   + f"  %r = f32[32] all-reduce(%q), {GROUPS}, to_apply=%add\n")
  gather, reduce = 32 * 8 * 4 * 3 / 4, 2 * 32 * 4 * 3 / 4
  assert found.overlap() == pytest.approx(gather / (gather + reduce))
  assert found.overlap(("all-reduce", ("data",))) == 0
  assert found.overlap(("all-gather", ("data",))) == 1


def test_a_transfer_between_slices_has_a_window_too():
  send = ('  %token = token[] after-all()\n'
          '  %s = (f32[8,8], u32[], token[]) send(%p, %token), channel_id=3, is_host_transfer=true,'
          ' frontend_attributes={_xla_megascale_target="{0:1}x8",'
          '_xla_megascale_transfer_type="ALL_REDUCE"}\n')
  done = "  %d = token[] send-done(%s), channel_id=3\n"
  mesh = {"slice": 2, "data": 4, "tensor": 2}

  def share(between):
    text = (f"HloModule made, is_scheduled=true, num_partitions=8\n\n{OTHERS}\n"
            "ENTRY %main (p: f32[8,8]) -> f32[8] {\n  %p = f32[8,8] parameter(0)\n"
            "  %x.0 = f32[16,8] parameter(2)\n  %y.0 = f32[8,16] parameter(3)\n"
            f"{send}{between}{done}}}\n")
    return hlo.analyse(text, mesh).overlap()

  assert share(WORK) == 1 and share(IDLE) == 0
