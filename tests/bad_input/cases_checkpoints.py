"""Places where no run can go, and checkpoints that are damaged, of something else, or not there."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

from cases import Room, case
from cases_stores import AGAIN
from cases_text import two_documents
from tiny import ROOT

from chinchilla_jax import cli
from chinchilla_jax.training import seals

# -------------------------------------------------------------------- Where a run goes


def run_case(name: str, flags: str, cause: str, cure: str,
             make: Callable[[Room], object] = lambda room: None) -> None:
  """Everything is fine but the run's folder."""
  case(f"run: {name}", f"train --config=tiny.json {flags}", cause, cure,
       lambda room: (room.config(), room.store(), make(room)))


run_case("of an unknown scheme", "--workdir=nosuch://bucket/run",
         r"--workdir: nosuch:// is not understood here", r"use gs://, s3://")
run_case("without a bucket", "--workdir=s3:///run", r"--workdir: 's3:///run' names no bucket",
         r"write s3://BUCKET/FOLDER")
run_case("at a file", "--workdir=run", r"--workdir: .*run .*(File exists|is a file)",
         r"choose another place", lambda room: room.write("run", "mine"))
run_case("below a file", "--workdir=file/run", r"--workdir: .*file/run.*Not a directory",
         r"choose another place", lambda room: room.write("file", "mine"))
run_case("in /proc", "--workdir=/proc/x/run", r"--workdir: /proc/x/run.*No such file",
         r"choose another place")
run_case("below a device", "--workdir=/dev/null/run", r"--workdir: /dev/null/run.*Not a directory",
         r"choose another place")
run_case("of an endless name", f"--workdir={'r' * 300}", r"--workdir: r+ .*File name too long",
         r"choose another place")
run_case("that starts from what is no run", "--workdir=run --config.checkpoint.init_from=nowhere",
         r"config\.checkpoint\.init_from: 'nowhere' has no checkpoint", r"give the folder of a run")
case("run: without a checkpoint", "evaluate --workdir=run", r"'run' has no checkpoint yet",
     r"train it first", lambda room: (room.config(), room.write(
         "run/config.json", (room.path / "tiny.json").read_text())))
case("run: config cut short", "generate --workdir=run", r"run/config\.json is not JSON",
     r"mend it, or copy it again", lambda room: room.write("run/config.json", '{"config": {'))

# -------------------------------------------------------------------- Checkpoints

STEPS = (4, 8, 12)
RESUME = "train --config=tiny.json --workdir=run"
FLIPPED = r"state/\S+ has changed \(its checksum is not the seal's\)"
OTHER_VERSION = r"of another version of chinchilla_jax|by another version of chinchilla_jax"
NEW_RUN = r"start a new run with another --workdir"


def checkpoint_case(name: str, argv: str, cause: str, cure: str, make: Callable[[Room], object],
                    **rest) -> None:
  """A whole run in ./run and its store in ./store; then `make` does something to them."""
  case(f"checkpoint: {name}", argv, cause, cure,
       lambda room: (room.config(), room.store(), _run(room), make(room)), **rest)


def _run(room: Room, name: str = "run", **changes) -> None:
  """The run, as if it had been trained on ./store."""
  path = room.run(name) / "config.json"
  content = json.loads(path.read_text())
  content["config"]["data"]["store"] = "store"
  path.write_text(json.dumps(content))


