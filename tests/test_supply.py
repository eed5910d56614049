"""What comes from elsewhere is data: no store, tokenizer or checkpoint can make a program run.

Two proofs. An audit hook (PEP 578) watches a process that opens a store or a checkpoint and reads
all of it: what is unpickled, executed, imported or started is seen whoever does it, C code
included. And no module of the package calls what could.

Config files are programs by design (`--config=FILE.py`), like any script: run only your own. The
config.json of a run is data. The files of a run that was handed over thus run nothing either.
"""

import ast
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tiny import ROOT

from chinchilla_jax.data import ledger as ledgers
from chinchilla_jax.training import seals

# Runs as a script file, as the `chinchilla` command does: then Python has the script's folder on
# its path, and not the current one (python -m and python -c put that first, before anything of
# ours runs).
WATCHED = r'''
import atexit
import os
import sys

OURS = [os.path.realpath(sys.argv[1]), os.path.realpath(os.curdir)]
STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork"}
seen = []


def lies_there(name):
  if isinstance(name, bytes):
    name = os.fsdecode(name)
  # "<string>" is what a library makes up for itself, such as dataclasses.
  return isinstance(name, str) and not name.startswith("<") and any(
      os.path.realpath(name).startswith(folder + os.sep) for folder in OURS)


def hook(event, args):
  if event == "pickle.find_class" or event in STARTS:
    seen.append((event, str(args[:2])))
  elif event == "exec" and lies_there(args[0].co_filename):
    seen.append((event, args[0].co_filename))
  elif event == "compile" and lies_there(args[1]):
    seen.append((event, args[1]))
  elif event == "import" and lies_there(args[1]):
    seen.append((event, args[1]))
  elif event == "ctypes.dlopen" and lies_there(args[0]):
    seen.append((event, args[0]))
  elif event == "open" and lies_there(args[0]) and str(args[0]).endswith((".py", ".pyc", ".so")):
    seen.append((event, str(args[0])))


atexit.register(lambda: print("SEEN", seen))  # also after an error
sys.addaudithook(hook)
what, path = sys.argv[2], sys.argv[1]
if what == "library":
  import numpy as np

  from chinchilla_jax.data import batches, tokens
  store = tokens.open_store(path, "full")
  for name in store.ledger["splits"]:
    split = store.split(name)
    ids = split.read(0, split.n_tokens)
    assert len(ids) == split.n_tokens
    assert store.tokenizer.decode_bytes(ids)
  batches.Batches(store.split("train"), seq_len=32, seed=0).batch(0, 64)
  text = "import json  # \u6771\u4eac\n"
  assert store.tokenizer.decode(store.tokenizer.encode(text)) == text
elif what == "command":
  from chinchilla_jax import cli
  print("status", cli.main(["inspect", f"--store={path}"]))
elif what == "checkpoint":
  import pathlib

  from chinchilla_jax.parallel import layout, mesh
  from chinchilla_jax.training import checkpoint, loop, run_folder, state, trained
  run = pathlib.Path(path).parent / "run"
  assert trained.load(run).step == 12
  experiment = run_folder.RunFolder(run).read_config()
  wanted = state.abstract(experiment.model, loop.plan(experiment).optimizer)
  wanted = layout.Layout(experiment, mesh.on_one()).placed(wanted)
  for step in checkpoint.steps(run / "checkpoints"):
    assert checkpoint.problem(run / "checkpoints", step) == ""
    assert "params" in checkpoint.restore(run / "checkpoints", step, wanted, whole=True)
    assert checkpoint.restore_weights(run / "checkpoints", step, wanted["optimizer"]["mu"])
elif what == "generate":
  from chinchilla_jax import cli
  run = os.path.join(os.path.dirname(path), "run")
  print("status", cli.main(["generate", f"--workdir={run}", "--max-tokens=2"]))
elif what == "unpickle":  # What the hook must see, or it proves nothing.
  import pickle
  pickle.loads(b"\x80\x04cbuiltins\nlen\n.")
elif what == "import":
  sys.path.insert(0, path)
  import planted
elif what == "start":
  os.system("true")
'''
PLANTED = ("json.py", "conftest.py", "sentencepiece.py", "numpy.py", "sitecustomize.py",
           "usercustomize.py", "__init__.py", "tokenizer.py", "planted.py", "array_record.py")


