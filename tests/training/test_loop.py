"""The loop as a user meets it: runs that end, runs that are stopped, runs that go on."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tiny import StopAfter, with_fields

from chinchilla_jax import config_io
from chinchilla_jax.errors import AGAIN, UserError
from chinchilla_jax.parallel import mesh
from chinchilla_jax.parallel.layout import Layout
from chinchilla_jax.training import checkpoint, loop, start, trained
from chinchilla_jax.training.run_folder import RunFolder

EXACT = ("kind", "step", "tokens", "epoch", "flops_6nd", "loss", "grad_norm", "param_norm",
         "update_norm", "learning_rate", "targets", "bits_per_byte")


def records(workdir):
  """metrics.jsonl without what depends on the clock."""
  return [{k: r[k] for k in EXACT if k in r} for r in RunFolder(workdir).read_metrics()]


def state_of(experiment, workdir, step):
  made = loop.plan(experiment)
  layout = Layout(experiment, mesh.on_one())
  wanted = layout.placed(loop.state_lib.abstract(experiment.model, made.optimizer))
  return checkpoint.restore(RunFolder(workdir).checkpoints, step, wanted, whole=True)


def assert_same(a, b):
  for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert left.dtype == right.dtype
    np.testing.assert_array_equal(left, right)


def test_a_run_leaves_what_it_promises(tiny_run):
  experiment, workdir = tiny_run
  lines = records(workdir)
  train = [r for r in lines if r["kind"] == "train"]
  evals = [r for r in lines if r["kind"] == "eval"]
  assert [r["step"] for r in train] == list(range(1, 13))
  assert [r["step"] for r in evals] == [6, 12]
  assert train[-1]["tokens"] == 12 * 4 * 32
  n_params = loop.plan(experiment).clock.n_params
  assert train[-1]["flops_6nd"] == 6 * n_params * 12 * 4 * 32
  assert train[-1]["epoch"] == round(12 * 4 / loop.plan(experiment).sequences.n_windows, 6)
  assert train[-1]["loss"] < train[0]["loss"]
  assert checkpoint.newest_good(workdir / "checkpoints") == (12, {})
  saved = json.loads((workdir / "config.json").read_text())
  assert saved["versions"]["jax"] == jax.__version__
  assert config_io.load(str(workdir / "config.json")) == experiment


def test_the_same_command_again_does_nothing(tiny_run, capsys):
  experiment, workdir = tiny_run
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
  assert loop.train(experiment, workdir).step == 12
  assert "nothing to do" in capsys.readouterr().out
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before


def test_keeps_the_newest_checkpoints_and_every_so_many(tiny, tmp_path):
  experiment = with_fields(tiny, checkpoint__every="2 steps", checkpoint__keep=2,
                           checkpoint__keep_every="6 steps", evaluation__every="0 steps")
  loop.train(experiment, tmp_path / "run")
  assert checkpoint.steps(tmp_path / "run/checkpoints") == [6, 10, 12]


@pytest.mark.parametrize("signalled, stop", [(1, 2), (4, 4), (5, 6), (7, 6)])
def test_a_stopped_run_goes_on_bit_for_bit(tiny_run, tmp_path, monkeypatch, signalled, stop):
  """The signal is heard a step late, or at once at a step that saves; the last one comes while
  step 6 is evaluated, where the loop asks for it too."""
  experiment, uninterrupted = tiny_run
  with monkeypatch.context() as patched:
    patched.setattr(loop, "Interrupt", lambda: StopAfter(signalled - 1))
    outcome = loop.train(experiment, tmp_path / "run")
  assert outcome.step == stop and outcome.signal == signal.SIGINT
  outcome = loop.train(experiment, tmp_path / "run")
  assert outcome.step == 12 and outcome.signal is None
  assert records(tmp_path / "run") == records(uninterrupted)
  assert_same(state_of(experiment, tmp_path / "run", 12), state_of(experiment, uninterrupted, 12))


def test_a_crash_loses_only_what_came_after_the_checkpoint(tiny_run, tmp_path, monkeypatch):
  """Dies after step 7 with the log ahead of checkpoint 4, its last line cut short."""
  experiment, uninterrupted = tiny_run
  workdir = tmp_path / "run"
  original = loop.recorder.Recorder.step

  def dies(self, step, values):
    original(self, step, values)
    if step == 7:
      raise RuntimeError("power cut")

  with monkeypatch.context() as patched:
    patched.setattr(loop.recorder.Recorder, "step", dies)
    with pytest.raises(RuntimeError, match="power cut"):
      loop.train(experiment, workdir)
  with open(workdir / "metrics.jsonl", "a") as file:
    file.write('{"kind": "train", "st')
  loop.train(experiment, workdir)
  assert records(workdir) == records(uninterrupted)
  assert_same(state_of(experiment, workdir, 12), state_of(experiment, uninterrupted, 12))


def test_identity_may_not_change_and_the_rest_may(tiny_run, tmp_path, capsys):
  experiment, workdir = tiny_run
  for fields, name in [(dict(optimizer__peak_lr=2e-2), "optimizer.peak_lr"), (dict(seed=3), "seed"),
                       (dict(model__d_ff=128), "model.d_ff")]:
    with pytest.raises(UserError, match=f"config.{name}=.*another --workdir"):
      loop.train(with_fields(experiment, **fields), workdir)
  longer = with_fields(experiment, run_length="13 steps", logging__every="2 steps",
                       model__attention_block=8)
  shutil.copytree(workdir, tmp_path / "copy")
  assert loop.train(longer, tmp_path / "copy").step == 13
  printed = capsys.readouterr().out
  assert "config.run_length was '12 steps', is now '13 steps'" in printed
  assert "config.model.attention_block" in printed


def test_a_model_smaller_than_the_tokenizer_is_refused(tiny, tmp_path):
  with pytest.raises(UserError, match="model.vocab_size"):
    loop.train(with_fields(tiny, model__vocab_size=100), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_stops_after_too_many_non_finite_steps(tiny, tmp_path):
  experiment = with_fields(tiny, optimizer__peak_lr=1e38, optimizer__clip_norm=0.0,
                           guard__nonfinite_limit=3, run_length="40 steps",
                           evaluation__every="0 steps", schedule__warmup="0 steps")
  with pytest.raises(UserError, match=r"3 steps in a row up to step \d+; the first.*sequences"):
    loop.train(experiment, tmp_path / "run")


def test_batch_ramp_and_epochs(tiny, tmp_path):
  """The batch doubles midway; the run passes the end of an epoch."""
  windows = loop.plan(tiny).sequences.n_windows
  experiment = with_fields(tiny, batch__ramp=(("50%", 8),), run_length="1.2 epochs",
                           batch__sequences=max(4, windows // 12), evaluation__every="0 steps",
                           checkpoint__every="0 steps", logging__every="1 steps")
  experiment = with_fields(experiment,
                           batch__ramp=(("50%", 2 * experiment.batch.sequences),))
  outcome = loop.train(experiment, tmp_path / "run")
  lines = [r for r in records(tmp_path / "run") if r["kind"] == "train"]
  sizes = [r["targets"] / 32 for r in lines]
  first = experiment.batch.sequences
  assert sizes == sorted(sizes) and set(sizes) == {first, 2 * first}
  assert outcome.step < round(1.2 * windows / first)
  assert abs(lines[-1]["tokens"] / (windows * 32) - 1.2) < 0.2


def test_init_from_takes_the_master_copy(tiny_run, tmp_path):
  experiment, workdir = tiny_run
  fields = dict(checkpoint__init_from=str(workdir), seed=5)
  made = loop.plan(with_fields(experiment, **fields))
  folder = RunFolder(tmp_path / "run")
  layout = Layout(made.experiment, mesh.on_one())
  state, note = start.state_of(made, folder, start.Start(0, False, ()), layout)
  source = state_of(experiment, workdir, 12)
  assert "step 12" in note
  assert_same(state["optimizer"]["master"], source["optimizer"]["master"])
  assert_same(state["params"], source["params"])
  made = loop.plan(with_fields(experiment, precision__parameters="float32", **fields))
  layout = Layout(made.experiment, mesh.on_one())
  state, _ = start.state_of(made, folder, start.Start(0, False, ()), layout)
  assert_same(state["params"], source["optimizer"]["master"])


def test_a_checkpoint_of_another_shape_or_dtype_is_named(tiny_run):
  experiment, workdir = tiny_run
  with pytest.raises(UserError, match=r"params/.* is .*bfloat16.*wants float32"):
    state_of(with_fields(experiment, precision__parameters="float32"), workdir, 12)
  with pytest.raises(UserError, match="bias_in is float32.*2, 64.*wants.*2, 128"):
    state_of(with_fields(experiment, model__d_ff=128), workdir, 12)


def test_trained_loads_parameters_only(tiny_run):
  experiment, workdir = tiny_run
  model = trained.load(workdir)
  assert model.step == 12 and model.experiment == experiment
  assert_same(model.params, state_of(experiment, workdir, 12)["params"])
  with pytest.raises(UserError, match="no checkpoint at step 7; there are 4, 8, 12"):
    trained.load(workdir, 7)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, AGAIN)])
def test_a_real_signal_saves_and_says_how_to_go_on(tiny, tmp_path, number, status):
  """The console command, in a process of its own, stopped from outside."""
  experiment = with_fields(tiny, run_length="100000 steps", evaluation__every="0 steps",
                           checkpoint__every="0 steps", logging__console="1 steps")
  config = tmp_path / "config.json"
  config.write_text(json.dumps(config_io.to_dict(experiment)))
  command = [sys.executable, "-m", "chinchilla_jax", "train", f"--config={config}",
             "--workdir", str(tmp_path / "run")]
  root = str(pathlib.Path(loop.__file__).parents[2])
  environment = dict(os.environ, PYTHONPATH=root, PYTHONUNBUFFERED="1")
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             env=environment)
  deadline = time.monotonic() + 300
  for line in process.stdout:
    assert time.monotonic() < deadline
    if line.startswith("step 3/"):
      process.send_signal(number)
      break
  rest = process.stdout.read()
  assert process.wait(timeout=120) == status, rest
  assert "saved at step" in rest and "the same command goes on" in rest
  assert "Traceback" not in rest
  saved, problems = checkpoint.newest_good(tmp_path / "run/checkpoints")
  assert not problems
  assert saved >= 3 and records(tmp_path / "run")[-1]["step"] == saved
