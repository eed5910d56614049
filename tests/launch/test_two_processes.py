"""launch/two_processes.sh: two real processes, and stand-ins for how they end."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from tiny import ROOT, tiny_experiment

from chinchilla_jax import config_io

SCRIPT = ROOT / "launch/two_processes.sh"


def run(environ, *words, timeout=300):
  return subprocess.run([SCRIPT, *words], env={**os.environ, **environ}, text=True,
                        capture_output=True, timeout=timeout)


def stand_in(folder, body):
  path = folder / "stand_in"
  path.write_text(f'#!/usr/bin/env bash\nfor w in "$@"; do case $w in --process=*) i=${{w#*=}} ;; '
                  f"esac; done\n{body}\n")
  path.chmod(0o755)
  return {"CHINCHILLA": str(path)}


def test_two_processes_train_together(tiny_store, tmp_path):
  config = tmp_path / "config.json"
  config.write_text(json.dumps({"config": config_io.to_dict(tiny_experiment(tiny_store))}))
  done = run({"CHINCHILLA": f"{sys.executable} -m chinchilla_jax", "PYTHONPATH": str(ROOT),
              "JAX_PLATFORMS": "cpu"},
             f"--config={config}", f"--workdir={tmp_path}/run", "--config.run_length=4 steps",
             "--config.batch.sequences=8", "--config.mesh.whole_below=0")
  assert done.returncode == 0, done.stderr
  assert "trained to step 4" in done.stdout
  lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines if '"train"' in line] == [1, 2, 3, 4]


def test_they_are_told_who_they_are_and_speak_with_their_number(tmp_path):
  done = run(stand_in(tmp_path, 'echo "$*"; [ "$i" = 0 ] || echo oops >&2') | {"PROCESSES": "3"},
             "--config=a b")
  assert done.returncode == 0, done.stderr
  port = re.search(r"127\.0\.0\.1:(\d+)", done.stdout)[1]
  words = f"train --config=a b --coordinator=127.0.0.1:{port} --processes=3 --process="
  told = done.stdout.splitlines()
  assert sorted(told) == sorted([f"{words}0", f"process 1: {words}1", "process 1: oops",
                                 f"process 2: {words}2", "process 2: oops"])


@pytest.mark.parametrize("statuses, status", [
    ("0 0", 0), ("75 75", 75), ("0 3", 3), ("2 134", 2), ("134 2", 134)])
def test_its_status_is_that_of_process_0_or_the_first_other_one(tmp_path, statuses, status):
  done = run(stand_in(tmp_path, f'statuses=({statuses})\nexit "${{statuses[$i]}}"'))
  assert done.returncode == status


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_reaches_both_once_and_they_may_take_their_time(tmp_path, number, status):
  """The whole group gets it, as from a terminal."""
  body = ("trap 'echo TERM >> " + str(tmp_path) + "/got; sleep 1; echo saved; exit 75' TERM\n"
          "trap 'echo INT >> " + str(tmp_path) + "/got; sleep 1; echo saved; exit 130' INT\n"
          f"touch {tmp_path}/ready$i\nwhile :; do sleep 0.1; done")
  process = subprocess.Popen([SCRIPT], env={**os.environ, **stand_in(tmp_path, body)}, text=True,
                             stdout=subprocess.PIPE, start_new_session=True)
  end = time.monotonic() + 60
  while not all((tmp_path / f"ready{i}").exists() for i in (0, 1)):
    assert time.monotonic() < end
    time.sleep(0.05)
  os.killpg(process.pid, number)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == status
  assert sorted(out.split("\n")) == ["", "process 1: saved", "saved"]
  assert (tmp_path / "got").read_text().split() == [number.name.removeprefix("SIG")] * 2


@pytest.mark.parametrize("environ, words, message", [
    ({"PROCESSES": "none"}, [], "PROCESSES is 'none'"),
    ({"CHINCHILLA": "/no/such"}, [], "/no/such not found; activate the environment"),
    ({"CHINCHILLA": "true"}, ["--process=1"], "it chooses --process itself")])
def test_bad_input(environ, words, message):
  done = run(environ, *words)
  assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
