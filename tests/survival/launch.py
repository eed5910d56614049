"""`chinchilla train` in a process of its own, with something done to it first."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
import orbax.checkpoint as ocp
from tiny import ROOT

from chinchilla_jax import config_io
from chinchilla_jax.training.run_folder import RunFolder

# Fields of a record that do not depend on the clock.
EXACT = ("kind", "step", "tokens", "epoch", "flops_6nd", "loss", "grad_norm", "param_norm",
         "update_norm", "learning_rate", "targets", "bits_per_byte", "what", "batch",
         "prompt", "text")

# A prelude: SIGTERM comes while step 6 is computed.
STOP_AT_6 = """
import os, signal
from chinchilla_jax.parallel import processes
_vote = processes.vote
def vote(mesh, ballot):
  vote.calls += 1
  return _vote(mesh, signal.SIGTERM if vote.calls == 6 else ballot)
vote.calls = 0
processes.vote = vote
"""


def start(experiment, workdir, prelude="", flags=(), **environ) -> subprocess.Popen:
  """Starts the command; `prelude` is Python that runs in its process before it."""
  config = pathlib.Path(tempfile.mkdtemp()) / "config.json"
  config.write_text(json.dumps(config_io.to_dict(experiment)))
  program = f"{prelude}\nimport sys\nfrom chinchilla_jax import cli\nsys.exit(cli.main())"
  # The tests' own cache of compiled programs: start-up is most of what these processes do.
  cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
           "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  return subprocess.Popen(
      [sys.executable, "-c", program, "train", f"--config={config}", "--workdir", str(workdir),
       *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
      env=os.environ | cache | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environ)


def finish(process: subprocess.Popen, timeout: float = 240) -> tuple[int, str]:
  """(exit status, everything it printed)."""
  try:
    text, _ = process.communicate(timeout=timeout)
    return process.returncode, text
  finally:
    process.kill()


def run(experiment, workdir, prelude="", flags=(), **environ) -> tuple[int, str]:
  return finish(start(experiment, workdir, prelude, flags, **environ))


def records(workdir) -> list[dict]:
  """metrics.jsonl without what depends on the clock; each step stands there once."""
  lines = RunFolder(workdir).read_metrics()
  for kind in ("train", "eval"):
    steps = [line["step"] for line in lines if line["kind"] == kind]
    assert steps == sorted(set(steps))
  return [{key: line[key] for key in EXACT if key in line} for line in lines]


def arrays(workdir, step) -> dict[str, np.ndarray]:
  """Every array of a checkpoint, by path, as it was stored."""
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    tree = reader.restore((workdir / "checkpoints" / str(step) / "state").absolute())
  leaves, _ = jax.tree.flatten_with_path(tree)
  return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_arrays(got, wanted) -> None:
  assert got.keys() == wanted.keys()
  assert {"params/embedding/table", "optimizer/master/embedding/table"} <= got.keys()
  for path, array in wanted.items():
    assert got[path].dtype == array.dtype, path
    np.testing.assert_array_equal(got[path], array, err_msg=path)


def assert_same_run(workdir, other, step) -> None:
  """Every logged number, and every array after `step` steps, bit for bit."""
  assert records(workdir) == records(other)
  assert_same_arrays(arrays(workdir, step), arrays(other, step))
