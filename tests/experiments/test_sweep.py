"""The algebra of sweeps, and what members are before anything runs."""

import dataclasses
import json
import shutil

import pytest
from tiny import tiny_experiment

from chinchilla_jax import cli, config_io
from chinchilla_jax.errors import UserError
from chinchilla_jax.experiments import local, run_state, sweep
from chinchilla_jax.training import run_lock
from chinchilla_jax.training.run_folder import RunFolder

A, B = sweep.over("a", [1, 2]), sweep.over("b", [3, 4])


def test_algebra():
  assert sweep.product(A, B) == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3},
                                 {"a": 2, "b": 4}]
  assert sweep.chain(A, B) == [{"a": 1}, {"a": 2}, {"b": 3}, {"b": 4}]
  assert sweep.zipped(A, B) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
  assert sweep.product(sweep.fixed("c", 0), A) == [{"c": 0, "a": 1}, {"c": 0, "a": 2}]
  assert sweep.product() == [{}] and sweep.chain() == [] and sweep.product(A, []) == []
  three = sweep.product(A, B, sweep.over("c", range(3)))
  assert three == sweep.product(sweep.product(A, B), sweep.over("c", range(3)))
  assert len(three) == 12 and len({tuple(one.items()) for one in three}) == 12


@pytest.mark.parametrize("wrong, says", [
    (lambda: sweep.product(A, A), "product: a is set by two"),
    (lambda: sweep.zipped(A, sweep.fixed("a", 1) * 2), "zipped: a is set by two"),
    (lambda: sweep.zipped(A, sweep.over("b", [1, 2, 3])), "have 2, 3 members"),
])
def test_what_cannot_be_put_together(wrong, says):
  with pytest.raises(UserError, match=says):
    wrong()


def test_members(bench):
  config = bench.config(
      "import numpy as np\n"
      "def sweep():\n"
      "  return product(over('optimizer.peak_lr', np.array([1e-3, 3e-3])), over('seed', range(2)))")
  before = bench.files()
  found = sweep.members(config, [("run_length", "6 steps")], "w")
  assert bench.files() == before
  assert [member.index for member in found] == [0, 1, 2, 3]
  assert [member.overrides for member in found] == [
      {"optimizer.peak_lr": lr, "seed": seed} for lr in (1e-3, 3e-3) for seed in (0, 1)]
  first = found[0]
  assert first.id.startswith("peak_lr=0.001_seed=0_") and len(first.id.split("_")[-1]) == 8
  assert first.folder == sweep.pathlib.Path("w/runs") / first.id
  assert (first.total_steps, first.total_tokens) == (6, 6 * 4 * 32)
  wanted = config_io.flat(tiny_experiment(bench.store)) | {
      "name": f"tiny-{first.id}", "run_length": "6 steps", "optimizer.peak_lr": 1e-3}
  assert config_io.flat(first.experiment) == wanted
  sweep.write("w", found, config)
  assert sweep.read("w") == found
  # What `train` is given is this config, whatever becomes of the file.
  assert config_io.load(first.argv[4].removeprefix("--config=")) == first.experiment


def test_an_id_is_of_what_the_run_computes(bench):
  config = bench.config("def sweep(): return over('seed', range(2))")
  ids = lambda *flags: [member.id for member in sweep.members(config, list(flags))]
  plain = ids()
  assert ids() == plain
  assert ids(("logging.every", "5 steps"), ("guard.spikes", "skip"), ("loss.chunk", "32"),
             ("name", "other")) == plain
  for flag in (("run_length", "13 steps"), ("optimizer.peak_lr", "2e-2"), ("model.d_ff", "96")):
    assert not set(ids(flag)) & set(plain), flag
  # Another member in front renames none.
  assert ids() == [member.id for member in sweep.members(
      bench.config("def sweep(): return chain(fixed('seed', 7), over('seed', range(2)))"))][1:]


def test_arguments_and_flags(bench):
  config = bench.config("def sweep(argument='1'): return over('seed', range(int(argument)))")
  assert len(sweep.members(config)) == 1 and len(sweep.members(f"{config}:3")) == 3
  config = bench.config("def sweep(): return over('seed', range(2))")
  assert len(sweep.members(f"{config}:3")) == 2
  # A flag is for all members, and wins.
  config = bench.config(
      "def sweep(): return product(over('seed', [1, 2]), fixed('run_length', '9 steps'))")
  found = sweep.members(config, [("run_length", "3 steps")])
  assert [(m.overrides, m.total_steps) for m in found] == [({"seed": 1}, 3), ({"seed": 2}, 3)]
  with pytest.raises(UserError, match=r"member 1 .* same run as member 0 .*leave out the flags"):
    sweep.members(config, [("seed", "5")])


