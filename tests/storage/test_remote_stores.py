"""Token stores in buckets: copied to this machine once, whole or not at all."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from tiny import ROOT, tiny_experiment, with_fields

from chinchilla_jax import cli
from chinchilla_jax.data import ledger as ledgers
from chinchilla_jax.data import prepare, remote_store, tokenizer, tokens
from chinchilla_jax.errors import UserError
from chinchilla_jax.storage import objects


@pytest.fixture
def store(server, tiny_store, request):
  """The URL of a store of this test's own."""
  name = f"stores/{request.node.name.replace('[', '-').strip(']')}"
  server.copy_up(pathlib.Path(tiny_store), name)
  return f"{server.url}/{name}"


def test_the_store_of_a_disk(store, tiny_store, cache):
  """The same ids, from files that are named by the fingerprint, and copied once."""
  local, there = tokens.open_store(tiny_store), tokens.open_store(store)
  assert there.fingerprint == local.fingerprint
  assert pathlib.Path(there.path) == cache / "stores" / local.fingerprint
  for name in ("train", "validation"):
    count = local.split(name).n_tokens
    np.testing.assert_array_equal(there.split(name).read(0, count),
                                  local.split(name).read(0, count))
  copied = {path: path.stat().st_mtime_ns for path in pathlib.Path(there.path).iterdir()}
  assert tokens.open_store(f"{store}/", "full").path == there.path
  assert {path: path.stat().st_mtime_ns for path in pathlib.Path(there.path).iterdir()} == copied
  assert sorted(os.listdir(cache / "stores")) == [f".{local.fingerprint}.lock", local.fingerprint]
  assert tokenizer.load(store).fingerprint == local.tokenizer.fingerprint


def chunks(store: str) -> list[str]:
  return [name for name in objects.sizes(store) if "array_record" in name]


def test_a_changed_object_is_refused_and_what_was_whole_is_kept(store, cache):
  name = chunks(store)[0]
  whole = objects.read(f"{store}/{name}")
  objects.write(f"{store}/{name}", whole[:-1] + bytes([whole[-1] ^ 1]))
  with pytest.raises(UserError, match=f"{name} has changed .*its checksum is not the ledger's"):
    tokens.open_store(store)
  [partial] = (cache / "stores").glob(".*.partial")
  kept = {path.name: path.stat().st_ino for path in partial.iterdir()}
  assert name not in kept and not [one for one in kept if one.endswith(".coming")]
  objects.write(f"{store}/{name}", whole)
  opened = tokens.open_store(store)
  now = {path.name: path.stat().st_ino for path in pathlib.Path(opened.path).iterdir()}
  assert kept.items() <= now.items() and name in now  # It went on where it had been.
  objects.delete(f"{store}/{name}")
  assert tokens.open_store(store).path == opened.path


def test_a_missing_object_and_a_damaged_ledger_are_one_line(store, cache):
  name = chunks(store)[0]
  objects.delete(f"{store}/{name}")
  with pytest.raises(UserError, match=f"{store}/{name} is missing"):
    tokens.open_store(store)
  objects.write(f"{store}/ledger.json", b"{")
  with pytest.raises(UserError, match="ledger.json is damaged"):
    tokens.open_store(store)
  objects.delete(f"{store}/ledger.json")
  with pytest.raises(UserError, match=f"no token store at {store}: make it with"):
    tokens.open_store(store)


def test_a_damaged_copy_is_copied_again(store, cache, capsys):
  opened = tokens.open_store(store)
  victim = pathlib.Path(opened.path, chunks(store)[0])
  content = victim.read_bytes()
  victim.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
  capsys.readouterr()
  assert tokens.open_store(store).path == opened.path
  out = capsys.readouterr().out
  assert "is damaged" in out and victim.name in out and "copying it again" in out
  assert victim.read_bytes() == content


