"""The folder of one run.

  config.json       the resolved config, library versions and git commit; --config takes it
  metrics.jsonl     one line a step and one an evaluation
  checkpoints/      Orbax
  tensorboard/      event files
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from typing import Any

import chinchilla_jax
from chinchilla_jax import config as schema
from chinchilla_jax import config_io
from chinchilla_jax.errors import UserError

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "sentencepiece",
              "tensorflow-datasets", "array-record", "ml-collections", "numpy")


def versions() -> dict[str, str | None]:
  """Versions of Python, of this package with its git commit, and of the libraries."""
  found: dict[str, str | None] = {"python": platform.python_version(),
                                  "chinchilla_jax": chinchilla_jax.__version__,
                                  "git_commit": git_commit()}
  for name in _LIBRARIES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = None
  return found


def git_commit() -> str | None:
  """Commit of the checkout that the package lies in, "-dirty" if changed; None outside git."""
  root = pathlib.Path(chinchilla_jax.__file__).parent.parent
  if not (root / ".git").exists():
    return None
  def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True,
                          check=True, timeout=20).stdout.strip()
  try:
    return git("rev-parse", "HEAD") + (
        "-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
  except (OSError, subprocess.SubprocessError):
    return None


class RunFolder:
  """Paths in a run's folder, and its config file."""

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self.config = self.path / "config.json"
    self.metrics = self.path / "metrics.jsonl"
    self.checkpoints = self.path / "checkpoints"
    self.tensorboard = self.path / "tensorboard"

  def write_config(self, experiment: schema.Experiment) -> None:
    """Writes config.json; a crash leaves the old one or the new one, never half of it."""
    self.path.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"config": config_io.to_dict(experiment), "versions": versions()}, indent=2)
    write_atomically(self.config, text + "\n")

  def read_config(self) -> schema.Experiment:
    """The experiment of this run.

    Raises:
      UserError: the folder is not a run.
    """
    if not self.config.is_file():
      raise UserError(f"--workdir: {str(self.path)!r} is not a run's folder (it has no "
                      "config.json); give the folder that `chinchilla train` wrote")
    return config_io.load(str(self.config))

  def rewind_metrics(self, step: int) -> None:
    """Cuts metrics.jsonl back to `step`: a restart repeats no line and loses none."""
    if not self.metrics.is_file():
      return
    kept = []
    for line in self.metrics.read_text(errors="replace").splitlines():
      try:
        record: Any = json.loads(line)
      except json.JSONDecodeError:  # The line that a crash cut short.
        continue
      if isinstance(record, dict) and record.get("step", step + 1) <= step:
        kept.append(line + "\n")
    write_atomically(self.metrics, "".join(kept))

  def read_metrics(self) -> list[dict[str, Any]]:
    """Every record of metrics.jsonl, in order."""
    if not self.metrics.is_file():
      return []
    return [json.loads(line) for line in self.metrics.read_text().splitlines()]


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Writes a sibling, flushes it to disk, and renames it over `path`."""
  partial = path.with_name(path.name + ".partial")
  with open(partial, "w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  partial.replace(path)
