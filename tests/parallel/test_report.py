import json
import math
import os
import re
import subprocess
import sys

import pytest
from tiny import ROOT, tiny_experiment, with_fields

from chinchilla_jax import cli, config_io
from chinchilla_jax.commands import inspect
from chinchilla_jax.errors import UserError
from chinchilla_jax.model import shapes
from chinchilla_jax.parallel import report

CHINCHILLA = str(ROOT / "configs" / "chinchilla.py")


def chinchilla(name="70b", **fields):
  return with_fields(config_io.load(f"{CHINCHILLA}:{name}"), **fields)


def facts_of(experiment, n_devices, n_slices=1):
  mesh = report.abstract_mesh(experiment.mesh, n_devices, n_slices)
  return report.facts(experiment, mesh, inspect._state(experiment))


def array(facts, path):
  return next(row for row in facts["arrays"] if row["path"] == path)


def held(facts):
  """Every group of arrays that the report has a line for."""
  return [part for row in facts["arrays"] for part in (row["parameter"], *row["optimizer"])
          ] + facts["others"]


def run(capsys, *words):
  """(exit status, stdout, stderr) of `chinchilla inspect`."""
  status = cli.main(["inspect", *map(str, words)])
  return status, *capsys.readouterr()


@pytest.fixture
def config(tmp_path):
  """Writes an experiment, gives its --config flag."""
  def write(experiment):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_io.to_dict(experiment)))
    return f"--config={path}"
  return write


@pytest.mark.parametrize("experiment, n_devices", [
    (chinchilla("70b", mesh__strategy="deepmind", mesh__tensor=16), 1024),
    (chinchilla("1424m"), 32),
    (with_fields(tiny_experiment(), model__activation="swiglu", model__qk_norm=True,
                 model__position="rotary"), 4)])
