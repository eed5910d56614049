"""The scripts of benchmarks/ are read by people: help is there, a mistake is no traceback."""

import os
import subprocess
import sys

import pytest
from tiny import ROOT

SCRIPTS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py"))


def run(name, *words, folder=ROOT) -> tuple[int, str, str]:
  done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / name), *words], text=True,
                        capture_output=True, cwd=folder,
                        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"})
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_a_wrong_word(name, tmp_path):
  status, out, err = run(name, "--help", folder=tmp_path)
  assert status == 0 and f"usage: {name}" in out and err == ""
  status, out, err = run(name, "--no-such-flag", folder=tmp_path)
  assert status == 2 and "Traceback" not in err and "error: " in err.splitlines()[-1]
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name, words, said", [
    ("step_driver.py", ["--steps=0"], "--steps: got '0', allowed is a whole number from 1 on"),
    ("step_driver.py", ["--batch=-3"], "--batch: got '-3'"),
    ("step_driver.py", ["--chunk=-1"], "--chunk: allowed is 0 and more"),
    ("gpu_step.py", ["--shapes", "9b"], "--shapes: invalid choice: '9b'"),
    ("gpu_step.py", ["--nanogpt=nowhere"], "nowhere is no checkout of nanoGPT"),
    ("growth.py", ["--rounds=0", "--out=x"], "--rounds: got '0'"),
    ("growth.py", ["--out=file/x"], "--out: file/x cannot be written"),
    ("loop_overhead.py", ["--config=nowhere.py"], "nowhere.py"),
    ("attention_memory.py", ["--topology=v99:1"], "v99"),
    ("tpu_table.py", ["--only=nothing"], "no row's command contains 'nothing'"),
    ("plot_loss.py", ["nowhere", "x.png"], "nowhere has no evaluation"),
    ("scaling_fits.py", [], "what"),
])
def test_a_mistake_is_told_in_a_line(name, words, said, tmp_path):
  (tmp_path / "file").write_text("")
  status, out, err = run(name, *words, folder=tmp_path)
  assert status == 2 and out == "" and "Traceback" not in err
  assert said in err.splitlines()[-1]
  assert os.listdir(tmp_path) == ["file"]


def test_the_step_driver_alone(tmp_path):
  """As a harness reads it: JSON lines, a first and a last one."""
  import json
  status, out, err = run("step_driver.py", "--shape=smoke", "--steps=1", "--warmup=0",
                         folder=tmp_path)
  assert status == 0, err
  events = [json.loads(line) for line in out.splitlines()]
  assert [event["event"] for event in events] == ["ready", "step", "summary", "bye"]
  assert events[0]["attention"] == "blockwise" and events[2]["tok_s_median"] > 0
