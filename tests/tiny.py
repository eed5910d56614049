"""A tiny experiment, and how to change one."""

import pathlib
import signal

from chinchilla_jax import config as schema
from chinchilla_jax import config_io

ROOT = pathlib.Path(__file__).parent.parent


def with_fields(experiment: schema.Experiment, **fields) -> schema.Experiment:
  """with_fields(e, model__n_layers=3, seed=1): the experiment with some fields changed."""
  tree = config_io.to_dict(experiment)
  for name, value in fields.items():
    *path, leaf = name.split("__")
    node = tree
    for key in path:
      node = node[key]
    node[leaf] = value
  return config_io.from_dict(tree)


def tiny_experiment(store: str = "") -> schema.Experiment:
  """Two layers of width 32 on sequences of 32 tokens; a step takes milliseconds."""
  return config_io.from_dict({
      "name": "tiny", "run_length": "12 steps",
      "model": {"n_layers": 2, "d_model": 32, "n_heads": 2, "kv_size": 16, "d_ff": 64,
                "vocab_size": 512, "attention_block": 16},
      "batch": {"sequences": 4},
      "corpus": {"validation_fraction": 0.25},
      "tokenizer": {"vocab_size": 512},
      "data": {"store": store, "seq_len": 32},
      "optimizer": {"peak_lr": 1e-2},
      "schedule": {"warmup": "2 steps"},
      "loss": {"chunk": 64},
      "evaluation": {"every": "6 steps", "max_tokens": 2000},
      "checkpoint": {"every": "4 steps"},
      "logging": {"tensorboard": False},
  })


class StopAfter:
  """Stands in for Ctrl-C; the loop hears of it with the values of the step before."""

  def __init__(self, steps):
    self.left = steps

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    pass

  @property
  def signal(self):
    self.left -= 1
    return signal.SIGINT if self.left < 0 else None
