"""Tests of the HLO reader: compiled programs on 8 simulated devices, and short hand-made texts."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from chinchilla_jax.parallel import hlo

MESH = {"slice": 1, "data": 4, "tensor": 2}
MICROBATCHES, BATCH, D, F = 3, 128, 32, 64

# Compiles the programs for the devices that its environment gives it; one file each.
PROGRAMS = '''
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

folder, topology = sys.argv[1:]
if topology == "cpu":
  devices, shape = jax.devices(), (1, 4, 2)
else:
  from jax.experimental import topologies
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  shape = (1, 2, 2)
mesh = Mesh(np.array(devices).reshape(shape), ("slice", "data", "tensor"))
M, B, D, F = MICROBATCHES, BATCH, WIDTH, HIDDEN


def dump(name, function, *arguments):
  text = jax.jit(function).lower(*arguments).compile().as_text()
  open(f"{folder}/{name}.txt", "w").write(text)


def array(shape, *spec, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def train(weights, batches):
  """Microbatches outside, layers inside, forward and backward: 6 products a layer."""
  def layer(x, w):
    return x + jnp.tanh(x @ w[0]) @ w[1], None
  def loss(weights, x):
    return jnp.sum(jax.lax.scan(layer, x, weights)[0] ** 2)
  def micro(total, x):
    return jax.tree.map(jnp.add, total, jax.grad(loss)(weights, x)), None
  return jax.lax.scan(micro, jax.tree.map(jnp.zeros_like, weights), batches)[0]


def stack(depth):
  weights = array((depth, D, F), None, None, "tensor"), array((depth, F, D), None, "tensor")
  dump(f"train{depth}", train, weights, array((M, B, D), None, "data"))


stack(2)
stack(16)
if topology != "cpu":
  sys.exit()


@jax.shard_map(mesh=mesh, in_specs=P("data", "tensor"), out_specs=P("data", "tensor"),
               check_vma=False)
def collectives(x):
  a = jax.lax.psum(x, "data")
  b = jax.lax.all_gather(a, "tensor", axis=1, tiled=True)
  c = jax.lax.psum_scatter(jnp.sin(b), "data", scatter_dimension=0, tiled=True)
  d = jax.lax.ppermute(jnp.sin(c), "data", [(i, (i + 1) % 4) for i in range(4)])
  e = jax.lax.all_to_all(jnp.sin(d), "tensor", 1, 0, tiled=True)
  shift = lambda x, _: (jax.lax.ppermute(jnp.sin(x), "tensor", [(0, 1), (1, 0)]), None)
  f = jax.lax.scan(shift, e, length=5)[0]
  return f + jax.lax.psum(jnp.sum(f), ("data", "tensor"))


dump("collectives", collectives, array((64, 32), "data", "tensor"))
fsdp = lambda w, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
dump("fsdp", fsdp, array((7, D, D), None, "data"), array((B, D), "data"))
dump("endless", lambda x: jax.lax.while_loop(lambda x: x < 9.0, lambda x: x * 1.5, x), array(()))
dump("branches", lambda p, x: jax.lax.cond(p, lambda x: x @ x, jnp.sin, x),
     array((), dtype=jnp.bool_), array((D, D)))
'''


def compile_programs(folder: pathlib.Path, topology: str) -> None:
  script = PROGRAMS
  for name, value in [("MICROBATCHES", MICROBATCHES), ("BATCH", BATCH), ("WIDTH", D),
                      ("HIDDEN", F)]:
    script = script.replace(name, str(value))
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1",
                 "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
  done = subprocess.run([sys.executable, "-c", script, str(folder), topology], env=environment,
                        capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
  folder = tmp_path_factory.mktemp("hlo")
  compile_programs(folder, "cpu")
  return lambda name: (folder / f"{name}.txt").read_text()


def module(body: str, partitions: int = 8, others: str = "") -> str:
  """A module whose entry has these lines."""
  return (f"HloModule made, is_scheduled=true, num_partitions={partitions}\n\n{others}\n"
          f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n")


# Compiled programs.

@pytest.mark.parametrize("depth", [2, 16])
def test_flops_are_exact_at_any_depth(program, depth):
  found = hlo.analyse(program(f"train{depth}"), MESH)
  assert found.matmul_flops == MICROBATCHES * depth * 6 * 2 * BATCH * D * F / 8
  assert [trips for _, trips in found.loops] == [MICROBATCHES, depth, depth]
  assert not found.opaque


def test_hbm_bytes_grow_with_depth_and_not_with_its_square(program):
  two, sixteen = (hlo.analyse(program(f"train{depth}"), MESH).hbm_bytes for depth in (2, 16))
  assert 2 * two < sixteen < 9 * two


def test_collectives_made_by_hand(program):
  found = hlo.analyse(program("collectives"), MESH)
  rows = {(c.kind, c.axes): (c.group_size, c.dtype, c.payload_bytes, c.executions, c.wire_bytes)
          for c in found.collectives}
  block = 64 * 32 * 4 // 8  # The bytes of one device's block.
  assert rows == {
      ("all-reduce", ("data",)): (4, "f32", block, 1, block * 2 * 3 / 4),
      ("all-gather", ("tensor",)): (2, "f32", 2 * block, 1, block),
      ("reduce-scatter", ("data",)): (4, "f32", 2 * block, 1, 2 * block * 3 / 4),
      ("collective-permute", ("data",)): (4, "f32", block // 2, 1, block / 2),
      ("all-to-all", ("tensor",)): (2, "f32", block // 2, 1, block / 4),
      ("collective-permute", ("tensor",)): (2, "f32", block // 2, 5, block * 5 / 2),
      ("all-reduce", ("data", "tensor")): (8, "f32", 4, 1, 4 * 2 * 7 / 8),
  }
  assert not any(c.asynchronous for c in found.collectives)
  assert any("ppermute" in c.where for c in found.collectives)
  assert found.by_axes()["collective-permute", ("tensor",)] == (5, block * 5 / 2, 0.0)


def test_collectives_made_by_the_partitioner(program):
  found = hlo.analyse(program("fsdp"), MESH)
  gathers = [c for c in found.collectives if c.kind == "all-gather"]
  assert [(c.axes, c.executions, c.payload_bytes) for c in gathers] == [(("data",), 7, D * D * 4)]
  assert found.matmul_flops == 7 * 2 * BATCH * D * D / 4


def test_a_loop_of_unknown_length_raises(program):
  with pytest.raises(ValueError, match="trip count of the loop %while"):
    hlo.analyse(program("endless"), MESH)


def test_the_costliest_branch_counts(program):
  assert hlo.analyse(program("branches"), MESH).matmul_flops == 2 * D**3


def test_another_mesh_is_refused(program):
  with pytest.raises(ValueError, match="compiled for 8 devices"):
    hlo.analyse(program("fsdp"), {"data": 4})


@pytest.mark.tpu_topology
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_flops_on_a_tpu_that_is_not_here(tmp_path):
  compile_programs(tmp_path, "v5e:2x2")
  for depth in (2, 16):
    found = hlo.analyse((tmp_path / f"train{depth}.txt").read_text(),
                        {"slice": 1, "data": 2, "tensor": 2})
    assert found.matmul_flops == MICROBATCHES * depth * 6 * 2 * BATCH * D * F / 4
    assert [trips for _, trips in found.loops] == [MICROBATCHES, depth, depth]


# HBM bytes and FLOPs.

def test_hbm_convention():
  others = """\
