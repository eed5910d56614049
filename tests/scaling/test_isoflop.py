import math
import pathlib
import runpy

import pytest
from tiny import ROOT

from chinchilla_jax import config_io, durations
from chinchilla_jax.errors import UserError
from chinchilla_jax.experiments import sweep as sweeps
from chinchilla_jax.model import shapes
from chinchilla_jax.scaling import isoflop, shapes_near

CONFIG = str(ROOT / "configs" / "isoflop.py")
FILE = runpy.run_path(CONFIG)


def experiments(form):
  """The members' configs, as `chinchilla sweep` makes them; no store is needed."""
  base = config_io.to_dict(config_io.load(f"{CONFIG}:{form}"))
  found = []
  for overrides in FILE["sweep"](form):
    tree = {name: dict(part) if isinstance(part, dict) else part for name, part in base.items()}
    for name, value in overrides.items():
      section, _, leaf = name.rpartition(".")
      (tree[section] if section else tree)[leaf] = value
    found.append(config_io.from_dict(tree))
  return found


def clock(experiment):
  return durations.clock(
      experiment.run_length, experiment.batch.sequences, experiment.batch.ramp,
      seq_len=experiment.data.seq_len, n_params=shapes.count_parameters(experiment.model),
      epoch_tokens=10**7)


def by_budget(form):
  groups = {}
  for experiment in experiments(form):
    budget = durations.parse(experiment.run_length)
    assert budget.unit == "flops"
    groups.setdefault(budget.value, []).append(experiment)
  return groups


@pytest.mark.parametrize("form", ["paper", "laptop", "1e18,3e18@44m,74m,117m"])
def test_members_hit_their_budgets(form):
  for budget, members in by_budget(form).items():
    for experiment in members:
      made = clock(experiment)
      assert made.flops(made.total_steps) == pytest.approx(budget, rel=0.0035)
      assert made.total_steps >= isoflop.FEWEST_STEPS
      # The schedule is of this run: warm-up in steps, cosine to its last.
      assert experiment.schedule.shape == "cosine"
      assert made.steps(experiment.schedule.warmup) <= 0.06 * made.total_steps


def test_laptop_form():
  groups = by_budget("laptop")
  assert len(groups) >= 4
  assert math.log10(max(groups) / min(groups)) >= 1.5 - 1e-9
  for members in groups.values():
    sizes = [shapes.count_parameters(one.model) for one in members]
    assert len(set(sizes)) >= 5 and sizes == sorted(sizes)
    assert max(sizes) / min(sizes) > 4
    for one in members:
      assert one.model.vocab_size == one.tokenizer.vocab_size <= 512
      # The embedding is at most seven tenths of N.
      assert shapes_near.non_embedding(one.model) > 0.3 * shapes.count_parameters(one.model)
      assert one.precision.activations == "float32" and not one.logging.tensorboard
      assert one.evaluation.every == one.checkpoint.every == "0 steps"


def test_larger_budgets_look_at_larger_models():
  for form in ("paper", "laptop"):
    centres = [sum(math.log(shapes.count_parameters(one.model)) for one in members) / len(members)
               for _, members in sorted(by_budget(form).items())]
    assert centres == sorted(centres)


def test_paper_form():
  groups = by_budget("paper")
  assert sorted(groups) == [6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21]
  rows = {(row.d_model, row.n_layers) for row in shapes.TABLE_A9}
  for members in groups.values():
    assert len(members) >= 5
    for one in members:
      assert (one.model.d_model, one.model.n_layers) in rows
      assert one.batch.sequences * one.data.seq_len % 262_144 == 0
      assert 1.25e-4 <= one.optimizer.peak_lr <= 2e-4
  # The optimum that approach 2 found lies inside the sizes of every budget.
  for budget, members in groups.items():
    sizes = [shapes.count_parameters(one.model) for one in members]
    assert min(sizes) < 0.1449 * budget**0.4899 / 2 and max(sizes) > 0.1449 * budget**0.4899 * 2


@pytest.mark.parametrize("form", ["paper-curves", "laptop-curves"])
def test_training_curves_have_four_horizons_over_a_factor_of_16(form):
  groups = {}
  for experiment in experiments(form):
    groups.setdefault(shapes.count_parameters(experiment.model), []).append(experiment)
  assert len(groups) >= 4
  for members in groups.values():
    tokens = [clock(one).tokens(clock(one).total_steps) for one in members]
    assert len(tokens) >= 4
    assert max(tokens) / min(tokens) == pytest.approx(16, rel=0.02)
    assert len({one.optimizer.peak_lr for one in members}) == 1


def test_members_are_different_runs():
  for form in ("paper", "paper-curves", "laptop", "laptop-curves"):
    family = FILE["sweep"](form)
    assert len({str(one) for one in family}) == len(family)


def test_non_embedding_convention():
  rows = [shapes.find("44m"), shapes.find("74m")]
  family = isoflop.isoflop([1e18], lambda budget: rows, isoflop.Settings(), "params_non_embedding")
  for one, row in zip(family, rows, strict=True):
    tokens = durations.parse(one["run_length"])
    assert tokens.unit == "tokens"
    assert 6 * shapes_near.non_embedding(row) * tokens.value == pytest.approx(1e18, rel=1e-5)


@pytest.mark.parametrize("form, message", [
    ("papr", "got 'papr' as a budget; give FLOPs such as 6e18, or one of the forms paper"),
    ("-1e18@44m", "got '-1e18' as a budget"),
    ("1e18@44q", "unknown model shape '44q'"),
    ("1e12@44m", "is 0 steps of 128 x 2048 tokens for the model 44m"),
    ("1e30", "lies outside Table A9; name sizes of your own")])
def test_bad_forms(form, message):
  with pytest.raises(UserError, match=message):
    FILE["sweep"](form)


def test_too_few_horizons():
  with pytest.raises(UserError, match="2 horizons a size; approach 1 takes at least 4"):
    isoflop.training_curves([shapes.find("44m")], [20, 40, 20], isoflop.Settings())


def test_laptop_sweep_is_listed_and_a_flag_wins(tiny_store, tmp_path):
  store = pathlib.Path(tiny_store)
  flags = [("data.store", str(store)), ("optimizer.peak_lr", "0.004")]
  found = sweeps.members(f"{CONFIG}:laptop", flags, tmp_path)
  assert len(found) == len(FILE["sweep"]("laptop"))
  assert {one.experiment.optimizer.peak_lr for one in found} == {0.004}
  assert len({one.id for one in found}) == len(found)