def test_layout_may_be_swept_but_not_observation(bench):
  found = sweep.members(bench.config("def sweep(): return over('loss.chunk', [16, 32])"))
  assert len({member.id for member in found}) == 2
  assert len({member.fingerprint for member in found}) == 1
  with pytest.raises(UserError, match="member 1 .* is the same run as member 0"):
    sweep.members(bench.config("def sweep(): return over('checkpoint.keep', [1, 2])"))


BAD = {
    "no sweep": ("", "has no sweep function"),
    "raises": ("def sweep():\n  return 1 / 0", r"family\.py, line 5: ZeroDivisionError"),
    "user error": ("def sweep():\n  return zipped([{}], [])", r"line 5: zipped: .*equally long"),
    "ends the program": ("import sys\ndef sweep(): sys.exit(0)", "SystemExit"),
    "no list": ("def sweep(): return 3", "returns int"),
    "text": ("def sweep(): return 'seed'", "returns str"),
    "nothing": ("def sweep(): return []", "returns no members"),
    "no dicts": ("def sweep(): return [('seed', 1)]", "member 0 is"),
    "misspelt": ("def sweep(): return [{}, {'model.d_modle': 3}]",
                 r"member 1 \(model.d_modle=3\): .*did you mean model.d_model"),
    "group": ("def sweep(): return over('model', [3])", r"member 0 \(model=3\): .*group"),
    "field in a field": ("def sweep(): return over('seed.x', [3])", "seed is a field"),
    "type": ("def sweep(): return over('seed', ['x'])", r"member 0 \(seed=x\): config.seed"),
    "range": ("def sweep(): return over('optimizer.b1', [0.5, 2.0])",
              r"member 1 \(optimizer.b1=2.0\): config.optimizer.b1"),
    "vocabulary": ("def sweep(): return over('model.vocab_size', [512, 300])",
                   r"member 1 .*vocab_size"),
    "the same": ("def sweep(): return over('seed', [1, 2, 1])",
                 r"member 2 \(seed=1\) is the same run as member 0"),
    "no store": ("def sweep(): return fixed('data.store', 'nowhere')",
                 r"no token store at nowhere.*chinchilla prepare --config=family.py "
                 r"--config.data.store=nowhere$"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_sweep_is_one_line_and_nothing_is_written(bench, what, capsys):
  body, says = BAD[what]
  bench.config(body)
  before = bench.files()
  assert cli.main(["sweep", "--config=family.py"]) == 2
  line = capsys.readouterr().err
  assert line.count("\n") == 1
  with pytest.raises(AssertionError, match=says):
    raise AssertionError(line.strip())
  assert bench.files() == before


@pytest.mark.parametrize("flags, says", [
    ([], "no config file given"),
    (["--workdir=nowhere"], "'nowhere' is not a sweep's folder"),
    (["--config=nowhere.py"], "no file 'nowhere.py'"),
    (["--config=family.py", "--workdir=gs://a/b"], "is remote"),
    (["--config=family.py", "--workdir=family.py"], "is a file"),
    (["--config=family.py", "--only=9"], "from 0 to 1"),
    (["--config=family.py", "--only=x"], "--list shows them"),
    (["--config=family.py", "--parallel=0"], "at least 1"),
    (["--config=family.py", "--parallel=4096"], "do not fit on the"),
    (["--config=family.py", "--cores=4096"], "do not fit on the"),
    (["--config=family.py", "--retries=-1"], "at least 0"),
    (["--config=family.py", "--sbatch=--x"], "--on slurm"),
])
def test_bad_flags(bench, flags, says, capsys):
  bench.config("def sweep(): return over('seed', [1, 2])")
  before = bench.files()
  assert cli.main(["sweep", *flags]) == 2
  line = capsys.readouterr().err
  assert line.count("\n") == 1 and says in line
  assert bench.files() == before


def test_list_writes_nothing(bench, capsys):
  config = bench.config("def sweep(): return over('seed', [1, 2])")
  before = bench.files()
  assert cli.main(["sweep", f"--config={config}", "--list"]) == 0
  assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()[1:]] == [
      [str(m.index), m.id, "pending"] for m in sweep.members(config)]
  assert cli.main(["sweep", f"--config={config}", "--list", "--json"]) == 0
  assert [m["overrides"] for m in json.loads(capsys.readouterr().out)["members"]] == [
      {"seed": 1}, {"seed": 2}]
  assert bench.files() == before


def test_a_damaged_sweep_is_refused(bench):
  config = bench.config("def sweep(): return over('seed', [1, 2])")
  found = sweep.members(config, workdir="w")
  sweep.write("w", found, config)
  for path in (found[1].folder / "member.json", sweep.pathlib.Path("w/sweep.json")):
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match=f"{path.name} is damaged"):
      sweep.read("w")


