"""From a budget to a run: what each law says, and one recommendation as a config that trains.

Conventions: C is training FLOPs, counted as 6 N D. N is counted as the law counts it (`params` of
the law); a shape's parameters are those of the rule of Table A9, embedding included. D is tokens
that are trained on, repetitions included. Loss is in nats per token, on the text and with the
tokenizer that a law was fitted on: it says how choices compare, not what your run will print.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from chinchilla_jax import config as schema
from chinchilla_jax import config_io, durations
from chinchilla_jax.errors import UserError
from chinchilla_jax.model import shapes
from chinchilla_jax.model.shapes import Shape
from chinchilla_jax.parallel import topology
from chinchilla_jax.scaling import laws, shapes_near, transfer

# Shown for every budget. The paper's third approach stands twice, since rounding moves it.
SHOWN = ("approach_1", "approach_2", "approach_3", "approach_3_tex", "besiroglu_2024")
DEFAULT_LAW = "besiroglu_2024"
WHY_DEFAULT = (
    "approach 3 fitted to the end: it agrees with approaches 1 and 2, by which Chinchilla was "
    "chosen, and unlike them it has a loss; the constants as printed do not agree")
FITTED_TO = 6e18, 3e21  # FLOPs of the runs behind the published laws that are shown
MFU = 0.4  # assumed, as in docs/launch.md
DAY = 86_400
FEWEST_STEPS = 150
WARMUP_STEPS = 1500  # Gopher
_LARGE = 50e9  # parameters from which one attention block compiles in reasonable time
_REMAT_LAYERS = 24

COUNTS: Mapping[str, Callable[[Shape], int]] = {
    laws.WITH_EMBEDDING: shapes.count_parameters,
    laws.NON_EMBEDDING: shapes_near.non_embedding,
    laws.WITH_HEAD: shapes.count_parameters,  # With a tied embedding the head is the embedding.
    laws.UNSTATED: shapes.count_parameters,
}


@dataclasses.dataclass(frozen=True)
class Off:
  """What it costs to train a model of `factor` times the best N.

  Attributes:
    loss: nats per token more at the same FLOPs.
    flops: times the FLOPs that the same loss takes; None: out of reach at that size.
  """

  factor: float
  loss: float
  flops: float | None


@dataclasses.dataclass(frozen=True)
class Row:
  """A law's optimum, and the cost of being off by two; None where the law has no loss."""

  law: laws.Law
  best: laws.Optimum
  halved: Off | None
  doubled: Off | None


@dataclasses.dataclass(frozen=True)
class Ask:
  """What is planned for. Exactly one of flops, params, tokens and days is given.

  Attributes:
    flops: training FLOPs (6ND).
    params: N, as the law counts it; the budget is the one that it is best for.
    tokens: D; the budget is the one that it is best for.
    days: on `where` at `mfu`.
    where: the devices, if known.
    mfu: model FLOPs (6ND) over the peak of dense bfloat16, assumed.
    law: that the recommendation follows.
    unique_tokens: of text that there is; more are repetitions (Muennighoff et al. 2023).
    inference_tokens: that the model will read and write in its life (Sardana et al. 2024).
    vocab_size, seq_len: of the model.
    rule: learning rate and batch, a key of `transfer.RULES`.
  """

  law: laws.Law
  flops: float | None = None
  params: float | None = None
  tokens: float | None = None
  days: float | None = None
  where: topology.Slice | None = None
  mfu: float = MFU
  unique_tokens: float | None = None
  inference_tokens: float | None = None
  vocab_size: int = 32_000
  seq_len: int = 2048
  rule: str = transfer.DEFAULT


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run that can be trained.

  Attributes:
    ask: what it is for.
    flops: the budget, 6ND.
    rows: what the laws say.
    n, d: the optimum that the shape and tokens are made from.
    by: the law that they are from, which with limited data is another one than was asked for.
    why: how they were found, where that is not the law's optimum at the budget.
    shape: what is trained; `params` its N by Table A9, `counted` its N as the law counts.
    recipe: learning rate and batch.
    experiment: the config.
    steps, tokens: of the run, in whole steps.
    loss: predicted for the shape and its tokens; None: the law has none.
    fit: a `meshes.Fit`; None where no devices were named.
    days: on the devices; None likewise.
  """

  ask: Ask
  flops: float
  rows: tuple[Row, ...]
  n: float
  d: float
  by: str
  why: str
  shape: Shape
  params: int
  counted: int
  recipe: transfer.Recipe
  experiment: schema.Experiment
  steps: int
  tokens: int
  loss: float | None
  fit: "meshes.Fit | None"  # noqa: F821, imported only where devices are named
  days: float | None

  @property
  def training_flops(self) -> float:
    """6ND of the run itself, N by the rule of Table A9."""
    return 6.0 * self.params * self.tokens


def off_by(law: laws.ParametricLaw, flops: float, factor: float) -> Off:
  """The cost of `factor` times the compute-optimal N at a budget."""
  best = law.at(flops)
  n = factor * best.params
  more = law.loss(n, flops / 6 / n) - best.loss
  left = best.loss - law.E - law.A / n**law.alpha  # for B / D^beta
  same = None if left <= 0 else 6 * n * (law.B / left) ** (1 / law.beta) / flops
  return Off(factor, more, same)


def rows(shown: Sequence[laws.Law], ask: Ask, flops: float) -> tuple[Row, ...]:
  """Each law's optimum: at the budget, or where N or D was given, at the one it is best for."""
  made = []
  for law in shown:
    at = flops
    if ask.params is not None or ask.tokens is not None:
      at = law.flops_for(n=ask.params, d=ask.tokens)
    has_loss = isinstance(law, laws.ParametricLaw)
    made.append(Row(law, law.at(at), off_by(law, at, 0.5) if has_loss else None,
                    off_by(law, at, 2.0) if has_loss else None))
  return tuple(made)


