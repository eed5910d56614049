"""Compiler flags: only measured ones, and the compiler takes them."""

import jax
import pytest
from tiny import tiny_experiment

from chinchilla_jax.parallel import compiler_flags, topology
from chinchilla_jax.training import ahead


def test_every_flag_says_where_it_is_from_and_what_it_does():
  for chip, flags in compiler_flags.FLAGS.items():
    assert chip == "cpu" or chip in topology.CHIPS
    assert len({flag.name for flag in flags}) == len(flags) > 0
    assert all(flag.source and flag.measured for flag in flags)


@pytest.mark.parametrize("kind", ["host", "TPU v99", "NVIDIA H100 80GB HBM3"])
def test_no_flags_are_none_and_not_an_empty_dict(kind):
  assert compiler_flags.options(kind) is None


def test_flags_reach_the_compiler_ahead_of_time(monkeypatch):
  flag = compiler_flags.Flag("xla_there_is_no_such_flag", True, "nowhere", "nothing")
  monkeypatch.setitem(compiler_flags.FLAGS, "v4", (flag,))
  monkeypatch.setattr(topology, "chip_of", lambda kind: topology.CHIPS["v4"])
  with pytest.raises(jax.errors.JaxRuntimeError, match="xla_there_is_no_such_flag"):
    ahead.compile_step(tiny_experiment(), jax.devices()[:1])


def test_flags_reach_the_compiler_of_a_run(monkeypatch, tiny, tmp_path):
  from chinchilla_jax.training import loop
  monkeypatch.setattr(compiler_flags, "options", lambda kind: {"xla_there_is_no_such_flag": True})
  with pytest.raises(jax.errors.JaxRuntimeError, match="xla_there_is_no_such_flag"):
    loop.train(tiny, tmp_path / "run")


def test_a_step_that_does_not_fit_is_one_line_with_what_helps(monkeypatch, tiny, tmp_path):
  from chinchilla_jax.training import early, loop
  said = jax.errors.JaxRuntimeError(
      "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
      "Used 40.00G of 31.25G hbm.")
  monkeypatch.setattr(early, "compiling", lambda *unused: lambda: said)
  with pytest.raises(ahead.OutOfMemory, match=r"needs 40\.00 GiB .* what helps: .*microbatches"):
    loop.train(tiny, tmp_path / "run")
