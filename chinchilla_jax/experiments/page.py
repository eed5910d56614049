"""One HTML page of runs that needs nothing but itself: no network, no other file.

Tables are HTML when it is written, so they are there without JavaScript; figures are drawn by
assets/*.js from numbers in the page. Text from runs goes through `html.escape`, or into JSON
without "<"; and the page's policy runs its own script only, named by its hash.
"""

import base64
import hashlib
import html
import importlib.resources
import json
from collections.abc import Sequence
from typing import Any

from chinchilla_jax.experiments import page_curves, run_state
from chinchilla_jax.experiments.report import Run

MARK = "<!doctype html>\n<!-- chinchilla report -->\n"  # By which a page of ours is known.
CURVE_BYTES = 3_000_000  # Of all curves in the page.
_MOST_ROWS = 500
_SCRIPTS = ("curves.js", "axes.js", "drawing.js", "figure.js", "page.js")

_CONVENTIONS = (
    ("Tokens", "trained on, up to the newest line of metrics.jsonl. N: parameters by the rule of "
     "Table A9, embedding included."),
    ("FLOPs", "6&middot;N&middot;D, which counts no attention and nothing that is recomputed."),
    ("Time", "from the journal, each start to its stop, evaluations, saves and compilation "
     "included; a start without an end of its own is not counted, and is named. In steps: tokens "
     "of each step over its speed, without the first step after each pause."),
    ("Tokens/s", "median over the logged steps; the time of a step leaves evaluations and saves "
     "out."),
    ("Validation loss", "nats per token, the newest evaluation: the mean over the targets of the "
     "held-out split, as far as the config's evaluation.max_tokens goes."),
    ("Bits per byte", "the same nats in bits, over the bytes of the held-out text: comparable "
     "between tokenizers."),
    ("Training loss", "nats per token of each step's batch, before its update."),
    ("MFU", "of the bfloat16 peak of all devices; attention counted over all pairs (mfu), or over "
     "visible pairs (mfu_causal). Where the peak is not known there is none."),
    ("Odd steps", "spikes as the run's guard judged them; steps whose loss, gradient or update "
     "was not finite; updates that were left out for either."),
)


def render(runs: Sequence[Run], written: str, curve_bytes: int = CURVE_BYTES) -> str:
  """The page, in ASCII.

  Args:
    runs: to show, in order.
    written: when and by what; stands in the foot of the page.
    curve_bytes: that curves may take; what does not fit is thinned, and the page says so.
  """
  parts, thinning = page_curves.fit(runs, curve_bytes)
  data = {"runs": [page_curves.run_data(run, index, part)
                   for index, (run, part) in enumerate(zip(runs, parts, strict=True))]}
  # "<" would let text end the script element or open a comment in it.
  numbers = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
  script = "(function () {\n\"use strict\";\n" + "".join(map(_asset, _SCRIPTS)) + "}());\n"
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  title = _escape("Report: " + ", ".join(run.name for run in runs[:4])
                  + (f" and {len(runs) - 4} more" if len(runs) > 4 else ""))
  page = f"""{MARK}<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; \
form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{_asset("page.css")}</style>
</head>
<body>
<header>
<h1>{_heading(runs)}</h1>
<p class="quiet">{_escape(written)}</p>
</header>
<main>
{_summary(runs)}
{_figures(runs, thinning)}
{_differences(runs)}
{"".join(_details(run, index) for index, run in enumerate(runs))}
</main>
<footer class="quiet">This page is complete in itself: it loads nothing and sends nothing.</footer>
<script type="application/json" id="data">{numbers}</script>
<script>{script}</script>
</body>
</html>
"""
  # Character references also stand for what UTF-8 cannot write, such as half of a pair.
  return page.encode("ascii", "xmlcharrefreplace").decode()


def _asset(name: str) -> str:
  return (importlib.resources.files(__package__) / "assets" / name).read_text("ascii")


def _escape(text: Any) -> str:
  return html.escape(str(text))


# -------------------------------------------------------------------- Head


def _heading(runs: Sequence[Run]) -> str:
  return _name(runs[0], 0) if len(runs) == 1 else f"Report of {len(runs)} runs"


def _name(run: Run, index: int) -> str:
  """A run's name with its line as the figures draw it."""
  return (f'<svg class="swatch" viewBox="0 0 22 10" width="22" height="10" aria-hidden="true">'
          f'<line x1="0" x2="22" y1="5" y2="5" class="c{index % page_curves.COLOURS} '
          f'd{index // page_curves.COLOURS % 4}"/></svg>{_escape(run.name)}')


def _summary(runs: Sequence[Run]) -> str:
  heads = ("Run", "Status", "Validation loss", "Bits per byte", "Training loss", "Tokens",
           "FLOPs (6ND)", "Time", "Tokens/s", "Odd steps, restarts")
  best = _best(runs)
  body = "".join(_table_row(heads, _summary_cells(run, index, run is best))
                 for index, run in enumerate(runs))
  conventions = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in _CONVENTIONS)
  notes = "".join(f"<li>{_escape(f'{run.name}: ' if len(runs) > 1 else '')}{_escape(note)}</li>"
                  for run in runs for note in run.notes)
  return f"""<section aria-labelledby="h-summary">
<h2 id="h-summary">Where they stand</h2>
<div class="wide"><table class="cards">{_head(heads)}<tbody>{body}</tbody></table></div>
{f'<ul class="notes">{notes}</ul>' if notes else ""}
<details><summary>How these numbers are counted</summary><dl>{conventions}</dl></details>
</section>"""


