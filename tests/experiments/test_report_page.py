"""`chinchilla report`: what the page holds, and what it does in a real browser."""

import base64
import html.parser
import json
import math
import os
import re
import resource
import time

import numpy as np
import peak
import pytest
from browser import PROGRAM, Browser
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
from chinchilla_jax.training import seals

EVIL = "</script><script>window.pwned = 1</script><!--<img src=x onerror='window.pwned = 2'>"


def numbers(text: str) -> dict:
  """The JSON in a page, as a browser's parser finds it."""
  class Finder(html.parser.HTMLParser):
    inside, found = False, ""

    def handle_starttag(self, tag, attrs):
      self.inside = tag == "script" and ("id", "data") in attrs

    def handle_endtag(self, tag):
      self.inside = False

    def handle_data(self, data):
      self.found += data if self.inside else ""

  finder = Finder()
  finder.feed(text)
  return json.loads(finder.found)


def decoded(text: str, dtype: str) -> np.ndarray:
  return np.frombuffer(base64.b64decode(text), dtype)


def rendered(*folders, **options) -> str:
  return page.render(report.read([str(folder) for folder in folders]), "now", **options)


@pytest.fixture
def two(tmp_path):
  """A run with everything in it, and one that goes on."""
  metrics = []
  for step in range(1, 101):
    loss = math.nan if step == 40 else math.inf if step == 41 else 6.0 / (1 + step / 50)
    line = train_line(step, loss=loss, mfu=0.4, mfu_causal=0.3)
    if step == 51:
      del line["tokens_per_second"]
    metrics.append(line)
    if step in (40, 41):
      metrics.append(trouble_line(step, "nonfinite", "loss or gradient is not finite: update "
                                  "left out (1 in a row); sequences 160 to 163"))
    if step % 25 == 0:
      metrics.append(eval_line(step, 5.0 - step / 50))
  journal = [
      event_line("start", 0, step=0, notes=["starting afresh"], devices="1 x cpu", processes=1),
      event_line("stop", 10, step=50, signal=15),
      event_line("resume", 20, step=50, notes=["resuming at step 50"]),
      event_line("save failed", 25, step=75, why="No space left on device"),
      event_line("complete", 30, step=100, signal=0)]
  metrics += [sample_line(step, "import ", f"import <b>{step}\n") for step in (25, 50, 100)]
  one = write(tmp_path / "one", metrics, journal, run_length="100 steps")
  other = write(tmp_path / "other", [train_line(step, loss=7.0) for step in range(1, 31)],
                [event_line("start", 0, step=0)], tail='{"kind": "train", "st',
                run_length="100 steps", optimizer__peak_lr=3e-3)
  return one, other


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
  assert other.summary["state"] == "ended"
  assert "at step 30 of 100" in other.summary["status"]
  assert any("1 line of metrics.jsonl cannot be read" in note for note in other.notes)


@pytest.mark.parametrize("events, state, words", [
    ([("start", {}), ("stop", {"signal": 2})], "stopped", "stopped by SIGINT at step 3 of 100"),
    ([("start", {}), ("failed", {"why": "it burns"})], "failed",
     "failed at step 3 of 100: it burns"),
    ([("start", {}), ("rollback", {"step": 3})], "ended", "without a word"),
    ([], "unknown", "at step 3 of 100; no journal"),
])
def test_status_from_the_journal(tmp_path, events, state, words):
  journal = [event_line(event, minute, **facts) for minute, (event, facts) in enumerate(events)]
  folder = write(tmp_path / "run", map(train_line, (1, 2, 3)), journal, run_length="100 steps")
  [run] = report.read([str(folder)])
  assert run.summary["state"] == state
  assert words in run.summary["status"]


def test_a_run_whose_process_lives_is_running(tmp_path):
  folder = write(tmp_path / "run", [train_line(1)], [event_line("start", 0, step=0)])
  lock = {"host": os.uname().nodename, "pid": os.getpid(), "since": "now"}
  (folder / ".lock").write_text(json.dumps(lock))
  assert report.read([str(folder)])[0].summary["state"] == "running"


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
    (["gs://bucket/run"], "is remote"),
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


# -------------------------------------------------------------------- In a browser

