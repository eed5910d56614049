"""`chinchilla inspect --workdir`: every checkpoint as it is, and what a resume would do."""

import json
import pathlib
import shutil

import pytest
from tiny import StopAfter

from chinchilla_jax import cli
from chinchilla_jax.training import loop, seals, start
from chinchilla_jax.training.run_folder import RunFolder


def inspect(capsys, *words) -> tuple[int, str, str]:
  """(exit status, stdout, stderr)"""
  capsys.readouterr()
  status = cli.main(["inspect", *map(str, words)])
  return status, *capsys.readouterr()


def facts(capsys, workdir, *words) -> dict:
  """What it says of a run as JSON. It changes nothing."""
  before = snapshot(workdir)
  status, out, error = inspect(capsys, "--workdir", workdir, "--json", *words)
  assert (status, error) == (0, "")
  assert snapshot(workdir) == before
  return json.loads(out)["run"]


def text(capsys, workdir, *words) -> str:
  status, out, error = inspect(capsys, "--workdir", workdir, *words)
  assert (status, error) == (0, ""), error
  return out


def snapshot(folder) -> dict:
  return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.fixture
def workdir(tiny_run, tmp_path) -> pathlib.Path:
  """A copy of a whole run; its checkpoints are of steps 4, 8 and 12."""
  return pathlib.Path(shutil.copytree(tiny_run[1], tmp_path / "run"))


def flip(folder) -> None:
  path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def change(path, edit) -> None:
  content = json.loads(path.read_text())
  edit(content)
  path.write_text(json.dumps(content))


def test_a_whole_run(workdir, capsys):
  run = facts(capsys, workdir)
  assert run["path"] == str(workdir) and run["checked"] == "full"
  assert [(row["step"], row["tokens"], row["problem"], row["owed"])
          for row in run["checkpoints"]] == [
              (4, 512, "", []), (8, 1024, "", []), (12, 1536, "", [])]
  for row in run["checkpoints"]:
    assert row["bytes"] == sum(path.stat().st_size for path in (
        workdir / "checkpoints" / str(row["step"])).rglob("*") if path.is_file())
    assert row["dtypes"]["params"] == ["bfloat16"]
    assert row["dtypes"]["optimizer/master"] == row["dtypes"]["optimizer/nu"] == ["float32"]
    assert row["surroundings"]["mesh"] == "one device"
    assert row["surroundings"]["processes"] == 1 and row["surroundings"]["versions"]["jax"]
  assert run["aside"] == run["partial"] == run["rollbacks"] == []
  # The evaluation that the last checkpoint was written as owing is in the log.
  assert run["resume"] == {"step": 12, "total_steps": 12, "from_checkpoint": True, "owed": [],
                           "skipped": [], "set_aside": []}
  said = text(capsys, workdir)
  assert said.startswith(f"run {workdir}: 3 checkpoints (checksums compared)\n")
  assert said.count("  whole") == 3 and "DAMAGED" not in said
  assert "float32 master, mu, nu; bfloat16 params; written on one device (1 x cpu, " in said
  assert "train would do nothing: complete at step 12 of 12" in said
  assert "\n\n" in said and "train state" in said, "and its arrays, on this machine"


def test_a_damaged_one_and_what_quick_does_not_see(workdir, capsys):
  flip(workdir / "checkpoints/12")
  run = facts(capsys, workdir)
  assert [row["problem"] == "" for row in run["checkpoints"]] == [True, True, False]
  assert "has changed (its checksum is not the seal's)" in run["checkpoints"][2]["problem"]
  [aside] = run["resume"]["set_aside"]
  assert (aside["step"], aside["kind"]) == (12, start.DAMAGED)
  assert run["resume"]["step"] == 8 and run["resume"]["from_checkpoint"]
  said = text(capsys, workdir)
  assert said.count("  whole") == 2 and "on disk  DAMAGED: state/" in said
  assert "train would go on from step 8 of 12, setting checkpoint 12 aside (damaged)" in said
  quick = facts(capsys, workdir, "--quick")
  assert quick["checked"] == "sizes"
  assert [row["problem"] for row in quick["checkpoints"]] == ["", "", ""]
  assert "3 checkpoints (sizes compared, checksums not)" in text(capsys, workdir, "--quick")
  path = max((workdir / "checkpoints/8/state").rglob("*"), key=lambda p: p.stat().st_size)
  path.write_bytes(path.read_bytes()[:-1])
  assert "bytes instead of" in facts(capsys, workdir, "--quick")["checkpoints"][1]["problem"]


def test_what_train_says_it_would_do_it_does(tiny_run, workdir, capsys):
  flip(workdir / "checkpoints/12")
  flip(workdir / "checkpoints/8")
  said = facts(capsys, workdir)["resume"]
  loop.train(tiny_run[0], workdir)
  printed = capsys.readouterr().out
  assert f"resuming at step {said['step']}" in printed and said["step"] == 4
  for one in said["set_aside"]:
    assert f"checkpoint {one['step']} is {one['kind']}: {one['why']}" in printed
  run = facts(capsys, workdir)
  assert run["aside"] == ["12-damaged", "8-damaged"]
  assert [row["step"] for row in run["checkpoints"]] == [4, 8, 12]
  assert "  set aside: 12-damaged\n  set aside: 8-damaged\n" in text(capsys, workdir)