def test_states(tiny_run, tmp_path, bench):
  """From the folder alone, each by what makes it so."""
  experiment, whole = tiny_run
  member = sweep.Member(0, "x", {}, experiment, tmp_path / "x", 12, 0, 1, "", "")
  assert sweep.state_of(member).state == "pending"
  folder = RunFolder(member.folder)
  folder.create()
  assert sweep.state_of(member).state == "pending"
  folder.note("start", step=0)
  assert sweep.state_of(member).state == "interrupted"
  run_state.note_failure(folder, "two\nlines")
  run_state.note_failure(folder, "said already")
  assert sweep.state_of(member).state == "failed" and sweep.state_of(member).reason == "two lines"
  with run_lock.held(member.folder):
    assert sweep.state_of(member).state == "running"
  folder.note("resume", step=0)
  assert sweep.state_of(member).state == "interrupted" and sweep.state_of(member).reason == ""

  done = dataclasses.replace(member, folder=whole)
  assert sweep.state_of(done).state == "complete"
  assert sweep.state_of(dataclasses.replace(done, total_steps=13)).state == "interrupted"
  copy = tmp_path / "copy"
  sweep_copy = dataclasses.replace(member, folder=copy)
  shutil.copytree(whole, copy)
  assert sweep.state_of(sweep_copy).state == "complete"
  # An evaluation of the last step that is still owed.
  lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
  (copy / "metrics.jsonl").write_text("".join(
      line for line in lines if not ('"eval"' in line and '"step": 12' in line)))
  assert sweep.state_of(sweep_copy).state == "interrupted"
  (copy / "metrics.jsonl").write_text("".join(lines))
  # A checkpoint of the last step that lacks a piece.
  next((copy / "checkpoints/12/state").rglob("_METADATA")).unlink()
  assert sweep.state_of(sweep_copy).state == "interrupted"
  # All of them were taken away to make room: the journal is believed, of this length.
  shutil.rmtree(copy / "checkpoints")
  assert sweep.state_of(sweep_copy).state == "complete"
  assert sweep.state_of(dataclasses.replace(sweep_copy, total_steps=13)).state == "interrupted"


def test_slots_share_nothing(monkeypatch):
  monkeypatch.setattr(local.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 8, 9, 10, 11})
  cpu = {"JAX_PLATFORMS": "cpu"}
  assert local.slots(1, environ=cpu) == [local.Slot()]
  assert [slot.cores for slot in local.slots(3, environ=cpu)] == [{0, 1}, {2, 3}, {8, 9}]
  assert [slot.cores for slot in local.slots(2, 1, environ=cpu)] == [{0}, {1}]
  assert str(local.slots(2, environ=cpu)[1]) == "cores 8-11"
  with pytest.raises(UserError, match="9 members at a time on 1 core each"):
    local.slots(9, environ=cpu)
  with pytest.raises(UserError, match="3 members at a time on 3 cores each"):
    local.slots(3, 3, environ=cpu)

  monkeypatch.setattr(local.glob, "glob", lambda pattern: [])
  gpus = [slot.environ["CUDA_VISIBLE_DEVICES"]
          for slot in local.slots(2, environ={"CUDA_VISIBLE_DEVICES": "4,5,6,7"})]
  assert gpus == ["4,5", "6,7"]
  with pytest.raises(UserError, match="2 members at a time on 1 GPU"):
    local.slots(2, environ={"CUDA_VISIBLE_DEVICES": "0"})
  monkeypatch.setattr(local.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern
                      else [])
  with pytest.raises(UserError, match="a TPU belongs to one process"):
    local.slots(2, environ={})
