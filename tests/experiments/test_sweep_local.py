"""Sweeps of tiny runs in real processes, and the rows that come of them."""

import json
import os
import pathlib
import signal
import statistics
import sys
import time
import types

import numpy as np
import pytest
from survival import launch
from sweep_bench import Bench, rows_of

from chinchilla_jax import cli
from chinchilla_jax.errors import UserError
from chinchilla_jax.experiments import report, results, sweep
from chinchilla_jax.training import run_lock
from chinchilla_jax.training.run_folder import RunFolder

CLOCK = ("tokens_per_second_median", "seconds_of_steps")  # Columns that depend on it.


TWO = "def sweep(): return zipped(over('seed', [1, 2]), over('model.d_ff', [64, 96]))"


@pytest.fixture(scope="module")
def serial(tiny_store, tmp_path_factory):
  """A sweep of two runs, on one core and one after the other: (bench, flags, what it printed)."""
  with pytest.MonkeyPatch.context() as monkeypatch:
    bench = Bench(tmp_path_factory.mktemp("serial"), tiny_store, monkeypatch)
    flags = [f"--config={bench.config(TWO)}", "--workdir=w", "--cores=1"]
    process = bench.start(*flags)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
  return bench, flags, out


def test_runs_rows_and_nothing_twice(serial, bench, capsys, monkeypatch):
  bench, flags, out = serial
  monkeypatch.chdir(bench.path)
  assert "2 complete; results in w/results.jsonl" in out and "step 12/12  loss" in out
  members = sweep.read("w")

  # The rows, from other sources.
  rows = rows_of("w")
  for row, member, d_ff in zip(rows, members, (64, 96), strict=True):
    folder = pathlib.Path("w/runs") / row["id"]
    arrays = launch.arrays(folder, 12)
    n = sum(array.size for path, array in arrays.items() if path.startswith("params/"))
    assert row["params_table_a9"] == n
    assert row["params_non_embedding"] == n - 512 * 32
    assert (row["status"], row["reason"], row["seed"]) == ("complete", "", member.index + 1)
    assert row["overrides"] == {"seed": member.index + 1, "model.d_ff": d_ff}
    assert row["steps"] == row["total_steps"] == 12
    assert row["tokens"] == row["total_tokens"] == 12 * 4 * 32
    assert row["flops_six_n_d"] == 6 * n * 1536
    assert row["tokens_per_param_table_a9"] == 1536 / n
    lines = [json.loads(line) for line in (pathlib.Path("w") / row["curve"]).open()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 12 and row["train_loss_last"] == losses[-1]
    assert row["train_loss_mean_last_1pct"] == pytest.approx(np.mean(losses[2:]), rel=1e-12)
    assert row["epochs"] == pytest.approx(lines[-1]["epoch"], abs=1e-6)
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    assert row["tokens_per_second_median"] == statistics.median(speeds)
    assert row["seconds_of_steps"] == pytest.approx(12 * np.mean([128 / s for s in speeds]))
    assert cli.main(["evaluate", f"--workdir={folder}", "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert row["validation_loss"] == pytest.approx(evaluated["loss"], rel=1e-6)
    assert row["validation_bits_per_byte"] == pytest.approx(evaluated["bits_per_byte"], rel=1e-6)
    assert (row["starts"], row["cores"]) == (1, 1) and "jax" in row["versions"]
  assert results.read("w") == [results.Row(**row) for row in rows]
  assert results.read("w/results.jsonl", needed=("validation_loss",))[1].id == members[1].id

  # A report takes the whole sweep.
  assert [run.name for run in report.read(["w"])] == [member.id for member in members]
  assert [run.summary["state"] for run in report.read(["w"])] == ["complete"] * 2

  # Nothing is done twice: no file changes, not even its time.
  before = bench.files()
  assert bench.sweep(*flags) == 0
  assert bench.sweep("--workdir=w", "--cores=1", "--parallel=2") == 0
  assert bench.sweep("--workdir=w", "--only=1") == 0
  assert bench.sweep("--workdir=w", "--collect") == 0
  assert bench.files() == before
  # Without the results file, it is made anew, the same.
  pathlib.Path("w/results.jsonl").unlink()
  assert bench.sweep("--workdir=w", "--collect") == 0
  assert rows_of("w") == rows

  # A changed config is another run; one that is only observed otherwise is not.
  before = bench.files()
  capsys.readouterr()
  assert bench.sweep(*flags, "--config.logging.every=2 steps", "--list", "--json") == 0
  assert [m["state"] for m in json.loads(capsys.readouterr().out)["members"]] == ["complete"] * 2
  assert bench.sweep(*flags, "--config.model.d_ff=80", "--list", "--json") == 0
  assert [m["state"] for m in json.loads(capsys.readouterr().out)["members"]] == ["pending"] * 2
  assert bench.files() == before


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="takes two cores")
def test_in_parallel_the_rows_are_the_same(serial, bench, capsys):
  config = bench.config(TWO)
  assert bench.sweep(f"--config={config}", "--workdir=p", "--parallel=2", "--json") == 0
  captured = capsys.readouterr()
  assert "2 at a time, on core " in captured.err
  assert [m["state"] for m in json.loads(captured.out.splitlines()[-1])["members"]] == [
      "complete"] * 2
  pinned = [line.rsplit(" ", 1)[-1] for member in sweep.read("p")
            for line in member.log.read_text().splitlines() if line.startswith("--- ")]
  assert len(set(pinned)) == 2
  plain = lambda folder: [{k: v for k, v in row.items() if k not in CLOCK}
                          for row in rows_of(folder)]
  assert plain("p") == plain(serial[0].path / "w")


def test_failures_are_reported_and_stop_nothing(bench, capsys):
  """One that is refused before it begins, one that fails on the way, one that dies."""
  config = bench.config("def sweep(): return chain(fixed('mesh.data', 3), "
                        "fixed('optimizer.peak_lr', 1e30), fixed('seed', 3), fixed('seed', 4))",
                        guard={"nonfinite_limit": 3})
  dies = sweep.members(config, workdir="w")[3]
  # Its log of steps cannot be opened: that is no UserError.
  (dies.folder / "metrics.jsonl").mkdir(parents=True)
  before = bench.files()
  assert bench.sweep(f"--config={config}", "--workdir=w", "--retries=0") == 2
  captured = capsys.readouterr()
  assert captured.err.count("\n") == 1
  refused, diverged, good, dead = sweep.read("w")
  assert "3 of 4 members failed" in captured.err and str(refused.log) in captured.err
  assert [row["status"] for row in rows_of("w")] == ["failed", "failed", "complete", "failed"]
  why = [row["reason"] for row in rows_of("w")]
  assert "mesh" in why[0] and "not finite in 3 steps in a row" in why[1]
  assert why[3].startswith("ended with status 1 after 1 start: ")
  assert all(line.count("\n") == 0 for line in why)
  assert [m.log.read_text().count("--- ") for m in (refused, diverged, good, dead)] == [1, 1, 1, 1]
  for member in (refused, diverged, dead):
    assert f"{member.id}: failed (" in captured.out
  assert set(before) < set(bench.files())

  # Mended, the same command runs what is not complete, and only that.
  (dies.folder / "metrics.jsonl").rmdir()
  stamp = good.log.stat().st_mtime_ns
  assert bench.sweep("--workdir=w", f"--only={dead.id}") == 0
  assert [row["status"] for row in rows_of("w")] == ["failed", "failed", "complete", "complete"]
  assert good.log.stat().st_mtime_ns == stamp


def wait_for(condition, process, seconds=120):
  end = time.monotonic() + seconds
  while not (found := condition()):
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < end, "it takes too long"
    time.sleep(0.02)
  return found


def test_stopped_killed_resumed(bench):
  """SIGTERM, Ctrl-C, then a member killed without a word: it goes on, and ends as it should."""
  config = bench.config("def sweep(): return [{'seed': 1}, {'seed': 2, 'run_length': '4 steps'}]",
                        run_length="600 steps",
                        checkpoint={"every": "40 steps", "keep": 20},
                        evaluation={"every": "0 steps"}, logging={"console": "50 steps"})
  flags = [f"--config={config}", "--workdir=w"]
  first, second = sweep.members(config, workdir="w")
  run = RunFolder(first.folder)
  steps = lambda: max((int(path.name) for path in run.checkpoints.glob("*")
                       if path.name.isdecimal()), default=0)

  reached = 0
  for number, status in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
    process = bench.start(*flags)
    wait_for(lambda reached=reached: steps() > reached, process)
    assert sweep.state_of(first).state == "running"
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == status, out
    assert f"{number.name}: saved" in out and f"{number.name}: saved" in first.log.read_text()
    assert [sweep.state_of(member).state for member in (first, second)] == [
        "interrupted", "pending"]
    assert steps() > reached
    reached = steps()
    row = rows_of("w")[0]
    assert (row["status"], row["steps"], row["validation_loss"]) == ("interrupted", reached, None)
    assert row["tokens"] == reached * 4 * 32

  process = bench.start(*flags)
  wait_for(lambda: steps() > reached, process)
  os.kill(json.loads((first.folder / ".lock").read_text())["pid"], signal.SIGKILL)
  out, _ = process.communicate(timeout=240)
  assert process.returncode == 0, out
  assert "killed by SIGKILL; starting it again" in out
  rows = rows_of("w")
  assert [(row["status"], row["steps"], row["starts"]) for row in rows] == [
      ("complete", 600, 4), ("complete", 4, 1)]
  records = [r["step"] for r in run.read_metrics() if r["kind"] == "train"]
  assert records == list(range(1, 601))


def test_a_member_that_somebody_else_trains_is_left_alone(bench, capsys):
  flags = [f"--config={bench.config(TWO)}", "--workdir=w"]
  first = sweep.members(flags[0].removeprefix("--config="), workdir="w")[0]
  first.folder.mkdir(parents=True)
  with run_lock.held(first.folder):
    assert bench.sweep(*flags, "--only=0") == 75
  assert "did not start" in capsys.readouterr().out
  assert not first.log.exists()
  assert [row["status"] for row in rows_of("w")] == ["running", "pending"]


def test_slurm_gets_what_is_missing(bench, capsys, monkeypatch):
  flags = [f"--config={bench.config(TWO)}", "--workdir=w"]
  calls = []
  stand_in = types.ModuleType("chinchilla_jax.experiments.slurm")
  stand_in.submit = lambda *words: calls.append(words) or "submitted"
  monkeypatch.setitem(sys.modules, "chinchilla_jax.experiments.slurm", stand_in)
  assert bench.sweep(*flags, "--on=slurm", "--parallel=7", "--sbatch=--partition=x") == 0
  members = sweep.read("w")
  assert calls == [(pathlib.Path("w"), members, 7, ["--partition=x"])]
  assert all((member.folder / "member.json").is_file() for member in members)
  assert "submitted" in capsys.readouterr().out


# -------------------------------------------------------------------- The file


@pytest.fixture(scope="module")
def good_line(tiny_run) -> dict:
  experiment, folder = tiny_run
  member = sweep.Member(0, "x", {"seed": 0}, experiment, folder, 12, 1536, 9999, "f", "s")
  return json.loads(json.dumps(results.dataclasses.asdict(results.row_of(member, folder))))


BAD_ROWS = {
    "no JSON": (lambda row: "{", "line 2: is not JSON"),
    "no object": (lambda row: "[]", "line 2: is not a JSON object"),
    "a column missing": (lambda row: {k: v for k, v in row.items() if k != "tokens"},
                         "line 2: has no column tokens"),
    "NaN": (lambda row: row | {"validation_loss": float("nan")},
            "line 2: validation_loss is nan, and must be a finite number"),
    "infinite": (lambda row: row | {"flops_six_n_d": float("inf")}, "flops_six_n_d is inf"),
    "text": (lambda row: row | {"tokens": "many"}, "tokens is 'many', and must be a whole number"),
    "half a token": (lambda row: row | {"tokens": 0.5}, "tokens is 0.5"),
    "true": (lambda row: row | {"tokens": True}, "tokens is True"),
    "null": (lambda row: row | {"tokens": None}, "tokens is None"),
    "number for text": (lambda row: row | {"curve": 3}, "curve is 3, and must be text"),
    "status": (lambda row: row | {"status": "fine"}, "status is 'fine', and must be one of"),
    "twice": (lambda row: row | {"id": "x"}, "id 'x' is also on line 1"),
    "no loss": (lambda row: row | {"validation_loss": None}, "validation_loss has no value"),
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_a_broken_results_file_is_one_line(good_line, what, tmp_path):
  change, says = BAD_ROWS[what]
  bad = change(good_line | {"id": "y"})
  path = tmp_path / "results.jsonl"
  path.write_text(json.dumps(good_line) + "\n"
                  + (bad if isinstance(bad, str) else json.dumps(bad)) + "\n\n")
  with pytest.raises(UserError) as error:
    results.read(path, needed=("validation_loss",))
  assert says in str(error.value) and "\n" not in str(error.value)
  assert str(path) in str(error.value)


def test_reading_what_is_right(good_line, tmp_path):
  path = tmp_path / "results.jsonl"
  path.write_text(json.dumps(good_line | {"more": 1}) + "\n"
                  + json.dumps(good_line | {"id": "y", "status": "pending",
                                            "validation_loss": None}) + "\n")
  rows = results.read(path, needed=("validation_loss",))
  assert [row.id for row in rows] == ["x", "y"]
  assert isinstance(rows[0].flops_six_n_d, float) and isinstance(rows[0].tokens, int)
  path.write_text("")
  assert results.read(path) == []
  with pytest.raises(UserError, match="no results at"):
    results.read(tmp_path / "nowhere.jsonl")