class Bomb:
  """Pickled, it makes a file when it is loaded."""

  def __init__(self, path: pathlib.Path):
    self.path = str(path)

  def __reduce__(self):
    return open, (self.path, "w")


@pytest.fixture
def place(tmp_path, tiny_store) -> pathlib.Path:
  """A folder with a store; programs are planted in both. `exploded` appears where one has run."""
  shutil.copytree(tiny_store, tmp_path / "here" / "store")
  (tmp_path / "watched").mkdir()
  (tmp_path / "watched" / "watched.py").write_text(WATCHED)
  body = f"open({str(tmp_path / 'exploded')!r}, 'w').close()\n"
  for folder in ("here", "here/store"):
    for name in PLANTED:
      (tmp_path / folder / name).write_text(body)
  return tmp_path


def watched(place: pathlib.Path, what: str) -> tuple[str, str]:
  """What the hook saw, and all that the process printed."""
  done = subprocess.run(
      [sys.executable, str(place / "watched" / "watched.py"), str(place / "here" / "store"), what],
      cwd=place / "here", capture_output=True, text=True, timeout=120,
      env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"})
  seen = [line.removeprefix("SEEN ") for line in done.stdout.splitlines() if line[:4] == "SEEN"]
  assert len(seen) == 1, done.stderr
  return seen[0], done.stdout + done.stderr


@pytest.mark.parametrize("what, event", [
    ("unpickle", "pickle.find_class"), ("import", "exec"), ("start", "os.system")])
def test_the_hook_sees_what_it_must(place, what, event):
  seen, _ = watched(place, what)
  assert event in seen
  assert (place / "exploded").exists() == (what == "import")


@pytest.mark.parametrize("what", ["library", "command"])
def test_reading_a_store_runs_nothing_that_lies_in_it(place, what):
  seen, printed = watched(place, what)
  assert seen == "[]"
  assert not (place / "exploded").exists()
  assert what == "library" or "status 0" in printed


def describe_again(folder: pathlib.Path) -> None:
  """Signs a store anew: its maker is the one who means harm."""
  ledger = json.loads((folder / ledgers.FILE).read_text())
  for entry in ledgers.files(ledger):
    entry |= ledgers.describe_file(str(folder / entry["name"]))
  ledger["tokenizer"] = ledgers.sha256(str(folder / "tokenizer.model"))
  ledger["fingerprint"] = ledgers.fingerprint(ledger)
  ledgers.write(str(folder), ledger)


@pytest.mark.parametrize("kind", ["pickle", "npy"])
@pytest.mark.parametrize("name, refused", [
    ("tokens-train*", True), ("tokens-validation*", True), ("tokenizer.model", True),
    ("dataset_info.json", False), ("features.json", False)])  # for TFDS: not read here
def test_a_pickle_under_the_name_of_a_part_is_not_loaded(place, kind, name, refused):
  (path,) = (place / "here" / "store").glob(name)
  if kind == "pickle":
    path.write_bytes(pickle.dumps(Bomb(place / "exploded")))
  else:
    with open(path, "wb") as file:
      np.save(file, np.array([Bomb(place / "exploded")], object), allow_pickle=True)
  describe_again(path.parent)
  for what in ("command", "library") if refused else ("library",):
    seen, printed = watched(place, what)
    assert seen == "[]"
    assert not (place / "exploded").exists()
    if what == "library":
      assert ("UserError" in printed) == refused, printed
  pickle.loads(pickle.dumps(Bomb(place / "exploded"))).close()
  assert (place / "exploded").exists(), "the bomb is one"


@pytest.fixture
def run(place, tiny_run) -> pathlib.Path:
  """A run in `place`, on the store there."""
  folder = pathlib.Path(shutil.copytree(tiny_run[1], place / "here" / "run"))
  config = json.loads((folder / "config.json").read_text())
  config["config"]["data"]["store"] = str(place / "here" / "store")
  (folder / "config.json").write_text(json.dumps(config))
  return folder


@pytest.mark.parametrize("what", ["checkpoint", "generate"])
def test_restoring_a_checkpoint_runs_nothing_that_lies_in_its_run(place, run, what):
  body = f"open({str(place / 'exploded')!r}, 'w').close()\n"
  for folder in [run, *(path for path in run.rglob("*") if path.is_dir())]:
    for name in (*PLANTED, "orbax.py", "jax.py", "tensorstore.py", "state.py", "config.py"):
      (folder / name).write_text(body)
    for name in ("state.pkl", "checkpoint.pkl", "params.pickle", "progress.pkl"):
      (folder / name).write_bytes(pickle.dumps(Bomb(place / "exploded")))
  seen, printed = watched(place, what)
  assert seen == "[]"
  assert not (place / "exploded").exists()
  assert ("status 0" in printed) if what == "generate" else ("Error" not in printed), printed


@pytest.mark.parametrize("name", ["config.json", "checkpoints/12/progress.json",
                                  "checkpoints/12/state/_METADATA",
                                  "checkpoints/12/state/manifest.ocdbt", "largest",
                                  "checkpoints/12/state/checkpoint"])  # Read by Orbax, if there.
def test_a_pickle_under_the_name_of_a_checkpoints_part_is_not_loaded(place, run, name):
  """Sealed again: its maker is the one who means harm."""
  path = run / name
  if name == "largest":
    path = max((run / "checkpoints/12/state").rglob("*"), key=lambda file: file.stat().st_size)
  assert path.is_file() or path.name == "checkpoint"
  path.write_bytes(pickle.dumps(Bomb(place / "exploded")))
  for step in (4, 8):  # So that none is left to fall back to.
    shutil.rmtree(run / f"checkpoints/{step}")
  seals.write(run / "checkpoints/12", 0, 1)
  seen, printed = watched(place, "checkpoint")
  assert seen == "[]"
  assert not (place / "exploded").exists()
  assert "UserError" in printed, printed

MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal",
           "torch", "yaml", "code", "runpy", "imp"}