%slice_of_stack (s: f32[64,1024], n: s32[]) -> f32[1024] {
  %s = f32[64,1024]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,1024]{1,0} dynamic-slice(%s, %n, %zero), dynamic_slice_sizes={1,1024}
  ROOT %flat = f32[1024]{0} bitcast(%one)
}

%store_in_stack (s.1: f32[64,1024], x: f32[1024], n.1: s32[]) -> (f32[64,1024], f32[1024]) {
  %s.1 = f32[64,1024]{1,0} parameter(0)
  %x = f32[1024]{0} parameter(1)
  %n.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %row = f32[1,1024]{1,0} bitcast(%x)
  %stored = f32[64,1024]{1,0} dynamic-update-slice(%s.1, %row, %n.1, %zero.1)
  %twice = f32[1024]{0} add(%x, %x)
  ROOT %both = (f32[64,1024]{1,0}, f32[1024]{0}) tuple(%stored, %twice)
}
"""
  counted = """\
  %p = f32[64,1024]{1,0} parameter(0)
  %n = s32[] constant(3)
  %a = f32[1024]{0} fusion(%p, %n), kind=kLoop, calls=%slice_of_stack
  %v = f32[1024]{0:T(1024)S(1)} fusion(%p, %n), kind=kLoop, calls=%slice_of_stack
  %b = (f32[64,1024]{1,0}, f32[1024]{0}) fusion(%p, %a, %n), kind=kLoop, calls=%store_in_stack
  %c = f32[1024]{0} get-tuple-element(%b), index=1
  %d = f32[32,32]{1,0} bitcast(%c)
  %e = f32[32,32]{1,0:T(8,128)S(1)} copy(%d)
  %f = f32[32,32]{1,0} add(%e, %e)
  %g = (f32[32,32]{1,0:T(8,128)S(1)}, f32[32,32]{1,0}, u32[]{:S(2)}) copy-start(%f)
  ROOT %h = f32[32,32]{1,0:T(8,128)S(1)} copy-done(%g)"""
  kib4 = 4096
  expected = (kib4 + 4 + kib4  # a: the slice, the index; its result
              + kib4 + 4  # v: the same into VMEM
              + kib4 + 4 + kib4 + kib4  # b: x, the index; the update and the sum
              + kib4 + 0  # e: from HBM to VMEM
              + 0 + kib4  # f: from VMEM
              + kib4)  # g: from HBM to VMEM
  assert hlo.analyse(module(counted, others=others), MESH).hbm_bytes == expected


def test_gather_and_scatter_touch_only_their_rows():
  lines = """\
  %p = bf16[32000,64]{1,0} parameter(0)
  %i = s32[16]{0} parameter(1)
  %rows = bf16[16,64]{1,0} gather(%p, %i), offset_dims={1}
  ROOT %new = bf16[32000,64]{1,0} scatter(%p, %i, %rows), to_apply=%add"""
  rows, index = 16 * 64 * 2, 16 * 4
  assert hlo.analyse(module(lines), MESH).hbm_bytes == (rows + index + rows) + (
      index + rows + rows)


@pytest.mark.parametrize("line, flops", [
    ("f32[4,8,16] dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
     "rhs_batch_dims={0}, rhs_contracting_dims={1}", 2 * 4 * 8 * 16 * 32),
    # A product as the TPU writes it: the contraction over a spatial dimension and a feature.
    ("f32[8,16,1] convolution(%a, %c), window={size=4}, dim_labels=0bf_0io->bf0",
     2 * 8 * 16 * 4 * 32),
    # A batched product: of the 4 x 4 positions of the window only 4 meet data.
    ("f32[4,8,16] convolution(%a, %c), window={size=4 stride=3 lhs_dilate=4}, "
     "dim_labels=0bf_0io->0bf", 2 * 4 * 8 * 16 * 32),
    ("f32[4,8,16] convolution(%d, %c), window={size=4 pad=3_3 rhs_reversal=1}, "
     "dim_labels=0bf_0io->0bf", 2 * 4 * 8 * 16 * 32),
    ('(f32[4,8,16], s8[99]) custom-call(%a, %b), custom_call_target="__cublas$gemm", '
     'backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
     '{"lhs_contracting_dimensions":["2"]}}}', 2 * 4 * 8 * 16 * 32),
])
def test_flops_of_one_product(line, flops):
  lines = f"""\
  %a = f32[4,8,32] parameter(0)
  %b = f32[4,32,16] parameter(1)
  %c = f32[4,32,16] parameter(2)
  %d = f32[1,8,32] parameter(3)
  ROOT %r = {line}"""
  assert hlo.analyse(module(lines), MESH).matmul_flops == flops


def test_custom_calls_are_reported():
  lines = ("  %p = f32[8] parameter(0)\n"
           '  ROOT %r = f32[8] custom-call(%p), custom_call_target="tpu_custom_call"')
  assert hlo.analyse(module(lines), MESH).opaque == (("tpu_custom_call", 1),)


# Forms of TPU and GPU text.

def test_start_and_done_are_one_asynchronous_collective():
  lines = """\
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %s = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, \
u32[]{:S(2)}) collective-permute-start(%p), channel_id=1, source_target_pairs={{0,2},{2,0}}, \
metadata={op_name="jit(step)/while/body/block/attention/mul" stack_frame_id=3}
  %d = bf16[8,128]{1,0:T(8,128)(2,1)} collective-permute-done(%s)
  %g = (bf16[8,128], bf16[32,128]) all-gather-start(%d), channel_id=2, \
replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, use_global_device_ids=true, \
backend_config={"collective_backend_config":{"is_sync":true}}
  ROOT %h = bf16[32,128] all-gather-done(%g)"""
  found = hlo.analyse(module(lines), MESH)
  permute, gather = found.collectives
  assert permute == hlo.Collective("collective-permute", ("data",), 4, "bf16", 2048, 1, 2048.0,
                                   True, "block/attention/mul")
  assert (gather.kind, gather.payload_bytes, gather.asynchronous) == ("all-gather", 8192, False)
  assert found.hbm_bytes == 2 * 2048 + 2048 + 8192
  assert found.by_axes()["collective-permute", ("data",)] == (1, 2048.0, 1.0)


def test_wrapped_asynchronous_collectives():
  others = """\
%wrapped (q: f32[32]) -> f32[8] {
  %q = f32[32]{0} parameter(0)
  ROOT %rs = f32[8]{0} reduce-scatter(%q), channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}, \
use_global_device_ids=true, dimensions={0}, to_apply=%add
}
"""
  lines = """\
  %p = f32[32]{0} parameter(0)
  %s = ((f32[32]{0}), f32[8]{0}) async-start(%p), calls=%wrapped
  %u = ((f32[32]{0}), f32[8]{0}) async-update(%s), calls=%wrapped
  ROOT %d = f32[8]{0} async-done(%u), calls=%wrapped"""
  found = hlo.analyse(module(lines, others=others), MESH)
  (c,) = found.collectives
  assert (c.kind, c.axes, c.asynchronous, c.wire_bytes) == ("reduce-scatter", ("data",), True, 96)
  assert found.hbm_bytes == 128 + 32


def test_all_reduce_scatter_fusion():
  others = """\
