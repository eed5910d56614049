"""A config file with a sweep, and the command in this process and in one of its own."""

import json
import pathlib
import subprocess
import sys

import jax
from tiny import ROOT, tiny_experiment

from chinchilla_jax import cli, config_io

# Of the children. Start-up is most of what they do, so they share the tests' compiled programs.
ENVIRON = {"PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


class Bench:
  """A folder to work in; it becomes the current one."""

  def __init__(self, path: pathlib.Path, store: str, monkeypatch):
    self.path, self.store = path, store
    monkeypatch.chdir(path)
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    for name, value in (ENVIRON | cache).items():
      monkeypatch.setenv(name, value)

  def config(self, sweep: str, name: str = "family.py", **sections) -> str:
    """Writes a config file: the tiny experiment with some fields changed, and this sweep()."""
    tree = config_io.to_dict(tiny_experiment(self.store))
    for section, fields in sections.items():
      tree[section] = tree[section] | fields if isinstance(fields, dict) else fields
    (self.path / name).write_text(
        "from chinchilla_jax.experiments.sweep import chain, fixed, over, product, zipped\n"
        f"def get_config(argument=None):\n  return {tree!r}\n{sweep}\n")
    return str(self.path / name)

  def files(self) -> dict[str, int]:
    """Every file and folder below, with the time of its last change in ns."""
    return {str(path): path.stat().st_mtime_ns for path in self.path.rglob("*")
            if "pycache" not in str(path)}

  def sweep(self, *flags: str) -> int:
    return cli.main(["sweep", *flags])

  def start(self, *flags: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "chinchilla_jax", "sweep", *flags],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rows_of(folder) -> list[dict]:
  """results.jsonl as it lies there."""
  return [json.loads(line) for line in (pathlib.Path(folder) / "results.jsonl").open()]
