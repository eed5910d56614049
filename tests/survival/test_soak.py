"""A run that saves all the time stays as it began; benchmarks/soak.py measures it at length."""

import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
from survival import launch
from tiny import ROOT, with_fields

SOAK = runpy.run_path(str(ROOT / "benchmarks/soak.py"))


def test_eighty_saves_pile_nothing_up(tiny, tmp_path):
  experiment = with_fields(tiny, run_length="240 steps", checkpoint__every="3 steps",
                           evaluation__every="60 steps", logging__tensorboard=True)
  process = launch.start(experiment, tmp_path / "run")
  samples = SOAK["watch"](process, every=0.2)
  seconds, resident, files, threads = samples[len(samples) // 2:].T
  assert len(seconds) > 20
  third = len(seconds) // 3
  # A save holds files open; nothing else may come on top, and none of it may stay.
  assert files[-third:].max() <= files[:third].max() + 4
  assert threads[-third:].max() <= threads[:third].max() + 4
  slope, _ = np.polyfit(seconds, resident / 2**20, 1)
  assert slope * (seconds[-1] - seconds[0]) < 30  # MiB; a copy of anything at every save is more.
  assert [r["step"] for r in launch.records(tmp_path / "run") if r["kind"] == "train"] == list(
      range(1, 241))


@pytest.mark.long
def test_twenty_thousand_steps(tmp_path):
  """About a quarter of an hour. Speed is only printed: it says something on a quiet machine."""
  done = subprocess.run([sys.executable, str(ROOT / "benchmarks/soak.py"), "--workdir", tmp_path],
                        cwd=ROOT, text=True, capture_output=True)
  print(done.stdout, done.stderr)
  assert done.returncode == 0
  number = lambda words: float(re.search(words, done.stdout)[1])
  assert number(r"slope ([+-][\d.]+)") < 2  # MiB per 1,000 steps, with 20 saves.
  early, late = (number(rf"open files .*?(\d+) {when}") for when in ("early", "late"))
  assert late <= early + 10
