"""Is the train state held once, and are scores kept out of memory? By hand, on CPU, for a TPU."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from tiny import tiny_experiment, with_fields

from chinchilla_jax.model import transformer
from chinchilla_jax.parallel import (
    hlo_checks,
    hlo_copies,
    hlo_scores,
    hlo_text,
    mesh,
    topology,
    wire_minimum,
)
from chinchilla_jax.parallel.layout import Layout
from chinchilla_jax.training import ahead, step

LEAF = 1024 * 1024  # Numbers of the leaf in the programs by hand: 4 MiB.


def program(lines: str, alias: str = "{0}: (0, {}, may-alias), {1}: (1, {}, may-alias)",
            others: str = "") -> hlo_text.Module:
  """Two donated arrays of state, w and count, and a batch."""
  return hlo_text.parse(f"""\
HloModule step, is_scheduled=true, input_output_alias={{ {alias} }}, \
entry_computation_layout={{(f32[1024,1024], s32[], f32[8])->(f32[1024,1024], s32[])}}

{others}
ENTRY %main (w: f32[1024,1024], count: s32[], x: f32[8]) -> (f32[1024,1024], s32[]) {{
  %w = f32[1024,1024]{{1,0}} parameter(0), metadata={{op_name="state[\\'params\\'][\\'w\\']"}}
  %count = s32[] parameter(1), metadata={{op_name="state[\\'count\\']"}}
  %x = f32[8] parameter(2), metadata={{op_name="batch[\\'x\\']"}}
{lines}
}}
""")


IN_PLACE = """\
  %new = f32[1024,1024]{1,0} add(%w, %w)
  ROOT %out = (f32[1024,1024]{1,0}, s32[]) tuple(%new, %count)"""


def test_a_step_in_place_copies_nothing():
  found = hlo_copies.find(program(IN_PLACE))
  assert found == hlo_copies.Copies(2, (), ()) and found.bytes == 0


def test_what_is_not_donated_is_named():
  found = hlo_copies.find(program(IN_PLACE, "{1}: (1, {}, may-alias)"))
  assert found.not_donated == ("state['params']['w']",)
  nothing = hlo_copies.find(program(IN_PLACE, ""))
  assert nothing.not_donated == ("state['count']", "state['params']['w']")


@pytest.mark.parametrize("line, name", [
    ("%c = f32[1024,1024]{0,1} copy(%w)", "state['params']['w']"),
    ("%c = f32[1024,1024]{0,1} transpose(%w), dimensions={1,0}", "state['params']['w']"),
    ("%c = f32[1,1024,1024]{1,2,0} copy(%b)", "state['params']['w']"),
    ("%c = f32[1024,1024]{0,1} fusion(%w), kind=kLoop, calls=%moves", "state['params']['w']"),
    # A gradient or an updated value: not the state itself, but as large.
    ("%c = f32[1024,1024]{0,1} copy(%g)", "like state['params']['w']"),
    ("%c = (f32[1024,1024]{1,0}, f32[1024,1024]{1,0}, u32[]) copy-start(%w)",
     "state['params']['w']"),
])
def test_a_copy_is_found(line, name):
  others = """\
%moves (p: f32[1024,1024]) -> f32[1024,1024] {
  %p = f32[1024,1024]{1,0} parameter(0)
  ROOT %q = f32[1024,1024]{0,1} copy(%p)
}
"""
  lines = ("  %b = f32[1,1024,1024]{2,1,0} bitcast(%w)\n"
           f"  %g = f32[1024,1024]{{1,0}} multiply(%w, %w)\n  {line}\n{IN_PLACE}")
  found = hlo_copies.find(program(lines, others=others))
  assert [(row[0], row[3], row[4]) for row in found.found] == [(name, 1, 4 * LEAF)]


@pytest.mark.parametrize("line", [
    "%c = f32[1024,1024]{1,0:T(8,128)S(1)} copy(%w)",  # To the chip: a prefetch.
    "%c = (f32[1024,1024]{1,0:S(1)}, f32[1024,1024]{1,0}, u32[]) copy-start(%w)",
    "%c = f32[1024,1024]{1,0} copy(%v)",  # And back.
    "%c = bf16[1024,1024]{1,0} convert(%w)",  # Other numbers.
    "%c = f32[512,1024]{1,0} copy(%part)",  # Not a whole array.
    "%c = s32[] copy(%count)",  # Too small to matter.
    "%c = f32[1024,1024]{0,1} fusion(%w), kind=kLoop, calls=%works",
])
def test_what_is_no_copy_is_not_found(line):
  others = """\
%works (p: f32[1024,1024]) -> f32[1024,1024] {
  %p = f32[1024,1024]{1,0} parameter(0)
  %q = f32[1024,1024]{0,1} copy(%p)
  ROOT %r = f32[1024,1024]{0,1} sine(%q)
}
"""
  lines = ("  %v = f32[1024,1024]{1,0:T(8,128)S(1)} sine(%w)\n"
           f"  %part = f32[512,1024]{{1,0}} slice(%w), slice={{[0:512], [0:1024]}}\n"
           f"  {line}\n{IN_PLACE}")
  assert hlo_copies.find(program(lines, others=others)).found == ()


def test_a_copy_in_a_loop_counts_as_often_as_it_runs():
  others = """\
