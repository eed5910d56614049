import json
import os
import pty
import subprocess
import sys

import jax.numpy as jnp
import pytest
import tensorboardX.proto.event_pb2 as events
from tiny import ROOT, tiny_experiment, with_fields

from chinchilla_jax import config_io, durations
from chinchilla_jax.errors import UserError
from chinchilla_jax.training import metrics, recorder
from chinchilla_jax.training.run_folder import RunFolder

VALUES = {"loss": jnp.float32(2.0), "nonfinite_run": jnp.int32(0)}


class Sink(list):
  write = list.append


@pytest.fixture
def sink():
  return Sink()


def recorder_of(sink, log_every=1, **fields):
  clock = durations.clock("10 steps", 4, (("4 steps", 8),), seq_len=32, n_params=100,
                          epoch_tokens=1000)
  experiment = with_fields(tiny_experiment(), **fields)
  return recorder.Recorder(experiment, clock, [sink], log_every)


def test_a_step_is_written_when_the_next_one_is_under_way(sink):
  record = recorder_of(sink)
  record.step(1, VALUES)
  assert sink == []
  record.step(2, VALUES)
  assert [r["step"] for r in sink] == [1]
  record.pause()
  assert [r["step"] for r in sink] == [1, 2]


def test_numbers_that_are_counted(sink):
  record = recorder_of(sink)
  for step in range(1, 7):
    record.step(step, VALUES)
  record.pause()
  tokens = (4 * 4 + 2 * 8) * 32
  assert sink[5]["tokens"] == tokens
  assert sink[5]["flops_6nd"] == 6 * 100 * tokens
  assert sink[5]["epoch"] == round(tokens / 1000, 6)


def test_log_every_keeps_the_last_step(sink):
  record = recorder_of(sink, log_every=4)
  for step in range(1, 11):
    record.step(step, VALUES)
  record.pause()
  assert [r["step"] for r in sink] == [4, 8, 10]


def test_pauses_are_not_in_the_speed(sink, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(recorder.time, "perf_counter", lambda: now[0])
  record = recorder_of(sink)
  for step in range(1, 4):
    record.step(step, VALUES)
    now[0] += 1.0
  record.pause()
  now[0] += 100.0  # An evaluation.
  record.resume()
  record.step(4, VALUES)
  now[0] += 1.0
  record.pause()
  assert "tokens_per_second" not in sink[0]  # Its start, with compilation, is not known.
  assert [r["tokens_per_second"] for r in sink[1:]] == [128.0] * 3
  assert record.median_tokens_per_second() == 128.0


def test_mfu_only_where_the_peak_is_known(sink, monkeypatch):
  monkeypatch.setattr(recorder.topology, "peak_flops", lambda kind: 1e9)
  record = recorder_of(sink)
  for step in (1, 2):
    record.step(step, VALUES)
  record.pause()
  assert sink[1]["mfu"] >= sink[1]["mfu_causal"] > 0
  other = Sink()
  monkeypatch.undo()
  record = recorder_of(other)
  for step in (1, 2):
    record.step(step, VALUES)
  record.pause()
  assert "mfu" not in other[1]


def test_the_guard_names_the_first_bad_batch(sink):
  record = recorder_of(sink, guard__nonfinite_limit=3, seed=7)
  for step, run in ((1, 0), (2, 1), (3, 2), (4, 3)):
    record.step(step, dict(VALUES, nonfinite_run=jnp.int32(run)))
  # Steps 2 to 4 were skipped; step 2 had sequences 4 to 7.
  with pytest.raises(UserError, match="3 steps in a row up to step 4.*sequences 4 to 7 of seed 7"):
    record.pause()


def test_the_guard_says_what_is_not_finite(sink):
  record = recorder_of(sink)
  norms = {"grad_norm": 1.0, "update_norm": float("inf"), "param_norm": 2.0}
  for step, loss in ((1, 2.0), (2, float("nan"))):
    record.step(step, VALUES | {k: jnp.float32(v) for k, v in (norms | {"loss": loss}).items()}
                | {"nonfinite_run": jnp.int32(step)})
  record.pause()
  told = [line for line in sink if line["kind"] == "trouble"]
  assert told[0]["text"].startswith("update_norm not finite: update left out (1 in a row)")
  assert told[1]["text"].startswith("loss, update_norm not finite: update left out (2 in a row)")
  assert told[0]["param_norm"] == 2.0


def test_tensorboard_files_hold_the_scalars(tmp_path):
  writer = metrics.TensorBoard(tmp_path, 0)
  writer.write({"kind": "train", "step": 3, "loss": 1.5})
  writer.close()
  data = next(tmp_path.iterdir()).read_bytes()
  found, at = {}, 0
  while at < len(data):  # length (8), its checksum (4), event, its checksum (4)
    size = int.from_bytes(data[at:at + 8], "little")
    event = events.Event.FromString(data[at + 12:at + 12 + size])
    for value in event.summary.value:
      found[value.tag, event.step] = value.simple_value
    at += size + 16
  assert found == {("train/loss", 3): 1.5}


def test_wandb_that_is_not_installed_is_a_users_mistake(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match="pip install wandb"):
    metrics.WeightsAndBiases("project", "name", tmp_path, {})


def test_rewinding_drops_later_lines_and_the_broken_one(tmp_path):
  folder = RunFolder(tmp_path)
  folder.metrics.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
  folder.rewind_metrics(2)
  assert [r["step"] for r in folder.read_metrics()] == [1, 2]


def test_plain_lines_where_there_is_no_terminal(capsys):
  console = metrics.Console(total_steps=10, first_step=0, plain_every=5)
  for step in range(1, 11):
    console.write({"kind": "train", "step": step, "loss": 2.0, "learning_rate": 1e-3,
                   "tokens_per_second": 1234.0})
  console.close()
  lines = capsys.readouterr().out.splitlines()
  assert [line.split("  ")[0] for line in lines] == ["step 5/10", "step 10/10"]
  assert "1,234 tokens/s" in lines[0] and "ETA" in lines[0]


def test_a_progress_bar_on_a_terminal(tiny, tmp_path):
  """The real command on a real (pseudo) terminal."""
  config = tmp_path / "config.json"
  config.write_text(json.dumps(config_io.to_dict(tiny)))
  leader, follower = pty.openpty()
  process = subprocess.Popen(
      [sys.executable, "-m", "chinchilla_jax", "train", f"--config={config}", "--workdir",
       str(tmp_path / "run")], stdout=follower, stderr=follower, stdin=follower,
      env=dict(os.environ, PYTHONPATH=str(ROOT), TERM="xterm", COLUMNS="120"))
  os.close(follower)
  shown = b""
  while True:
    try:
      piece = os.read(leader, 65536)
    except OSError:  # The other side is closed.
      break
    if not piece:
      break
    shown += piece
  os.close(leader)
  assert process.wait(timeout=60) == 0
  text = shown.decode()
  assert "step 12/12" in text and "ETA" in text and "━" in text
  assert "validation" in text
