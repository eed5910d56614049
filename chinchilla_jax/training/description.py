"""What a run says of itself before its first step."""

from typing import TYPE_CHECKING

import jax

from chinchilla_jax.parallel import mesh as mesh_lib
from chinchilla_jax.parallel import processes
from chinchilla_jax.parallel.layout import Layout
from chinchilla_jax.training import state as state_lib

if TYPE_CHECKING:
  from chinchilla_jax.training.loop import Plan


def of(made: "Plan", layout: Layout) -> list[str]:
  """What is about to be trained, on what, for how long; every number with its convention."""
  model, clock = made.experiment.model, made.clock
  precision = made.experiment.precision
  train, total = made.store.split("train"), clock.tokens(clock.total_steps)
  devices = jax.devices()
  entries = layout.entries(state_lib.abstract(model, made.optimizer))
  held = sum(entry.bytes_per_device(layout.mesh.shape) for entry in entries)
  lines = [
      f"model: {clock.n_params:,} parameters (rule of Table A9, embedding included), "
      f"{model.n_layers} x {model.d_model}, {model.position} positions, "
      f"{precision.parameters} parameters, {precision.activations} activations",
      f"data: {made.experiment.data.store}, {train.n_tokens:,} tokens in {train.n_documents:,} "
      f"documents, vocabulary {made.store.tokenizer.vocab_size:,}",
      f"run: {clock.total_steps:,} steps, {total:,} tokens = {total / clock.n_params:.3g} per "
      f"parameter = {total / clock.epoch_tokens:.2f} epochs, {clock.flops(clock.total_steps):.3g} "
      f"FLOPs (6ND)",
      f"mesh: {mesh_lib.shape_text(layout.mesh)} ({len(devices)} x {devices[0].device_kind}, "
      f"{processes.count()} process{'es' if processes.count() > 1 else ''}), strategy "
      f"{made.experiment.mesh.strategy}, {held / 2**20:,.1f} MiB of train state per device, "
      f"attention {layout.attention}",
  ]
  if made.store.tokenizer.vocab_size < model.vocab_size:
    lines.append(f"note: {model.vocab_size - made.store.tokenizer.vocab_size:,} rows of the "
                 "embedding stand for no piece of the tokenizer")
  return lines