def _damaged(*at: int, run: str = "run") -> Callable[[Room], None]:
  """Flips a bit in the largest file of checkpoints: no size tells."""
  def make(room: Room) -> None:
    for step in at:
      folder = room.path / run / f"checkpoints/{step}/state"
      path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
      content = bytearray(path.read_bytes())
      content[len(content) // 2] ^= 1
      path.write_bytes(content)
  return make


def _sealed(name: str, change: Callable[[str], str], at: int = 12,
            run: str = "run") -> Callable[[Room], None]:
  """Changes a text in a checkpoint, and seals it again: it is whole, and says something else."""
  def make(room: Room) -> None:
    folder = room.path / run / f"checkpoints/{at}"
    path = folder / name
    path.write_text(change(path.read_text()))
    seals.write(folder, 0, 1)
  return make


def _progress(change: Callable[[dict], object], at: int = 12) -> Callable[[Room], None]:
  """A whole checkpoint whose progress.json says something else."""
  def edited(text: str) -> str:
    progress = json.loads(text)
    change(progress)
    return json.dumps(progress)
  return _sealed("progress.json", edited, at)


def _state(change: Callable[[dict], object]) -> Callable[[Room], None]:
  """A whole checkpoint at step 12 with another state than its config tells of."""
  def make(room: Room) -> None:
    import orbax.checkpoint as ocp
    folder = room.path / "run/checkpoints/12"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
      tree = orbax.restore((folder / "state").absolute())
      change(tree)
      orbax.save((folder / "state").absolute(), args=ocp.args.PyTreeSave(tree), force=True)
    seals.write(folder, 0, 1)
  return make


def _escaping(name: str) -> Callable[[Room], None]:
  """Every seal names a file outside of its checkpoint."""
  def make(room: Room) -> None:
    for path in room.path.glob("run/checkpoints/*/seals/0.json"):
      seal = json.loads(path.read_text())
      seal["files"][name] = seal["files"].pop("progress.json")
      path.write_text(json.dumps(seal))
  return make


def _config_of_run(change: Callable[[dict], object]) -> Callable[[Room], None]:
  def make(room: Room) -> None:
    path = room.path / "run/config.json"
    content = json.loads(path.read_text())
    change(content["config"])
    path.write_text(json.dumps(content))
  return make


def _other_store(room: Room, name: str = "other") -> None:
  """A good store of other text, with a tokenizer of its own."""
  two_documents(room)
  assert cli.main(["prepare", "text", f"--store={name}", "--config.tokenizer.vocab_size=300"]) == 0


def _replaced_store(room: Room) -> None:
  shutil.rmtree(room.path / "store")
  _other_store(room, "store")


def _locked(room: Room) -> None:
  """Another process, which lives, holds ./run."""
  program = ("import pathlib, sys; from chinchilla_jax.training import run_lock; "
             "lock = run_lock.KernelLock(pathlib.Path(sys.argv[1])); print('held', flush=True); "
             "sys.stdin.read()")
  process = room.ending.enter_context(subprocess.Popen(
      [sys.executable, "-c", program, str(room.path / "run")], stdin=subprocess.PIPE,
      stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}))
  room.ending.callback(process.stdin.close)
  assert process.stdout.readline() == "held\n"


def _file_for(name: str) -> Callable[[Room], None]:
  """A file where a folder of the run should be."""
  return lambda room: (shutil.rmtree(room.path / name), room.write(name, "mine"))


for what, make, cause in (
    ("damaged", _damaged(*STEPS), rf"12: {FLIPPED}"),
    ("without seals", lambda room: [shutil.rmtree(room.path / f"run/checkpoints/{step}/seals")
                                    for step in STEPS], r"12: seals/0\.json is missing"),
    ("a file", lambda room: [_file_for(f"run/checkpoints/{step}")(room) for step in STEPS],
     r"12: it is not a folder"),
    ("sealed with a file above it", _escaping("../../config.json"),
     r"12: its seal names a file outside of it, '\.\./\.\./config\.json'"),
    ("sealed with an absolute path", _escaping("/etc/passwd"),
     r"12: its seal names a file outside of it, '/etc/passwd'"),
    ("sealed with an endless name", _escaping("x" * 300),
     r"12: x+\.\.\. \(300 characters\) is missing"),
    ("sealed by nobody", lambda room: [
        path.write_text(path.read_text().replace('"processes": 1', '"processes": 0'))
        for path in room.path.glob("run/checkpoints/*/seals/0.json")],
     r"12: there are more seals in seals/ than the 0"),
    ("sealed without end", lambda room: [
        room.write(f"run/checkpoints/{step}/seals/0.json", "[" * 100_000) for step in STEPS],
     r"12: a file in seals/ is damaged"),
):
  checkpoint_case(f"every one is {what}", RESUME,
                  rf"run/checkpoints has no checkpoint that is whole \({cause}",
                  r"bring back a copy, or start from nothing with --force", make)
  if what in ("damaged", "a file"):
    for command in ("evaluate", "generate"):
      checkpoint_case(f"every one is {what}, {command}", f"{command} --workdir=run",
                      rf"--workdir: 'run' has no checkpoint that is whole \({cause}",
                      r"bring back a copy", make)