def test_counts_and_bytes_add_up(experiment, n_devices):
  facts = facts_of(experiment, n_devices)
  count = shapes.count_parameters(experiment.model)
  assert facts["parameters"]["total"] == facts["parameters"]["in_table"] == count
  assert sum(facts["parameters"]["groups"].values()) == count

  totals = facts["totals"]
  assert totals["parameters"]["bytes"] == 2 * count
  assert totals["master"]["bytes"] == 4 * count
  assert totals["moments"]["bytes"] == 8 * count
  assert totals["counters"]["bytes"] == 40
  parts = [total for name, total in totals.items() if name != "state"]
  for key in ("bytes", "bytes_per_device", "bytes_on_all_devices", "replicated_bytes"):
    assert totals["state"][key] == sum(part[key] for part in parts)
  for key in ("bytes", "bytes_per_device", "replicated_bytes"):
    assert totals["state"][key] == sum(part[key] for part in held(facts))
  for row in facts["arrays"]:
    for part in (row["parameter"], *row["optimizer"]):
      pieces = math.prod(facts["mesh"]["axes"][axis] for axes in part["cut"] for axis in axes)
      assert part["bytes_per_device"] * pieces == part["bytes"]
      assert part["replicated_bytes"] == part["bytes"] * (n_devices // pieces - 1)


def test_the_papers_layout_of_the_70b():
  facts = facts_of(chinchilla(mesh__strategy="deepmind", mesh__tensor=16), 1024)
  assert facts["mesh"]["axes"] == {"slice": 1, "data": 64, "context": 1, "tensor": 16}
  w_in = array(facts, "blocks/feed_forward/w_in")
  assert w_in["axes"] == ["layers", "embed", "mlp"]
  assert w_in["parameter"]["cut"] == [[], [], ["tensor"]]
  assert w_in["parameter"]["bytes_per_device"] == 80 * 8192 * 32768 * 2 // 16
  state, = w_in["optimizer"]
  assert state["arrays"] == ["master", "mu", "nu"] and state["dtype"] == "float32"
  assert state["cut"] == [[], ["data"], ["tensor"]]
  assert state["bytes_per_device"] == 3 * 80 * 8192 * 32768 * 4 // (16 * 64)
  assert state["replicated_bytes"] == 0
  assert facts["batch"] == [
      {"from": "0%", "sequences": 768, "microbatches": 1, "per_device": 12},
      {"from": "50%", "sequences": 1536, "microbatches": 2, "per_device": 12}]
  between = next(row for row in facts["activations"] if row["name"] == "between layers")
  assert between["shape_per_device"] == [12, 2048 // 16, 8192]
  assert facts["does_not_train"] is None and facts["fell_back"] == []


def test_replicated_on_8_devices_is_seven_eighths_copies():
  facts = facts_of(with_fields(tiny_experiment(), mesh__strategy="replicated"), 8)
  total = facts["totals"]["state"]
  assert total["bytes_per_device"] == total["bytes"]
  assert 8 * total["replicated_bytes"] == 7 * total["bytes_on_all_devices"]


def test_slices_hold_copies():
  facts = facts_of(with_fields(tiny_experiment(), mesh__whole_below=0), 8, n_slices=2)
  assert facts["mesh"]["axes"]["slice"] == 2
  table = array(facts, "embedding/table")["parameter"]
  assert table["replicated_bytes"] == table["bytes"]


def test_fall_backs_are_told():
  odd = with_fields(tiny_experiment(), model__vocab_size=513, mesh__tensor=2,
                    mesh__strategy="fsdp_tensor")
  facts = facts_of(odd, 4)
  row, = facts["fell_back"]
  assert row["reason"] == "vocab 513 does not divide by tensor 2"
  assert {"params/embedding/table", "optimizer/master/embedding/logit_bias",
          "activations/logits"} <= set(row["arrays"])
  assert facts["does_not_train"] is None, "training goes on with the next rule"
  line = " ".join(report.text(facts).split())
  assert "fell back: vocab 513 does not divide by tensor 2; in" in line


def test_overrides_are_told_and_so_are_those_without_effect():
  experiment = with_fields(tiny_experiment(), mesh__overrides=(
      ("params/embedding/table", "data,-"), ("no_such_array", "-"),
      ("^params/embedding/table$", "-,-"), ("optimizer/mu/final_norm", "data")))
  facts = facts_of(experiment, 4)
  assert array(facts, "embedding/table")["parameter"]["cut"] == [["data"], []]
  assert [row["arrays"] for row in facts["overrides"]] == [
      ["params/embedding/table"], [], [], ["optimizer/mu/final_norm/gain"]]
  # Moments that lie apart from the master have a line of their own.
  assert [part["arrays"] for part in array(facts, "final_norm/gain")["optimizer"]] == [
      ["master", "nu"], ["mu"]]
  assert facts["totals"]["moments"]["bytes"] == 2 * facts["totals"]["master"]["bytes"]
  text = report.text(facts)
  assert "override: 'params/embedding/table' cuts by 'data,-': params/embedding/table" in text
  assert "'no_such_array' matches no array" in text
  assert "'^params/embedding/table$' comes after others" in text


def test_an_override_that_cannot_be_kept_is_refused():
  with pytest.raises(UserError, match="config.mesh.overrides, .*table.* into 7"):
    facts_of(with_fields(tiny_experiment(), mesh__overrides=(("table", "data,-"),)), 7)


@pytest.mark.parametrize("experiment, n_devices, n_slices", [
    (chinchilla(mesh__strategy="deepmind", mesh__tensor=16), 1024, 1),
    (chinchilla(mesh__strategy="fsdp_tensor", mesh__tensor=8, mesh__context=4), 4096, 2),
    (chinchilla(mesh__strategy="fsdp", mesh__tensor=1,
                mesh__overrides=(("w_in", "-,-,-"),)), 1000, 1)])
def test_the_text_fits_a_terminal(experiment, n_devices, n_slices):
  text = report.text(facts_of(experiment, n_devices, n_slices))
  assert max(map(len, text.splitlines())) <= report.COLUMNS
  assert "80 x (8192, 64, 128)" in text


def test_json_and_text_say_the_same(capsys):
  words = [f"--config={CHINCHILLA}:70b", "--config.mesh.strategy=deepmind",
           "--config.mesh.tensor=16", "--topology=v4:8x8x16"]
  status, text, _ = run(capsys, *words)
  assert status == 0
  status, out, _ = run(capsys, *words, "--json")
  assert status == 0
  facts = json.loads(out)
  assert report.text(facts) == text.rstrip("\n")
  assert "70,061,956,352" in text and facts["parameters"]["total"] == 70_061_956_352
  state = facts["totals"]["state"]["bytes_per_device"]
  assert report.bytes_text(state) in text
  assert facts["mesh"]["memory_per_device"] == 32 * 2**30
  assert f"{state / 2**35:.1%} of a device's 32.00 GiB" in text


def test_slices_and_memory_of_a_topology(capsys):
  words = [f"--config={CHINCHILLA}:74m", "--topology=v5e:4x4", "--slices=2", "--json"]
  _, out, _ = run(capsys, *words)
  mesh = json.loads(out)["mesh"]
  assert mesh["axes"] == {"slice": 2, "data": 16, "context": 1, "tensor": 1}
  assert (mesh["kind"], mesh["memory_per_device"]) == ("2 x v5e:4x4", 16 * 2**30)


def test_the_devices_of_this_machine(config, capsys):
  status, out, _ = run(capsys, config(tiny_experiment()))
  assert status == 0 and re.search(r"= \d+ devices? \(cpu, this machine\)", out)


def test_what_does_not_train_is_shown_and_then_refused(config, capsys):
  words = [config(with_fields(tiny_experiment(), batch__sequences=6)), "--devices=4"]
  status, out, error = run(capsys, *words)
  assert status == 2 and "do not divide among the devices" in out
  assert error.startswith("chinchilla inspect: does not train: config.batch: 6 sequences")
  assert error.count("\n") == 1
  status, out, _ = run(capsys, *words, "--json")
  assert status == 2 and json.loads(out)["does_not_train"].startswith("config.batch: 6 ")


@pytest.mark.parametrize("words, expected", [
    ([], "nothing to inspect"),
    (["--config.seed=1", "--topology=v9:2x2"], "unknown generation 'v9'"),
    (["--config.seed=1", "--topology=v4:8x8x16", "--devices=8"], "one of them"),
    (["--config.seed=1", "--slices=2"], "--slices"),
    (["--config.seed=1", "--devices=0"], "--devices: got 0"),
    (["--config.mesh.tensor=3", "--devices=8"], "does not make 8 devices"),
    (["--config.mesh.tensor=4096"], "with --devices or --topology"),
    (["--workdir=nowhere"], "nowhere"),
    (["--workdir=nowhere", "--config=x.py"], "its own config"),
    (["--store=nowhere"], "nowhere"),
    (["--store=nowhere", "--devices=8"], "lies on no devices")])
def test_a_users_mistake_is_one_line_and_status_2(words, expected, capsys):
  status, out, error = run(capsys, *words)
  assert (status, out, error.count("\n")) == (2, "", 1)
  assert expected in error


def test_a_run_and_its_checkpoints(tiny_run, capsys):
  experiment, workdir = tiny_run
  status, text, _ = run(capsys, "--workdir", workdir, "--devices=2")
  assert status == 0 and text.startswith(f"run {workdir}: 3 checkpoints (checksums compared)\n")
  status, out, _ = run(capsys, "--workdir", workdir, "--devices=2", "--json")
  facts = json.loads(out)
  rows = facts["run"]["checkpoints"]
  assert [(row["step"], row["tokens"]) for row in rows] == [
      (step, step * 4 * 32) for step in (4, 8, 12)]
  whole = facts["totals"]["state"]["bytes"]
  assert all(row["bytes"] > whole / 4 for row in rows), "compressed, but there"
  assert facts["name"] == experiment.name
  # The checkpoints are shown even if the run does not fit these devices.
  status, text, error = run(capsys, "--workdir", workdir, "--devices=3",
                            "--config.mesh.tensor=2")
  assert status == 2 and "3 checkpoints" in text and "does not make 3 devices" in error


def test_a_token_store(tiny_store, config, capsys):
  status, text, _ = run(capsys, "--store", tiny_store)
  assert status == 0 and "512 pieces" in text and "sequences" not in text
  _, out, _ = run(capsys, "--store", tiny_store, "--json", config(tiny_experiment()))
  facts = json.loads(out)["store"]
  train = facts["splits"]["train"]
  assert train["sequences"] == (train["tokens"] - 1) // 32
  assert train["bytes_per_token"] == train["bytes"] / train["tokens"]
  assert f"{train['tokens']:,} tokens in {train['documents']:,} documents" in text
  assert facts["fingerprint"] in text


def test_devices_are_not_touched():
  """Another process may be using them: JAX is told to look at CPUs only."""
  code = ("import sys; from chinchilla_jax.cli import main; "
          f"main(['inspect', '--config={CHINCHILLA}:70b', '--devices=8', '--json']); "
          "import jax; assert jax.config.jax_platforms == 'cpu', jax.config.jax_platforms")
  environ = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
  subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT,
                 env=environ)
