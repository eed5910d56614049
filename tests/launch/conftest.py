"""A real SLURM for the tests that want one."""

import os
import shutil
import subprocess
import sys

import pytest
from tiny import ROOT

NODE = ROOT / "tests/launch/slurm_node.sh"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
  """The environment in which sbatch, squeue and so on speak to a SLURM of this session's own."""
  if os.geteuid() != 0:
    pytest.skip("a SLURM node of one's own needs root")
  if not (shutil.which("slurmctld") or shutil.which("apt-get")):
    pytest.skip("neither SLURM nor apt-get to install it")
  folder = tmp_path_factory.mktemp("slurm")
  # Not to a pipe: the daemons would inherit it, and reading it would never end.
  with open(folder / "start.log", "w+") as log:
    started = subprocess.run([NODE, "start", folder], stdout=log, stderr=log, timeout=600)
    said = (folder / "start.log").read_text().strip()
  if started.returncode == 3:
    pytest.skip(said)
  assert started.returncode == 0, said
  yield {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "JAX_PLATFORMS": "cpu",
         "PYTHONPATH": str(ROOT), "CHINCHILLA": f"{sys.executable} -m chinchilla_jax", "PAUSE": "0",
         # A run and the run that resumes it are one program.
         "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
         "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
  subprocess.run([NODE, "stop", folder], check=True, timeout=60)
