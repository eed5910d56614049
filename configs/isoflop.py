"""Runs that scaling laws are fitted to: chinchilla sweep --config=configs/isoflop.py:FORM.

  paper           IsoFLOP profiles: the paper's nine budgets, sizes of Table A9
  paper-curves    training curves: sizes from 70M to 10B, four cosine lengths each
  laptop          IsoFLOP profiles in minutes on two cores, on the standard library
  laptop-curves   training curves of the same kind
  BUDGETS@SIZES   your own, such as 1e18,3e18@44m,74m,140m: FLOPs (6ND), and rows of Table A9 or
                  WIDTHxLAYERS; without @SIZES, rows about the optimum of each budget

Runs at one budget differ in size and take D = C / (6 N) tokens, N with embedding (Table A9). The
cosine ends with the run. Learning rate and batch follow a rule of size: the paper's (see
chinchilla_jax/scaling/transfer.py), or for the laptop one that was measured (docs/planning.md).
Flags are for all members and win over the rule. A parametrisation that keeps the best rate over
sizes (docs/parametrisation.md) is switched on so:

  chinchilla prepare --config=configs/isoflop.py:laptop
  chinchilla sweep --config=configs/isoflop.py:laptop --parallel 2
  chinchilla sweep --config=configs/isoflop.py:laptop --parallel 2 --workdir sweeps/isoflop-mup \\
      --config.optimizer.peak_lr=1e-2 --config.model.parametrisation=mup \\
      --config.model.base_width=32 --config.model.base_kv_size=32
"""

import dataclasses

from chinchilla_jax import config_io
from chinchilla_jax.errors import UserError
from chinchilla_jax.model import shapes
from chinchilla_jax.scaling import isoflop, shapes_near, transfer

# The laptop. What was measured, and how sizes, rate and batch were chosen: docs/planning.md.
VOCAB = 512
SEQ_LEN = 256
BATCH_TOKENS = 512  # Few tokens a step: the schedule needs steps more than they need averaging.
LR_AT = (44e3, 8e-3)  # N, peak learning rate
LR_EXPONENT = -1 / 2  # of N; between what was measured at 44k, 86k and 195k
PROFILES = {  # FLOPs (6ND): WIDTHxLAYERS
    7e10: ("16x1", "20x1", "24x1", "32x1", "32x2", "40x2"),
    2.5e11: ("24x1", "32x1", "32x2", "40x2", "48x2", "56x2"),
    8e11: ("32x1", "32x2", "40x2", "48x2", "64x2", "64x3"),
    2.5e12: ("40x2", "48x2", "64x2", "64x3", "80x3", "96x3"),
}
CURVE_SIZES = ("24x1", "32x2", "48x2", "64x3")
CURVE_HORIZONS = (5, 12.5, 32, 80)  # tokens per parameter


def get_config(form="laptop"):
  config = config_io.default_config()
  config.name = f"isoflop-{form}".replace("@", "-at-").replace(",", "-")
  config.checkpoint.keep = 1
  if form in ("laptop", "laptop-curves"):
    return _laptop(config)
  shape = shapes.find("44m")  # Members set their own.
  for field in ("n_layers", "d_model", "n_heads", "kv_size", "d_ff", "vocab_size"):
    config.model[field] = getattr(shape, field)
  return config


def sweep(form="laptop"):
  if form == "laptop":
    return isoflop.isoflop(PROFILES, lambda budget: _small(PROFILES[budget]), _laptop_settings())
  if form == "laptop-curves":
    return isoflop.training_curves(_small(CURVE_SIZES), CURVE_HORIZONS, _laptop_settings())
  if form == "paper":
    return isoflop.isoflop(isoflop.PAPER_BUDGETS, isoflop.paper_sizes, isoflop.Settings())
  if form == "paper-curves":
    return isoflop.training_curves(isoflop.paper_curve_sizes(), isoflop.PAPER_HORIZONS,
                                   isoflop.Settings())
  budgets, _, sizes = form.partition("@")
  found = [_size(name) for name in sizes.split(",")] if sizes else None
  return isoflop.isoflop(map(_budget, budgets.split(",")),
                         lambda budget: found or isoflop.paper_sizes(budget), isoflop.Settings())


def _laptop(config):
  config.corpus.sources = ("stdlib",)
  config.corpus.validation_fraction = 0.05
  # A large vocabulary would be most of so small a model.
  config.tokenizer.vocab_size = VOCAB
  config.model.vocab_size = VOCAB
  config.data.store = "stores/isoflop"
  config.data.seq_len = SEQ_LEN
  # 0.02, GPT-2's standard deviation, is far too small at these widths.
  config.model.init = "fan_in"
  # At these widths a CPU multiplies float32 at least as fast as bfloat16.
  config.precision.activations = "float32"
  config.evaluation.every = "0 steps"  # After the last step only, on the whole split.
  config.evaluation.batch = 32
  config.checkpoint.every = "0 steps"
  config.logging.tensorboard = False
  config.logging.console = "25%"
  return config


def _laptop_settings():
  return isoflop.Settings(seq_len=SEQ_LEN, rule=_laptop_rule)


def _laptop_rule(n, flops):
  del flops
  lr = transfer.carried(LR_AT[1], LR_AT[0], n, LR_EXPONENT)
  return transfer.Recipe(lr, BATCH_TOKENS, None, "measured on these runs")


def _small(names):
  """Shapes with heads of 64 or more, one at least: more and smaller ones cost a CPU time."""
  found = []
  for shape in (_size(name, VOCAB) for name in names):
    n_heads = max(1, shape.d_model // 64)
    found.append(dataclasses.replace(shape, n_heads=n_heads, kv_size=shape.d_model // n_heads))
  return found


def _size(name, vocab_size=32_000):
  width, _, layers = name.partition("x")
  if width.isdecimal() and layers.isdecimal():
    return shapes_near.generated(int(width), int(layers), vocab_size)
  return shapes.find(name)


def _budget(text):
  try:
    value = float(text)
  except ValueError:
    value = float("nan")
  if not 0 < value < float("inf"):
    raise UserError(f"got {text[:40]!r} as a budget; give FLOPs such as 6e18, or one of the forms "
                    "paper, paper-curves, laptop, laptop-curves")
  return value
