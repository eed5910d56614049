"""launch/slurm.sbatch on a real SLURM: real jobs, signals, preemption, queues."""

import json
import os
import re
import subprocess
import time

import numpy as np
import pytest
from tiny import ROOT, tiny_experiment

from chinchilla_jax import config_io

pytestmark = pytest.mark.slurm
PATIENCE = 600  # Seconds until a hang counts as one.
SCRIPT = ROOT / "launch/slurm.sbatch"


class Jobs:
  """Submits and watches; jobs run in `folder`, where their logs lie."""

  def __init__(self, folder, environ):
    self.folder, self.environ = folder, environ

  def run(self, *command):
    done = subprocess.run(command, cwd=self.folder, env=self.environ, text=True,
                          capture_output=True, timeout=60)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout.strip()

  def submit(self, *words, flags=()):
    return self.run("sbatch", "--parsable", "--output=batch.log", *flags, str(SCRIPT), *words)

  def field(self, job, name):
    return re.search(rf"\b{name}=(\S+)", self.run("scontrol", "show", "job", "-o", job))[1]

  def wait(self, condition, what):
    end = time.monotonic() + PATIENCE
    while not condition():
      assert time.monotonic() < end, (what, self.run("squeue"), self.said())
      time.sleep(0.2)

  def ended(self, job):
    """(state, exit status, restarts) when the job is over for good."""
    self.wait(lambda: self.field(job, "JobState") in
              ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED"), "end of the job")
    status = int(self.field(job, "ExitCode").split(":")[0])
    return self.field(job, "JobState"), status, int(self.field(job, "Restarts"))

  def said(self):
    return "\n".join(path.read_text() for path in sorted(self.folder.glob("**/*.log")))


@pytest.fixture
def jobs(slurm, tmp_path):
  return Jobs(tmp_path, dict(slurm))


@pytest.fixture
def stand_in(jobs):
  """Sets what each task does instead of training: `body` is bash, $k counts the starts from 0."""
  def make(body):
    path = jobs.folder / "stand_in"
    path.write_text(f'#!/usr/bin/env bash\necho "$*" >> {jobs.folder}/starts\n'
                    f"k=$(($(wc -l < {jobs.folder}/starts) - 1))\n{body}\n")
    path.chmod(0o755)
    jobs.environ["CHINCHILLA"] = str(path)
    return lambda: (jobs.folder / "starts").read_text().splitlines()
  return make


SAVES = ("trap 'echo saved; exit 75' TERM\n[ $k = 0 ] || exit 0\ntouch ready\n"
         "for i in $(seq 1200); do sleep 0.1; done")


def curve(workdir, kind):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  steps = [line["step"] for line in lines if line["kind"] == kind]
  assert steps == sorted(set(steps))  # No line lost, none doubled.
  return np.array([line["loss"] for line in lines if line["kind"] == kind])


def test_two_tasks_preempted_queued_again_and_the_curve_of_an_uninterrupted_run(jobs, tiny_store):
  config = jobs.folder / "config.json"
  config.write_text(json.dumps({"config": config_io.to_dict(tiny_experiment(tiny_store))}))
  fields = {"batch.sequences": "8", "run_length": "40 steps", "checkpoint.every": "10 steps",
            "evaluation.every": "20 steps", "schedule.shape": "constant",
            "optimizer.peak_lr": "1e-3", "mesh.whole_below": "0"}
  words = [f"--config={config}", *(f"--config.{name}={value}" for name, value in fields.items())]
  job = jobs.submit(*words, f"--workdir={jobs.folder}/run", flags=["--ntasks=2"])
  jobs.wait((jobs.folder / "run/checkpoints/10").exists, "a checkpoint")
  jobs.run("scancel", "--signal=TERM", job)
  assert jobs.ended(job) == ("COMPLETED", 0, 1), jobs.said()
  assert "SIGTERM: saved at step" in jobs.said() and "resuming at step" in jobs.said()
  assert "trained to step 40" in (jobs.folder / f"logs/{job}-0.log").read_text()
  assert (jobs.folder / f"logs/{job}-1.log").exists()

  # The same two processes without SLURM, and without a stop.
  words.append(f"--workdir={jobs.folder}/whole")
  done = subprocess.run([ROOT / "launch/two_processes.sh", *words], env=jobs.environ, text=True,
                        capture_output=True, timeout=PATIENCE)
  assert done.returncode == 0, done.stderr
  for kind in ("train", "eval"):
    np.testing.assert_array_equal(curve(jobs.folder / "run", kind),
                                  curve(jobs.folder / "whole", kind))


def test_before_the_time_limit_the_batch_shell_has_the_tasks_save(jobs, stand_in):
  """SLURM signals the batch shell alone then, as `scancel --batch` does."""
  starts = stand_in(SAVES)
  job = jobs.submit("--config=a")
  jobs.wait((jobs.folder / "ready").exists, "the task")
  jobs.run("scancel", "--batch", "--signal=TERM", job)
  assert jobs.ended(job) == ("COMPLETED", 0, 1), jobs.said()
  assert starts() == ["train --config=a"] * 2
  assert "told to stop, the tasks save" in jobs.said() and "saved" in jobs.said()


@pytest.mark.long
def test_a_real_time_limit(jobs, stand_in):
  starts = stand_in(SAVES)
  job = jobs.submit("--config=a", flags=["--time=1", "--signal=B:TERM@45"])
  assert jobs.ended(job) == ("COMPLETED", 0, 1), jobs.said()
  assert len(starts()) == 2 and "told to stop, the tasks save" in jobs.said()


def test_preempted_by_slurm_it_is_queued_again_once(jobs, stand_in):
  """By a job of a partition of higher priority, which needs the whole node."""
  starts = stand_in(SAVES)
  job = jobs.submit("--config=a", flags=["--exclusive"])
  jobs.wait((jobs.folder / "ready").exists, "the task")
  other = jobs.run("sbatch", "--parsable", "--partition=high", "--exclusive", "--output=other.log",
                   "--wrap=sleep 3")
  assert jobs.ended(job) == ("COMPLETED", 0, 1), jobs.said()
  assert jobs.ended(other)[0] == "COMPLETED"
  assert len(starts()) == 2


def test_cancelled_it_stays_cancelled_although_the_tasks_saved(jobs, stand_in):
  starts = stand_in(SAVES)
  job = jobs.submit("--config=a")
  jobs.wait((jobs.folder / "ready").exists, "the task")
  jobs.run("scancel", job)
  assert jobs.ended(job)[0] == "CANCELLED"
  time.sleep(8)  # A job queued again would start after 5 s.
  assert jobs.ended(job)[0] == "CANCELLED" and len(starts()) == 1
  assert "left as it is" in jobs.said()


@pytest.mark.parametrize("statuses, end, n_starts", [
    ([2], ("FAILED", 2, 0), 1), ([130], ("FAILED", 130, 0), 1),
    ([137, 75, 134, 0], ("COMPLETED", 0, 3), 4), ([1, 1, 1, 1], ("FAILED", 1, 2), 3)])
def test_queued_again_only_when_that_helps(jobs, stand_in, statuses, end, n_starts):
  starts = stand_in(f"statuses=({' '.join(map(str, statuses))})\nexit ${{statuses[$k]}}")
  jobs.environ["RETRIES"] = "2"
  job = jobs.submit("--config=a b")
  assert jobs.ended(job) == end, jobs.said()
  assert starts() == ["train --config=a b"] * n_starts


def test_a_task_that_saves_slowly_is_not_killed_by_one_that_has_saved(jobs, stand_in):
  stand_in("trap '[ $SLURM_PROCID = 1 ] && exit 75; sleep 3; echo slowly saved; exit 75' TERM\n"
           "[ -e slow_done ] && exit 0\ntouch ready$SLURM_PROCID\n"
           "while :; do sleep 0.1; done")
  job = jobs.submit("--config=a", flags=["--ntasks=2"])
  jobs.wait(lambda: all((jobs.folder / f"ready{i}").exists() for i in (0, 1)), "the tasks")
  (jobs.folder / "slow_done").touch()
  jobs.run("scancel", "--signal=TERM", job)
  assert jobs.ended(job) == ("COMPLETED", 0, 1), jobs.said()
  assert "slowly saved" in (jobs.folder / f"logs/{job}-0.log").read_text()


@pytest.mark.parametrize("environ, words, message", [
    ({}, ["--config=a"], "not in a SLURM job; start it with: sbatch"),
    ({"SLURM_JOB_ID": "1"}, [], "no arguments")])
def test_outside_a_job_it_says_how_to_start_it(tmp_path, environ, words, message):
  plain = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
  done = subprocess.run([SCRIPT, *words], env=plain | environ, text=True, capture_output=True,
                        cwd=tmp_path, timeout=60)
  assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
  assert list(tmp_path.iterdir()) == []
