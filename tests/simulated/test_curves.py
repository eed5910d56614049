"""Whole runs through the loop, on eight devices and on one.

Thirty steps from a peak learning rate of 1e-2. With float32 activations and parameters, losses
agree within 1e-5 nats at every step (seen: 1e-6), and gradient norms within 1e-3 of themselves.
"""

import functools
import json

import eight
import jax
import numpy as np
import pytest
from tiny import StopAfter, with_fields

from chinchilla_jax import config_io
from chinchilla_jax.errors import UserError
from chinchilla_jax.parallel import mesh
from chinchilla_jax.training import loop
from chinchilla_jax.training.run_folder import RunFolder

STEPS, NATS = 30, 1e-5


@pytest.fixture(scope="module")
def base(tiny_store):
  return eight.experiment(
      data__store=tiny_store, run_length=f"{STEPS} steps", optimizer__eps=1e-6,
      evaluation__every="15 steps", checkpoint__every="15 steps", model__attention_block=16)


def train(experiment, workdir, stop=None, one_device=False):
  """Records of the whole run so far, by kind."""
  with pytest.MonkeyPatch.context() as patched:
    if stop:
      patched.setattr(loop, "Interrupt", lambda: StopAfter(stop - 2))
    if one_device:
      patched.setattr(loop.mesh_lib, "make",
                      functools.partial(mesh.make, devices=jax.devices()[:1]))
    outcome = loop.train(experiment, workdir)
  assert outcome.step == (stop or outcome.total_steps)
  return [r for r in RunFolder(workdir).read_metrics() if r["kind"] in ("train", "eval")]


def assert_same_curve(got, want, nats=NATS):
  exact = lambda records: [(r["kind"], r["step"], r.get("tokens"), r["targets"]) for r in records]
  assert exact(got) == exact(want)
  losses = lambda records: [r["loss"] for r in records]
  np.testing.assert_allclose(losses(got), losses(want), rtol=0, atol=nats)
  norms = lambda records: [r["grad_norm"] for r in records if r["kind"] == "train"]
  np.testing.assert_allclose(norms(got), norms(want), rtol=1e-3)


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
  """The curve of one device."""
  records = train(base, tmp_path_factory.mktemp("alone"), one_device=True)
  train_losses = [r["loss"] for r in records if r["kind"] == "train"]
  assert len(train_losses) == STEPS and train_losses[-1] < train_losses[0] - 1
  assert sum(r["kind"] == "eval" for r in records) == 2
  return records


@pytest.mark.parametrize("name", [
    "replicated data 8", "deepmind data 4 x tensor 2", "fsdp_tensor data 2 x context 2 x tensor 2"])
def test_thirty_steps_give_the_curve_of_one_device(name, base, alone, tmp_path):
  assert_same_curve(train(eight.on(name, base), tmp_path / "run"), alone)


def test_a_run_goes_on_on_another_mesh(base, alone, tmp_path, capsys):
  """Fifteen steps on one mesh, the rest on another, which restores the first one's checkpoint."""
  train(eight.on("fsdp data 8", base), tmp_path / "run", stop=15)
  got = train(eight.on("fsdp_tensor data 2 x tensor 4", base), tmp_path / "run")
  printed = capsys.readouterr().out
  assert "resuming at step 15" in printed
  assert "config.mesh.strategy was 'fsdp', is now 'fsdp_tensor'" in printed
  assert_same_curve(got, alone)


@pytest.mark.parametrize("by", ["microbatches", "size"])
def test_a_batch_ramp_is_exact_and_survives_a_stop(by, base, tmp_path):
  """Twice the batch after 1,024 tokens, which is after step 4; stopped after step 3."""
  experiment = with_fields(base, run_length="8 steps", batch__ramp=(("1024 tokens", 16),),
                           batch__ramp_by=by, evaluation__every="0 steps",
                           checkpoint__every="0 steps")
  whole = train(eight.on("fsdp data 8", experiment), tmp_path / "whole")
  steps = [r for r in whole if r["kind"] == "train"]
  assert [r["targets"] for r in steps] == [8 * 32] * 4 + [16 * 32] * 4
  assert [r["tokens"] for r in steps] == [256, 512, 768, 1024, 1536, 2048, 2560, 3072]
  train(eight.on("fsdp data 8", experiment), tmp_path / "parts", stop=3)
  parts = train(eight.on("fsdp data 8", experiment), tmp_path / "parts")
  assert_same_curve(parts, whole, nats=0)
  if by == "microbatches":  # Of the two, the one that changes the program midway.
    assert_same_curve(train(experiment, tmp_path / "alone", one_device=True), whole)


@pytest.mark.parametrize("fields, says", [
    (["batch.sequences=12"], "12 sequences in 1 microbatches do not divide among 8 devices"),
    (["mesh.strategy=deepmind", "mesh.tensor=8"], "4 heads do not divide by 8"),
    (["mesh.context=8", "data.seq_len=36"], "36 tokens do not divide by config.mesh.context 8"),
    (["mesh.tensor=2"], "strategy 'fsdp' cuts no layer"),
    (["mesh.tensor=3"], "tensor 3 does not make 8 devices"),
    (["mesh.overrides=(('embedding/table', 'tensor'),)"], "has 1 entries for an array"),
])
def test_a_layout_that_cannot_be_is_one_line_and_status_2(fields, says, base, tmp_path, capsys,
                                                          monkeypatch):
  from chinchilla_jax import cli
  monkeypatch.chdir(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(config_io.to_dict(base)))
  words = ["train", "--config=config.json", "--workdir=run",
           *(f"--config.{field}" for field in fields)]
  assert cli.main(words) == 2
  captured = capsys.readouterr()
  assert captured.err.startswith("chinchilla train: ") and captured.err.count("\n") == 1
  assert says in captured.err
  assert [p.name for p in tmp_path.iterdir()] == ["config.json"], "nothing may be written"


def test_a_refusal_comes_before_the_folder(base, tmp_path):
  with pytest.raises(UserError, match="12 sequences"):
    loop.train(with_fields(base, batch__sequences=12), tmp_path / "run")
  assert not (tmp_path / "run").exists()