def _best(runs: Sequence[Run]) -> Run | None:
  """The run of the fewest bits per byte, where several can be compared."""
  known = [run for run in runs if run.summary["bits_per_byte"] is not None]
  return min(known, key=lambda run: run.summary["bits_per_byte"]) if len(known) > 1 else None


def _summary_cells(run: Run, index: int, best: bool) -> list[str]:
  facts = run.summary
  number = lambda name, form: "&ndash;" if facts[name] is None else format(facts[name], form)
  small = lambda text: f'<small>{text}</small>' if text else ""
  at = facts["eval_step"]
  params = facts["params"]
  per = f"N = {params:,}, {facts['tokens'] / params:.3g} per parameter" if params else ""
  wall = "&ndash;" if facts["wall_seconds"] is None else run_state.duration(facts["wall_seconds"])
  inside = [] if facts["step_seconds"] is None else [
      f"{run_state.duration(facts['step_seconds'])} in steps"]
  if facts["unended_legs"]:
    inside.append(f"and {_count(facts['unended_legs'], 'start')} whose end is not known")
  odd = [_count(facts["spikes"], "spike") if facts["spikes"] else "",
         f"{facts['nonfinite']:,} not finite" if facts["nonfinite"] else "",
         f"{_count(facts['left_out'], 'update')} left out" if facts["left_out"] else "",
         _count(facts["rollbacks"], "rollback") if facts["rollbacks"] else "",
         _count(facts["resumes"], "restart") if facts["resumes"] else ""]
  nothing_yet = facts["step"] is None and not run.events
  return [
      f'<strong>{_name(run, index)}</strong>{small(_escape(run.path))}',
      _state(facts) + small("" if facts["step"] is not None or nothing_yet else "no metrics yet"),
      number("eval_loss", ".4f") + small(f"nats/token, step {at:,}" if at is not None else ""),
      number("bits_per_byte", ".4f") + small("fewest of these runs" if best else ""),
      number("train_loss", ".4f")
      + small(f"nats/token, step {facts['step']:,}" if facts["step"] is not None else ""),
      number("tokens", ",.0f") + small(per),
      _power(facts["flops"]),
      wall + small(", ".join(inside)),
      number("tokens_per_second", ",.0f") + small(
          "median step" if facts["tokens_per_second"] else ""),
      ", ".join(text for text in odd if text) or "none",
  ]


def _state(facts: dict[str, Any]) -> str:
  """The state as a word that stands out, and the rest of what is said of it."""
  state, words = facts["state"], facts["status"]
  if not words.startswith(state):
    return f'<span class="state {state}">{_escape(words)}</span>'
  rest = words.removeprefix(state).removeprefix(",").strip()
  return f'<span class="state {state}">{state}</span><small>{_escape(rest)}</small>'


def _power(value: float | None) -> str:
  if value is None:
    return "&ndash;"
  head, power = f"{value:.2e}".split("e")
  return f"{head}&times;10<sup>{int(power)}</sup>"


def _count(number: int, noun: str) -> str:
  return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _head(heads: Sequence[str]) -> str:
  cells = "".join(f'<th scope="col">{_escape(head)}</th>' for head in heads)
  return f"<thead><tr>{cells}</tr></thead>"


def _table_row(heads: Sequence[str], cells: Sequence[str]) -> str:
  return "<tr>" + "".join(f'<td data-head="{_escape(head)}">{cell}</td>'
                          for head, cell in zip(heads, cells, strict=True)) + "</tr>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  body = "".join(_table_row(heads, row) for row in rows)
  return f'<div class="wide"><table>{_head(heads)}<tbody>{body}</tbody></table></div>'


# -------------------------------------------------------------------- Figures


def _figures(runs: Sequence[Run], thinning: Sequence[str]) -> str:
  if not any(len(run.train) or len(run.evals) for run in runs):
    return '<section><h2>Curves</h2><p>No metrics yet: there is nothing to draw.</p></section>'
  lines = "".join(f"<li>{_escape(line)}</li>" for line in thinning)
  return f"""<section aria-labelledby="h-curves">
<h2 id="h-curves">Curves</h2>
<noscript><p>The figures need JavaScript; the tables do not.</p></noscript>
<div id="controls" hidden></div>
<div id="figures"></div>
<p id="live" class="hidden" aria-live="polite"></p>
<details><summary>How these curves are drawn</summary>
<p>Drag in a figure to zoom: along the axis in all figures, and a box that is higher than a few
millimetres sets that figure's height too. A double-click shows all again. Hover, or touch, to read
values. With the keyboard: Tab to a figure, arrows move the reading (Shift: ten at a time), + and -
zoom around it, 0 or Escape shows all. In the legend a click hides or shows a run, a double-click
shows it alone.</p>
<p>Where a pixel holds more than one point, the line is their mean, and the band behind it reaches
from the smallest to the largest: no outlier is lost. Smoothing is an exponential moving average
over so many steps, corrected for its start, drawn over the curve, which stays. A value that is not
finite is a gap. Marks at the top of a figure: &#9654; resumed, &#9632; stopped, &#9664; rolled
back, &#9650; spike, &#10005; not finite, ! save failed, &#9661; checkpoint set aside, &#9679;
failed.</p>
<ul>{lines}</ul></details>
</section>"""


