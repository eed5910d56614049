"""Logs in parts: whatever fails on the way, every line once and in order; the same as a file's."""

import json
import shutil
import tempfile
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinchilla_jax.storage import logs, objects
from chinchilla_jax.training.run_folder import RunFolder

ACTIONS = st.lists(st.one_of(
    st.tuples(st.just("write"), st.integers(1, 5)),  # So many steps.
    st.tuples(st.just("flush"), st.just(0)),
    st.tuples(st.just("fail"), st.just(0)),      # The next put is not answered, and was not made.
    st.tuples(st.just("unheard"), st.just(0)),   # It was made, and the answer was lost.
    st.tuples(st.just("rewind"), st.integers(0, 8)),  # Back by so many steps, as after a crash.
), max_size=25)


@given(ACTIONS, st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_parts_hold_what_a_file_would(actions, part):
  put, bucket = objects.write, RunFolder(f"memory://logs/{uuid.uuid4().hex}")
  folder = tempfile.mkdtemp()
  disk = RunFolder(folder)
  old, logs._PART = logs._PART, part
  troubles = []

  def write(url, content):
    trouble = troubles.pop() if troubles else ""
    if trouble != "fail":
      put(url, content)
    if trouble:
      raise objects.Unreachable(5, "no answer", url)

  objects.write = write
  try:
    there, here, step = logs.appending(bucket.metrics), logs.appending(disk.metrics), 0
    for action, number in actions:
      if action == "write":
        for _ in range(number):
          step += 1
          line = json.dumps({"step": step, "kind": "train"}).encode() + b"\n"
          there.write(line)
          here.write(line)
      elif action == "flush":
        try:
          there.flush()
        except OSError:
          there.flush()
        assert bucket.read_metrics() == disk.read_metrics()
      elif action == "rewind":
        troubles.clear()
        there.flush()
        here.close()
        step = max(0, step - number)
        for run in (bucket, disk):
          run.rewind_metrics(step, keep=True)
        there, here = logs.appending(bucket.metrics), logs.appending(disk.metrics)
        assert bucket.read_metrics() == disk.read_metrics()
        assert list(logs.lines(bucket.rolled_back)) == list(logs.lines(disk.rolled_back))
      else:
        troubles[:] = [action]
    troubles.clear()
    there.close()
    here.close()
    assert [one["step"] for one in bucket.read_metrics()] == list(range(1, step + 1))
    assert bucket.read_metrics() == disk.read_metrics()
  finally:
    objects.write, logs._PART = put, old
    objects.delete_all(str(bucket.path))
    shutil.rmtree(folder)


def test_a_part_ends_at_a_megabyte(monkeypatch):
  monkeypatch.setattr(logs, "_PART", 1000)
  log = logs.appending(RunFolder("memory://logs/sizes").metrics)
  sent = []
  put = objects.write
  monkeypatch.setattr(objects, "write",
                      lambda url, content: (sent.append(len(content)), put(url, content)))
  for step in range(500):
    log.write(b"%099d\n" % step)
    log.flush()
  assert max(sent) == 1000 and sum(sent) < 500 * 100 * 6  # Not every line with every flush.
  assert len(objects.sizes("memory://logs/sizes")) == 50
  objects.delete_all("memory://logs/sizes")


def test_a_log_of_a_disk_goes_on_in_a_bucket_and_back(tmp_path):
  def line(step):
    return json.dumps({"step": step}).encode() + b"\n"

  bucket, disk = RunFolder("memory://logs/moved"), RunFolder(tmp_path)
  objects.write("memory://logs/moved/metrics.jsonl", line(1) + line(2) + line(3))
  bucket.rewind_metrics(2)
  log = logs.appending(bucket.metrics)
  log.write(line(3) + line(4))
  log.close()
  assert [one["step"] for one in bucket.read_metrics()] == [1, 2, 3, 4]
  for name in objects.sizes("memory://logs/moved"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(objects.read(f"memory://logs/moved/{name}"))
  log = logs.appending(disk.metrics)
  log.write(line(5) + line(6))
  log.close()
  assert [one["step"] for one in disk.read_metrics()] == [1, 2, 3, 4, 5, 6]
  disk.rewind_metrics(3)
  assert [one["step"] for one in disk.read_metrics()] == [1, 2, 3]
  log = logs.appending(disk.metrics)
  log.write(line(4))
  log.close()
  assert [one["step"] for one in disk.read_metrics()] == [1, 2, 3, 4]
  objects.delete_all("memory://logs/moved")


def test_what_is_not_known_is_not_taken_for_missing(monkeypatch):
  """A bucket that does not answer has no rollbacks "so far": nobody may train on that."""
  folder = RunFolder("memory://logs/quiet")

  def entries(url):
    raise objects.Unreachable(5, "no answer", url)

  monkeypatch.setattr(objects, "entries", entries)
  for ask in (folder.read_rollbacks, folder.read_metrics, folder.read_config):
    with pytest.raises(objects.Unreachable, match="cannot be reached"):
      ask()
