"""launch/local.sh with a stand-in for the command that ends as told."""

import os
import signal
import subprocess

import pytest
from tiny import ROOT


def launcher(tmp_path, body, retries=3):
  """Starts the launcher with a stand-in whose k-th start has $k = k - 1."""
  stand_in = tmp_path / "stand_in"
  stand_in.write_text(f'#!/usr/bin/env bash\necho "$*" >> {tmp_path}/starts\n'
                      f"k=$(($(wc -l < {tmp_path}/starts) - 1))\n{body}\n")
  stand_in.chmod(0o755)
  return subprocess.Popen(
      [str(ROOT / "launch/local.sh"), "--config=a b"], stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, text=True, start_new_session=True,
      env=dict(os.environ, CHINCHILLA=str(stand_in), RETRIES=str(retries), PAUSE="0"))


def starts(tmp_path):
  return (tmp_path / "starts").read_text().splitlines()


@pytest.mark.parametrize("statuses, status, n_starts", [
    ([0], 0, 1), ([137, 1, 0], 0, 3), ([2], 2, 1), ([1, 2], 2, 2), ([130], 130, 1),
    ([75, 143, 134, 0], 0, 4), ([1, 1, 1, 9], 9, 4)])
def test_starts_again_only_when_that_helps(tmp_path, statuses, status, n_starts):
  process = launcher(tmp_path, f"statuses=({' '.join(map(str, statuses))})\nexit ${{statuses[$k]}}")
  process.communicate(timeout=60)
  assert process.returncode == status
  assert starts(tmp_path) == ["train --config=a b"] * n_starts


def test_told_to_stop_it_waits_for_the_save_and_starts_nothing(tmp_path):
  """The whole process group gets the signal, as a supervisor sends it."""
  process = launcher(
      tmp_path, "trap 'sleep 1; echo saved; exit 75' TERM\necho ready\nwhile :; do sleep 0.1; done")
  assert process.stdout.readline() == "ready\n"
  os.killpg(process.pid, signal.SIGTERM)
  rest, _ = process.communicate(timeout=60)
  assert process.returncode == 75 and "saved" in rest
  assert len(starts(tmp_path)) == 1