def budget(ask: Ask) -> float:
  """Training FLOPs (6ND) of what was asked for."""
  if ask.flops is not None:
    return ask.flops
  if ask.days is not None:
    return ask.days * DAY * flops_per_second(ask.where, ask.mfu)
  return ask.law.flops_for(n=ask.params, d=ask.tokens)


def flops_per_second(where: topology.Slice, mfu: float) -> float:
  """Model FLOPs (6ND) a second of all chips together."""
  return where.chips * where.chip.peak_bf16 * mfu


def make(ask: Ask, name: str = "plan", store: str = "") -> Plan:
  """Plans a run.

  Args:
    ask: what for.
    name: of the config.
    store: its token store; empty: the schema's default.

  Raises:
    UserError: nothing that trains comes out of it; says why.
  """
  flops = budget(ask)
  if not 0 < flops < 1e40:
    raise UserError(f"a budget of {flops:.3g} FLOPs cannot be planned for; give one below 1e40")
  shown = [laws.find(known) for known in SHOWN]
  if ask.law not in shown:
    shown.append(ask.law)
  n, d, by, why = _target(ask, flops)
  count = COUNTS[ask.law.params]
  shape = shapes_near.near(n, ask.vocab_size, count)
  params, counted = shapes.count_parameters(shape), count(shape)
  # The budget is kept, whatever the shape's N came to.
  tokens = n * d / counted
  recipe = transfer.recipe(ask.rule, params, 6 * n * d)
  experiment, fit = _experiment(ask, shape, tokens, recipe, name, store)
  clock = durations.clock(
      experiment.run_length, experiment.batch.sequences, experiment.batch.ramp,
      seq_len=ask.seq_len, n_params=params, epoch_tokens=0)
  real = clock.tokens(clock.total_steps)
  days = None
  if ask.where is not None:
    days = 6.0 * params * real / flops_per_second(ask.where, ask.mfu) / DAY
  return Plan(ask, flops, rows(shown, ask, flops), n, d, by, why, shape, params, counted,
              recipe, experiment, clock.total_steps, real, _loss(ask, counted, real), fit, days)


