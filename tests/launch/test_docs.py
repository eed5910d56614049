"""docs/launch.md: its numbers, its commands, its links."""

import re
import shlex
import subprocess
import sys

import pytest
from fake_cloud import Cloud, checkout
from tiny import ROOT

from chinchilla_jax.parallel import topology

PAGE = (ROOT / "docs/launch.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S)
            for line in re.sub(r"\\\n", " ", block).splitlines()]


def chip_hours(*words):
  return subprocess.run([sys.executable, ROOT / "launch/chip_hours.py", *words], text=True,
                        capture_output=True, cwd=ROOT, timeout=60)


def test_the_table_is_that_of_the_script():
  done = chip_hours()
  assert done.returncode == 0 and done.stdout.strip() in PAGE


def test_chip_hours_by_hand():
  """6 x 70.06e9 x 1.4e12 FLOPs at 40 % of 275e12 a second."""
  done = chip_hours("configs/chinchilla.py:70b")
  hours = 6 * 70_061_956_352 * 1.4e12 / (0.4 * 275e12) / 3600
  assert topology.CHIPS["v4"].peak_bf16 == 275e12
  assert f"{float(f'{hours:.3g}'):,.0f}" == "1,490,000" and "| 1,490,000 |" in done.stdout
  assert "| 2,970,000 |" in chip_hours("configs/chinchilla.py:70b", "--mfu=0.2").stdout


@pytest.mark.parametrize("words, message", [
    (["--mfu=40"], "give a share such as 0.4"), (["configs/none.py"], "no file 'configs/none.py'")])
def test_chip_hours_of_nothing(words, message):
  done = chip_hours(*words)
  assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_every_tpu_command_is_one(tmp_path):
  """Each with --dry-run: flags, names and folders are accepted."""
  cloud, repo = Cloud(tmp_path / "cloud", sys.executable), checkout(tmp_path / "repo")
  lines = [line for line in COMMANDS if line.startswith("launch/tpu_vm.sh")]
  assert len(lines) >= 7
  for line in lines:
    words = shlex.split(line, comments=True)
    done = cloud.run(repo / "launch/tpu_vm.sh", *words[1:3], "--dry-run", "--project=my-project",
                     "--zone=us-west4-b", *words[3:], CHINCHILLA="true")
    assert done.returncode == 0 and done.stdout.startswith("gcloud "), (line, done.stderr)
  assert cloud.calls == []


def test_the_gke_command_renders():
  [line] = [line for line in COMMANDS if line.startswith("launch/gke/render.py")]
  words = shlex.split(line.partition(" > ")[0])
  done = subprocess.run([sys.executable, *words], text=True, capture_output=True, cwd=ROOT,
                        timeout=120)
  assert done.returncode == 0 and "kind: JobSet" in done.stdout, done.stderr


def test_links_lead_somewhere():
  anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
             for title in re.findall(r"^#+ (.*)$", PAGE, re.M)}
  for target in re.findall(r"\]\(([^)]+)\)", PAGE):
    if target.startswith("#"):
      assert target[1:] in anchors, target
    elif not target.startswith("http"):
      assert (ROOT / "docs" / target.partition("#")[0]).exists(), target
  for name in re.findall(r"`((?:launch|tests)/[\w./-]+)`", PAGE):
    assert (ROOT / name).exists(), name
