"""Bad input of every kind: one line with cause and cure, exit status 2, nothing written or changed.

The table is the test. A case puts something bad into an empty folder, which is also the current
one, and gives the command line that meets it there. `cause` is what the line must say is wrong
and where, `cure` what it must say about mending it (regular expressions).
"""

import contextlib
import os
import socket
import subprocess
import sys
import types
from collections.abc import Iterator

import cases_checkpoints  # noqa: F401  (each adds its cases to the table)
import cases_command_line  # noqa: F401
import cases_planning  # noqa: F401
import cases_stores  # noqa: F401
import pytest
from cases import CASES, Room, check, snapshot
from cases_text import two_documents
from tiny import ROOT, tiny_experiment

from chinchilla_jax import cli, config_io, durations
from chinchilla_jax.data import tokens
from chinchilla_jax.errors import UserError
from chinchilla_jax.inference import generate


@pytest.fixture
def room(tmp_path, tiny_store, monkeypatch, request) -> Iterator[Room]:
  path = tmp_path / "here"
  path.mkdir()
  monkeypatch.chdir(path)
  with contextlib.ExitStack() as ending:
    yield Room(path, tiny_store, lambda: request.getfixturevalue("tiny_run")[1], ending)


HERE = [case for case in CASES if case.devices == 1]
APART = [case for case in CASES if case.devices > 1 or case.name in (
    "unknown flag", "bytes that are not UTF-8", "tokenizer that is empty",
    "store: shard with a flipped bit", "store: ledger with a file above it",
    "checkpoint: every one is damaged", "checkpoint: state of another shape, evaluate",
    "checkpoint: arrays are nonsense, but sealed", "checkpoint: a process is at it")]


@pytest.mark.parametrize("case", HERE, ids=lambda case: case.name)
def test_one_line_with_cause_and_cure_and_nothing_written(case, room, capfd):
  case.make(room)
  before = snapshot(room.path.parent)
  capfd.readouterr()
  status = cli.main(list(case.argv))
  captured = capfd.readouterr()
  check(case, status, captured.err)
  assert captured.out == ""
  assert snapshot(room.path.parent) == before


@pytest.mark.parametrize("case", APART, ids=lambda case: case.name)
def test_the_same_from_a_shell(case, room):
  """What a process prints, C++ libraries included, and leaves."""
  case.make(room)
  before = snapshot(room.path.parent)
  flags = f"--xla_force_host_platform_device_count={case.devices}"
  done = subprocess.run(
      [sys.executable, "-m", "chinchilla_jax", *map(os.fsencode, case.argv)], capture_output=True,
      env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}, timeout=120)
  check(case, done.returncode, done.stderr.decode())
  assert done.stdout == b""
  assert snapshot(room.path.parent) == before


def test_there_are_cases_enough():
  assert len(CASES) >= 70 and len(APART) >= 5
  assert {case.argv[0] for case in CASES} >= set(cli.COMMANDS)


def test_a_dataset_that_nobody_knows_is_refused_without_asking_the_network(room, monkeypatch):
  """So it is refused at once where there is no network, or one that swallows packets."""
  asked = []
  for name in ("getaddrinfo", "create_connection"):
    monkeypatch.setattr(socket, name, lambda *args, **kwargs: asked.append(args))
  monkeypatch.setattr(socket.socket, "connect", lambda *args: asked.append(args))
  assert cli.main(["prepare", "tfds:nosuch", "--config.corpus.tfds_data_dir=tfds"]) == 2
  assert asked == []


def test_a_store_may_hold_links_to_elsewhere(room):
  """Shards on another disk: what the ledger names has to be in the folder, not its content."""
  folder, elsewhere = room.store(), room.path / "elsewhere"
  elsewhere.mkdir()
  for path in list(folder.glob("tokens-*")):
    path.rename(elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)
  store = tokens.open_store(str(folder), "full")
  assert len(store.split("train").read(0, 100)) == 100


def test_preparing_anew_what_a_link_leads_to_keeps_the_link(room):
  two_documents(room)
  (room.path / "disk").mkdir()
  (room.path / "link").symlink_to("disk/store")
  words = ["prepare", "text", "--store=link", "--config.tokenizer.vocab_size=300"]
  assert cli.main(words) == 0
  assert cli.main([*words, "--config.corpus.validation_fraction=0.4", "--overwrite"]) == 0
  assert (room.path / "link").is_symlink()
  assert os.listdir(room.path / "disk") == ["store"]


def test_text_too_long_for_the_memory_is_refused_before_any_is_made(room):
  model = types.SimpleNamespace(store=tokens.open_store(room.stores),
                                experiment=tiny_experiment(room.stores))
  with pytest.raises(UserError, match=r"--max-tokens: a prompt of .* GiB .*; lower it"):
    generate.generate(model, "import", max_tokens=10**12)


def test_a_config_file_leaves_no_bytecode_and_is_never_stale(room):
  for seed in (1, 2):  # same size, same second
    room.write("c.py", f"def get_config(): return {{'seed': {seed}}}")
    assert config_io.load("c.py").seed == seed
  assert os.listdir(room.path) == ["c.py"]


def test_lengths_are_read_as_they_are_meant():
  assert durations.parse("1,000,000 steps").value == 1_000_000
  for text in ("1,5 steps", "1,00 steps", "10,0000 steps", "1e40 flops"):
    with pytest.raises(UserError):
      durations.parse(text)