%test (v: (s32[], f32[1024,1024])) -> pred[] {
  %v = (s32[], f32[1024,1024]) parameter(0)
  %n = s32[] get-tuple-element(%v), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%n, %three), direction=LT
}

%body (u: (s32[], f32[1024,1024])) -> (s32[], f32[1024,1024]) {
  %u = (s32[], f32[1024,1024]) parameter(0)
  %m = s32[] get-tuple-element(%u), index=0
  %one = s32[] constant(1)
  %m1 = s32[] add(%m, %one)
  %a = f32[1024,1024]{1,0} get-tuple-element(%u), index=1
  %c = f32[1024,1024]{1,0} copy(%a)
  ROOT %both = (s32[], f32[1024,1024]) tuple(%m1, %c)
}
"""
  lines = """\
  %zero = s32[] constant(0)
  %t = (s32[], f32[1024,1024]) tuple(%zero, %w)
  %loop = (s32[], f32[1024,1024]) while(%t), condition=%test, body=%body
  %new = f32[1024,1024] get-tuple-element(%loop), index=1
  ROOT %out = (f32[1024,1024], s32[]) tuple(%new, %count)"""
  (row,) = hlo_copies.find(program(lines, others=others)).found
  assert row[3:] == (3, 3 * 4 * LEAF)


def test_another_name_for_the_state_is_refused():
  with pytest.raises(ValueError, match="no parameter of the program is part of 'weights'"):
    hlo_copies.find(program(IN_PLACE), argument="weights")


# Compiled programs.

def compiled(step, donate) -> hlo_text.Module:
  array = jax.ShapeDtypeStruct((512, 512), jnp.float32)
  arguments = {"a": array, "b": array}, jax.ShapeDtypeStruct((512, 512), jnp.float32)
  return hlo_text.parse(jax.jit(step, donate_argnums=donate).lower(*arguments).compile().as_text())


def test_jax_donates_what_it_is_told_to_and_can():
  update = lambda state, x: {name: w + x for name, w in state.items()}
  assert hlo_copies.find(compiled(update, 0)).not_donated == ()
  assert len(hlo_copies.find(compiled(update, ())).not_donated) == 2
  narrow = lambda state, x: {"a": state["a"] + x, "b": (state["b"] + x).astype(jnp.bfloat16)}
  assert hlo_copies.find(compiled(narrow, 0)).not_donated == ("state['b']",)


def test_jax_copies_what_is_swapped():
  swap = lambda state, x: {"a": state["b"] + x, "b": state["a"] * x}
  kept = lambda state, x: {"a": state["a"] + x, "b": state["b"] * x}
  assert hlo_copies.find(compiled(kept, 0), at_least=0).found == ()
  assert hlo_copies.find(compiled(swap, 0), at_least=0).found != ()


# What is printed.

def said(**fields) -> str:
  given = dict(least=(), sent=0.0, overlap=0.0, copies=hlo_copies.Copies(3, (), ()), scores=None,
               unknown="") | fields
  return "\n".join(hlo_checks.lines(hlo_checks.Checks(**given)))


def test_the_answers_are_said():
  assert said() == ("  state donated: yes, all 3 arrays\n  copies of parameters: none\n"
                    "  scores in memory: none")
  term = wire_minimum.Term("gather for use", "all-gather", ("data",), 4, 2e9)
  assert "sent 3.000 GB, least by this layout 2.000 GB: sent / least 1.50" in said(
      least=(term,), sent=3e9)
  assert "can overlap with matrix products: 25% of what is sent" in said(sent=1.0, overlap=0.25)
  bad = hlo_copies.Copies(3, ("state['step']",), (
      ("state['params']['blocks']['w']", "bf16", (2, 4), 1, 2**30),
      ("like state['params']['v']", "bf16", (4,), 3, 2**29)))
  text = said(copies=bad, scores=("f32[8,8]", 2**30))
  assert "state donated: no, 1 of 3 arrays are not: step" in text
  assert "copies of parameters: 4, 1.500 GiB a step: params/blocks/w, like params/v" in text
  assert "scores in memory: f32[8,8], 1.000 GiB" in text
  assert "scores in memory: not known, why" in said(unknown="why")


# Scores.

WANTED = hlo_scores.Scores(rows=256, keys=256, pieces=8, sequences=2,
                           lookalikes=(64,), weights=((4, 256, 256), (16, 256, 256)))


def entry(*lines: str) -> hlo_text.Module:
  return program("\n".join(f"  {line}" for line in lines) + "\n" + IN_PLACE)


@pytest.mark.parametrize("shape, bytes_each", [
    ("f32[4,2,256,256]", 4), ("bf16[8,256,256]", 2), ("f32[2,256,4,256]", 4),
    ("f32[4,2,256,257]", 4),     # Before the relative shift.
    ("f32[8,65792]", 4),         # Rows and keys as one line: 256 x 257.
    ("f32[8,1,65536]", 4), ("f32[2,8,256,256]", 4)])
def test_scores_in_memory_are_found(shape, bytes_each):
  size = 1
  for n in shape.split("[")[1].rstrip("]").split(","):
    size *= int(n)
  module = entry(f"%s = {shape} fusion(%x), kind=kLoop, calls=%none")
  assert hlo_scores.largest(module, WANTED) == (shape, bytes_each * size)


@pytest.mark.parametrize("line", [
    "%s = f32[4,2,256,256]{3,2,1,0:T(8,128)S(1)} exponential(%x)",  # On the chip.
    "%s = pred[4,2,256,256] compare(%x, %x)",                       # A mask.
    "%s = f32[2,256,256] multiply(%x, %x)",         # An activation, were d_model 256 as well.
    "%s = f32[4,2,128,256] exponential(%x)",        # A block of rows.
    "%s = f32[16,256,256] add(%x, %x)",             # The gradient of a weight of all layers.
    "%s = f32[16,2,256,64] add(%x, %x)",            # No second such axis.
    "%s = (f32[4,2,256,256], s32[]) tuple(%x)",     # Nobody's result.
])
def test_what_are_no_scores_are_not_found(line):
  assert hlo_scores.largest(entry(line), WANTED) is None


def test_rows_may_be_a_part_of_the_sequence():
  cut = hlo_scores.Scores(rows=64, keys=256, pieces=8, sequences=2)
  assert hlo_scores.largest(entry("%s = f32[8,64,256] exponential(%x)"), cut)
  assert not hlo_scores.largest(entry("%s = f32[8,64,64] exponential(%x)"), cut)


def test_one_head_and_a_width_like_the_sequence_cannot_be_told():
  with pytest.raises(ValueError, match="a device has one head"):
    hlo_scores.largest(entry(), hlo_scores.Scores(256, 256, 2, 2, lookalikes=(256,)))


def scores_of(block: int) -> tuple[str, int] | None:
  """Of the gradient of a real model, whose d_ff and two sequences' worth are no hits."""
  experiment = with_fields(tiny_experiment(), data__seq_len=64, model__attention_block=block,
                           model__n_heads=4, model__d_ff=64)
  params = transformer.abstract(experiment.model, "bfloat16")
  batch = {name: jax.ShapeDtypeStruct((4, 64), jnp.dtype(dtype)) for name, dtype in (
      ("inputs_bt", "int32"), ("targets_bt", "int32"), ("segments_bt", "int32"),
      ("weights_bt", "float32"))}
  gradients = jax.jit(lambda params, batch: step.gradients(experiment, params, batch))
  text = gradients.lower(params, batch).compile({"xla_backend_optimization_level": 0}).as_text()
  wanted = hlo_scores.Scores.of(experiment, Layout(experiment, mesh.on_one()), 4)
  return hlo_scores.largest(hlo_text.parse(text), wanted)


