"""Damaged checkpoints: found, named, kept aside; the run goes on from the one before."""

import re
import shutil

import pytest
from tiny import with_fields

from chinchilla_jax.errors import UserError
from chinchilla_jax.training import checkpoint, loop, trained
from chinchilla_jax.training.run_folder import RunFolder
from launch import arrays, assert_same_arrays, assert_same_run


def largest(folder):
  """The file with the most data: what a bad disk hits first."""
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder):
  path = largest(folder)
  path.write_bytes(path.read_bytes()[:-7])
  return rf"{path.name} has [0-9,]+ bytes instead of"


def empty(folder):
  path = largest(folder)
  path.write_bytes(b"")
  return rf"{path.name} has 0 bytes instead of"


def remove(folder):
  path = largest(folder)
  path.unlink()
  return rf"{path.name} is missing"


def flip(folder):
  """One bit, somewhere in the middle: no size tells."""
  path = largest(folder)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  return rf"{path.name} has changed"


def flip_in_every_file(folder):
  for path in sorted(folder.rglob("*")):
    if path.is_file() and path.stat().st_size:
      content = bytearray(path.read_bytes())
      content[0] ^= 0xFF
      path.write_bytes(content)
  return "seals/ is damaged"


def no_seals(folder):
  shutil.rmtree(folder / "seals")
  return "0.json is missing"


def no_orbax_marker(folder):
  (folder / "state" / "_CHECKPOINT_METADATA").unlink()
  return "_CHECKPOINT_METADATA is missing"


def no_state(folder):
  shutil.rmtree(folder / "state")
  return "is missing"


def other_progress(folder):
  path = folder / "progress.json"
  path.write_text(path.read_text().replace('"step": 12', '"step": 13'))
  return "progress.json has changed"


def half_a_seal(folder):
  path = folder / "seals" / "0.json"
  path.write_text(path.read_text()[:100])
  return "seals/ is damaged"


def no_processes(folder):
  """One bit: "1" becomes "0". Nothing would be compared."""
  path = folder / "seals" / "0.json"
  path.write_text(path.read_text().replace('"processes": 1', '"processes": 0'))
  return "more seals in seals/ than the 0"


def fewer_processes(folder):
  """One bit: of three processes, the files of two would not be compared."""
  (folder / "seals" / "1.json").write_text('{"process": 1, "processes": 3, "files": {}}')
  (folder / "seals" / "2.json").write_text('{"process": 2, "processes": 3, "files": {}}')
  return "more seals in seals/ than the 1"


def seal_of_another(folder):
  path = folder / "seals" / "0.json"
  path.write_text(path.read_text().replace('"process": 0', '"process": 1'))
  return "seals in seals/ are not of one checkpoint"


def a_file(folder):
  shutil.rmtree(folder)
  folder.write_text("not a folder")
  return "not a folder"


def escaping_seal(folder):
  path = folder / "seals" / "0.json"
  path.write_text(path.read_text().replace('"progress.json"', '"../../config.json"'))
  return "outside of it"


DAMAGES = [truncate, empty, remove, flip, flip_in_every_file, no_seals, no_orbax_marker, no_state,
           other_progress, half_a_seal, no_processes, fewer_processes,
           seal_of_another, a_file, escaping_seal]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_found_and_named_and_nothing_is_moved_by_looking(tiny_run, tmp_path, damage, capsys):
  _, whole = tiny_run
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  words = damage(workdir / "checkpoints/12")
  step, problems = checkpoint.newest_good(workdir / "checkpoints")
  assert step == 8 and list(problems) == [12]
  assert re.search(words, problems[12])
  # Evaluation and generation use the one before, and say so.
  if damage is flip:
    assert trained.load(workdir).step == 8
    assert "checkpoint 12 is damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match="--step: the checkpoint of step 12 is damaged"):
      trained.load(workdir, 12)
  assert (workdir / "checkpoints/12").exists()


@pytest.mark.parametrize("damage", [flip, remove, no_seals], ids=lambda f: f.__name__)
def test_goes_on_from_the_one_before(tiny_run, tmp_path, damage, capsys):
  experiment, whole = tiny_run
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  damage(workdir / "checkpoints/12")
  kept = {p.relative_to(workdir / "checkpoints/12"): p.read_bytes()
          for p in (workdir / "checkpoints/12").rglob("*") if p.is_file()}
  assert loop.train(experiment, workdir).step == 12
  printed = capsys.readouterr().out
  assert "resuming at step 8" in printed and "checkpoint 12 is damaged: " in printed
  aside = workdir / "checkpoints/aside/12-damaged"
  assert {p.relative_to(aside): p.read_bytes() for p in aside.rglob("*") if p.is_file()} == kept
  assert_same_run(workdir, whole, 12)
  [event] = [e for e in RunFolder(workdir).read_journal() if e["event"] == "checkpoint set aside"]
  assert event["step"] == 12 and event["why"]


def test_two_damaged_and_a_second_time(tiny_run, tmp_path):
  experiment, whole = tiny_run
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  flip(workdir / "checkpoints/12")
  truncate(workdir / "checkpoints/8")
  loop.train(experiment, workdir)
  flip(workdir / "checkpoints/12")
  loop.train(experiment, workdir)
  assert_same_run(workdir, whole, 12)
  assert sorted(p.name for p in (workdir / "checkpoints/aside").iterdir()) == [
      "12-damaged", "12-damaged-2", "8-damaged"]


def test_none_is_whole(tiny_run, tmp_path, capsys):
  experiment, whole = tiny_run
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  for step in (4, 8, 12):
    flip(workdir / f"checkpoints/{step}")
  before = sorted(p for p in workdir.rglob("*"))
  for _ in range(2):  # It does not give up what is left by being asked twice.
    with pytest.raises(UserError, match="no checkpoint that is whole.*12: .*--force"):
      loop.train(experiment, workdir)
  assert sorted(p for p in workdir.rglob("*")) == before
  loop.train(experiment, workdir, force=True)
  assert "starting afresh" in capsys.readouterr().out
  assert_same_run(workdir, whole, 12)
  assert len(list((workdir / "checkpoints/aside").iterdir())) == 3


def test_sizes_alone_do_not_see_a_flipped_bit(tiny_run, tmp_path):
  """What `checkpoint.verify=sizes` gives up; a truncated file it sees."""
  _, whole = tiny_run
  shutil.copytree(whole, tmp_path / "run")
  flip(tmp_path / "run/checkpoints/12")
  assert checkpoint.newest_good(tmp_path / "run/checkpoints", "sizes") == (12, {})
  truncate(tmp_path / "run/checkpoints/12")
  assert checkpoint.newest_good(tmp_path / "run/checkpoints", "sizes")[0] == 8


def test_a_new_run_does_not_start_from_a_damaged_one(tiny_run, tmp_path):
  experiment, whole = tiny_run
  shutil.copytree(whole, tmp_path / "source")
  for step in (4, 8, 12):
    flip(tmp_path / f"source/checkpoints/{step}")
  with pytest.raises(UserError, match="init_from.*no checkpoint that is whole"):
    loop.train(with_fields(experiment, checkpoint__init_from=str(tmp_path / "source")),
               tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_half_written_ones_are_cleared_away_and_never_used(tiny_run, tmp_path):
  experiment, whole = tiny_run
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  shutil.move(workdir / "checkpoints/12", workdir / "checkpoints/12.partial")
  shutil.copytree(workdir / "checkpoints/8", workdir / "checkpoints/.retired-2")
  loop.train(experiment, workdir)
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["12", "4", "8"]
  assert_same_arrays(arrays(workdir, 12), arrays(whole, 12))