for command in ("evaluate", "generate"):
  checkpoint_case(f"{command} a damaged step", f"{command} --workdir=run --step=8",
                  rf"--step: the checkpoint of step 8 is damaged: {FLIPPED}",
                  r"choose another of 4, 12", _damaged(8))
  checkpoint_case(f"{command} a step that is not there", f"{command} --workdir=run --step=7",
                  r"--step: no checkpoint at step 7", r"there are 4, 8, 12", lambda room: None)
  checkpoint_case(f"{command} step -1", f"{command} --workdir=run --step=-1",
                  r"--step: no checkpoint at step -1", r"there are 4, 8, 12", lambda room: None)
  checkpoint_case(f"{command} a step that is no number", f"{command} --workdir=run --step=last",
                  r"--step: invalid int value: 'last'", rf"see chinchilla {command} --help",
                  lambda room: None)
checkpoint_case("evaluate a step that is a file", "evaluate --workdir=run --step=12",
                r"--step: the checkpoint of step 12 is damaged: it is not a folder",
                r"choose another of 4, 8", _file_for("run/checkpoints/12"))
for argv in (RESUME, "evaluate --workdir=run", "inspect --workdir=run"):
  checkpoint_case(f"checkpoints is a file, {argv.split()[0]}", argv,
                  r"run/checkpoints cannot be read \(Not a directory\)", r"move it away",
                  _file_for("run/checkpoints"))

# What is sealed was written so: by another version of the program, or by somebody.
for what, text in (("not JSON", "{"), ("empty", ""), ("a list", "[]"), ("a number", "3"),
                   ("nested without end", "[" * 100_000)):
  checkpoint_case(f"progress is {what}, but sealed", "evaluate --workdir=run --step=12",
                  r"the checkpoint of step 12 is damaged: progress\.json is damaged",
                  r"choose another of", _sealed("progress.json", lambda _, text=text: text))
for what, change, cause in (
    ("lacks its config", lambda progress: progress.pop("config"), r"there is no config in"),
    ("lacks its step", lambda progress: progress.pop("step"), r"there is no step in"),
    ("lacks the store", lambda progress: progress["fingerprints"].pop("store"),
     r"there is no fingerprints\.store in"),
    ("lacks surroundings", lambda progress: progress.pop("surroundings"),
     r"there is no surroundings\.mesh in"),
    ("has tokens that are text", lambda progress: progress.update(tokens="9"),
     r"tokens is no int in"),
    ("owes what nobody knows", lambda progress: progress.update(owed=["cleaning"]),
     r"it owes 'cleaning' in"),
    ("leaves out half a range", lambda progress: progress.update(skipped=[[3]]),
     r"skipped holds no ranges in"),
):
  for argv in (RESUME, "evaluate --workdir=run")[:1 if "surround" in what else 2]:
    checkpoint_case(f"progress {what}, {argv.split()[0]}", argv,
                    rf"checkpoint run/checkpoints/12 was written {OTHER_VERSION} \({cause}",
                    r"use that version", _progress(change))
checkpoint_case("progress is of another step", "generate --workdir=run --step=12",
                r"the checkpoint of step 12 is damaged: it is of step 13", r"choose another of",
                _progress(lambda progress: progress.update(step=13)))
for what, change, cause in (
    ("an unknown field", lambda config: config["model"].update(n_experts=8),
     r"config\.model\.n_experts: no such field"),
    ("a field that became a group", lambda config: config.update(seed={"data": 3}),
     r"config\.seed: got \{'data': 3\}"),
    ("a choice that is gone", lambda config: config["model"].update(position="alibi"),
     r"config\.model\.position: got 'alibi'"),
):
  checkpoint_case(f"config of a checkpoint has {what}", RESUME,
                  rf"run holds a run {OTHER_VERSION} \({cause}", rf"use that version, or {NEW_RUN}",
                  _progress(lambda progress, change=change: change(progress["config"])))
  checkpoint_case(f"config of a run has {what}", "evaluate --workdir=run",
                  rf"run/config\.json is {OTHER_VERSION}, or was edited \({cause}",
                  r"use that version, or bring back", _config_of_run(change))


