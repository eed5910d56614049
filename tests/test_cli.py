import os
import subprocess
import sys

import pytest
from tiny import ROOT

from chinchilla_jax import cli


def test_help_lists_the_commands_and_imports_nothing_heavy():
  code = ("import sys; from chinchilla_jax.cli import main; main(['--help']); "
          "print([m for m in ('jax', 'numpy', 'ml_collections', 'rich') if m in sys.modules])")
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert out.stdout.splitlines()[-1] == "[]"
  for command in cli.COMMANDS:
    assert f"\n  {command} " in out.stdout


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_has_help(command, capsys):
  with pytest.raises(SystemExit) as exit_:
    cli.main([command, "--help"])
  assert exit_.value.code == 0
  assert f"usage: chinchilla {command}" in capsys.readouterr().out


@pytest.mark.parametrize("words, expected", [
    (["trian"], "did you mean train?"),
    (["train", "--confg=x"], "--confg"),
    (["train", "--config"], "no file given"),
    (["train", "--config=missing.py"], "missing.py"),
    (["train", "--config.model.d_modle=3"], "did you mean model.d_model?"),
    (["train", "--config.data.store=nowhere"], "nowhere"),
    (["evaluate"], "--workdir"),
    (["evaluate", "--workdir", "nowhere"], "nowhere"),
    (["generate", "--workdir", "nowhere"], "nowhere"),
    (["prepare", "missing.txt"], "missing.txt"),
])
def test_a_users_mistake_is_one_line_and_status_2(words, expected, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert cli.main(words) == 2
  captured = capsys.readouterr()
  assert captured.err.startswith("chinchilla ") and captured.err.count("\n") == 1
  assert expected in captured.err
  assert list(tmp_path.iterdir()) == [], "nothing may be written"


@pytest.mark.parametrize("platforms", ["rocm", "bogus"])
def test_a_platform_that_is_not_here(platforms):
  done = subprocess.run(
      [sys.executable, "-m", "chinchilla_jax", "compile", "--config=configs/smoke.py"],
      capture_output=True, text=True, cwd=ROOT,
      env=os.environ | {"JAX_PLATFORMS": platforms, "PYTHONPATH": str(ROOT)})
  assert done.returncode == 2 and done.stdout == ""
  (line,) = done.stderr.splitlines()
  assert line.startswith(f"chinchilla compile: JAX_PLATFORMS={platforms}: JAX finds no such device")


def test_config_flags():
  config, overrides, rest = cli.split_config_flags(
      ["--config", "a.py:70b", "x", "--config.model.d_model", "3", "--config.data.store=a=b",
       "--config.model.qk_norm", "--workdir", "w"])
  assert config == "a.py:70b"
  assert overrides == [("model.d_model", "3"), ("data.store", "a=b"), ("model.qk_norm", None)]
  assert rest == ["x", "--workdir", "w"]


@pytest.mark.parametrize("ends, status, said", [
    ("raise UserError('no')", 2, "chinchilla train: no\n"),
    ("raise KeyboardInterrupt", 130, "\nchinchilla train: interrupted\n"),
    ("raise ValueError('odd')", 1, "ValueError: odd\n"),
])
def test_nobody_waits_for_a_step_that_is_still_compiled(ends, status, said):
  """From its end on, the process is gone; the thread that compiles cannot be interrupted."""
  program = f"""
import sys, time
from chinchilla_jax import cli
from chinchilla_jax.errors import UserError
from chinchilla_jax.training import early
class Slow:
  def lower(self):
    time.sleep(600)
def run(name, argv):
  early.compiling(Slow())
  {ends}
cli._run = run
sys.argv = ["chinchilla", "train"]
cli.leave()
"""
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                        timeout=300)
  assert done.returncode == status and done.stderr.endswith(said)
