"""`chinchilla report`: what the page holds. test_report_browser.py has what it does there."""

import json
import math
import os
import re
import resource
import time

import numpy as np
import peak
import pytest
from pages import EVIL, decoded, numbers, rendered
from synthetic import (
    TOKENS,
    eval_line,
    event_line,
    sample_line,
    train_line,
    trouble_line,
    write,
)

from chinchilla_jax import cli
from chinchilla_jax.experiments import page, page_curves, report, run_log
from chinchilla_jax.training import run_lock, seals

# -------------------------------------------------------------------- What it says


def test_the_head_says_how_each_run_stands(two):
  one, other = report.read([str(folder) for folder in two])
  facts = one.summary
  assert (facts["state"], facts["status"]) == ("complete", "complete at step 100 of 100")
  assert (facts["tokens"], facts["params"], facts["step"]) == (100 * TOKENS, 1000, 100)
  assert facts["flops"] == 6.0 * 1000 * 100 * TOKENS
  assert facts["wall_seconds"] == 20 * 60  # Ten minutes before the stop, ten after it.
  # Of step 51, the first after the pause, no speed is known.
  assert facts["step_seconds"] == pytest.approx(99 * TOKENS / 5000)
  assert facts["tokens_per_second"] == 5000
  assert (facts["eval_loss"], facts["bits_per_byte"]) == (3.0, 1.2)
  assert (facts["nonfinite"], facts["left_out"], facts["resumes"], facts["spikes"]) == (2, 2, 1, 0)
  assert any("loss was not finite in 2 lines" in note for note in one.notes)
  assert other.summary["state"] == "interrupted"
  assert "at step 30 of 100" in other.summary["status"]
  assert any("1 line of metrics.jsonl cannot be read" in note for note in other.notes)


@pytest.mark.parametrize("events, state, words", [
    ([("start", {}), ("stop", {"signal": 2})], "interrupted", "stopped by SIGINT at step 3 of 100"),
    ([("start", {}), ("failed", {"why": "it burns"})], "failed",
     "failed at step 3 of 100: it burns"),
    ([("start", {}), ("rollback", {"step": 3})], "interrupted", "without a word"),
    ([], "interrupted", "at step 3 of 100; no journal"),
])
def test_status_from_the_journal(tmp_path, events, state, words):
  journal = [event_line(event, minute, **facts) for minute, (event, facts) in enumerate(events)]
  folder = write(tmp_path / "run", map(train_line, (1, 2, 3)), journal, run_length="100 steps")
  [run] = report.read([str(folder)])
  assert run.summary["state"] == state
  assert words in run.summary["status"]


def test_a_run_that_a_process_holds_is_running(tmp_path):
  folder = write(tmp_path / "run", [train_line(1)], [event_line("start", 0, step=0)])
  state = lambda: report.read([str(folder)])[0].summary["state"]
  assert state() == "interrupted"
  with run_lock.held(folder):
    assert state() == "running"
  # On another machine: it wrote a line just now, and then none for an hour.
  (folder / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "since": "now"}))
  assert state() == "running"
  for name in ("metrics.jsonl", "journal.jsonl"):
    os.utime(folder / name, (time.time() - 3600,) * 2)
  assert state() == "interrupted"


def test_the_tables(two):
  text = rendered(*two)
  assert "<code>optimizer.peak_lr</code>" in text and "<code>0.003</code>" in text
  differences = text[text.index("h-config"):text.index('<section class="run">')]
  assert "optimizer.peak_lr" in differences and "optimizer.b1" not in differences
  assert "No space left on device" in text and "import &lt;b&gt;100" in text
  assert text.index("step 100</figcaption>") < text.index("step 25</figcaption>")
  assert "No checkpoints" in text and "No journal" not in text
  assert text.isascii()


def test_checkpoints_whole_and_damaged(tmp_path):
  folder = write(tmp_path / "run", [train_line(12)])
  for step in (4, 8, 12):
    checkpoint = folder / "checkpoints" / str(step)
    (checkpoint / "state").mkdir(parents=True)
    (checkpoint / "state/array").write_bytes(bytes(1000))
    (checkpoint / "progress.json").write_text(json.dumps({"step": step, "tokens": step * TOKENS}))
    seals.write(checkpoint, 0, 1)
  os.truncate(folder / "checkpoints/8/state/array", 10)
  (folder / "checkpoints/aside/2-damaged").mkdir(parents=True)
  (folder / "checkpoints/16.partial").mkdir()
  [run] = report.read([str(folder)])
  assert [(row["step"], row["tokens"], bool(row["problem"])) for row in run.checkpoints] == [
      (4, 4 * TOKENS, False), (8, 8 * TOKENS, True), (12, 12 * TOKENS, False), (None, None, True)]
  assert all(row["bytes"] > 1000 for row in run.checkpoints if row["step"] in (4, 12))
  text = rendered(folder)
  assert "damaged: state/array has 10 bytes instead of 1,000" in text
  assert "Checkpoints: 2 whole, 1 damaged" in text and "2-damaged" in text