def _as(dtype: str) -> Callable[[dict], None]:
  def change(tree: dict) -> None:
    tree["params"]["embedding"]["table"] = tree["params"]["embedding"]["table"].astype(dtype)
  return change


def _shorter(tree: dict) -> None:
  tree["params"]["embedding"]["table"] = tree["params"]["embedding"]["table"][:, :8]


def _nonsense(room: Room, under: str = "") -> None:
  """Sealed again with other bytes in every file of the arrays, or in those under a folder."""
  folder = room.path / "run/checkpoints/12"
  for path in (folder / "state" / under).rglob("*"):
    if path.is_file() and path.name[0] != "_":
      path.write_bytes(bytes(range(256)) * 8)
  seals.write(folder, 0, 1)


THERE = r"checkpoint run/checkpoints/12"
for what, change, cause in (
    ("of another dtype", _as("float32"),
     r": params/embedding/table is float32\[512, 32\], the config wants bfloat16\[512, 32\]"),
    ("of another shape", _shorter,
     r": params/embedding/table is bfloat16\[512, 8\], the config wants bfloat16\[512, 32\]"),
    ("without an array", lambda tree: tree["params"]["embedding"].pop("table"),
     r" has no params/embedding/table"),
):
  for argv in (RESUME, "evaluate --workdir=run"):
    checkpoint_case(f"state {what}, {argv.split()[0]}", argv, THERE + cause,
                    r"use the config\.json of its run", _state(change))
for argv in (RESUME, "evaluate --workdir=run"):
  checkpoint_case(f"state is nonsense, but sealed, {argv.split()[0]}", argv,
                  rf"{THERE} cannot be read \(", r"look at it with `chinchilla inspect`", _nonsense)
checkpoint_case("arrays are nonsense, but sealed", "evaluate --workdir=run",
                rf"{THERE} cannot be read \(", r"look at it with `chinchilla inspect`",
                lambda room: _nonsense(room, under="ocdbt.process_0/d"))
checkpoint_case("state with an array more", RESUME, THERE + r" has optimizer/third, the config",
                r"use the config\.json of its run",
                _state(lambda tree: tree["optimizer"].update(third=tree["optimizer"]["count"])))
for what, text in (("empty", ""), ("no JSON", "{"), ("a list", "[]"), ("an object", "{}"),
                   ("another object", '{"tree_metadata": {"x": 3}}')):
  checkpoint_case(f"state's description is {what}, but sealed", RESUME,
                  rf"{THERE} cannot be read", r"look at it with `chinchilla inspect`",
                  _sealed("state/_METADATA", lambda _, text=text: text))

# The rest of a run's folder.
for what, text in (("not JSON", "[{"), ("an object", '{"a": 1}'), ("a number", "3"),
                   ("of half a range", '[{"step": 5, "skipped": [3]}]'),
                   ("of negative ranges", '[{"step": 5, "skipped": [-3, 4]}]'),
                   ("of no step", '[{"skipped": [3, 4]}]')):
  checkpoint_case(f"rollbacks.json is {what}", RESUME, r"run/rollbacks\.json is damaged, so it is",
                  rf"bring back a copy, or {NEW_RUN}",
                  functools.partial(lambda room, text: room.write("run/rollbacks.json", text),
                                    text=text))
for what, text, cause in (
    ("not JSON", "{", r"run/config\.json is not JSON"),
    ("empty", "", r"run/config\.json is not JSON"),
    ("a list", "[]", r"run/config\.json does not hold a JSON object"),
    ("nested without end", "[" * 100_000, r"run/config\.json is not JSON"),
):
  for argv in ("evaluate --workdir=run", "inspect --workdir=run"):
    checkpoint_case(f"config.json is {what}, {argv.split()[0]}", argv, cause, r"mend it|give the c",
                    functools.partial(lambda room, text: room.write("run/config.json", text),
                                      text=text))
checkpoint_case("config.json is gone", "generate --workdir=run",
                r"'run' is not a run's folder \(it has no config\.json\)", r"give the folder that",
                lambda room: (room.path / "run/config.json").unlink())