def test_scores_of_a_real_model_are_there_without_blocks_and_not_with_them():
  shape, size = scores_of(0)
  assert "64,6" in shape and size >= 4 * 4 * 64 * 64 * 4
  assert scores_of(32) is None


@pytest.mark.tpu_topology
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_step_for_a_tpu_is_in_place_and_sends_little_more_than_it_must():
  experiment = with_fields(
      tiny_experiment(), data__seq_len=256, batch__sequences=32, mesh__strategy="fsdp_tensor",
      mesh__tensor=2, mesh__whole_below=0, model__d_model=512, model__d_ff=2048,
      model__n_heads=4, model__kv_size=128, model__n_layers=2, model__remat="full",
      model__attention_block=0)
  report = ahead.compile_step(experiment, ahead.devices(topology.parse("v5e:2x4")))
  checks = report.checks
  assert checks.copies.leaves == 78 and checks.copies.not_donated == ()
  assert checks.copies.found == ()
  assert 1.0 <= checks.sent_over_least < 1.3
  gathered = [t.wire_bytes for t in checks.least if t.name == "gather for use"]
  (sent,) = [wire for (kind, axes), (_, wire, _) in report.program.by_axes().items()
             if (kind, axes) == ("all-gather", ("data",))]
  # Forward and backward, and the table once more, for the loss (`Placement.first`).
  table = experiment.model.vocab_size // 2 * experiment.model.d_model * 2  # Bytes of tensor's half.
  assert sent == pytest.approx(sum(gathered) + table * 3 / 4, rel=1e-3)
  assert 0 < checks.overlap < 1
  assert checks.overlap <= sum(c.wire_bytes for c in report.program.collectives
                               if c.asynchronous) / checks.sent
