"""A trace of the steps that were asked for, which both viewers can open."""

import dataclasses
import gzip
import json

import jax
import pytest
from tiny import tiny_experiment

from chinchilla_jax import config as schema
from chinchilla_jax import config_io
from chinchilla_jax.errors import UserError
from chinchilla_jax.training import loop, profiling


def with_steps(experiment, steps):
  return dataclasses.replace(experiment, profile=schema.Profile(steps=steps))


def spans(folder, name) -> int:
  """How often something happened, counted in the Perfetto trace; what it nests is part of it."""
  (trace,) = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
  events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
  count, end = 0, -1.0
  for start, duration in sorted((e["ts"], -e.get("dur", 0)) for e in events
                                if name in e.get("name", "")):
    count, end = count + (start >= end), max(end, start - duration)
  return count


def test_a_run_traces_its_steps_and_computes_the_same(tiny, tiny_run, tmp_path, capsys):
  loop.train(with_steps(tiny, "3-4"), tmp_path / "run")
  assert "trace of steps 3 to 4 in" in capsys.readouterr().out
  assert spans(tmp_path / "run/profile", "PjitFunction(voted)") == 2
  (xplane,) = (tmp_path / "run/profile").glob("plugins/profile/*/*.xplane.pb")
  planes = jax.profiler.ProfileData.from_file(str(xplane)).planes
  names = [event.name for plane in planes for line in plane.lines for event in line.events]
  assert any("PjitFunction(voted)" in name for name in names)
  kept = lambda path: [(r["step"], r["loss"]) for r in loop.RunFolder(path).read_metrics()
                       if r["kind"] == "train"]
  assert kept(tmp_path / "run") == kept(tiny_run[1])


def test_a_trace_that_cannot_be_written_stops_no_run(tiny_store, tmp_path, capsys):
  experiment = with_steps(tiny_experiment(tiny_store), "1-2")
  folder = loop.RunFolder(tmp_path / "run")
  folder.create()
  folder.profile.write_text("in the way")
  outcome = loop.train(dataclasses.replace(experiment, run_length="3 steps"), tmp_path / "run")
  assert outcome.step == 3 and "no trace: " in capsys.readouterr().out


def test_a_stop_ends_the_trace(tmp_path):
  said = []
  profiler = profiling.Profiler(schema.Profile(steps="2-9"), tmp_path / "profile", said.append)
  profiler.before(1, ())
  assert not said
  profiler.before(2, ())
  jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
  profiler.close()
  profiler.close()
  assert said == [f"trace of steps 2 to 9 in {tmp_path / 'profile'}"]
  assert spans(tmp_path / "profile", "PjitFunction") >= 1


@pytest.mark.parametrize("text", ["0", "0-3", "5-4", "a", "3-", "-3", "1-2-3", "3 - 4"])
def test_steps_that_are_none(text):
  with pytest.raises(UserError, match="config.profile.steps"):
    config_io.load(None, [("profile.steps", text)])
