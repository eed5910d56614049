"""The search for a layout: what is legal, bounds that hold, and what is done in the time given."""

import dataclasses
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from tiny import ROOT, tiny_experiment, with_fields

from chinchilla_jax import cli
from chinchilla_jax.parallel import roofline, topology
from chinchilla_jax.training import ahead, search

CHIP = topology.CHIPS["v5e"]
GIB = 2**30
BASE = with_fields(tiny_experiment(), batch__sequences=16, model__n_heads=4, mesh__whole_below=0)


@dataclasses.dataclass(frozen=True)
class Device:
  """As much of a device as a mesh needs."""

  id: int
  coords: tuple[int, int, int]
  platform: str = "cpu"
  device_kind: str = "TPU v5 lite"
  process_index: int = 0
  slice_index: int = 0


def devices(shape=(2, 4)):
  """Those of a v5e slice."""
  return [Device(i, (i % shape[0], i // shape[0], 0)) for i in range(math.prod(shape))]


def all_of(experiment=BASE, **fields):
  return search.candidates(with_fields(experiment, **fields), devices(),
                           experiment.batch.sequences, CHIP)


# What there is.

def test_legal_layouts_and_the_others_are_counted():
  legal, illegal = all_of()
  kinds = {(c.experiment.mesh.strategy, c.axes["tensor"], c.experiment.batch.microbatches)
           for c in legal}
  # 16 sequences over data 8: 1 or 2 microbatches; over data 2: up to 8.
  assert {m for s, t, m in kinds if (s, t) == ("fsdp", 1)} == {1, 2}
  assert {m for s, t, m in kinds if (s, t) == ("fsdp_tensor", 4)} == {1, 2, 4, 8}
  assert not any(s in ("replicated", "fsdp") and t > 1 for s, t, _ in kinds)
  assert not any(t == 8 for _, t, _ in kinds)  # 4 heads do not divide.
  assert len(legal) == 3 * len(kinds)  # Every remat.
  tried = 3 * 7 * (2 + 4 + 3)  # replicated and fsdp; deepmind 1, 2, 4, 8; fsdp_tensor 2, 4, 8.
  assert len(legal) + sum(illegal.values()) == tried
  assert set(illegal) == {"config.batch", "config.mesh.tensor"}


def test_a_later_stage_of_the_ramp_must_be_legal_too():
  _, before = all_of()
  legal, illegal = all_of(batch__ramp=(("50%", 24),), batch__ramp_by="size")
  # 24 sequences over data 8 cannot have 2 microbatches.
  assert illegal["config.batch"] > before["config.batch"]
  assert not any(c.axes["data"] == 8 and c.experiment.batch.microbatches == 2 for c in legal)


def test_what_is_not_laid_out_anew_stays():
  made = with_fields(BASE, mesh__overrides=(("params/embedding/table", "-,-"),),
                     model__attention_block=8)
  assert {(c.experiment.mesh.overrides, c.experiment.model.attention_block)
          for c in search.candidates(made, devices(), 16, CHIP)[0]} == {
              (made.mesh.overrides, 8)}


def test_the_most_promising_comes_first():
  legal, _ = all_of()
  assert [c.step_s for c in legal] == sorted(c.step_s for c in legal)
  likely = sorted(c.likely for c in legal)
  small = dataclasses.replace(CHIP, hbm_bytes=int(likely[len(likely) // 2] / 0.92))
  doubtful = [c.likely > 0.92 * small.hbm_bytes
              for c in search.candidates(BASE, devices(), 16, small)[0]]
  assert doubtful == sorted(doubtful) and set(doubtful) == {False, True}


def test_the_70bs_own_layout_is_the_most_promising_on_the_papers_slice():
  from chinchilla_jax import config_io
  own, chip = config_io.load("configs/chinchilla.py:70b", []), topology.CHIPS["v4"]
  slice_ = [Device(i, (i % 8, i // 8 % 8, i // 64)) for i in range(8 * 8 * 16)]
  for sequences in (768, 1536):
    first = search.candidates(own, slice_, sequences, chip)[0][0]
    assert first.experiment == own and dict(first.axes)["data"] == 256


# Bounds.

def bounded(axes, **fields):
  sizes = {"slice": 1, "data": 1, "context": 1, "tensor": 1} | axes
  link = roofline.Link("ici", 1e9, 1e9, 1e9)
  experiment = with_fields(BASE, **fields)
  return search.bounded(experiment, sizes, experiment.batch.sequences, CHIP, lambda _: link)


def test_memory_shrinks_as_it_should():
  whole = bounded({"data": 8}, mesh__strategy="replicated")
  cut = bounded({"data": 8}, mesh__strategy="fsdp")
  assert cut.memory < whole.memory / 4
  # Saved activations: less with microbatches (but float32 sums come), less with remat.
  wide = dict(mesh__strategy="fsdp", data__seq_len=2048)
  none, dots, full = (bounded({"data": 2}, model__remat=r, **wide) for r in search.REMATS)
  assert full.memory < dots.memory <= none.memory
  assert bounded({"data": 2}, batch__microbatches=8, **wide).memory < none.memory


def test_time_counts_what_is_done_again():
  none, dots, full = (bounded({"data": 8}, model__remat=r) for r in search.REMATS)
  assert none.seconds["compute"] == dots.seconds["compute"] < full.seconds["compute"]
  assert full.seconds["compute"] < 4 / 3 * none.seconds["compute"]
  # With full, the relative keys are made again, and their matrix is gathered again.
  assert none.seconds["ici"] < dots.seconds["ici"] < full.seconds["ici"]
  dots, full = (bounded({"data": 8}, model__remat=r, model__position="rotary")
                for r in search.REMATS[1:])
  assert dots.seconds["ici"] == full.seconds["ici"]
  assert full.step_s == max(full.seconds.values())


@pytest.mark.tpu_topology
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_compiler_is_not_below_the_bounds():
  experiment = with_fields(
      BASE, data__seq_len=128, model__d_model=256, model__d_ff=512, model__kv_size=64,
      model__attention_block=0, batch__sequences=64, batch__microbatches=2, model__remat="dots",
      mesh__strategy="fsdp_tensor", mesh__tensor=2)
  where = topology.parse("v5e:2x2")
  found = ahead.devices(where)
  report = ahead.compile_step(experiment, found)
  (candidate,) = [c for c in search.candidates(experiment, found, 64, where.chip)[0]
                  if c.experiment == dataclasses.replace(
                      experiment, mesh=dataclasses.replace(experiment.mesh, data=0))]
  assert candidate.memory <= report.memory["peak"]
  bounds = report.bounds
  assert candidate.seconds["compute"] <= bounds.compute_s
  assert candidate.seconds["ici"] <= bounds.ici_s
  assert candidate.step_s <= bounds.step_s


# The search, with a compiler that is made up.

class Compiler:
  """Takes `minute` seconds of a made-up clock; says what `peaks` and `slower` make of a layout."""

  def __init__(self, takes=60.0, peak=lambda c: c.memory * 1.5, slower=lambda c: 1.2):
    self.now, self.takes, self.peak, self.slower, self.asked = 0.0, takes, peak, slower, []

  def __call__(self, candidate, seconds):
    self.asked.append((candidate, seconds))
    if seconds is not None and seconds < self.takes:
      self.now += seconds
      return None
    self.now += self.takes
    peak = self.peak(candidate)
    if peak > CAPACITY:
      return search.Outcome(False, self.takes, peak, note="too large")
    step = candidate.step_s * self.slower(candidate)
    return search.Outcome(True, self.takes, peak, step, 2 * step, 0.5, 0.25)


CAPACITY = 16 * GIB


def made(step_s, memory=GIB):
  return search.Candidate(BASE, {"data": 8}, memory, memory, {"compute": step_s})


def searched(found, compiler, limit=600.0, capacity=CAPACITY):
  return search.search(found, {"why": 3}, capacity, limit, compiler, lambda: compiler.now)


def reasons(result):
  return [reason for _, reason, _ in result.skipped]


def test_what_cannot_win_is_left_out():
  compiler = Compiler()
  result = searched([made(s) for s in (1.0, 1.1, 1.19, 1.2, 1.3)], compiler)
  # The first takes 1.2 in truth: three could be faster, two could not.
  assert len(result.compiled) == 3 and reasons(result) == [search.TOO_SLOW] * 2
  assert result.ranked[0][0].step_s == 1.0 and result.illegal == {"why": 3}
  assert [seconds for _, seconds in compiler.asked] == [None, 540.0, 480.0]


def test_the_fastest_is_not_always_the_first():
  slow = made(1.0)
  compiler = Compiler(slower=lambda c: 3.0 if c is slow else 1.0)
  result = searched([slow, made(2.0), made(2.5)], compiler)
  assert [c.step_s for c, _ in result.ranked] == [2.0, 1.0]
  assert len(result.compiled) == 2  # 2.5 cannot beat 2.0.


def test_what_decides_between_equals():
  outcome = lambda step_s, **more: search.Outcome(True, 60.0, **(
      dict(peak=2, step_s=step_s, serial_s=3.0, ceiling=0.5, serial=0.25, exposed_s=0.5) | more))
  # By far not the fastest; nearly; the fastest; nearly, and better by something else.
  rows = {"slow": outcome(1.02, exposed_s=0.0), "near": outcome(1.009),
          "first": outcome(1.0, peak=3),
          "exposed": outcome(1.005, exposed_s=0.4, serial_s=4.0),
          "serial": outcome(1.005, serial_s=2.9, peak=4)}
  found = search.Found(tuple((name, rows[name]) for name in rows), (), {}, 0.0)
  assert [name for name, _ in found.ranked] == ["exposed", "serial", "near", "first", "slow"]


def test_what_cannot_fit_is_left_out_and_what_does_not_is_no_answer():
  compiler = Compiler()
  result = searched([made(1.0, 17 * GIB), made(1.1, 12 * GIB), made(1.2, 8 * GIB)], compiler)
  assert reasons(result) == [search.TOO_LARGE]
  assert [o.fits for _, o in result.compiled] == [False, True]
  assert [c.step_s for c, _ in result.ranked] == [1.2]


def test_where_nothing_can_fit_the_nearest_is_compiled_all_the_same():
  result = searched([made(1.0, 30 * GIB), made(1.1, 20 * GIB), made(1.2, 25 * GIB)], Compiler())
  assert len(result.compiled) == 1 and not result.ranked
  assert result.nearest[0].memory == 20 * GIB
  assert reasons(result) == [search.TOO_LARGE] * 2


def test_one_is_compiled_however_little_time_there_is():
  compiler = Compiler(takes=1000.0)
  result = searched([made(1.0), made(1.05)], compiler, limit=1.0)
  assert len(result.compiled) == 1 and reasons(result) == [search.NO_TIME]
  assert len(compiler.asked) == 1


def test_the_time_is_kept():
  compiler = Compiler(takes=100.0)
  result = searched([made(1 + n / 100) for n in range(10)], compiler, limit=350.0)
  # 3 in 300 s; 50 s are less than any took.
  assert len(result.compiled) == 3 and reasons(result) == [search.NO_TIME] * 7
  assert compiler.now <= 350.0
  # One that takes longer than the others is stopped when the time is over.
  last = [made(1.0), made(1.01), made(1.02)]
  compiler = Compiler(takes=100.0)
  slow = lambda c, seconds: (setattr(compiler, "takes", 400.0 if c is last[1] else 100.0)
                             or compiler(c, seconds))
  result = search.search(last, {}, CAPACITY, 350.0, slow, lambda: compiler.now)
  assert reasons(result) == [search.NO_TIME] * 2 and compiler.now == 350.0
  assert len(result.compiled) == 1


def test_all_are_accounted_for():
  legal, illegal = all_of()
  result = searched(legal, Compiler(), limit=200.0)
  assert len(result.compiled) + len(result.skipped) == len(legal)
  assert all(detail for _, _, detail in result.skipped)


def test_flags_make_the_layout():
  from chinchilla_jax import config_io
  legal, _ = all_of()
  for candidate in legal[:: len(legal) // 7]:
    words = [flag.removeprefix("--config.").split("=") for flag in candidate.flags]
    there = config_io.load("configs/smoke.py", [(name, value) for name, value in words])
    assert there.mesh.strategy == candidate.experiment.mesh.strategy
    assert (there.mesh.tensor, there.mesh.context) == (candidate.axes["tensor"], 1)
    assert there.batch.microbatches == candidate.experiment.batch.microbatches
    assert there.model.remat == candidate.experiment.model.remat


# The command.

@pytest.fixture
def compiler(monkeypatch):
  """Stands in for the process that compiles; returns the words that it was given."""
  from chinchilla_jax.commands import compile_search
  asked = []
  fits = lambda words: SimpleNamespace(returncode=0, stderr="", stdout=json.dumps({
      "memory": {"peak": 3 * GIB}, "program": {"collectives": [
          {"overlap": 0.75, "seconds": 4e-9}, {"overlap": 0.0, "seconds": None}]},
      "bounds": {"step_s": 1e-9, "serial_s": 2e-9, "mfu_ceiling": {"causal": 0.5},
                 "mfu_serial": {"causal": 0.25}}}))

  def stand_in(answer=fits):
    def run(words, **unused):
      asked.append(words)
      return answer(words)
    monkeypatch.setattr(compile_search.subprocess, "run", run)
    return asked

  monkeypatch.setattr(ahead, "devices", lambda where: devices(where.shape))
  return stand_in


WORDS = ["compile", "--config=configs/smoke.py", "--config.batch.sequences=16",
         "--topology=v5e:2x4", "--search", "--config.mesh.tensor=1"]


def test_the_command_prints_a_table_and_the_winner(compiler, capsys):
  asked = compiler()
  assert cli.main([*WORDS, "--search-minutes=0.5"]) == 0
  out = capsys.readouterr().out
  assert asked[0][:4] == [asked[0][0], "-m", "chinchilla_jax", "compile"]
  winner = out.strip().splitlines()[-1].strip()
  assert winner.startswith("chinchilla compile --config=configs/smoke.py "
                           "--config.batch.sequences=16 --topology=v5e:2x4 --sequences=16")
  # What the search sets is said once.
  assert winner.count("--config.mesh.tensor=") == 1 and "--config.model.remat=" in winner
  assert "not legal:" in out and "their least time is above the best one's" in out
  assert f" {len(asked)} compiled" in out


def test_the_command_as_json(compiler, capsys):
  asked = compiler()
  assert cli.main([*WORDS, "--json"]) == 0
  captured = capsys.readouterr()
  facts = json.loads(captured.out)
  assert captured.err == ""
  assert len(facts["compiled"]) == len(asked) and facts["compiled"][0]["fits"]
  assert facts["compiled"][0]["exposed_s"] == pytest.approx(1e-9)  # A quarter of 4e-9.
  assert facts["best"].split()[-6:] == facts["compiled"][0]["flags"]
  assert {row["reason"] for row in facts["skipped"]} <= {
      search.TOO_LARGE, search.TOO_SLOW, search.NO_TIME}


@pytest.mark.parametrize("complaint, numbers", [
    ("a device (TPU v5 lite) needs 20.50 GiB of the 15.75 GiB that a program can use, 4.75 GiB "
     "too many", "20.50 of 15.75 GiB"),
    ("peak 16.25 GiB of 16.00 GiB", "16.25 of 16.00 GiB")])
def test_nothing_fits_is_one_line_with_the_nearest_and_what_helps(
    complaint, numbers, compiler, capsys):
  compiler(lambda words: SimpleNamespace(returncode=2, stdout="", stderr=(
      f"E0000 libtpu complains\nchinchilla compile: out of memory: {complaint}; what helps: more "
      "devices\nand again\n")))
  assert cli.main([*WORDS, "--json"]) == 2
  captured = capsys.readouterr()
  line = captured.err.strip()
  assert "\n" not in line and "no layout that was compiled fits v5e:2x4" in line
  assert numbers in line and "more devices" in line
  assert not any(row["fits"] for row in json.loads(captured.out)["compiled"])


def test_another_failure_is_said_with_the_command(compiler, capsys):
  compiler(lambda words: SimpleNamespace(returncode=1, stdout="", stderr="Killed\n"))
  assert cli.main(WORDS) == 2
  assert "does not compile: Killed; try it alone: chinchilla compile" in capsys.readouterr().err


def test_a_later_failure_does_not_lose_what_was_found(compiler, capsys):
  answers = iter([SimpleNamespace(returncode=0, stderr="", stdout=json.dumps({
      "memory": {"peak": GIB}, "program": {"collectives": []},
      "bounds": {"step_s": 1.0, "serial_s": 2.0, "mfu_serial": {"causal": 0.2},
                 "mfu_ceiling": {"causal": 0.4}}}))])
  compiler(lambda words: next(answers, SimpleNamespace(returncode=-9, stdout="", stderr="")))
  assert cli.main(WORDS) == 0
  captured = capsys.readouterr()
  assert "status -9" in captured.err and "the best of them:" in captured.out


@pytest.mark.parametrize("words, said", [
    (["--search"], "--search: give --topology"),
    (["--search", "--topology=v5e:2x4", "--hlo=x.txt"], "not --hlo"),
    *((["--search", "--topology=v5e:2x4", f"--search-minutes={n}"],
       "allowed is more than 0 and at most") for n in ("0", "-3", "nan", "inf", "1e300")),
    (["--search", "--topology=v5e:2x4", "--search-minutes=ten"], "--search-minutes"),
    (["--search", "--topology=v5e:2x4", "--config.batch.sequences=3"], "layouts is legal"),
])
def test_bad_words_are_one_line(words, said, compiler, capsys):
  compiler()
  assert cli.main(["compile", "--config=configs/smoke.py", *words]) == 2
  captured = capsys.readouterr()
  assert captured.out == "" and captured.err.count("\n") == 1 and said in captured.err


def test_a_sigterm_ends_the_compiler_too(tmp_path):
  """Else it would go on for minutes, with gigabytes, and nobody to take its answer."""
  program = """
import os, sys
from chinchilla_jax.commands import compile_search
with open("compiler", "w") as file:
  file.write("#!/bin/sh\\necho $$ > pid.new; mv pid.new pid; exec sleep 600\\n")
os.chmod("compiler", 0o755)
sys.executable = os.path.abspath("compiler")
compile_search.compiled([], None)
"""
  process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path,
                             env=os.environ | {"PYTHONPATH": str(ROOT)})
  try:
    while not (tmp_path / "pid").exists():
      assert process.poll() is None
      time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
  finally:
    process.kill()
  with pytest.raises(ProcessLookupError):
    os.kill(int((tmp_path / "pid").read_text()), 0)
