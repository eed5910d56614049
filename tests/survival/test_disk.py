"""Disks that are full: a save that fails costs nothing but that save."""

import contextlib
import subprocess

import pytest
from tiny import with_fields

from chinchilla_jax.training import checkpoint
from chinchilla_jax.training.run_folder import RunFolder
from launch import assert_same_run, run

# From the start of step 5 to the start of step 10 no file may grow beyond 20 kB.
FULL = """
import resource
from chinchilla_jax.training import recorder
_step = recorder.Recorder.step
def step(self, step, values):
  if step in (5, 10):
    limit = 20_000 if step == 5 else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
  _step(self, step, values)
recorder.Recorder.step = step
"""


FOR_EVER = FULL.replace("(5, 10)", "(5,)")
NO_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # JAX would leave half an entry in it.


def test_a_save_that_fails_is_told_and_tried_again(tiny, tiny_run, tmp_path):
  """The metrics cannot be written meanwhile either; no line is lost."""
  _, whole = tiny_run
  workdir = tmp_path / "run"
  status, text = run(tiny, workdir, FULL, ["--config.checkpoint.asynchronous=false"],
                     **NO_CACHE)
  assert status == 0, text
  assert "the checkpoint of step 8 was not saved: " in text and "File too large" in text, text
  assert "the newest checkpoint is of step 4, the next save tries again" in text
  assert checkpoint.steps(workdir / "checkpoints") == [4, 12]
  assert not list((workdir / "checkpoints").glob("*.partial"))
  assert_same_run(workdir, whole, 12)
  [failed] = [e for e in RunFolder(workdir).read_journal() if e["event"] == "save failed"]
  assert failed["step"] == 8


def test_stops_when_told_to_after_so_many(tiny, tmp_path):
  status, text = run(
      with_fields(tiny, run_length="40 steps", checkpoint__every="2 steps",
                  checkpoint__failures=2, checkpoint__asynchronous=False),
      tmp_path / "run", FOR_EVER, **NO_CACHE)
  assert status == 2, text
  assert ("2 saves in a row failed, the last at step 8: " in text
          and "the newest checkpoint is of step 4, the same command goes on" in text), text
  assert "Traceback" not in text
  assert checkpoint.steps(tmp_path / "run/checkpoints") == [2, 4]


def test_the_last_save_must_not_fail(tiny, tmp_path):
  status, text = run(with_fields(tiny, checkpoint__every="0 steps"), tmp_path / "run",
                     FOR_EVER, **NO_CACHE)
  assert status == 2 and "the last save, at step 12, failed" in text, text
  assert "trained to step" not in text
  status, text = run(with_fields(tiny, checkpoint__every="0 steps"), tmp_path / "run")
  assert status == 0, text


@pytest.fixture
def small_disk(tmp_path):
  """A real file system of two megabytes, where this machine allows to mount one."""
  folder = tmp_path / "disk"
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("mounting is not allowed here; the limit on file sizes is tested above")
  yield folder
  with contextlib.suppress(OSError):
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_real_disk_that_runs_full(tiny, tiny_run, small_disk):
  """A checkpoint takes about half a megabyte; a stranger's file fills the disk, and goes again."""
  _, whole = tiny_run
  fill = f"""
import os, time
from chinchilla_jax.training import recorder
_step = recorder.Recorder.step
def step(self, step, values):
  path = "{small_disk}/stranger"
  if step == 5:
    with open(path, "wb", buffering=0) as file:
      try:
        while True:
          file.write(bytes(4096))
      except OSError:
        pass
  if step == 10:
    os.unlink(path)
  _step(self, step, values)
recorder.Recorder.step = step
"""
  workdir = small_disk / "run"
  status, text = run(with_fields(tiny, checkpoint__asynchronous=False), workdir, fill)
  assert status == 0, text
  assert "the checkpoint of step 8 was not saved: " in text, text
  assert "No space left" in text, text
  assert checkpoint.newest_good(workdir / "checkpoints") == (12, {})
  assert_same_run(workdir, whole, 12)


def test_a_full_disk_at_the_start_is_one_line(tiny, small_disk):
  with contextlib.suppress(OSError), open(small_disk / "stranger", "wb", 0) as file:
    while True:
      file.write(bytes(4096))
  status, text = run(tiny, small_disk / "run")
  assert status == 2 and "Traceback" not in text, text
