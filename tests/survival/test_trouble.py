"""Numbers that go wrong: updates left out, spikes noticed, skipped, rolled back."""

import json

import numpy as np
import pytest
from tiny import with_fields

from chinchilla_jax.data import address, batches
from chinchilla_jax.errors import UserError
from chinchilla_jax.training import checkpoint, loop
from chinchilla_jax.training.run_folder import RunFolder
from launch import arrays, assert_same_arrays, records

STEPS, SPIKE = 48, 31  # The batch of step 31 is poisoned.


@pytest.fixture
def long_enough(tiny):
  return with_fields(
      tiny, run_length=f"{STEPS} steps", checkpoint__every="6 steps", checkpoint__keep=20,
      evaluation__every="12 steps", schedule__shape="constant", optimizer__peak_lr=3e-3,
      guard__spike_window=8, guard__spike_threshold=5.0, guard__rollback_before=2,
      guard__rollback_after=1)


def poison(monkeypatch, change, sequences=None):
  """The batch that begins with a sequence is changed before it goes to the device."""
  original = batches.Batches.batch
  firsts = {4 * (SPIKE - 1)} if sequences is None else sequences

  def batch(self, first, count):
    made = original(self, first, count)
    # By its number among all sequences: what is left out is never met.
    return change(made) if int(self.actual(np.array([first]))[0]) in firsts else made

  monkeypatch.setattr(batches.Batches, "batch", batch)


def no_numbers(batch):
  return batch | {"weights_bt": batch["weights_bt"] * np.float32("nan")}


def nonsense(batch):
  """Targets that nobody could expect: a byte that no text has."""
  return batch | {"targets_bt": np.full_like(batch["targets_bt"], 200)}


def troubles(workdir):
  return [r for r in RunFolder(workdir).read_metrics() if r["kind"] == "trouble"]


def test_a_non_finite_update_is_left_out_counted_and_its_batch_named(
    long_enough, tmp_path, monkeypatch, capsys):
  poison(monkeypatch, no_numbers)
  loop.train(long_enough, tmp_path / "run")
  [line] = troubles(tmp_path / "run")
  assert (line["step"], line["what"]) == (SPIKE, "nonfinite")
  first = 4 * (SPIKE - 1)
  assert line["batch"]["seed"] == 0 and line["batch"]["sequences"] == [[first, first + 3]]
  made = loop.plan(long_enough)
  assert line["batch"] == address.of(made.sequences, first, 4) and line["batch"]["documents"]
  assert f"sequences {first:,} to {first + 3:,} of seed 0" in capsys.readouterr().out
  steps = [r for r in RunFolder(tmp_path / "run").read_metrics() if r["kind"] == "train"]
  assert [r["nonfinite_total"] for r in steps] == [0] * (SPIKE - 1) + [1] * (STEPS - SPIKE + 1)
  assert steps[SPIKE]["param_norm"] == steps[SPIKE - 1]["param_norm"]  # As if it had not been.
  assert all(np.isfinite(r["loss"]) for r in steps if r["step"] != SPIKE)


def test_many_in_a_row_stop_the_run_with_the_address_of_the_first(long_enough, tmp_path,
                                                                  monkeypatch):
  poison(monkeypatch, no_numbers, {4 * k for k in range(20, 48)})
  with pytest.raises(UserError, match=r"3 steps in a row up to step 23; the first was step 21, "
                                      r"sequences 80 to 83 of seed 0 \(document"):
    loop.train(with_fields(long_enough, guard__nonfinite_limit=3), tmp_path / "run")
  assert [t["step"] for t in troubles(tmp_path / "run")] == [21, 22, 23]
  assert checkpoint.newest_good(tmp_path / "run/checkpoints") == (18, {})


def test_a_spike_is_logged_with_its_batch(long_enough, tmp_path, monkeypatch):
  poison(monkeypatch, nonsense)
  loop.train(long_enough, tmp_path / "run")
  lines = troubles(tmp_path / "run")
  assert (lines[0]["step"], lines[0]["what"]) == (SPIKE, "spike")
  assert lines[0]["batch"]["sequences"] == [[4 * (SPIKE - 1), 4 * SPIKE - 1]]
  steps = [r for r in RunFolder(tmp_path / "run").read_metrics() if r["kind"] == "train"]
  assert [r["step"] for r in steps if r["spike"]] == [t["step"] for t in lines]


