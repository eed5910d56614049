"""Restoring what does not belong together is refused, and the first difference is named."""

import dataclasses
import shutil

import pytest
from tiny import ROOT, with_fields

from chinchilla_jax.data import prepare
from chinchilla_jax.errors import UserError
from chinchilla_jax.parallel import mesh
from chinchilla_jax.parallel.layout import Layout
from chinchilla_jax.training import checkpoint, loop
from chinchilla_jax.training import state as state_lib


@pytest.fixture(scope="module")
def other_stores(tiny_store, tmp_path_factory):
  """Stores of other text: one with the same tokenizer, one with its own."""
  folder = tmp_path_factory.mktemp("others")
  from tiny import tiny_experiment
  made = {}
  for name, fields in {"store": {"tokenizer__path": tiny_store}, "tokenizer": {}}.items():
    experiment = with_fields(tiny_experiment(str(folder / name)), **fields)
    corpus = dataclasses.replace(experiment.corpus, sources=(str(ROOT / "tests"),))
    prepare.prepare(dataclasses.replace(experiment, corpus=corpus), quiet=True)
    made[name] = str(folder / name)
  return made


def snapshot(folder):
  return {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes())
          for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("fields, words", [
    (dict(seed=1), "config.seed=0, not 1"),
    (dict(model__n_layers=3), "config.model.n_layers=2, not 3"),
    (dict(model__position="rotary"), "config.model.position='relative', not 'rotary'"),
    (dict(precision__parameters="float32"), "config.precision.parameters='bfloat16', not"),
    (dict(precision__rounding="stochastic"), "config.precision.rounding='master', not"),
    (dict(optimizer__b2=0.99), "config.optimizer.b2=0.95, not 0.99"),
    (dict(data__seq_len=16), "config.data.seq_len=32, not 16"),
    (dict(batch__sequences=8), "config.batch.sequences=4, not 8"),
    (dict(data__store="store"), "a run on another token store"),
    (dict(data__store="tokenizer"), "a run with another tokenizer"),
], ids=str)
def test_another_run_is_refused_and_nothing_is_changed(tiny_run, other_stores, fields, words):
  experiment, workdir = tiny_run
  if "data__store" in fields:
    fields = dict(data__store=other_stores[fields["data__store"]])
  before = snapshot(workdir)
  with pytest.raises(UserError, match=words):
    loop.train(with_fields(experiment, run_length="20 steps", **fields), workdir)
  with pytest.raises(UserError, match=words):  # There is nothing here that force may override.
    loop.train(with_fields(experiment, run_length="20 steps", **fields), workdir, force=True)
  assert snapshot(workdir) == before


@pytest.mark.parametrize("fields, words", [
    (dict(model__d_ff=128), r"bias_in is float32\[2, 64\], the config wants float32\[2, 128\]"),
    (dict(precision__parameters="float32"), r"params/.* is bfloat16.*, the config wants float32"),
    (dict(precision__rounding="stochastic"), "has optimizer/master, the config wants none"),
    (dict(model__qk_norm=True), "has no optimizer/.*norm"),
], ids=str)
def test_another_tree_is_named_though_the_config_agrees(tiny_run, tmp_path, fields, words):
  """As where code has changed: the state itself is compared, not only what was written of it."""
  experiment, workdir = tiny_run
  other = with_fields(experiment, **fields)
  wanted = Layout(other, mesh.on_one()).placed(
      state_lib.abstract(other.model, loop.plan(other).optimizer))
  with pytest.raises(UserError, match=words):
    checkpoint.restore(workdir / "checkpoints", 12, wanted, whole=True)


def test_a_file_where_the_folder_should_be(tiny, tmp_path):
  (tmp_path / "run").write_text("")
  with pytest.raises(UserError, match="run.*cannot be written|is a file"):
    loop.train(tiny, tmp_path / "run")


def test_a_moved_run_goes_on_where_it_is(tiny_run, tmp_path):
  """Nothing in it depends on where it lies."""
  experiment, workdir = tiny_run
  shutil.copytree(workdir, tmp_path / "elsewhere")
  assert loop.train(experiment, tmp_path / "elsewhere").step == 12