%all-reduce-scatter (input: bf16[1000,64]) -> bf16[256,64] {
  %input = bf16[1000,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %zero = bf16[] constant(0)
  %pad = bf16[1024,64]{1,0:T(8,128)(2,1)} pad(%input, %zero), padding=0_24x0_0
  %all-reduce.9 = bf16[1024,64]{1,0:T(8,128)(2,1)} all-reduce(%pad), channel_id=6, \
replica_groups={{0,2,4,6},{1,3,5,7}}, use_global_device_ids=true, to_apply=%add
  %at = s32[] constant(0)
  ROOT %mine = bf16[256,64]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.9, %at, %at), \
dynamic_slice_sizes={256,64}
}
"""
  lines = """\
  %p = bf16[1000,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %r = bf16[256,64]{1,0:T(8,128)(2,1)} fusion(%p), kind=kCustom, \
calls=%all-reduce-scatter, metadata={op_name="jit(step)/transpose(jvp())/mlp/dot_general"}"""
  found = hlo.analyse(module(lines, others=others), MESH)
  (c,) = found.collectives
  assert (c.kind, c.axes, c.payload_bytes) == ("reduce-scatter", ("data",), 1024 * 64 * 2)
  assert c.where == "transpose(jvp())/mlp/dot_general"
  assert found.hbm_bytes == 256 * 64 * 2


def test_a_chain_of_fusions_is_one_collective():
  """v5e: a start, a product that carries the gather on, a done; each repeats the gather."""
  gather = ("channel_id=3, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}, "
            'use_global_device_ids=true, frontend_attributes={chain_id="1"}')
  others = f"""\
%begin (a: f32[8,8]) -> (f32[8,8], f32[32,8], u32[]) {{
  %a = f32[8,8]{{1,0}} parameter(0)
  %all-gather.1 = f32[32,8]{{1,0}} all-gather(%a), {gather}
  ROOT %custom-call.1 = (f32[8,8]{{1,0}}, f32[32,8]{{1,0}}, u32[]{{:S(2)}}) \
custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion (b: f32[8,8], c: f32[32,8], f: u32[], x: f32[16,8]) -> (f32[16,16]) {{
  %b = f32[8,8]{{1,0}} parameter(0)
  %c = f32[32,8]{{1,0}} parameter(1)
  %all-gather.2 = f32[32,8]{{1,0}} all-gather(%b), {gather}
  %f = u32[]{{:S(2)}} parameter(2)
  %x = f32[16,8]{{1,0}} parameter(3)
  %y = f32[16,16]{{1,0}} convolution(%x, %x), dim_labels=bf_oi->bf
  ROOT %t = (f32[16,16]{{1,0}}, f32[8,8]{{1,0}}, f32[32,8]{{1,0}}, f32[32,8]{{1,0}}, \
u32[]{{:S(2)}}) tuple(%y, %b, %c, %all-gather.2, %f)
}}

%end (d: f32[8,8], e: f32[32,8], g: u32[]) -> f32[32,8] {{
  %d = f32[8,8]{{1,0}} parameter(0)
  %e = f32[32,8]{{1,0}} parameter(1)
  %all-gather.3 = f32[32,8]{{1,0}} all-gather(%d), {gather}
  %g = u32[]{{:S(2)}} parameter(2)
  ROOT %custom-call.2 = f32[32,8]{{1,0}} custom-call(%d, %e, %all-gather.3, %g), \
custom_call_target="AsyncCollectiveDone"
}}
"""
  lines = """\
  %p = f32[8,8]{1,0} parameter(0)
  %x.1 = f32[16,8]{1,0} parameter(1)
  %s = (f32[8,8]{1,0}, f32[32,8]{1,0}, u32[]{:S(2)}) fusion(%p), kind=kCustom, calls=%begin
  %s0 = f32[8,8]{1,0} get-tuple-element(%s), index=0
  %s1 = f32[32,8]{1,0} get-tuple-element(%s), index=1
  %s2 = u32[]{:S(2)} get-tuple-element(%s), index=2
  %m = (f32[16,16]{1,0}, f32[8,8]{1,0}, f32[32,8]{1,0}, f32[32,8]{1,0}, u32[]{:S(2)}) \
fusion(%s0, %s1, %s2, %x.1), kind=kCustom, calls=%async_collective_fusion
  %m1 = f32[8,8]{1,0} get-tuple-element(%m), index=1
  %m3 = f32[32,8]{1,0} get-tuple-element(%m), index=3
  %m4 = u32[]{:S(2)} get-tuple-element(%m), index=4
  ROOT %d.1 = f32[32,8]{1,0} fusion(%m1, %m3, %m4), kind=kCustom, calls=%end"""
  found = hlo.analyse(module(lines, others=others), MESH)
  (c,) = found.collectives
  assert (c.kind, c.axes, c.payload_bytes, c.executions) == ("all-gather", ("data",), 1024, 1)
  assert c.asynchronous
  assert found.matmul_flops == 2 * 16 * 16 * 8
  # The gather reads its input and writes its output once; the product reads x, writes y.
  assert found.hbm_bytes == 256 + 1024 + 512 + 1024


def test_a_kernel_counts_as_it_says_it_does():
  """Pallas' cost estimate, times the trips of its loop; bytes beyond its arrays are read again."""
  call = ('%kernel = f32[8,16]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", '
          'backend_config={"custom_call_config":{"body":"AA==",COST"needs_layout_passes":true}}')
  told = '"cost_estimate":{"flops":"1000","transcendentals":"7","bytes_accessed":"5000"},'
  text = lambda cost: f"""HloModule m
ENTRY %main (x: f32[8,16]) -> f32[8,16] {{
  %x = f32[8,16]{{1,0}} parameter(0)
  ROOT {call.replace('COST', cost)}
}}
"""
  found = hlo.analyse(text(told), {})
  assert (found.matmul_flops, found.hbm_bytes, found.opaque) == (1000, 5000, ())
  assert hlo.analyse(text(told.replace("5000", "10")), {}).hbm_bytes == 2 * 8 * 16 * 4
  silent = hlo.analyse(text(""), {})
  assert silent.matmul_flops == 0 and silent.opaque == (("tpu_custom_call", 1),)