def test_text_of_runs_stays_text(tmp_path):
  folder = write(tmp_path / "run", [train_line(1), trouble_line(1, EVIL, EVIL), eval_line(1, 4.0),
                                   sample_line(1, EVIL, EVIL + "\ud800\x00\u2028")],
                 [event_line(EVIL, 0, step=1), event_line("failed", 1, why=EVIL)], name=EVIL)
  text = page.render(report.read([str(folder)], [EVIL]), EVIL)
  assert text.count("<script") == text.count("</script") == 2
  assert "<img" not in text
  assert numbers(text)["runs"][0]["name"] == EVIL


# -------------------------------------------------------------------- Curves


def test_values_are_in_the_page_to_the_last_bit(two):
  run = numbers(rendered(*two))["runs"][0]
  assert not run["train"]["thin"]
  losses = decoded(run["train"]["series"]["loss"]["mean"], "<f4")
  wanted = np.float32([6.0 / (1 + step / 50) for step in range(1, 101)])
  wanted[39:41] = np.inf  # Gaps.
  assert losses.tolist() == wanted.tolist()
  speeds = decoded(run["train"]["series"]["tokens_per_second"]["mean"], "<f4")
  assert np.isnan(speeds).nonzero()[0].tolist() == [50]
  assert decoded(run["train"]["tokens"], "<f8")[-1] == 100 * TOKENS
  assert [mark["kind"] for mark in run["marks"]] == [
      "stop", "resume", "save failed", "nonfinite", "nonfinite"]
  assert [mark["tokens"] for mark in run["marks"]][:2] == [50 * TOKENS, 50 * TOKENS]


def test_thinning_keeps_extremes_means_and_gaps():
  rng = np.random.default_rng(0)
  values = rng.normal(5, 1, 10_007)
  values[[17, 5000, 10_006]] = [99.0, -99.0, 50.0]
  values[2000:2300] = np.inf
  values[3000:3300] = np.nan
  values[7000] = np.inf
  steps = np.arange(1, len(values) + 1)
  curve = run_log.Curve(steps, steps * 10.0, {"loss": values})
  made = page_curves.thinned(curve, ["loss"], 100)
  low, mean, high = (decoded(made["series"]["loss"][part], "<f4")
                     for part in ("min", "mean", "max"))
  first, last = decoded(made["steps"], "<u4"), decoded(made["steps_to"], "<u4")
  assert first[0] == 1 and last[-1] == 10_007 and (first[1:] == last[:-1] + 1).all()
  assert high[0] == 99 and high[-1] == 50 and np.nanmin(low) == -99
  for index in range(100):
    part = values[first[index] - 1:last[index]]
    finite = part[np.isfinite(part)]
    if len(finite):
      assert low[index] == np.float32(finite.min()) and high[index] == np.float32(finite.max())
      assert mean[index] == pytest.approx(finite.mean(), rel=1e-6)
    else:
      assert np.isinf(mean[index]) if np.isinf(part).any() else np.isnan(mean[index])
  assert np.isinf(mean).sum() == 2 and np.isnan(mean).sum() >= 2


def test_a_short_run_beside_a_long_one_keeps_every_step(tmp_path):
  short = write(tmp_path / "short", map(train_line, range(1, 101)))
  long = write(tmp_path / "long", map(train_line, range(1, 5001)))
  text = rendered(short, long, curve_bytes=60_000)
  runs = numbers(text)["runs"]
  assert [run["train"]["thin"] for run in runs] == [False, True]
  assert "short: all 100 logged steps are in this page" in text
  assert re.search(r"long: 5,000 logged steps are thinned to \d+ points", text)


def test_lines_out_of_order_count_once(tmp_path):
  steps = [1, 2, 3, 4, 3, 4, 5]
  lines = [train_line(step, loss=float(index)) for index, step in enumerate(steps)]
  [run] = report.read([str(write(tmp_path / "run", lines))])
  assert run.train.steps.tolist() == [1, 2, 3, 4, 5]
  assert run.train.series["loss"].tolist() == [0, 1, 4, 5, 6]
  assert any("more than once" in note for note in run.notes)


