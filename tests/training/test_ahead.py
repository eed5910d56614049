"""Compiling for TPUs that are not here."""

import importlib.util
import json

import peak
import pytest
from tiny import tiny_experiment, with_fields

from chinchilla_jax import cli
from chinchilla_jax.errors import UserError
from chinchilla_jax.parallel import topology
from chinchilla_jax.training import ahead

needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"),
                                  reason="libtpu is not installed; make test installs it")
SMALL = dict(data__seq_len=128, batch__sequences=16, model__attention_block=64,
             mesh__whole_below=0)


@pytest.fixture
def small():
  return with_fields(tiny_experiment(), **SMALL)


@pytest.mark.tpu_topology
@needs_libtpu
def test_what_the_compiler_holds_is_what_the_layout_says(small):
  experiment = with_fields(small, mesh__strategy="fsdp_tensor", mesh__tensor=2, model__d_model=256,
                           model__d_ff=1024, model__n_heads=4, model__kv_size=128)
  report = ahead.compile_step(experiment, ahead.devices(topology.parse("v5e:2x4")))
  memory = report.memory
  predicted = sum(memory[name] for name in ("parameters", "master", "moments", "other", "batch"))
  assert predicted <= memory["arguments"] < 1.1 * predicted  # Tiles are padded.
  assert memory["peak"] < memory["capacity"] == 16 * 2**30
  assert report.devices == 8 and report.mesh_shape["data"] == 4
  axes = {axis for c in report.program.collectives for axis in c.axes}
  assert axes == {"data", "tensor"}
  assert report.bounds.step_s > 0


@pytest.mark.tpu_topology
@needs_libtpu
def test_flops_and_bytes_grow_with_depth(small):
  """The compiler's own count would see the body of the scan once."""
  found = ahead.devices(topology.parse("v5e:2x2"))
  two, four, eight = (ahead.compile_step(with_fields(small, model__n_layers=n), found).program
                      for n in (2, 4, 8))
  grown = (eight.matmul_flops - four.matmul_flops) / (four.matmul_flops - two.matmul_flops)
  assert grown == pytest.approx(2, rel=0.02)
  sent = [sum(c.wire_bytes for c in program.collectives) for program in (two, four, eight)]
  assert (sent[2] - sent[1]) / (sent[1] - sent[0]) == pytest.approx(2, rel=0.1)


@pytest.mark.tpu_topology
@needs_libtpu
def test_out_of_memory_says_by_how_much_and_what_helps(capsys):
  status = cli.main(["compile", "--config=configs/chinchilla.py:2980m", "--topology=v5e:2x2",
                     "--config.mesh.strategy=replicated", "--config.batch.sequences=8",
                     "--config.model.n_layers=12"])
  assert status == 2
  line = capsys.readouterr().err.strip()
  assert "\n" not in line
  assert "out of memory" in line and "GiB too many" in line
  assert "config.mesh.strategy=fsdp" in line and "config.batch.microbatches" in line


@pytest.mark.tpu_topology
@needs_libtpu
def test_chinchilla_70b_fits_the_slice_that_its_config_names():
  """The paper's batch on 1,024 v4 chips; nothing of that size is ever allocated."""
  printed, peak_bytes = peak.of_command("compile", "--config=configs/chinchilla.py:70b",
                                        "--topology=v4:8x8x16", "--sequences=768", "--json")
  facts = json.loads(printed)
  memory, checks = facts["memory"], facts["checks"]
  # All over tensor and data: 1,024; weights below whole_below over tensor alone.
  assert memory["parameters"] == pytest.approx(2 * 70.06e9 / 1024, rel=0.06)
  assert memory["master"] == pytest.approx(4 * 70.06e9 / 1024, rel=0.06)
  assert memory["moments"] == 2 * memory["master"]
  assert memory["temporaries"] <= 0.75 * memory["capacity"]
  # Products are saved: what is computed twice is attention's forward part, and masked halves.
  assert 1.0 < facts["program"]["matmul_flops"] / facts["model_flops"]["causal"] < 1.1
  assert facts["attention"] == "relative_tpu" and facts["program"]["opaque"] == []
  assert checks["scores"] is None and checks["scores_unknown"] is None
  assert 1 <= checks["sent_over_least"] <= 1.15
  assert checks["overlap"] > 0.4
  assert checks["state"]["not_donated"] == [] and checks["state"]["bytes"] < 2**25
  assert facts["bounds"]["mfu_ceiling"]["causal"] >= 0.7
  assert peak_bytes < 6 * 2**30


@pytest.mark.tpu_topology
@needs_libtpu
def test_scores_are_found_where_there_is_no_kernel(small):
  found = ahead.devices(topology.parse("v5e:2x2"))
  # More than the chip's own memory holds.
  small = with_fields(small, model__attention_block=0, data__seq_len=512, batch__sequences=64,
                      model__n_heads=8)
  assert ahead.compile_step(small, found).checks.scores is None
  blockwise = with_fields(small, model__attention_kernel="blockwise")
  assert ahead.compile_step(blockwise, found).checks.scores is not None


def test_gpus_cannot_be_compiled_for_without_one():
  with pytest.raises(UserError, match="h100:8 cannot be compiled for without one"):
    ahead.devices(topology.parse("h100:8"))


def test_this_machine_is_compiled_for_without_a_roofline(capsys, monkeypatch):
  words = ["compile", "--config=configs/smoke.py", "--config.model.n_layers=1"]
  assert cli.main([*words, "--json"]) == 0
  facts = json.loads(capsys.readouterr().out)
  assert facts["bounds"] is None and facts["memory"]["capacity"] is None
  assert facts["program"]["matmul_flops"] > facts["model_flops"]["causal"] > 0
  assert facts["program"]["collectives"] == []


@pytest.mark.parametrize("words, said", [
    (["--topology=v4:8x8"], "a shape of v4 has 3 dimensions"),
    (["--topology=v9:8x8"], "unknown generation 'v9'"),
    (["--slices=2"], "--slices: give a positive number, with --topology"),
    (["--topology=v5e:2x2", "--sequences=0"], "--sequences: got 0"),
])
def test_bad_words_are_one_line(words, said, capsys):
  assert cli.main(["compile", "--config=configs/smoke.py", *words]) == 2
  captured = capsys.readouterr()
  assert captured.out == "" and captured.err.count("\n") == 1 and said in captured.err


@pytest.mark.tpu_topology
@needs_libtpu
def test_what_does_not_divide_is_refused_with_the_numbers(capsys):
  assert cli.main(["compile", "--config=configs/chinchilla.py:70b", "--topology=v5p:8x8x8",
                   "--config.mesh.tensor=128"]) == 2
  assert "64 heads do not divide by 128" in capsys.readouterr().err