CALLS = {"eval", "exec", "compile", "__import__", "exec_module", "load_module", "run_path",
         "run_module", "execfile", "system", "popen", "literal_eval_unsafe"}
ALLOWED = {  # (module, what): why it is no danger
    ("config_file", "exec_module"): "a Python config file, which is a program by design",
}


def dangers(tree: ast.AST):
  """(what, line) of everything that could run or unpickle what it is given."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((name.name, node.lineno) for name in node.names
                  if name.name.split(".")[0] in MODULES)
    elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
      yield node.module, node.lineno
    elif isinstance(node, ast.Call):
      called = node.func
      if isinstance(called, ast.Name) and called.id in CALLS:
        yield called.id, node.lineno
      if isinstance(called, ast.Attribute):
        of = called.value.id if isinstance(called.value, ast.Name) else ""
        # re.compile and a lowered program's compile() make no Python code.
        if called.attr in CALLS - {"compile"} or (of, called.attr) == ("builtins", "compile"):
          yield called.attr, node.lineno
        if (of, called.attr) in (("np", "load"), ("numpy", "load"), ("jnp", "load")):
          yield f"{of}.load", node.lineno
      for word in node.keywords:
        if word.arg in ("allow_pickle", "shell") and not (
            isinstance(word.value, ast.Constant) and word.value.value is False):
          yield word.arg, node.lineno


@pytest.mark.parametrize("code, found", [
    ("import pickle", ["pickle"]), ("from pickle import loads", ["pickle"]),
    ("import torch", ["torch"]), ("x = eval('1')", ["eval"]), ("exec('1')", ["exec"]),
    ("compile('1', 'f', 'exec')", ["compile"]), ("np.load(f)", ["np.load"]),
    ("np.load(f, allow_pickle=True)", ["np.load", "allow_pickle"]),
    ("f(shell=True)", ["shell"]), ("os.system('x')", ["system"]),
    ("import re; re.compile('x'); ast.literal_eval('1'); json.load(f)", []),
])
def test_the_search_finds_what_it_must(code, found):
  assert [what for what, _ in dangers(ast.parse(code))] == found


def test_no_module_runs_or_unpickles_what_it_is_given():
  files = sorted((ROOT / "chinchilla_jax").rglob("*.py"))
  assert len(files) > 40
  found = {}
  for path in files:
    for what, line in dangers(ast.parse(path.read_text())):
      found[path.stem, what] = f"{path.relative_to(ROOT)}:{line}: {what}"
  assert set(found) == set(ALLOWED), [found[key] for key in found if key not in ALLOWED]
