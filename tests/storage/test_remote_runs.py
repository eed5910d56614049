"""Runs in buckets: the same bits as on a disk, whatever ends a process on the way."""

import json
import pathlib
import signal
import sys
import time
import urllib.request

import pytest
from tiny import StopAfter, with_fields

from chinchilla_jax import cli
from chinchilla_jax.errors import UserError
from chinchilla_jax.storage import objects
from chinchilla_jax.training import checkpoint, loop, run_lock
from chinchilla_jax.training.run_folder import RunFolder
from launch import assert_same_run, finish, records, run, start

# A lease is good for 3 seconds, so that a killed process keeps nobody waiting.
SHORT = "from chinchilla_jax.training import run_lock\nrun_lock.SECONDS = 3.0\n"

# Dies after so many objects of the checkpoint of a step have been put.
DIES = SHORT + """
import os, signal
from chinchilla_jax.storage import objects
_upload, _count = objects.upload, []
def upload(file, url):
  if "/checkpoints/{step}/" in url:
    _count.append(url)
    if len(_count) > {after}:
      os.kill(os.getpid(), signal.SIGKILL)
  _upload(file, url)
objects.upload = upload
"""

# Dies when everything is there but the commit.
UNCOMMITTED = SHORT + """
import os, signal
from chinchilla_jax.training import remote
_commit = remote.commit
def commit(path, step):
  if step == {step}:
    os.kill(os.getpid(), signal.SIGKILL)
  _commit(path, step)
remote.commit = commit
"""

DIES_AT_STEP = SHORT + """
import os, signal
from chinchilla_jax.training import recorder
_step = recorder.Recorder.step
def step(self, step, values):
  if step == {step}:
    os.kill(os.getpid(), signal.SIGKILL)
  _step(self, step, values)
recorder.Recorder.step = step
"""


def test_the_run_on_a_disk_bit_for_bit_and_every_command_reads_it(
    server, tiny, tiny_run, tiny_store, tmp_path, capsys):
  """The store is in the bucket too; TensorBoard's events are."""
  _, whole = tiny_run
  server.copy_up(pathlib.Path(tiny_store), "stores/tiny")
  url = f"{server.url}/runs/whole"
  experiment = with_fields(tiny, data__store=f"{server.url}/stores/tiny",
                           logging__tensorboard=True)
  status, text = run(experiment, url, SHORT)
  assert status == 0, text
  assert f"checkpoint and metrics in {url}" in text
  assert_same_run(server.copy_down("runs/whole", tmp_path / "down"), whole, 12)
  assert records(url) == records(whole)
  assert checkpoint.newest_good(RunFolder(url).checkpoints) == (12, {})
  names = server.names("runs/whole")
  assert not [name for name in names if name.endswith((".partial", "lease.json"))]
  assert [name for name in names if "/tensorboard/events" in name]

  def ask(*words) -> str:
    assert cli.main(list(words)) == 0
    return capsys.readouterr().out

  if server.kind == "s3":
    return  # From here on no scheme makes a difference, and moto answers slowly.
  found = json.loads(ask("inspect", "--workdir", url, "--json"))["run"]
  assert [(row["step"], row["problem"]) for row in found["checkpoints"]] == [
      (4, ""), (8, ""), (12, "")]
  assert found["resume"]["step"] == 12 and not found["partial"] + found["aside"]
  local = json.loads(ask("evaluate", "--workdir", str(whole), "--json"))
  there = json.loads(ask("evaluate", "--workdir", url, "--json"))
  assert {key: there[key] for key in ("step", "loss", "bits_per_byte", "targets")} == {
      key: local[key] for key in ("step", "loss", "bits_per_byte", "targets")}
  words = ("--prompt", "import ", "--max-tokens", "8")
  assert ask("generate", "--workdir", url, *words) == ask(
      "generate", "--workdir", str(whole), *words)
  assert "1 run" in ask("report", url, "--out", str(tmp_path / "report.html"))
  assert "complete" in (tmp_path / "report.html").read_text()
  assert "nothing to do" in ask("train", f"--config={url}/config.json", "--workdir", url)
  again = with_fields(experiment, checkpoint__init_from=url, run_length="3 steps",
                      checkpoint__every="0 steps", logging__tensorboard=False)
  assert loop.train(again, tmp_path / "new").step == 3
  assert f"starting from the parameters of {url} at step 12" in capsys.readouterr().out


