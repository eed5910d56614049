"""Shared fixtures: a tiny store of real text, and a tiny experiment on it."""

import os

# The tests are for CPUs, whatever the machine has; JAX reads this when it is imported.
os.environ["JAX_PLATFORMS"] = "cpu"

import dataclasses  # noqa: E402
import pathlib  # noqa: E402
import tempfile  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402
from tiny import ROOT, tiny_experiment  # noqa: E402

from chinchilla_jax import config as schema  # noqa: E402

# JAX sets it for itself; the commands that tests start are to begin as a user's do.
os.environ.pop("TF_CPP_MIN_LOG_LEVEL", None)

# Shapes that broadcast by accident are bugs.
jax.config.update("jax_numpy_rank_promotion", "raise")

# A run and the run that resumes it are one program: compile it once a session.
_CACHE = tempfile.TemporaryDirectory()
jax.config.update("jax_compilation_cache_dir", _CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# So does every command that a test starts, and none writes into the user's own.
os.environ["CHINCHILLA_COMPILED"] = _CACHE.name + "/commands"


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory) -> str:
  """A store of a few dozen source files of this repository's own package."""
  from chinchilla_jax.data import prepare
  folder = tmp_path_factory.mktemp("tiny")
  experiment = tiny_experiment(str(folder / "store"))
  corpus = dataclasses.replace(experiment.corpus, sources=(str(ROOT / "chinchilla_jax"),))
  prepare.prepare(dataclasses.replace(experiment, corpus=corpus))
  return str(folder / "store")


@pytest.fixture
def tiny(tiny_store) -> schema.Experiment:
  return tiny_experiment(tiny_store)


@pytest.fixture(scope="session")
def tiny_run(tiny_store, tmp_path_factory) -> tuple[schema.Experiment, pathlib.Path]:
  """An uninterrupted run of 12 steps: (experiment, folder)."""
  from chinchilla_jax.training import loop
  experiment, workdir = tiny_experiment(tiny_store), tmp_path_factory.mktemp("runs") / "whole"
  outcome = loop.train(experiment, workdir)
  assert (outcome.step, outcome.total_steps, outcome.signal) == (12, 12, None)
  return experiment, workdir