def test_a_spike_is_skipped(long_enough, tmp_path, monkeypatch):
  poison(monkeypatch, nonsense)
  loop.train(with_fields(long_enough, guard__spikes="skip"), tmp_path / "run")
  assert [t["step"] for t in troubles(tmp_path / "run")] == [SPIKE]
  steps = [r for r in RunFolder(tmp_path / "run").read_metrics() if r["kind"] == "train"]
  assert steps[SPIKE]["param_norm"] == steps[SPIKE - 1]["param_norm"]
  assert steps[-1]["spike_total"] == 1


@pytest.fixture
def told_from_the_start(long_enough, tmp_path):
  """A run of clean batches that leaves out, from the start, what the rollback leaves out."""
  workdir = tmp_path / "told"
  workdir.mkdir()
  # Steps 29 to 32 of four sequences: two before the spike's, one after.
  skipped = [4 * (SPIKE - 3), 16]
  (workdir / "rollbacks.json").write_text(json.dumps([{"step": SPIKE, "skipped": skipped}]))
  loop.train(long_enough, workdir)
  return workdir


def assert_rolled_back(workdir, told):
  assert_same_arrays(arrays(workdir, STEPS), arrays(told, STEPS))
  assert records(workdir) == records(told)
  [rollback] = RunFolder(workdir).read_rollbacks()
  assert rollback["step"] == SPIKE and rollback["skipped"] == [4 * (SPIKE - 3), 16]
  aside = sorted(p.name for p in (workdir / "checkpoints/aside").iterdir())
  assert aside == ["30-rolled-back"]  # It had seen two of the batches that are left out.
  events = [e["event"] for e in RunFolder(workdir).read_journal()]
  assert "rollback" in events or events.count("start") + events.count("resume") > 1
  cut = [json.loads(line)["step"]
         for line in (workdir / "metrics.rolled_back.jsonl").read_text().splitlines()]
  assert cut[0] == 25 and max(cut) >= SPIKE


def test_a_rollback_is_exact(long_enough, told_from_the_start, tmp_path, monkeypatch, capsys):
  poison(monkeypatch, nonsense)
  capsys.readouterr()
  loop.train(with_fields(long_enough, guard__spikes="rollback"), tmp_path / "run")
  printed = capsys.readouterr().out
  assert "going back to a checkpoint before it" in printed and "resuming at step 24" in printed
  assert_rolled_back(tmp_path / "run", told_from_the_start)
  assert checkpoint.progress(tmp_path / "run/checkpoints", STEPS)["skipped"] == [
      [4 * (SPIKE - 3), 16]]


def test_a_rollback_that_a_crash_cut_short_is_exact_too(long_enough, told_from_the_start, tmp_path,
                                                        monkeypatch):
  poison(monkeypatch, nonsense)
  experiment, workdir = with_fields(long_enough, guard__spikes="rollback"), tmp_path / "run"
  original = loop.roll_back

  def dies(*args):
    original(*args)
    raise RuntimeError("power cut")

  with monkeypatch.context() as patched:
    patched.setattr(loop, "roll_back", dies)
    with pytest.raises(RuntimeError, match="power cut"):
      loop.train(experiment, workdir)
  loop.train(experiment, workdir)
  assert_rolled_back(workdir, told_from_the_start)


def test_a_rollback_before_the_first_checkpoint_starts_afresh(long_enough, tmp_path, monkeypatch):
  poison(monkeypatch, nonsense)
  experiment = with_fields(long_enough, guard__spikes="rollback", checkpoint__every="0 steps")
  assert loop.train(experiment, tmp_path / "run").step == STEPS
  assert [r["step"] for r in records(tmp_path / "run") if r["kind"] == "train"] == list(
      range(1, STEPS + 1))


def test_too_many_rollbacks_stop_the_run(long_enough, tmp_path, monkeypatch):
  """Whatever is left out, the next batch at that point is bad again."""
  poison(monkeypatch, nonsense, set(range(4 * (SPIKE - 1), 4 * 400)))
  with pytest.raises(UserError, match="after 2 rollbacks.*guard.rollback_limit"):
    loop.train(with_fields(long_enough, guard__spikes="rollback", guard__rollback_limit=2),
               tmp_path / "run")
  assert len(RunFolder(tmp_path / "run").read_rollbacks()) == 2


def test_a_damaged_list_of_rollbacks_is_refused(long_enough, tmp_path):
  (tmp_path / "run").mkdir()
  (tmp_path / "run/rollbacks.json").write_text('[{"step": 3}]')
  with pytest.raises(UserError, match="rollbacks.json is damaged"):
    loop.train(long_enough, tmp_path / "run")
  assert [p.name for p in (tmp_path / "run").iterdir()] == ["rollbacks.json"]
