"""Compiled programs are kept, found again, and never in anybody's way."""

import os
import pathlib
import subprocess
import sys

import pytest
from tiny import ROOT

from chinchilla_jax.errors import UserError
from chinchilla_jax.storage import compiled

# Compiles one program that takes longer than what is worth keeping, and says how it got it.
PROGRAM = """
from chinchilla_jax.storage import compiled
compiled.keep()
import jax, jax.numpy as jnp
seen = []
jax.monitoring.register_event_listener(lambda name, **_: seen.append(name))
def f(x):
  for i in range(60):
    x = jnp.sin(x @ x) + i * jnp.cumsum(x, axis=0)
  return x
value = jax.jit(f)(jnp.eye(16))
print(sum("cache_hits" in name for name in seen), float(value.sum()))
"""


def run(**environ) -> tuple[int, str]:
  """(programs that were found, the result)."""
  plain = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
  done = subprocess.run(
      [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True,
      env={**plain, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environ})
  assert done.stderr == ""
  hits, result = done.stdout.split()
  return int(hits), result


def entries(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(folder.glob("*/*-cache"))


def test_the_second_process_compiles_nothing_and_computes_the_same(tmp_path):
  hits, result = run(CHINCHILLA_COMPILED=str(tmp_path))
  assert hits == 0 and entries(tmp_path)
  again, same = run(CHINCHILLA_COMPILED=str(tmp_path))
  assert again == len(entries(tmp_path)) and same == result


def test_what_a_killed_process_left_half_written_is_written_anew(tmp_path):
  _, result = run(CHINCHILLA_COMPILED=str(tmp_path))
  entry = max(entries(tmp_path), key=lambda path: path.stat().st_size)
  whole = entry.read_bytes()
  entry.write_bytes(whole[:len(whole) // 2])
  entry.with_name(entry.name.removesuffix("-cache") + "-atime").unlink()
  _, same = run(CHINCHILLA_COMPILED=str(tmp_path))
  assert same == result and entry.stat().st_size > len(whole) // 2
  hits, _ = run(CHINCHILLA_COMPILED=str(tmp_path))
  assert hits == len(entries(tmp_path))


def told(**environ) -> list[str]:
  """What a process that compiles the program says on stderr."""
  plain = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
  return subprocess.run(
      [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True,
      env={**plain, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environ},
  ).stderr.splitlines()


def test_what_cannot_be_read_is_told_in_one_line_and_replaced(tmp_path):
  run(CHINCHILLA_COMPILED=str(tmp_path))
  for entry in entries(tmp_path):
    entry.write_bytes(b"garbage")
  (line,) = told(CHINCHILLA_COMPILED=str(tmp_path))
  assert line.startswith("note: the compiled jit_") and "is damaged (" in line
  assert run(CHINCHILLA_COMPILED=str(tmp_path))[0] == len(entries(tmp_path)) > 0


def test_a_full_disk_is_told_in_one_line(tmp_path):
  full = """
import pathlib
def full(path, data):
  raise OSError(28, "No space left on device")
"""
  program = PROGRAM.replace("seen = []", f"{full}from jax._src import path as its_path\n"
                            "its_path.Path.write_bytes = full\nseen = []")
  plain = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
  done = subprocess.run(
      [sys.executable, "-c", program], capture_output=True, text=True, check=True,
      env={**plain, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
           "CHINCHILLA_COMPILED": str(tmp_path)})
  (line,) = done.stderr.splitlines()
  assert "cannot be kept in" in line and "No space left" in line and "or off" in line


def test_processes_that_share_a_folder_do_not_disturb_each_other(tmp_path):
  plain = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
  at_once = [subprocess.Popen(
      [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      env={**plain, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
           "CHINCHILLA_COMPILED": str(tmp_path)}) for _ in range(3)]
  ended = [(*process.communicate(), process.returncode) for process in at_once]
  assert {(err, status) for _, err, status in ended} == {("", 0)}
  results = {out.split()[1] for out, _, _ in ended}
  hits, result = run(CHINCHILLA_COMPILED=str(tmp_path))
  assert hits > 0 and results == {result}


def test_off_and_jax_own_setting_keep_nothing_here(tmp_path):
  run(CHINCHILLA_COMPILED="off", XDG_CACHE_HOME=str(tmp_path))
  assert not list(tmp_path.iterdir())
  run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "jax"), XDG_CACHE_HOME=str(tmp_path / "ours"),
      CHINCHILLA_COMPILED="")
  assert not (tmp_path / "ours").exists()


def test_by_default_they_lie_in_the_users_cache_folder(tmp_path):
  run(CHINCHILLA_COMPILED="", XDG_CACHE_HOME=str(tmp_path))
  assert entries(tmp_path / "chinchilla_jax/compiled")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("CHINCHILLA_COMPILED", str(tmp_path / "file"))
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  with pytest.raises(UserError, match="CHINCHILLA_COMPILED: .* cannot be written"):
    compiled.keep()
  for value, why in (("~nobody-of-this-name/x", "home"), ("gs://bucket/x", "no folder on a disk")):
    monkeypatch.setenv("CHINCHILLA_COMPILED", value)
    with pytest.raises(UserError, match=f"CHINCHILLA_COMPILED: .*{why}"):
      compiled.keep()
  monkeypatch.chdir(tmp_path)
  for value in (" OFF ", "0", "False"):
    monkeypatch.setenv("CHINCHILLA_COMPILED", value)
    compiled.keep()
  assert os.listdir(tmp_path) == ["file"]
  # Nobody asked for the default one, so nobody is bothered with it.
  assert run(CHINCHILLA_COMPILED="", XDG_CACHE_HOME=str(tmp_path / "file"))[0] == 0


def test_who_has_no_home_keeps_nothing(monkeypatch):
  def homeless():
    raise RuntimeError("Could not determine home directory.")
  for name in ("CHINCHILLA_COMPILED", "JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(compiled.pathlib.Path, "home", homeless)
  compiled.keep()