def test_killed_wherever_it_hurts(gs_server, tiny, tiny_run, tmp_path):
  """In a first save, after a save's last object, between saves: the same command goes on."""
  _, whole = tiny_run
  url = f"{gs_server.url}/runs/killed"
  path = RunFolder(url).checkpoints
  for prelude, left, partial in ((DIES.format(step=4, after=20), [], "4.partial"),
                                 (UNCOMMITTED.format(step=8), [4], "8.partial"),
                                 (DIES_AT_STEP.format(step=11), [4, 8], None)):
    status, text = run(tiny, url, prelude, ["--config.checkpoint.asynchronous=false"])
    assert status == -signal.SIGKILL, text
    assert checkpoint.steps(path) == left
    assert [n for n, _ in objects.entries(path.url) if n.endswith(".partial")] == (
        [partial] if partial else [])
  status, text = run(tiny, url, SHORT)
  assert status == 0 and "resuming at step 8" in text, text
  assert_same_run(gs_server.copy_down("runs/killed", tmp_path / "down"), whole, 12)
  assert records(url) == records(whole)
  assert [n for n, _ in objects.entries(path.url)] == ["12", "4", "8"]
  events = [e["event"] for e in RunFolder(url).read_journal()]
  assert events == ["start", "start", "resume", "resume", "complete"]


