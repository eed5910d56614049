"""The Dockerfile, as far as that goes without Docker; and the scripts through shellcheck."""

import fnmatch
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from tiny import ROOT


def instructions():
  """(instruction, rest) in order, continued lines joined."""
  text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
  lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
  return [tuple(line.split(None, 1)) for line in lines]


def copies():
  """(sources, destination) of every COPY."""
  words = [rest.split() for name, rest in instructions() if name == "COPY"]
  assert not any(word.startswith("--from") for one in words for word in one)
  return [(one[:-1], one[-1]) for one in words]


def test_the_base_is_pinned_and_the_user_is_not_root():
  names = [name for name, _ in instructions()]
  assert names.count("FROM") == 1 and dict(instructions())["FROM"] == "python:3.12-slim-bookworm"
  users = [rest for name, rest in instructions() if name == "USER"]
  assert users[-1] == "1000:1000"
  # Nothing runs as root after it.
  assert set(names[names.index("USER") + 1:]) == {"ENTRYPOINT", "CMD"}
  assert dict(instructions())["ENTRYPOINT"] == '["chinchilla"]'  # A shell would eat the signals.
  assert "ADD" not in names


def test_no_secret_is_built_in():
  text = (ROOT / "Dockerfile").read_text()
  assert not re.search(r"(?i)(key|token|password|secret)\s*=", text)
  assert {rest.split("=")[0] for name, rest in instructions() if name == "ARG"} == {"EXTRA"}


def test_every_source_is_there_and_passes_the_ignore_file():
  rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines()
           if line and not line.startswith("#")]
  assert rules[0] == "*"
  allowed = {rule[1:] for rule in rules if rule.startswith("!")}
  tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], text=True, capture_output=True).stdout
  for sources, _ in copies():
    for source in sources:
      assert (ROOT / source).exists(), source
      assert source.split("/")[0] in allowed, source
      # From the repository alone: what is not in it would be missing in a fresh clone.
      assert not tracked or any(name == source or name.startswith(f"{source}/")
                                for name in tracked.splitlines()), source
  for secret in (".git", ".env", "runs", "stores", ".venv"):
    assert not any(fnmatch.fnmatch(secret, rule) for rule in allowed)


def test_what_is_copied_is_a_whole_program(tmp_path):
  """The same files in a folder of their own: the command starts, and its configs load."""
  for sources, destination in copies():
    for source in sources:
      target = tmp_path / destination / pathlib.Path(source).name if destination == "./" \
          else tmp_path / destination
      target.parent.mkdir(parents=True, exist_ok=True)
      if (ROOT / source).is_dir():
        shutil.copytree(ROOT / source, target, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("__pycache__"))
      else:
        shutil.copy(ROOT / source, target)
  run = lambda *words: subprocess.run(
      [sys.executable, *words], cwd=tmp_path, text=True, capture_output=True, timeout=300,
      env={"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)})
  assert run("-m", "chinchilla_jax", "--version").stdout.startswith("chinchilla_jax ")
  done = run("-m", "chinchilla_jax", "inspect", "--config=configs/chinchilla.py:70b",
             "--topology=v4:8x8x16")
  assert done.returncode == 0, done.stderr
  done = run("setup.py", "--name") if run("-c", "import setuptools").returncode == 0 else None
  assert done is None or done.stdout.strip().endswith("chinchilla_jax")


SCRIPTS = sorted(path for folder in ("launch", "tests/launch", ".ci", "tests/survival")
                 for path in (ROOT / folder).glob("**/*")
                 if path.suffix in (".sh", ".sbatch"))


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
  done = subprocess.run(["shellcheck", script], text=True, capture_output=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it_and_it_can_be_run(script):
  assert subprocess.run(["bash", "-n", script]).returncode == 0
  assert script.stat().st_mode & 0o111
