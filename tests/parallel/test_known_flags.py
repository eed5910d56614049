"""What an older TPU compiler has not heard of is left out, and said."""

import importlib.util

import pytest

from chinchilla_jax import config as schema
from chinchilla_jax.parallel import compiler_flags, mesh, topology
from chinchilla_jax.parallel.layout import Layout
from chinchilla_jax.training import ahead

pytestmark = [
    pytest.mark.tpu_topology,
    pytest.mark.skipif(not importlib.util.find_spec("libtpu"),
                       reason="libtpu is not installed; make test installs it")]


@pytest.fixture
def v5p():
  return mesh.make(schema.Mesh(), ahead.devices(topology.parse("v5p:2x2x1")))


def test_all_of_today_are_known(v5p):
  assert compiler_flags.of(v5p) == compiler_flags.options("TPU v5p") != {}


def test_an_unknown_one_is_left_out_alone(v5p, monkeypatch, capsys):
  *_, last = known = compiler_flags.FLAGS["v5p"]
  odd = compiler_flags.Flag("xla_tpu_there_is_no_such_flag", True, "nowhere", "nothing")
  monkeypatch.setitem(compiler_flags.FLAGS, "v5p", (*known, odd))
  chosen = compiler_flags.of(v5p)
  assert odd.name not in chosen and last.name in chosen and len(chosen) == len(known)
  assert odd.name in capsys.readouterr().err


def test_none_when_none_are_wanted(v5p):
  experiment = lambda wanted: schema.Experiment(mesh=schema.Mesh(compiler_flags=wanted))
  assert Layout(experiment(True), v5p).compiler_options
  assert Layout(experiment(False), v5p).compiler_options is None