OPENS = """
import sys
from chinchilla_jax.data import tokens
print(tokens.open_store(sys.argv[1]).path)
"""
HALF = """
import os, signal
from chinchilla_jax.storage import objects
_download, _count = objects.download, []
def download(url, file):
  _count.append(url)
  if len(_count) == 3:
    file.write_bytes(objects.read(url)[:1000])
    os.kill(os.getpid(), signal.SIGKILL)
  _download(url, file)
objects.download = download
"""


def opening(store, prelude=""):
  return subprocess.Popen([sys.executable, "-c", prelude + OPENS, store], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_a_copy_that_was_killed_goes_on_and_two_at_once_make_one(store, tiny_store, cache):
  killed = opening(store, HALF)
  text, _ = killed.communicate(timeout=120)
  assert killed.returncode == -9, text
  fingerprint = json.loads(pathlib.Path(tiny_store, "ledger.json").read_text())["fingerprint"]
  assert not (cache / "stores" / fingerprint).exists()
  both = [opening(store), opening(store)]
  texts = [one.communicate(timeout=120)[0] for one in both]
  assert [one.returncode for one in both] == [0, 0], texts
  assert [text.splitlines()[-1] for text in texts] == [str(cache / "stores" / fingerprint)] * 2
  assert "".join(texts).count("copying") == 1
  ledgers.verify(str(cache / "stores" / fingerprint), ledgers.read(tiny_store), "full")
  assert sorted(os.listdir(cache / "stores")) == [f".{fingerprint}.lock", fingerprint]


def test_prepare_puts_a_store_there(server, cache, tmp_path, capsys):
  """The ids of a store on a disk; up to date the second time; one cut off is no store."""
  source = tmp_path / "text.txt"
  source.write_text("".join(f"line {number} of a small text\n" for number in range(2000)))
  experiment = with_fields(tiny_experiment(), corpus__sources=[str(ROOT / "chinchilla_jax/data")],
                           tokenizer__vocab_size=400)
  local = prepare.prepare(with_fields(experiment, data__store=str(tmp_path / "local")), quiet=True)
  url = f"{server.url}/made/store"
  remote = with_fields(experiment, data__store=url)
  killed = False

  def upload(file, name, _upload=objects.upload):
    if killed and name.endswith("ledger.json"):
      raise objects.Unreachable(5, "the cable is out", name)
    _upload(file, name)

  objects.upload, kept = upload, objects.upload
  try:
    killed = True
    with pytest.raises(UserError, match="the cable is out"):
      prepare.prepare(remote, quiet=True)
  finally:
    objects.upload = kept
  with pytest.raises(UserError, match="no token store"):
    tokens.open_store(url)
  assert prepare.prepare(remote, quiet=True)["fingerprint"] == local["fingerprint"]
  assert sorted(objects.sizes(url)) == sorted(os.listdir(tmp_path / "local"))
  assert tokens.open_store(url, "full").fingerprint == local["fingerprint"]
  capsys.readouterr()
  prepare.prepare(remote)
  assert "is up to date" in capsys.readouterr().err
  with pytest.raises(UserError, match="was made with .*--overwrite"):
    prepare.prepare(with_fields(remote, tokenizer__vocab_size=420), quiet=True)
  other = prepare.prepare(with_fields(remote, tokenizer__vocab_size=420), overwrite=True,
                          quiet=True)
  assert tokens.open_store(url).fingerprint == other["fingerprint"] != local["fingerprint"]
  assert not list((cache / "scratch").iterdir())
  objects.write(f"{server.url}/made/foreign/thing", b"")
  with pytest.raises(UserError, match="holds objects but no token store"):
    prepare.prepare(with_fields(experiment, data__store=f"{server.url}/made/foreign"), quiet=True)
  assert remote_store.PREPARING not in objects.sizes(url)


def test_inspect_and_the_command_line(store, tiny_store, cache, capsys):
  assert cli.main(["inspect", f"--store={store}", "--json"]) == 0
  there = json.loads(capsys.readouterr().out.splitlines()[-1])["store"]
  assert cli.main(["inspect", f"--store={tiny_store}", "--json"]) == 0
  here = json.loads(capsys.readouterr().out)["store"]
  assert there | {"path": ""} == here | {"path": ""}