def test_lines_of_nonsense_are_counted(tmp_path):
  lines = [[], 3, None, {"kind": "train"}, {"kind": "train", "step": "1", "tokens": 1},
           {"kind": "train", "step": 1, "tokens": None}, {"kind": "train", "step": -1, "tokens": 1},
           {"kind": "train", "step": 2, "tokens": math.nan}, {"kind": "train", "step": True},
           train_line(3, loss="low", grad_norm=None, update_norm=10**400, param_norm=1e300)]
  folder = write(tmp_path / "run", lines, [{"event": 3}, {"event": "start", "time": "?"}, [1],
                                           {"event": "stop", "signal": "x", "step": "y"}])
  (folder / "metrics.jsonl").open("ab").write(b"\xff\xfe\n" + b"[" * 100_000 + b"\n")
  text = rendered(folder)
  assert "11 lines of metrics.jsonl cannot be read" in text
  assert "2 lines of journal.jsonl cannot be read" in text
  assert numbers(text)["runs"][0]["train"]["series"].keys() >= {"param_norm"}


def test_700_000_steps_make_a_page_of_a_few_megabytes(tmp_path):
  def lines():
    for step in range(1, 700_001):
      yield train_line(step, loss=123.0 if step == 345_678 else 3.0, mfu=0.4, mfu_causal=0.3)
      if step % 2000 == 0:
        yield trouble_line(step, "spike", "spike: " + "x" * 200)
  folder = write(tmp_path / "long", lines(), run_length="700000 steps")
  out = tmp_path / "report.html"
  begin = time.monotonic()
  _, peak_bytes = peak.of_command("report", str(folder), "--out", str(out))
  assert out.stat().st_size < 4_000_000
  assert time.monotonic() - begin < 120  # About 10 s on a quiet machine.
  assert peak_bytes < 600 * 2**20
  text = out.read_text()
  [run] = numbers(text)["runs"]
  assert decoded(run["train"]["series"]["loss"]["max"], "<f4").max() == 123
  assert "700,000 logged steps are thinned to" in text


# -------------------------------------------------------------------- The command


def test_the_command_writes_one_file(two, tmp_path, capsys, monkeypatch):
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  words = ["report", *map(str, two), "--names", "A,B"]
  assert cli.main(words) == 0
  assert cli.main(words) == 0  # A report may be written again.
  assert os.listdir() == ["report.html"]
  out = capsys.readouterr().out.splitlines()
  assert out[-1].startswith("report.html: 2 runs, ")
  assert [run["name"] for run in numbers(open("report.html").read())["runs"]] == ["A", "B"]


def test_a_run_without_metrics_is_said_to_have_none(tmp_path, capsys):
  folder = write(tmp_path / "new")
  (folder / "metrics.jsonl").unlink()
  assert cli.main(["report", str(folder), "--out", str(tmp_path / "r.html")]) == 0
  assert "no metrics yet in new" in capsys.readouterr().out
  text = (tmp_path / "r.html").read_text()
  assert "No metrics yet: there is nothing to draw" in text


@pytest.mark.parametrize("words, cause", [
    ([], "the following arguments are required: RUN"),
    (["nowhere"], "'nowhere' does not exist"),
    (["runs/one/config.json"], "is a file"),
    (["."], "is not a run's folder"),
    (["runs"], "it holds runs: give runs/damaged and so on"),
    (["nosuch://bucket/run"], "is not understood here"),
    (["runs/one", "runs/one"], "is given twice"),
    (["runs/one", "runs/../runs/one/"], "is given twice"),
    (["runs/one", "--names", "a,b"], "--names: 2 for 1 runs"),
    (["runs/one", "runs/two", "--names", "a,a"], "--names: two are the same"),
    (["runs/one", "--names", ""], "--names"),
    (["runs/one", "--out", "runs"], "is a folder"),
    (["runs/one", "--out", "runs/one/config.json"], "is there already and is no report"),
    (["runs/one", "--out", "no/such/place.html"], "there is no folder"),
    (["runs/one", "--out", "x" * 300], "cannot be written"),
    (["runs/one", "--out", "/dev/null"], "is no file"),
    (["runs/one", "--out", "/proc/report.html"], "cannot be written"),
    (["runs/damaged"], "is not the config of a run"),
    (["runs/list"], "is not the config of a run"),
])
def test_bad_input_is_one_line_and_writes_nothing(words, cause, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  for name in ("one", "two", "damaged", "list"):
    write(tmp_path / "runs" / name, [train_line(1)])
  (tmp_path / "runs/damaged/config.json").write_text("{")
  (tmp_path / "runs/list/config.json").write_text("[1]")
  before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
  assert cli.main(["report", *words]) == 2
  out, err = capsys.readouterr()
  assert cause in err and err.count("\n") == 1 and out == ""
  assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_full_disk_leaves_the_old_page(two, tmp_path, monkeypatch, capsys):
  out = tmp_path / "report.html"
  assert cli.main(["report", str(two[0]), "--out", str(out)]) == 0
  before = out.read_bytes()
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # A write beyond it fails.
  try:
    assert cli.main(["report", *map(str, two), "--out", str(out)]) == 2
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert "cannot be written" in capsys.readouterr().err
  assert out.read_bytes() == before
  assert [path.name for path in tmp_path.glob("*html*")] == ["report.html"]
