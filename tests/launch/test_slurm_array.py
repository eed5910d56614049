"""A sweep as a job array on a real SLURM; and what is asked of sbatch, without one."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time
import types

import pytest
from tiny import tiny_experiment

from chinchilla_jax import config_io
from chinchilla_jax.errors import UserError
from chinchilla_jax.experiments import slurm as array

PATIENCE = 600

CONFIG = """
import json
from chinchilla_jax import config_io
from chinchilla_jax.experiments import sweep as sweeps

def get_config():
  config = config_io.default_config()
  for name, value in json.loads({fields!r}).items():
    *path, leaf = name.split(".")
    node = config
    for key in path:
      node = node[key]
    node[leaf] = tuple(value) if isinstance(value, list) else value
  return config

def sweep():
  return sweeps.over("seed", range({members}))
"""


def config(folder, store, members, **fields):
  fields = json.dumps(config_io.flat(tiny_experiment(store)) | fields, default=str)
  (folder / "config.py").write_text(CONFIG.format(fields=fields, members=members))


def sweep(slurm, folder, *words, status=0):
  done = subprocess.run([sys.executable, "-m", "chinchilla_jax", "sweep", *words], cwd=folder,
                        env=slurm, text=True, capture_output=True, timeout=PATIENCE)
  assert done.returncode == status, (done.stdout, done.stderr)
  return done.stdout + done.stderr


def wait_until_the_queue_is_empty(slurm):
  end = time.monotonic() + PATIENCE
  while subprocess.run(["squeue", "-h"], env=slurm, text=True, capture_output=True).stdout.strip():
    assert time.monotonic() < end
    time.sleep(0.5)


@pytest.mark.slurm
def test_an_array_with_a_member_that_fails_is_reported_mended_and_completed(slurm, tmp_path,
                                                                            tiny_store):
  config(tmp_path, tiny_store, members=3)
  flags = ["--config=config.py", "--workdir=w", "--on=slurm", "--parallel=2",
           "--sbatch=--time=30"]
  # Something in the way of one member's checkpoints, which only a person can take away.
  sweep(slurm, tmp_path, "--config=config.py", "--workdir=w", "--collect")
  members = json.loads(sweep(slurm, tmp_path, "--workdir=w", "--list", "--json"))["members"]
  folder = pathlib.Path(tmp_path, members[1]["folder"])
  (folder / "checkpoints").write_text("in the way")

  told = sweep(slurm, tmp_path, *flags)
  job = re.search(r"queued as job array (\d+): members 0-2%2; watch with squeue", told)[1]
  # The same command at once queues nothing twice.
  assert "nothing to submit; 3 are in the queue already" in sweep(slurm, tmp_path, *flags)
  wait_until_the_queue_is_empty(slurm)
  listed = sweep(slurm, tmp_path, "--workdir=w", "--list")
  states = re.findall(r"seed=\d_\w+ +(\w+)", listed)
  assert states == ["complete", "failed", "complete"], (listed, logs(tmp_path))
  assert "checkpoints" in listed  # Says why.
  assert (tmp_path / f"w/slurm/{job}_1-0.log").exists()

  (folder / "checkpoints").unlink()
  told = sweep(slurm, tmp_path, *flags)
  assert "queued as job array" in told and ": member 1%2;" in told, told
  wait_until_the_queue_is_empty(slurm)
  listed = sweep(slurm, tmp_path, "--workdir=w", "--list")
  assert re.findall(r"seed=\d_\w+ +(\w+)", listed) == ["complete"] * 3, (listed, logs(tmp_path))
  assert "nothing to submit: every member is complete" in sweep(slurm, tmp_path, *flags)


@pytest.mark.slurm
def test_a_preempted_element_saves_is_queued_again_and_completes(slurm, tmp_path, tiny_store):
  config(tmp_path, tiny_store, 1, **{"run_length": "400 steps", "checkpoint.every": "20 steps",
                                     "evaluation.every": "200 steps"})
  told = sweep(slurm, tmp_path, "--config=config.py", "--workdir=w", "--on=slurm")
  job = re.search(r"queued as job array (\d+): member 0;", told)[1]
  [member] = json.loads(sweep(slurm, tmp_path, "--workdir=w", "--list", "--json"))["members"]
  folder = pathlib.Path(tmp_path, member["folder"])
  end = time.monotonic() + PATIENCE
  while not (folder / "checkpoints/20").exists():
    assert time.monotonic() < end, logs(tmp_path)
    time.sleep(0.1)
  subprocess.run(["scancel", "--signal=TERM", f"{job}_0"], env=slurm, check=True)
  wait_until_the_queue_is_empty(slurm)
  assert "complete" in sweep(slurm, tmp_path, "--workdir=w", "--list"), logs(tmp_path)
  text = (folder / "train.log").read_text()
  assert "SIGTERM: saved at step" in text and "resuming at step" in text, logs(tmp_path)


def logs(folder):
  return "\n".join(f"{path}: {path.read_text()}" for path in sorted(folder.glob("w/**/*.log")))


# -------------------------------------------------------------------- Without a SLURM


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
  """sbatch and squeue that write down their words; what they answer lies in files."""
  for name, answer in (("sbatch", "77;cluster"), ("squeue", "")):
    (tmp_path / f"{name}.out").write_text(answer)
    path = tmp_path / name
    path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/{name}.words\n'
                    f"env > {tmp_path}/{name}.env\n"
                    f"cat {tmp_path}/{name}.err >&2 && exit 1\n"
                    f"cat {tmp_path}/{name}.out\n")
    path.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
  return tmp_path


def some(*indices):
  return [types.SimpleNamespace(index=index) for index in indices]


@pytest.mark.parametrize("indices, text", [
    ([3], "3"), ([3, 5, 7, 8, 9], "3,5,7-9"), ([1, 0], "0-1"), (range(100), "0-99")])
def test_spans(indices, text):
  assert array.spans(indices) == text


def test_one_array_job_with_what_is_missing(stand_in):
  folder = stand_in / "a sweep"
  (stand_in / "squeue.out").write_text("4\n5\nN/A\n")
  told = array.submit(folder, some(3, 4, 7), at_most=2, flags=["--partition=gpu", "--gpus=1"])
  words = (stand_in / "sbatch.words").read_text().splitlines()
  name = array.job_name(folder)
  assert words == ["--parsable", "--array=3,7%2", f"--job-name={name}",
                   f"--output={folder}/slurm/%A_%a.batch.log", "--partition=gpu", "--gpus=1",
                   str(array.SCRIPT), f"--workdir={folder}"]
  assert told == (f"queued as job array 77: members 3,7%2; 1 are in the queue already; watch with "
                  f"squeue --job=77, stop with scancel 77; logs in {folder}/slurm")
  environ = (stand_in / "sbatch.env").read_text().splitlines()
  assert f"LOGS={folder}/slurm" in environ
  assert f"CHINCHILLA={sys.executable} -m chinchilla_jax" in environ
  assert re.fullmatch(r"sweep-a-sweep-[0-9a-f]{8}", name)
  assert f"--name={name}" in (stand_in / "squeue.words").read_text()


@pytest.mark.parametrize("flag, message", [
    ("--array=1", "chooses --array itself"), ("-N2", "chooses --nodes itself"),
    ("--ntasks=2", "each of its members is one task"), ("gpu", "give one flag")])
def test_flags_that_would_break_it(stand_in, flag, message):
  with pytest.raises(UserError, match=message):
    array.submit(stand_in / "w", some(0), flags=[flag])
  assert not (stand_in / "w").exists() and not (stand_in / "sbatch.words").exists()


def test_what_slurm_says_is_passed_on(stand_in):
  (stand_in / "sbatch.err").write_text("sbatch: error: invalid partition specified: gpu\n")
  with pytest.raises(UserError, match="sbatch refused: invalid partition specified: gpu; mend"):
    array.submit(stand_in / "w", some(0), flags=["--partition=gpu"])


def test_no_slurm_here(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(UserError, match="squeue was not found; run it where SLURM's commands are"):
    array.submit(tmp_path / "w", some(0))
  assert not (tmp_path / "w").exists()
