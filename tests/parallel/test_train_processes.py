"""Real processes train the same model through the command line, and give one process's curve."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny import ROOT, tiny_experiment

from chinchilla_jax import config_io
from chinchilla_jax.errors import AGAIN

PATIENCE = 240  # Seconds until a hang counts as one.
FIELDS = {"batch.sequences": "8", "evaluation.every": "6 steps", "checkpoint.every": "6 steps"}


def start(config, workdir, processes, devices, fields=FIELDS):
  """`chinchilla train` in some processes with some simulated devices each."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  environ = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
             "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
  running = []
  for index in range(processes):
    own = fields[index] if isinstance(fields, list) else fields
    command = [sys.executable, "-m", "chinchilla_jax", "train", f"--config={config}",
               f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in own.items())]
    if processes > 1:
      command += [f"--coordinator={address}", f"--processes={processes}", f"--process={index}"]
    running.append(subprocess.Popen(command, env=environ, text=True, stdout=subprocess.PIPE,
                                    stderr=subprocess.PIPE))
  return running


def finish(running):
  """(exit status, stdout, stderr) of each."""
  try:
    texts = [process.communicate(timeout=PATIENCE) for process in running]
    return [(process.returncode, *text) for process, text in zip(running, texts, strict=True)]
  finally:
    for process in running:
      process.kill()


def curve(workdir, kind="train"):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  steps = [line["step"] for line in lines if line["kind"] == kind]
  assert steps == sorted(set(steps))  # No line lost, none doubled.
  return np.array([line["loss"] for line in lines if line["kind"] == kind])


@pytest.fixture(scope="module")
def config(tiny_store, tmp_path_factory):
  path = tmp_path_factory.mktemp("config") / "config.json"
  path.write_text(json.dumps({"config": config_io.to_dict(tiny_experiment(tiny_store))}))
  return path


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("alone") / "run"
  [(status, out, err)] = finish(start(config, workdir, 1, 1))
  assert status == 0, err
  return workdir


@pytest.mark.parametrize("processes, devices, layout", [
    (2, 2, {"mesh.strategy": "fsdp_tensor", "mesh.tensor": "2", "mesh.whole_below": "0"}),
    (4, 1, {"mesh.strategy": "fsdp", "mesh.whole_below": "0"}),
])
def test_the_curve_of_several_processes_is_that_of_one(config, alone, tmp_path, processes, devices,
                                                       layout):
  ended = finish(start(config, tmp_path / "run", processes, devices, FIELDS | layout))
  assert [status for status, _, _ in ended] == [0] * processes, ended
  assert "step 12/12" in ended[0][1] and "trained to step 12" in ended[0][1]
  for _, out, _ in ended[1:]:  # Only process 0 speaks; Gloo does too, of its own accord.
    assert all("[Gloo]" in line or "peer ranks" in line for line in out.splitlines()), out
  for kind in ("train", "eval"):
    got, wanted = curve(tmp_path / "run", kind), curve(alone, kind)
    assert len(got) == len(wanted)
    np.testing.assert_allclose(got, wanted, rtol=5e-3)  # bfloat16, summed in another order.


LONGER = FIELDS | {"run_length": "300 steps", "evaluation.every": "100 steps",
                   "checkpoint.every": "50 steps", "schedule.shape": "constant",
                   "optimizer.peak_lr": "1e-3", "precision.parameters": "float32",
                   "precision.activations": "float32"}


def wait_for(running, path):
  end = time.monotonic() + PATIENCE
  while not path.exists():
    assert time.monotonic() < end and running[0].poll() is None, finish(running)
    time.sleep(0.02)


def test_another_number_of_processes_goes_on_from_a_preempted_run(config, tmp_path):
  """Two processes; a SIGTERM to one of them alone; the rest in one: the curve of one process."""
  [(status, _, err)] = finish(start(config, tmp_path / "alone", 1, 1, LONGER))
  assert status == 0, err
  workdir = tmp_path / "run"
  running = start(config, workdir, 2, 1, LONGER | {"mesh.whole_below": "0"})
  wait_for(running, workdir / "checkpoints" / "50")
  running[1].send_signal(signal.SIGTERM)
  ended = finish(running)
  assert [status for status, _, _ in ended] == [AGAIN] * 2, ended
  assert "SIGTERM: saved at step" in ended[0][1]
  stopped = len(curve(workdir))
  assert 50 <= stopped < 300
  [(status, out, err)] = finish(start(config, workdir, 1, 1, LONGER))
  assert status == 0, err
  assert f"resuming at step {stopped}" in out
  assert "processes was 2, is now 1: results may differ in the last bits" in out
  for kind in ("train", "eval"):
    np.testing.assert_allclose(curve(workdir, kind), curve(tmp_path / "alone", kind), rtol=1e-4)


@pytest.mark.long
def test_a_killed_process_ends_all_and_all_go_on(config, tmp_path):
  """The others notice after a while (JAX's heartbeat); what comes then is bit for bit the run."""
  for workdir in (tmp_path / "whole", tmp_path / "killed"):
    running = start(config, workdir, 2, 1, LONGER)
    if workdir.name == "killed":
      wait_for(running, workdir / "checkpoints" / "100")
      running[1].kill()
      ended = finish(running)
      assert all(status not in (0, 2) for status, _, _ in ended), ended
      running = start(config, workdir, 2, 1, LONGER)
    ended = finish(running)
    assert [status for status, _, _ in ended] == [0, 0], ended
  for kind in ("train", "eval"):
    np.testing.assert_array_equal(curve(tmp_path / "killed", kind), curve(tmp_path / "whole", kind))


def test_processes_that_disagree_refuse_to_start_and_name_the_field(config, tmp_path):
  ended = finish(start(config, tmp_path / "run", 2, 1,
                       [FIELDS, FIELDS | {"optimizer.peak_lr": "1e-5"}]))
  for status, _, err in ended:
    assert status == 2
    assert "config.optimizer.peak_lr is 1e-05 there" in err.splitlines()[-1]
  assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers(config, tmp_path):
  ended = finish(start(config, tmp_path / "run", 1, 3))
  assert ended[0][0] == 2
  assert "8 sequences in 1 microbatches do not divide among 3 devices" in ended[0][2]
  assert not (tmp_path / "run").exists()
