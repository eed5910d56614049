"""Folders of runs that never ran: their config, metrics and journal, written by hand."""

import json
import os
import pathlib
from typing import Any

from tiny import tiny_experiment

from chinchilla_jax import config_io

TOKENS = 128  # Of a step of the tiny experiment.


def train_line(step: int, **values: Any) -> dict[str, Any]:
  return {"kind": "train", "step": step, "tokens": TOKENS * step, "epoch": step / 1000,
          "flops_6nd": 6.0 * 1000 * TOKENS * step, "loss": 6.0 / (1 + step / 50),
          "learning_rate": 1e-3, "grad_norm": 1.0, "update_norm": 0.1, "param_norm": 30.0,
          "nonfinite_run": 0.0, "tokens_per_second": 5000.0, **values}


def eval_line(step: int, loss: float) -> dict[str, Any]:
  return {"kind": "eval", "step": step, "tokens": TOKENS * step, "epoch": step / 1000,
          "flops_6nd": 6.0 * 1000 * TOKENS * step, "loss": loss, "bits_per_byte": loss / 2.5,
          "targets": 1000.0, "bytes": 3700.0}


def trouble_line(step: int, what: str, text: str) -> dict[str, Any]:
  return {"kind": "trouble", "step": step, "tokens": TOKENS * step, "epoch": step / 1000,
          "flops_6nd": 6.0 * 1000 * TOKENS * step, "what": what, "text": text}


def sample_line(step: int, prompt: str, text: str) -> dict[str, Any]:
  return {"kind": "sample", "step": step, "tokens": TOKENS * step, "epoch": step / 1000,
          "flops_6nd": 6.0 * 1000 * TOKENS * step, "prompt": prompt, "text": text}


def event_line(event: str, minute: int, **facts: Any) -> dict[str, Any]:
  return {"event": event, "time": f"2026-01-02T03:{minute:02d}:00+00:00", **facts}


def write(folder: pathlib.Path, metrics: Any = (), journal: Any = (), *, tail: str = "",
          **fields: Any) -> pathlib.Path:
  """Writes a run's folder; `tail` follows the last line of metrics.jsonl."""
  folder.mkdir(parents=True)
  tree = config_io.to_dict(tiny_experiment("stores/none"))
  for name, value in fields.items():
    *path, leaf = name.split("__")
    node = tree
    for key in path:
      node = node[key]
    node[leaf] = value
  (folder / "config.json").write_text(json.dumps({"config": tree, "versions": {"jax": "0.10.1"}}))
  with open(folder / "metrics.jsonl", "w") as file:
    file.writelines(json.dumps(line) + "\n" for line in metrics)
    file.write(tail)
  if journal:
    # Its process is gone: there is none of this number.
    lock = {"host": os.uname().nodename, "pid": 2**31 - 1, "since": "now"}
    (folder / ".lock").write_text(json.dumps(lock))
    (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in journal))
  return folder
