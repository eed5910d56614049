"""A plan as a config file that reads like those in configs/."""

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from chinchilla_jax import config_io
from chinchilla_jax.model.shapes import count_parameters
from chinchilla_jax.scaling import shapes_near
from chinchilla_jax.scaling.labels import short
from chinchilla_jax.scaling.plan import Plan

# Fields of the schema in the order in which a reader wants them; every other one keeps its default.
_MODEL = ("n_layers", "d_model", "n_heads", "kv_size", "d_ff", "vocab_size", "remat",
          "attention_block")


def text(plan: Plan, command: str) -> str:
  """The source of a config file whose get_config() is the plan's experiment.

  Args:
    plan: what to write.
    command: that made it, for the docstring.
  """
  return "\n".join([*_docstring(plan, command), "", "from chinchilla_jax import config_io", "", "",
                    "def get_config():", "  config = config_io.default_config()",
                    *_body(plan), "  return config", ""])


def _docstring(plan: Plan, command: str) -> Iterator[str]:
  yield f'"""{short(plan.params)} parameters on {short(plan.tokens)} tokens: a plan for ' \
        f"{plan.flops:.4g} FLOPs (6ND)."
  yield ""
  yield f"Written by: {command}"
  yield f"Law: {plan.ask.law.name} ({plan.ask.law.source})."
  yield f"N = {plan.params:,} by the rule of Table A9, embedding included; 6ND of the run is"
  yield f"{plan.training_flops:.4g}."
  yield '"""'


def _body(plan: Plan) -> Iterator[str]:
  experiment, shape = plan.experiment, plan.shape
  changed = {name: new for name, _, new in config_io.differences(
      config_io.from_dict({}), experiment, "identity", "length", "layout", "guard", "observation",
      "store")}

  def put(name: str, note: str = "") -> Iterator[str]:
    if name in changed:
      yield f"  config.{name} = {_literal(changed.pop(name))}{f'  # {note}' if note else ''}"

  yield from put("name")
  yield from put("run_length", f"{plan.tokens / plan.params:.1f} tokens per parameter, "
                 f"{plan.steps:,} steps")
  yield ""
  kind = "published" if shape in shapes_near.PUBLISHED else "the ratios of Table A9"
  yield f"  # {shape.name}, {kind}: {count_parameters(shape):,} parameters."
  for field in _MODEL:
    if field in ("remat", "attention_block"):
      yield from put(f"model.{field}")
    else:
      changed.pop(f"model.{field}", None)
      yield f"  config.model.{field} = {_literal(getattr(shape, field))}"
  yield ""
  yield from _wrapped(plan.recipe.source)
  for name in ("optimizer.peak_lr", "batch.sequences", "batch.ramp", "batch.microbatches",
               "schedule.warmup"):
    yield from put(name)
  if plan.fit is not None:
    yield ""
    yield f"  # {plan.ask.where.name}: about {plan.fit.share:.0%} of a device's memory, estimated."
  for name in [name for name in changed if name.startswith("mesh.")]:
    yield from put(name)
  if changed:
    yield ""
  for name in list(changed):
    yield from put(name)


def _wrapped(note: str) -> Iterator[str]:
  yield from textwrap.wrap(note, 97, initial_indent="  # ", subsequent_indent="  # ")


def _literal(value: Any) -> str:
  if isinstance(value, tuple):
    return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
  return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
