"""A trace of the steps that were asked for, which both viewers can open.

Each run is a process of its own: once libtpu has been loaded, as other tests do, JAX's profiler
does not start any more.
"""

import dataclasses
import gzip
import json
import os
import subprocess
import sys

import jax
import pytest
from tiny import ROOT

from chinchilla_jax import config as schema
from chinchilla_jax import config_io
from chinchilla_jax.errors import UserError
from chinchilla_jax.training import loop, profiling
from chinchilla_jax.training.run_folder import RunFolder


def train(experiment, steps, workdir) -> str:
  """What a run with a trace of these steps prints."""
  experiment = dataclasses.replace(experiment, profile=schema.Profile(steps=steps))
  config = workdir.parent / "config.json"
  config.write_text(json.dumps(config_io.to_dict(experiment)))
  done = subprocess.run(
      [sys.executable, "-m", "chinchilla_jax", "train", f"--config={config}",
       f"--workdir={workdir}"], capture_output=True, text=True, timeout=240,
      env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"})
  assert done.returncode == 0, done.stderr
  return done.stdout


def spans(folder, name) -> int:
  """How often something happened, counted in the Perfetto trace; what it nests is part of it."""
  (trace,) = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
  events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
  count, end = 0, -1.0
  for start, duration in sorted((e["ts"], -e.get("dur", 0)) for e in events
                                if name in e.get("name", "")):
    count, end = count + (start >= end), max(end, start - duration)
  return count


def test_a_run_traces_its_steps_and_computes_the_same(tiny, tiny_run, tmp_path):
  printed = train(tiny, "3-4", tmp_path / "run")
  assert f"trace of steps 3 to 4 in {tmp_path / 'run/profile'}" in printed
  assert spans(tmp_path / "run/profile", "PjitFunction(voted)") == 2
  (xplane,) = (tmp_path / "run/profile").glob("plugins/profile/*/*.xplane.pb")
  planes = jax.profiler.ProfileData.from_file(str(xplane)).planes
  names = [event.name for plane in planes for line in plane.lines for event in line.events]
  assert any("PjitFunction(voted)" in name for name in names)
  kept = lambda path: [(r["step"], r["loss"]) for r in RunFolder(path).read_metrics()
                       if r["kind"] == "train"]
  assert kept(tmp_path / "run") == kept(tiny_run[1])


class Record:
  """Stands in for the recorder; knows after which step something happened."""

  def __init__(self):
    self.happened = []
    self.pause, self.resume, self.start, self.stop = (
        lambda name=name: self.happened.append((name, self.step))
        for name in ("pause", "resume", "start", "stop"))


@pytest.mark.parametrize("trace", ["made", "not made", "another process's"])
def test_all_processes_pause_at_the_same_steps(tmp_path, monkeypatch, trace):
  """Else one would read the outcome of a vote a step before the others, and leave them. And what
  the profiler takes to start and to write is in no step's time."""
  record = Record()

  def start_trace(*unused, **more):
    if trace == "not made":
      raise RuntimeError("no")
    record.start()

  monkeypatch.setattr(jax.profiler, "start_trace", start_trace)
  monkeypatch.setattr(jax.profiler, "stop_trace", record.stop)
  folder = None if trace == "another process's" else tmp_path
  profiler = profiling.Profiler(schema.Profile(steps="3-4"), folder, lambda text: None)
  for step in range(1, 7):
    profiler.before(step, jax.numpy.zeros(()), record)
    record.step = step
    profiler.after(step, jax.numpy.zeros(()), record)
  assert record.happened == [
      (what, step) for step, does in ((2, "start"), (4, "stop"))
      for what in ("pause", *[does] * (trace == "made"), "resume")]


def test_the_end_of_the_run_ends_the_trace(tiny, tmp_path):
  short = dataclasses.replace(tiny, run_length="3 steps")
  assert "trace of steps 2 to 3 in" in train(short, "2-9", tmp_path / "run")
  assert spans(tmp_path / "run/profile", "PjitFunction(voted)") >= 2  # And the evaluation's.


def test_a_trace_that_cannot_be_written_stops_no_run(tiny, tmp_path):
  folder = RunFolder(tmp_path / "run")
  folder.create()
  folder.profile.write_text("in the way")
  printed = train(dataclasses.replace(tiny, run_length="3 steps"), "1-2", tmp_path / "run")
  assert "no trace: " in printed and "trained to step 3" in printed


@pytest.mark.parametrize("text", ["0", "0-3", "5-4", "a", "3-", "-3", "1-2-3", "3 - 4"])
def test_steps_that_are_none(text):
  with pytest.raises(UserError, match="config.profile.steps"):
    config_io.load(None, [("profile.steps", text)])


def test_steps_that_the_run_does_not_have(tiny):
  late = lambda steps: dataclasses.replace(tiny, profile=schema.Profile(steps=steps))
  assert loop.plan(late("12-99")).clock.total_steps == 12
  with pytest.raises(UserError, match="config.profile.steps: got 13-99, but the run ends at step "
                                      "12; give steps up to it"):
    loop.plan(late("13-99"))


def test_steps_before_a_resume_are_said_once(tmp_path):
  said = []
  profiler = profiling.Profiler(schema.Profile(steps="3-4"), tmp_path / "profile", said.append)
  for step in (9, 10):
    profiler.before(step, None, None)
    profiler.after(step, None, None)
  profiler.close()
  assert said == ["no trace: steps 3 to 4 of config.profile.steps were over before step 9"]
  assert not (tmp_path / "profile").exists()
