"""Fixtures of the tests of sweeps and reports."""

import math

import pytest
from sweep_bench import Bench
from synthetic import eval_line, event_line, sample_line, train_line, trouble_line, write


@pytest.fixture
def bench(tmp_path, tiny_store, monkeypatch) -> Bench:
  return Bench(tmp_path, tiny_store, monkeypatch)


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
      metrics.append(trouble_line(step, "nonfinite", "loss, grad_norm not finite: update "
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