def test_a_damaged_object_is_noticed_and_its_checkpoint_set_aside(
    gs_server, tiny, tiny_run, tmp_path):
  _, whole = tiny_run
  url = f"{gs_server.url}/runs/damaged"
  gs_server.copy_up(whole, "runs/damaged")  # A run of a disk goes on in a bucket.
  [victim] = [name for name in gs_server.names("runs/damaged/checkpoints/12")
              if "/state/d/" in name][:1]
  files = gs_server.files()
  content = bytearray(files.cat_file(f"bucket/{victim}"))
  content[len(content) // 2] ^= 1
  files.pipe_file(f"bucket/{victim}", bytes(content))
  assert "has changed" in checkpoint.problem(RunFolder(url).checkpoints, 12)
  assert checkpoint.problem(RunFolder(url).checkpoints, 12, "sizes") == ""
  status, text = run(tiny, url, SHORT)
  assert status == 0 and "checkpoint 12 is damaged: " in text, text
  assert "resuming at step 8" in text and f"kept as {url}/checkpoints/aside/12-damaged" in text
  aside = gs_server.names("runs/damaged/checkpoints/aside/12-damaged")
  assert len(aside) == sum(path.is_file() for path in (whole / "checkpoints/12").rglob("*"))
  down = gs_server.copy_down("runs/damaged", tmp_path / "down")
  assert_same_run(down, whole, 12)
  assert records(url) == records(whole)
  # And back on a disk: it is complete, and its logs are read from their parts.
  assert loop.train(tiny, down).step == 12


def test_one_process_at_a_time(gs_server, tiny, monkeypatch):
  monkeypatch.setattr(run_lock, "SECONDS", 2.0)
  url = f"{gs_server.url}/runs/locked"
  with run_lock.held(RunFolder(url).path) as lock:
    lock.check()
    lock.confirm()
    before = gs_server.names("runs/locked")
    with pytest.raises(UserError, match=f"{url} is in use by process .*--force"):
      loop.train(tiny, url)
    assert gs_server.names("runs/locked") == before  # Nothing was written.
    forced = run_lock.Lease(RunFolder(url).path, force=True)
    with pytest.raises(UserError, match="was lost to process"):
      lock.check()
    forced.release()
  assert gs_server.names("runs/locked") == []


# Twice it waits until the test says so; retries of gcsfs follow faster.
PAUSES = SHORT + """
import asyncio, os, time, types
import gcsfs.retry
gcsfs.retry.asyncio = types.SimpleNamespace(sleep=lambda s: asyncio.sleep(s / 20))
from chinchilla_jax.training import recorder
_step = recorder.Recorder.step
def step(self, step, values):
  while step in (7, 10) and not os.path.exists(f"{folder}/{{step}}"):
    time.sleep(0.05)
  _step(self, step, values)
recorder.Recorder.step = step
"""


def test_a_server_that_is_gone_for_a_while_costs_one_save(tiny, tiny_run, tmp_path, reach):
  from servers import Server
  _, whole = tiny_run
  (tmp_path / "go").mkdir()
  server = reach(Server("gs", tmp_path / "gs").start())
  try:
    process = start(tiny, f"{server.url}/runs/x", PAUSES.format(folder=tmp_path / "go"),
                    ["--config.logging.console=1 steps"], PYTHONUNBUFFERED="1")
    path = RunFolder(f"{server.url}/runs/x").checkpoints
    text = _until(process, "step 5/")
    while checkpoint.steps(path) != [4]:
      assert process.poll() is None
    server.stop()
    (tmp_path / "go/7").touch()
    text += _until(process, "was not saved")
    time.sleep(3.5)  # The lease runs out meanwhile, and is taken again.
    server.start()
    (tmp_path / "go/10").touch()
    status, rest = finish(process)
    text += rest
    assert status == 0, text
    assert "the checkpoint of step 8 was not saved: gs://bucket/runs/x" in text, text
    assert "the newest checkpoint is of step 4, the next save tries again" in text, text
    assert checkpoint.steps(path) == [4, 12]
    assert_same_run(server.copy_down("runs/x", tmp_path / "down"), whole, 12)
    events = [e["event"] for e in RunFolder(f"{server.url}/runs/x").read_journal()]
    assert events == ["start", "save failed", "complete"]
  finally:
    server.stop()


def _until(process, words) -> str:
  text = ""
  for line in process.stdout:
    text += line
    if words in line:
      return text
  raise AssertionError(text)


def test_any_other_scheme_of_fsspec(tiny, tiny_run, tmp_path, monkeypatch):
  """memory:// holds what this process puts there, and knows none of this project's names."""
  import fsspec
  _, whole = tiny_run
  monkeypatch.setattr(run_lock, "SECONDS", 2.0)
  url = "memory://runs/x"
  with monkeypatch.context() as stopped:
    stopped.setattr(loop, "Interrupt", lambda: StopAfter(6))
    assert 6 <= loop.train(tiny, url).step < 12
  assert loop.train(tiny, url).step == 12
  files = fsspec.filesystem("memory")
  for name in files.find("/runs/x"):
    target = tmp_path / "down" / name.removeprefix("/runs/x/")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(files.cat_file(name))
  assert_same_run(tmp_path / "down", whole, 12)
  files.rm("/runs", recursive=True)


def refused(capsys, *words) -> str:
  assert cli.main(list(words)) == 2
  out, err = capsys.readouterr()
  assert err.count("\n") == 1 and "Traceback" not in err + out
  return err


def test_a_bucket_that_is_not_there_is_one_line(server, capsys, tiny_store):
  url = f"{server.kind}://no-such-bucket/run"
  for words in (("train", f"--workdir={url}", f"--config.data.store={tiny_store}"),
                ("inspect", f"--workdir={url}"), ("evaluate", f"--workdir={url}"),
                ("generate", f"--workdir={url}"), ("report", url)):
    assert "there is no bucket 'no-such-bucket'" in refused(capsys, *words)
  assert "is not a run's folder" in refused(capsys, "evaluate", f"--workdir={server.url}/nothing")
  assert "is not a run's folder" in refused(capsys, "report", f"{server.url}/nothing")
  for store in (f"{url}/store", f"{server.url}/nothing"):
    line = refused(capsys, "train", f"--config.data.store={store}", "--workdir=unused")
    assert "there is no bucket" in line or f"no token store at {store}" in line
    assert "unused" not in line


def test_a_key_without_rights_is_one_line(servers, reach, capsys, monkeypatch):
  """moto checks rights where it is told to; the key is in no message."""
  server = reach(servers("s3"))
  monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRETWORD")

  def check_after(requests: bytes) -> None:
    urllib.request.urlopen(urllib.request.Request(
        f"{server.address}/moto-api/reset-auth", data=requests,
        headers={"Content-Type": "text/plain"})).close()

  check_after(b"0")
  try:
    line = refused(capsys, "evaluate", f"--workdir={server.url}/run")
    assert "cannot be reached" in line and "SECRETWORD" not in line
  finally:
    check_after(b"inf")


def test_a_package_that_is_missing_is_one_line(capsys, monkeypatch):
  for scheme, package, extra in (("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")):
    objects._file_system.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    line = refused(capsys, "evaluate", f"--workdir={scheme}://bucket/run")
    assert f'needs the package {package}, which is not installed; pip install "chinchilla_jax[' \
           f'{extra}]"' in line
  assert "nosuch:// is not understood here" in refused(
      capsys, "evaluate", "--workdir=nosuch://bucket/run")
  assert "names no bucket" in refused(capsys, "evaluate", "--workdir=gs:///run")