in_a_browser = pytest.mark.skipif(PROGRAM is None, reason="there is no chromium here: "
                                  "apt-get install chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  with Browser(tmp_path_factory.mktemp("profile")) as made:
    yield made


@pytest.fixture
def opened(browser, two, tmp_path):
  """The page of the two runs, in a browser that has not complained when the test is over."""
  out = tmp_path / "report.html"
  out.write_text(rendered(*two))
  browser.complaints.clear()
  browser.requests.clear()
  browser.resize(1400, 1000)
  browser.open(out)
  yield browser
  assert browser.complaints == []
  assert browser.requests == [out.as_uri()]  # It loads nothing but itself.


TIP = "document.querySelector('#figure-loss .tip')"


@in_a_browser
def test_figures_are_drawn(opened):
  figures = opened.ask("[...document.querySelectorAll('#figures > figure')].map((f) => f.id)")
  assert figures == ["figure-loss", "figure-bits", "figure-rate", "figure-speed", "figure-mfu",
                     "figure-grad", "figure-update", "figure-param"]
  assert opened.ask("document.querySelectorAll('#figure-loss .curve').length") == 3
  # The two values that are not finite cut the curve in two.
  paths = opened.ask("[...document.querySelectorAll('#figure-loss .curve.c0')]"
                     ".map((p) => (p.getAttribute('d').match(/M/g) || []).length)")
  assert paths == [2, 1]
  assert opened.ask("document.querySelectorAll('#figure-loss .dot').length") == 4
  assert "NaN" not in opened.ask("document.getElementById('figures').innerHTML")


@in_a_browser
def test_hovering_reads_the_values_of_all_runs(opened):
  x, y, width, height = opened.box("#figure-loss > svg")
  place = opened.ask(f"chinchilla.page.figures[0].placeX({25 * TOKENS})")
  opened.mouse("moved", x + place, y + height / 2)
  assert opened.ask(f"{TIP}.hidden") is False
  rows = opened.ask(f"[...{TIP}.querySelectorAll('tr')].slice(1).map((r) => "
                    "[...r.cells].map((c) => c.textContent))")
  assert rows == [["one, training", "25", "3.2k", "4"], ["one, validation", "25", "3.2k", "4.5"],
                  ["other, training", "25", "3.2k", "7"]]
  place = opened.ask(f"chinchilla.page.figures[0].placeX({50 * TOKENS})")
  opened.mouse("moved", x + place, y + height / 2)
  assert "step 50: stop: SIGTERM (2026-01-02T03:10:00+00:00)" in opened.ask(f"{TIP}.textContent")
  # The other run ended at step 30.
  far = opened.ask(f"[...{TIP}.querySelectorAll('.far')].map((r) => r.cells[0].textContent)")
  assert far == ["other, training"]
  opened.mouse("moved", 2, 2)
  assert opened.ask(f"{TIP}.hidden") is True


@in_a_browser
def test_dragging_zooms_all_figures_and_a_double_click_shows_all(opened):
  x, y, width, height = opened.box("#figure-loss > svg")
  whole = opened.ask("chinchilla.page.view()")
  assert whole == [0, 100 * TOKENS]
  opened.drag((x + width * 0.3, y + height / 2), (x + width * 0.6, y + height / 2 + 5))
  low, high = opened.ask("chinchilla.page.view()")
  assert 0 < low < high < whole[1] and (high - low) / whole[1] == pytest.approx(0.3, abs=0.05)
  texts = opened.ask("[...document.querySelectorAll('#figure-param text')].map(t => t.textContent)")
  assert "0" not in texts
  opened.drag((x + width * 0.3, y + height * 0.3), (x + width * 0.6, y + height * 0.7))
  assert opened.ask("chinchilla.page.figures[0].viewY !== null")
  for _ in range(2):
    opened.mouse("pressed", x + width / 2, y + height / 2, clicks=2)
    opened.mouse("released", x + width / 2, y + height / 2, clicks=2)
  assert opened.ask("chinchilla.page.view()") == whole
  assert opened.ask("chinchilla.page.figures[0].viewY") is None


@in_a_browser
def test_controls(opened):
  def press(text):
    opened.ask("[...document.querySelectorAll('#controls button')].find((b) => b.textContent === "
               f"{json.dumps(text)}).click()")
  press("FLOPs")
  assert opened.ask("chinchilla.page.view()") == [0, 6.0 * 1000 * 100 * TOKENS]
  assert "FLOPs (6ND)" in opened.ask("document.querySelector('#figure-loss svg').textContent")
  press("log")
  assert opened.ask("chinchilla.page.view()")[0] == 6.0 * 1000 * TOKENS
  press("steps")
  assert opened.ask("chinchilla.page.view()") == [1, 100]
  press("other")
  assert opened.ask("document.querySelectorAll('#figure-loss .curve.c1').length") == 0
  press("other")
  assert opened.ask("document.querySelectorAll('#figure-loss .curve.c1').length") == 1
  opened.ask("(() => { const s = document.getElementById('smooth'); s.value = 60; "
             "s.dispatchEvent(new Event('input')); })()")
  # The raw curve stays beneath.
  assert opened.ask("document.querySelectorAll('#figure-loss .curve.c1').length") == 2
  assert opened.ask("document.querySelectorAll('#figure-loss .curve.c1.under').length") == 1
  press("marks")
  assert opened.ask("document.querySelectorAll('.glyph').length") == 0
  opened.ask("document.querySelector('#figure-loss button').click()")
  assert opened.ask("chinchilla.page.figures[0].logY") is True
  assert "NaN" not in opened.ask("document.getElementById('figures').innerHTML")


@in_a_browser
def test_the_keyboard_reads_and_zooms(opened):
  opened.ask("document.querySelector('#figure-loss > svg').focus()")
  opened.key("Home")
  for _ in range(3):
    opened.key("ArrowRight")
  heard = opened.ask("document.getElementById('live').textContent")
  assert re.match(r"one training, step \d: 5\.\d+; one validation, step 25: 4.5; other", heard)
  opened.key("+")
  low, high = opened.ask("chinchilla.page.view()")
  assert high - low < 60 * TOKENS
  opened.key("Escape")
  assert opened.ask("chinchilla.page.view()") == [0, 100 * TOKENS]


@in_a_browser
def test_narrow_dark_and_printed(opened, tmp_path):
  opened.resize(420, 900)
  opened.ask("new Promise((done) => setTimeout(done, 300))")
  assert opened.ask("document.documentElement.scrollWidth") <= 420
  assert opened.ask("document.querySelector('#figure-loss > svg').viewBox.baseVal.width") < 420
  light = opened.ask("getComputedStyle(document.body).backgroundColor")
  opened.dark(True)
  assert opened.ask("getComputedStyle(document.body).backgroundColor") != light
  opened.dark(False)
  opened.send("Page.printToPDF")


@in_a_browser
def test_a_runs_text_is_not_run(browser, tmp_path):
  folder = write(tmp_path / "run", [train_line(1), trouble_line(1, EVIL, EVIL), train_line(2),
                                   sample_line(2, EVIL, EVIL)],
                 [event_line("failed", 1, why=EVIL)], name=EVIL)
  out = tmp_path / "evil.html"
  # Even if something slipped through, the policy names the one script that may run.
  text = page.render(report.read([str(folder)], [EVIL]), "now")
  out.write_text(text)
  browser.complaints.clear()
  browser.open(out)
  assert browser.ask("window.pwned") is None
  assert browser.ask("document.querySelectorAll('#figure-loss .curve').length") == 1
  x, y, width, height = browser.box("#figure-loss > svg")
  browser.mouse("moved", x + width / 2, y + height / 2)
  assert EVIL in browser.ask(f"{TIP}.textContent")
  assert browser.ask("window.pwned") is None and browser.complaints == []
  out.write_text(text.replace("<footer", "<script>window.pwned = 3</script><footer"))
  browser.open(out)
  assert browser.ask("window.pwned") is None
  assert any("Content Security Policy" in complaint for complaint in browser.complaints)


@in_a_browser
def test_a_thinned_run_shows_its_outlier_as_a_band(browser, tmp_path):
  folder = write(tmp_path / "run", (train_line(step, loss=50.0 if step == 7777 else 3.0)
                                    for step in range(1, 20_001)))
  out = tmp_path / "thin.html"
  out.write_text(rendered(folder, curve_bytes=200_000))
  browser.complaints.clear()
  browser.open(out)
  assert browser.ask("document.querySelectorAll('#figure-loss .band').length") == 1
  assert "line: mean, band: smallest to largest" in browser.ask(
      "document.querySelector('#figure-loss figcaption').textContent")
  row = browser.ask(f"chinchilla.read('loss', {7777 * TOKENS})")[0]
  assert "to 50]" in row["text"] and "\u2013" in row["step"]
  top = browser.ask("chinchilla.page.figures[0].placeY(50) - chinchilla.page.figures[0].frame.top")
  assert top >= 0
  assert browser.complaints == []
