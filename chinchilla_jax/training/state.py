"""The train state: plain nested dicts of arrays.

  step       int32: steps taken, skipped updates included
  params     the model's parameters, in `precision.parameters`
  optimizer  count (updates applied), mu, nu and, with a master, master: float32
  guard      int32 nonfinite_run, nonfinite_total: skipped updates, in a row and in all;
             int32 spike_total: spikes, skipped or not; the running estimate of `spikes`

A checkpoint's tree is this tree; a golden test holds it. The data cursor is not in it: it is
a function of the step (`durations.BatchSchedule.cursor`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from chinchilla_jax import config as schema
from chinchilla_jax.model import transformer
from chinchilla_jax.training import spikes
from chinchilla_jax.training.optimizer import AdamW

State = dict[str, Any]


def init(model: schema.Model, optimizer: AdamW, key: jax.Array) -> State:
  """A fresh state. Weights are drawn in float32; the master keeps them so."""
  params, optimizer_state = optimizer.init(transformer.init(model, key, jnp.float32))
  counts = ("nonfinite_run", "nonfinite_total", "spike_total")
  guard = {name: jnp.int32(0) for name in counts} | spikes.init()
  return {"step": jnp.int32(0), "params": params, "optimizer": optimizer_state, "guard": guard}


def abstract(model: schema.Model, optimizer: AdamW) -> State:
  """The same tree of shapes and dtypes, without memory."""
  return jax.eval_shape(lambda key: init(model, optimizer, key), jax.random.key(0))
