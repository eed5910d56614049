"""launch/local.sh with a stand-in for the command that ends as told."""

import os
import subprocess

import pytest
from tiny import ROOT


def launch(tmp_path, statuses, retries=3):
  """Runs the launcher; start k of the stand-in ends with statuses[k]. Returns (status, starts)."""
  stand_in = tmp_path / "stand_in"
  stand_in.write_text(
      "#!/usr/bin/env bash\n"
      f'echo "$*" >> {tmp_path}/starts\n'
      f"statuses=({' '.join(map(str, statuses))})\n"
      f"exit ${{statuses[$(($(wc -l < {tmp_path}/starts) - 1))]}}\n")
  stand_in.chmod(0o755)
  done = subprocess.run(
      [str(ROOT / "launch/local.sh"), "--config=a b"], timeout=60, capture_output=True,
      env=dict(os.environ, CHINCHILLA=str(stand_in), RETRIES=str(retries), PAUSE="0"))
  return done.returncode, (tmp_path / "starts").read_text().splitlines()


@pytest.mark.parametrize("statuses, status, n_starts", [
    ([0], 0, 1), ([137, 1, 0], 0, 3), ([2], 2, 1), ([1, 2], 2, 2), ([130], 130, 1),
    ([139, 143], 143, 2), ([1, 1, 1, 9], 9, 4)])
def test_starts_again_only_after_a_crash(tmp_path, statuses, status, n_starts):
  assert launch(tmp_path, statuses) == (status, ["train --config=a b"] * n_starts)