def test_every_one_is_damaged(workdir, capsys):
  for step in (4, 8, 12):
    shutil.rmtree(workdir / f"checkpoints/{step}/seals")
  assert "has no checkpoint that is whole (12: seals/0.json is missing; 8: " in facts(
      capsys, workdir)["resume"]["refuses"]
  said = text(capsys, workdir)
  assert said.count("DAMAGED: seals/0.json is missing") == 3
  assert "train would refuse: " in said and "--force" in said


def test_what_is_unfinished(workdir, capsys):
  (workdir / "checkpoints/12").rename(workdir / "checkpoints/12.partial")
  run = facts(capsys, workdir)
  assert run["partial"] == ["12.partial"]
  assert [row["step"] for row in run["checkpoints"]] == [4, 8]
  said = text(capsys, workdir)
  assert "unfinished: 12.partial (the next start clears it away)" in said
  assert "train would go on from step 8 of 12\n" in said


def test_a_stopped_run_owes_its_evaluation(tiny, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(loop, "Interrupt", lambda: StopAfter(5))
  loop.train(tiny, tmp_path / "run")
  run = facts(capsys, tmp_path / "run")
  last = run["checkpoints"][-1]
  assert (last["step"], last["owed"], run["resume"]["owed"]) == (
      6, ["evaluation"], ["evaluation"])
  said = text(capsys, tmp_path / "run")
  assert "whole, owes evaluation\n" in said
  assert "train would go on from step 6 of 12, doing the evaluation of that step first" in said


def test_a_folder_without_checkpoints(tiny, tmp_path, capsys):
  RunFolder(tmp_path / "run").write_config(tiny)
  run = facts(capsys, tmp_path / "run")
  assert run["checkpoints"] == [] and not run["resume"]["from_checkpoint"]
  said = text(capsys, tmp_path / "run")
  assert "0 checkpoints" in said and "train would start from nothing, 12 steps\n" in said


def test_rolled_back(workdir, capsys):
  """As a crash leaves it right after a rollback was decided: batches 9 to 11 are left out."""
  RunFolder(workdir).add_rollback({"step": 11, "skipped": [32, 12]})
  run = facts(capsys, workdir)
  assert run["rollbacks"] == [{"step": 11, "skipped": [32, 12]}]
  assert run["resume"]["skipped"] == [[32, 12]] and run["resume"]["step"] == 8
  assert [(one["step"], one["kind"]) for one in run["resume"]["set_aside"]] == [
      (12, start.ROLLED_BACK)]
  said = text(capsys, workdir)
  assert "rolled back at step 11: sequences 32 to 43 are left out" in said
  assert "train would go on from step 8 of 12, setting checkpoint 12 aside (rolled-back)" in said
  (workdir / "rollbacks.json").write_text("{")
  run = facts(capsys, workdir)
  assert len(run["checkpoints"]) == 3 and run["rollbacks"] == []
  assert "rollbacks.json is damaged" in run["resume"]["refuses"]


def test_longer_and_other_than_it_was(workdir, capsys):
  """--config.FIELD asks what `train` would do with it."""
  said = text(capsys, workdir, "--config.run_length=20 steps")
  assert "train would go on from step 12 of 20\n" in said
  said = text(capsys, workdir, "--config.seed=1")
  assert "train would refuse: " in said and "config.seed=0, not 1" in said
  assert said.count("  whole") == 3


@pytest.mark.parametrize("words", [["--quick"], []])
def test_of_another_version(workdir, capsys, words):
  """It is whole, so not damaged: it must not be set aside."""
  change(workdir / "checkpoints/12/progress.json", lambda progress: progress.pop("surroundings"))
  seals.write(workdir / "checkpoints/12", 0, 1)
  run = facts(capsys, workdir, *words)
  assert run["checkpoints"][2]["problem"] == ""
  assert "another version" in run["checkpoints"][2]["refused"]
  assert "another version" in run["resume"]["refuses"]
  assert "on disk  NOT OF USE: checkpoint " in text(capsys, workdir, *words)


def test_the_store_is_elsewhere(workdir, capsys):
  change(workdir / "config.json", lambda file: file["config"]["data"].update(store="nowhere"))
  said = text(capsys, workdir)
  assert said.count("  whole") == 3 and "train would refuse: no token store at nowhere" in said


def test_a_mesh_that_does_not_fit_this_machine(workdir, capsys):
  """A run of a pod, looked at on a laptop."""
  change(workdir / "config.json", lambda file: file["config"]["mesh"].update(data=64))
  status, out, error = inspect(capsys, "--workdir", workdir)
  assert (status, error) == (0, "")
  assert out.count("  whole") == 3 and "train would do nothing: complete at step 12" in out
  assert "its arrays, laid out on this machine: config.mesh" in out
  found = json.loads(inspect(capsys, "--workdir", workdir, "--json")[1])
  assert "does not make" in found["does_not_train"] and len(found["run"]["checkpoints"]) == 3
  status, out, error = inspect(capsys, "--workdir", workdir, "--devices=64",
                               "--config.batch.sequences=64")
  assert status == 0 and "64" in out.split("\n\n", 1)[1]
  # Who asks about devices is told about them.
  status, out, error = inspect(capsys, "--workdir", workdir, "--devices=3")
  assert status == 2 and out.count("  whole") == 3 and "does not make 3 devices" in error
