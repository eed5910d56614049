"""The page of `chinchilla report` in a real browser."""

import json
import re

import pytest
from browser import PROGRAM, Browser
from pages import EVIL, rendered
from synthetic import (
  TOKENS,
  event_line,
  sample_line,
  train_line,
  trouble_line,
  write,
)

from chinchilla_jax.experiments import page, report

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