def _target(ask: Ask, flops: float) -> tuple[float, float, str, str]:
  """(N, D, by which law, how they were found where it is not simply the law's optimum)."""
  n, d = ask.law.optimum(flops)
  name = ask.law.name
  if ask.unique_tokens is not None:
    unique, law = ask.unique_tokens, laws.DATA_CONSTRAINED
    if d <= unique:
      return n, d, name, f"the {unique:.3g} unique tokens last: none is seen twice"
    n, d = law.optimum(flops, unique)
    return n, d, law.name, (
        f"{unique:.3g} unique tokens, seen {d / unique:.2f} times, which is worth "
        f"{law.effective_tokens(d, unique):.3g} fresh ones")
  if ask.inference_tokens is not None:
    if not isinstance(ask.law, laws.ParametricLaw):
      raise UserError(f"--inference-tokens: {ask.law.name} has no loss to keep; take a law that "
                      f"has one, such as --law {DEFAULT_LAW}")
    loss = ask.law.loss(n, d)
    best = laws.inference_optimum(ask.law, loss, ask.inference_tokens)
    whole = flops + 2 * n * ask.inference_tokens
    return best.params, best.tokens, name, (
        f"Sardana et al. 2024: the loss of the optimum, {loss:.4f}, at the least FLOPs for "
        f"training and {ask.inference_tokens:.3g} tokens of inference: {best.flops:.3g} in all "
        f"(6ND, 2N per token served) against {whole:.3g} with the optimum for training, "
        f"{1 - best.flops / whole:.1%} less")
  return n, d, name, ""


def _loss(ask: Ask, n: float, d: float) -> float | None:
  if ask.unique_tokens is not None and d > ask.unique_tokens:
    return laws.DATA_CONSTRAINED.loss(n, d, ask.unique_tokens)
  return ask.law.loss(n, d) if isinstance(ask.law, laws.ParametricLaw) else None


def _experiment(ask: Ask, shape: Shape, tokens: float, recipe: transfer.Recipe, name: str,
                store: str):
  """(config, fit) of the run; fit is None where no devices were named."""
  most = tokens / ask.seq_len / FEWEST_STEPS
  if most < 1:
    raise UserError(
        f"the budget is {tokens:,.0f} tokens for a model of {shapes.count_parameters(shape):,} "
        f"parameters, and {FEWEST_STEPS} steps of one sequence of {ask.seq_len:,} tokens are "
        f"{FEWEST_STEPS * ask.seq_len:,}; take a larger budget, a smaller --vocab-size or a "
        "smaller --seq-len")
  batch_tokens = min(recipe.batch_tokens, math.floor(most) * ask.seq_len)
  if ask.where is None:
    return _config(ask, shape, tokens, recipe, batch_tokens, 1, name, store), None
  from chinchilla_jax.scaling import meshes
  wanted = transfer.sequences(batch_tokens, ask.seq_len)
  refused = None
  for part in (None, 16, 8, 4, 2, 1):  # Of the devices, along data.
    multiple = 1 if part is None else max(1, ask.where.devices // part)
    made = _config(ask, shape, tokens, recipe, batch_tokens, multiple, name, store)
    if abs(math.log(made.batch.sequences / wanted)) > math.log(1.25):
      continue
    try:
      fit = meshes.choose(made, ask.where)
    except meshes.DoesNotDivide as error:
      refused = refused or error
      continue
    return fit.experiment, fit
  raise refused


def _config(ask: Ask, shape: Shape, tokens: float, recipe: transfer.Recipe, batch_tokens: float,
            multiple: int, name: str, store: str) -> schema.Experiment:
  model = {field: getattr(shape, field) for field in
           ("n_layers", "d_model", "n_heads", "kv_size", "d_ff", "vocab_size")}
  if shape.n_layers > _REMAT_LAYERS:
    model["remat"] = "full"
  if shapes.count_parameters(shape) >= _LARGE:
    model["attention_block"] = 0
  sequences = transfer.sequences(batch_tokens, ask.seq_len, multiple)
  steps = tokens / sequences / ask.seq_len
  batch = {"sequences": sequences}
  if recipe.doubles_at is not None:
    batch["ramp"] = ((f"{recipe.doubles_at:.0%}", 2 * sequences),)
  tree = {
      "name": name, "run_length": f"{tokens:.6g} tokens", "model": model, "batch": batch,
      "data": {"seq_len": ask.seq_len} | ({"store": store} if store else {}),
      "optimizer": {"peak_lr": float(f"{recipe.peak_lr:.3g}")},
      "tokenizer": {"vocab_size": ask.vocab_size},
      "schedule": {"warmup": (f"{WARMUP_STEPS} steps" if steps * 0.05 >= WARMUP_STEPS else "5%")},
  }
  return config_io.from_dict(tree)