checkpoint_case("config.json of a wider model", "evaluate --workdir=run",
                rf"{THERE}: params/\S+ is bfloat16.*, the config wants bfloat16",
                r"use the config\.json of its run",
                _config_of_run(lambda config: config["model"].update(d_model=64)))

# What belongs to it.
checkpoint_case("store moved away", RESUME, r"no token store at store", r"did you mean \./moved\?",
                lambda room: (room.path / "store").rename(room.path / "moved"))
for command in ("evaluate", "generate"):
  checkpoint_case(f"store moved away, {command}", f"{command} --workdir=run",
                  r"no token store at store", r"say so in data\.store of run/config\.json",
                  lambda room: (room.path / "store").rename(room.path / "moved"))
  checkpoint_case(f"store replaced, {command}", f"{command} --workdir=run",
                  r"config\.data\.store: store is not the store that run was trained on",
                  r"prepare that one again, or say in data\.store of run/config\.json",
                  _replaced_store)
checkpoint_case("store replaced", RESUME,
                r"run holds a run with another tokenizer \(fingerprint [0-9a-f]{12}, now",
                rf"set config\.data\.store to the old store, or {NEW_RUN}", _replaced_store)
checkpoint_case("tokenizer of another store in this one", RESUME,
                r"tokenizer\.model has [\d,]+ bytes, its ledger says", AGAIN,
                lambda room: (_other_store(room), shutil.copy(
                    room.path / "other/tokenizer.model", room.path / "store/tokenizer.model")))
checkpoint_case("evaluate on a store of another tokenizer", "evaluate --workdir=run --store=other",
                r"--store: other was made with another tokenizer than the run's store",
                r"prepare it with --config\.tokenizer\.path=store", _other_store)
checkpoint_case("evaluate on a store of an unknown scheme",
                "evaluate --workdir=run --store=nosuch://bucket/s",
                r"nosuch:// is not understood here", r"use gs://, s3://", lambda room: None)
checkpoint_case("evaluate on no store", "evaluate --workdir=run --store=nowhere",
                r"no token store at nowhere", r"make it with `chinchilla prepare|did you mean",
                lambda room: None)
for field, old, new in (("seed", 0, 1), ("model.n_layers", 2, 3), ("data.seq_len", 32, 16),
                        ("precision.parameters", "bfloat16", "float32")):
  for force in ("", " --force"):
    checkpoint_case(f"another {field}{force}", f"{RESUME} --config.{field}={new}{force}",
                    rf"run holds a run with config\.{re.escape(field)}={old!r}, not {new!r}",
                    rf"keep the old value, or {NEW_RUN}", lambda room: None)
for flag in ("", " --force"):
  checkpoint_case(f"a process is at it{flag}", f"{RESUME} '--config.run_length=20 steps'{flag}",
                  r"--workdir: run is in use by process \d+ on \S+ \(since 20",
                  r"wait for it, stop it, or choose another --workdir.*--force does not help",
                  _locked)
NEW = "train --config=tiny.json --workdir=new --config.checkpoint.init_from=run"
checkpoint_case("start from a damaged run", NEW,
                rf"config\.checkpoint\.init_from: 'run' has no checkpoint .*whole \(12: {FLIPPED}",
                r"give the folder of a run", _damaged(*STEPS))
checkpoint_case("start from a run of another width",
                f"{NEW} --config.model.d_model=64 --config.model.kv_size=32",
                rf"config\.checkpoint\.init_from: {THERE}: optimizer/master/\S+ is float32\[2, 32",
                r"use the config\.json of its run, or give a run of the same model",
                lambda room: None)
checkpoint_case("start from a file", NEW, r"config\.checkpoint\.init_from: 'run' has no checkpoint",
                r"give the folder of a run", _file_for("run"))
checkpoint_case("start from a run whose checkpoints are a file", NEW,
                r"config\.checkpoint\.init_from: run/checkpoints cannot be read", r"move it away",
                _file_for("run/checkpoints"))
checkpoint_case("start from a run of an unknown scheme",
                NEW.replace("=run", "=nosuch://bucket/run"),
                r"config\.checkpoint\.init_from: .*nosuch:// is not understood here",
                r"use gs://, s3://", lambda room: None)
