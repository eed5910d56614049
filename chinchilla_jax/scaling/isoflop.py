"""Families of runs from which scaling laws are fitted: IsoFLOP profiles and training curves.

Both are lists of overrides for `chinchilla sweep` (docs/sweeps.md). Every member sets its own
shape, run length, learning rate, batch and warm-up; the cosine ends with the run, since a
schedule made for a longer one overstates the loss (Hoffmann et al. 2022, Appendix B).
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from chinchilla_jax.errors import UserError
from chinchilla_jax.model.shapes import TABLE_A9, Shape, count_parameters
from chinchilla_jax.scaling import paper_tables, shapes_near, transfer
from chinchilla_jax.scaling.laws import PUBLISHED

Overrides = dict[str, Any]
# N of a shape, FLOPs of the run -> recipe.
Rule = Callable[[float, float], transfer.Recipe]

N_CONVENTIONS: dict[str, Callable[[Shape], int]] = {
    "params_table_a9": count_parameters,
    "params_non_embedding": shapes_near.non_embedding,
}
FEWEST_STEPS = 150  # below that, warm-up and cosine are too coarse to be the schedule they say


@dataclasses.dataclass(frozen=True)
class Settings:
  """What all members of a family share.

  Attributes:
    seq_len: tokens per sequence, as the config has it.
    rule: learning rate and batch by size.
    warmup_steps: longest warm-up; a shorter run takes `warmup_share` of its steps.
    multiple: sequences of a batch are a multiple of it.
  """

  seq_len: int = 2048
  rule: Rule = transfer.paper
  warmup_steps: int = 1500  # Gopher
  warmup_share: float = 0.05
  multiple: int = 1


def isoflop(budgets: Iterable[float], sizes: Callable[[float], Sequence[Shape]],
            settings: Settings, count: str = "params_table_a9") -> list[Overrides]:
  """Approach 2: at each budget several sizes, with D = C / (6 N).

  Args:
    budgets: training FLOPs, counted as 6 N D.
    sizes: shapes for a budget.
    settings: of all members.
    count: the N of 6 N D, a key of `N_CONVENTIONS`. With "params_table_a9" a run length is
      written in FLOPs, for the config counts them so; else in tokens.

  Returns:
    One dict a member, budgets in order and within them sizes in order.

  Raises:
    UserError: a member would have fewer than `FEWEST_STEPS` steps.
  """
  family = []
  for budget in budgets:
    for shape in sizes(budget):
      tokens = budget / 6 / N_CONVENTIONS[count](shape)
      length = (f"{budget:g} flops" if count == "params_table_a9" else f"{tokens:.6g} tokens")
      family.append(_member(shape, length, tokens, settings))
  return family


def training_curves(shapes: Iterable[Shape], horizons: Sequence[float],
                    settings: Settings) -> list[Overrides]:
  """Approach 1: each size at several horizons, each with a cosine of its own length.

  Args:
    shapes: in order.
    horizons: run lengths in tokens per parameter (Table A9). The paper has four a size, over a
      factor of 16, and does not print them.
    settings: of all members.

  Raises:
    UserError: fewer than four horizons; a member would have fewer than `FEWEST_STEPS` steps.
  """
  if len(set(horizons)) < 4:
    raise UserError(f"{len(set(horizons))} horizons a size; approach 1 takes at least 4")
  return [_member(shape, f"{ratio:g} tokens/param", ratio * count_parameters(shape), settings)
          for shape in shapes for ratio in horizons]


def _member(shape: Shape, length: str, tokens: float, settings: Settings) -> Overrides:
  n = count_parameters(shape)
  recipe = settings.rule(n, 6 * n * tokens)
  sequences = transfer.sequences(recipe.batch_tokens, settings.seq_len, settings.multiple)
  steps = tokens / sequences / settings.seq_len
  if steps < FEWEST_STEPS:
    raise UserError(
        f"{length} is {steps:.0f} steps of {sequences} x {settings.seq_len} tokens for the model "
        f"{shape.name}; take smaller models, a larger budget or smaller batches, so that a run "
        f"has at least {FEWEST_STEPS}")
  short = steps * settings.warmup_share < settings.warmup_steps
  return {
      "run_length": length,
      "model.n_layers": shape.n_layers, "model.d_model": shape.d_model,
      "model.n_heads": shape.n_heads, "model.kv_size": shape.kv_size, "model.d_ff": shape.d_ff,
      "optimizer.peak_lr": float(f"{recipe.peak_lr:.3g}"), "batch.sequences": sequences,
      "schedule.warmup": (f"{settings.warmup_share:.0%}" if short
                          else f"{settings.warmup_steps} steps"),
  }


# -------------------------------------------------------------------- The paper's families


PAPER_BUDGETS = paper_tables.ISOFLOP_BUDGETS
PAPER_HORIZONS = (5.0, 12.5, 32.0, 80.0)  # a factor of 16 about 20 tokens per parameter


def paper_sizes(budget: float, at_most: int = 9, factor: float = 4.0) -> list[Shape]:
  """Rows of Table A9 about the optimum that approach 2 has for a budget.

  The paper does not print which sizes each budget had. Here: up to nine, evenly in log N, within
  a factor of four either way, that is from 16 times the best tokens per parameter to a 16th.
  """
  best, _ = PUBLISHED["approach_2"].optimum(budget)
  rows = [row for row in TABLE_A9 if best / factor <= count_parameters(row) <= best * factor]
  if not rows:
    raise UserError(f"a budget of {budget:g} FLOPs: its optimum of {best:.3g} parameters lies "
                    "outside Table A9; name sizes of your own")
  return shapes_near.thinned(rows, at_most)


def paper_curve_sizes(at_most: int = 12) -> list[Shape]:
  """Rows of Table A9 from 70M to 10B, approach 1's range, evenly in log N."""
  rows = [row for row in TABLE_A9 if 70e6 <= count_parameters(row) <= 10e9]
  return shapes_near.thinned(rows, at_most)