# -------------------------------------------------------------------- Tables


def _differences(runs: Sequence[Run]) -> str:
  if len(runs) < 2:
    return ""
  names = list(dict.fromkeys(name for run in runs for name in run.config))
  missing = object()
  rows = []
  for name in names:
    values = [run.config.get(name, missing) for run in runs]
    texts = ["&ndash;" if value is missing else _value(value) for value in values]
    if len(set(texts)) > 1:
      rows.append([f"<code>{_escape(name)}</code>", *texts])
  heads = ["field", *(run.name for run in runs)]
  body = _table(heads, rows) if rows else "<p>Their configs and versions are the same.</p>"
  return f"""<section aria-labelledby="h-config">
<h2 id="h-config">What differs between the configs</h2>
{body}
<p class="quiet">All fields of each run stand below; &ndash; is a field that its config.json does
not have.</p>
</section>"""


def _value(value: Any) -> str:
  text = json.dumps(value) if not isinstance(value, str) else value
  return f"<code>{_escape(text if len(text) <= 400 else text[:400] + ' ...')}</code>"


def _details(run: Run, index: int) -> str:
  return f"""<section class="run">
<h2>{_name(run, index)}</h2>
{_checkpoints(run)}
{_events(run)}
{_troubles(run)}
{_samples(run)}
<details><summary>Config: {len(run.config):,} fields</summary>
{_table(("field", "value"), [(f"<code>{_escape(name)}</code>", _value(value))
                             for name, value in run.config.items()])}</details>
</section>"""


def _checkpoints(run: Run) -> str:
  if not run.checkpoints:
    return "<p>No checkpoints.</p>"
  rows = []
  for row in run.checkpoints[-_MOST_ROWS:]:
    good = not row["problem"]
    state = ('<span class="state complete">whole</span>' if good else
             f'<span class="state {"interrupted" if row["step"] is None else "failed"}">'
             f'{"" if row["step"] is None else "damaged: "}{_escape(row["problem"])}</span>')
    rows.append((_escape(row["name"]) if row["step"] is None else f"{row['step']:,}",
                 "&ndash;" if row["tokens"] is None else f"{row['tokens']:,}",
                 f"{row['bytes']:,}", state))
  bad = sum(bool(row["problem"]) and row["step"] is not None for row in run.checkpoints)
  whole = sum(not row["problem"] for row in run.checkpoints)
  return f"""<details{" open" if bad else ""}><summary>Checkpoints: {whole:,} whole\
{f", {bad:,} damaged" if bad else ""} (sizes compared, checksums not)</summary>
{_cut(run.checkpoints)}{_table(("step", "tokens", "bytes on disk", "files"), rows)}</details>"""


def _events(run: Run) -> str:
  if not run.events:
    return "<p>No journal.</p>"
  rows = [(f'<time>{_escape(event.time)}</time>', _escape(event.kind),
           "&ndash;" if event.step is None else f"{event.step:,}", _escape(event.text))
          for event in run.events[-_MOST_ROWS:]]
  return f"""<details><summary>Journal: {_count(len(run.events), "event")}</summary>
{_cut(run.events)}{_table(("time (UTC)", "event", "step", "what it says"), rows)}</details>"""


def _troubles(run: Run) -> str:
  if not run.troubles:
    return ""
  rows = [(f"{event.step:,}", _escape(event.kind), _escape(event.text))
          for event in run.troubles[-_MOST_ROWS:]]
  return f"""<details><summary>Odd steps: {len(run.troubles):,}</summary>
{_cut(run.troubles)}{_table(("step", "what", "what it says"), rows)}</details>"""


def _cut(things: Sequence[Any]) -> str:
  return f"<p>The newest {_MOST_ROWS:,} of {len(things):,}.</p>" if len(things) > _MOST_ROWS else ""


def _samples(run: Run) -> str:
  if not run.samples:
    return ""
  prompts = list(dict.fromkeys(sample["prompt"] for sample in run.samples))
  parts = []
  for prompt in prompts:
    own = [sample for sample in run.samples if sample["prompt"] == prompt]
    blocks = "".join(f"<figure><figcaption>step {sample['step']:,}</figcaption>"
                     f"<pre>{_escape(sample['text'])}</pre></figure>" for sample in reversed(own))
    parts.append(f"<h3>after <code>{_escape(prompt)}</code></h3>"
                 f'<div class="samples">{blocks}</div>')
  return f"""<details open><summary>Sample text: {len(run.samples):,}, the newest first</summary>
{"".join(parts)}</details>"""
