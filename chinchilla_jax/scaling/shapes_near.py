"""A model shape of about N parameters: a published row, or one with the paper's ratios.

Pure Python. All counts are by the rule of Table A9, embedding included.

The ratios of Table A9: d_ff = 4 d_model in all rows, n_heads * kv_size = d_model in 44 of 50,
kv_size 64 below d_model 1280 and 128 from there on, d_model / n_layers between 40 and 109,
growing with size. Below 44M, where the paper has nothing, heads of 32, 16 and 8 and from 8 units
of width a layer on let sizes grow in small steps.
"""

import math
from collections.abc import Callable, Iterator, Sequence

from chinchilla_jax.errors import UserError
from chinchilla_jax.model.shapes import (
  CHINCHILLA,
  GOPHER,
  TABLE_A9,
  Shape,
  count_parameters,
  parameter_groups,
)
from chinchilla_jax.scaling.labels import short

Count = Callable[[Shape], int]
PUBLISHED: Sequence[Shape] = (*TABLE_A9, CHINCHILLA, GOPHER[-1])
CLOSE = 0.05     # a published row this near in N is taken as it is
TOLERANCE = 0.045  # of a generated shape of 1M parameters and more, in N
_WINDOW = 0.02   # within this the table's proportions decide
ASPECTS = 40, 110  # d_model / n_layers of Table A9, from 44M on
SMALL_ASPECTS = 8, 70
_SMALL = 44e6
_KV_SIZES = (64, 8), (128, 16), (256, 32), (1280, 64), (math.inf, 128)  # (d_model below, kv_size)
_LAYERS = 600

# d_model / n_layers along the table: about 64 up to 300M, 102 for the 70B. Small models: half.
_TREND = ((1e5, 24.0), (44e6, 64.0), (300e6, 64.0), (16e9, 102.0), (70e9, 102.0))


def near(n: float, vocab_size: int = 32_000, count: Count = count_parameters) -> Shape:
  """The shape to train for about n parameters.

  A row of Table A9, Chinchilla or Gopher 280B where one is within `CLOSE` and vocab_size is
  theirs, else a generated one.

  Args:
    n: wanted parameters.
    vocab_size: rows of the tied embedding.
    count: which parameters n counts; by default all, embedding included.

  Returns:
    A shape within `TOLERANCE` of n where n is 1M or more, else the nearest that there is.

  Raises:
    UserError: the smallest shape with this vocabulary has more than 1.5 n parameters, or the
      largest that can be written down fewer than n.
  """
  def distance(shape: Shape) -> float:
    return abs(math.log(count(shape) / n))

  def cost(shape: Shape) -> tuple[bool, float]:
    off = distance(shape)
    if off > math.log1p(_WINDOW):
      return True, off
    return False, abs(math.log(shape.d_model / shape.n_layers / aspect_trend(n)))

  if vocab_size == CHINCHILLA.vocab_size:
    row = min(PUBLISHED, key=distance)
    if distance(row) <= math.log1p(CLOSE):
      return row
  smallest = generated(16, 1, vocab_size)
  if n < count(smallest) / 1.5:
    raise UserError(
        f"no model of {n:,.0f} parameters: with a vocabulary of {vocab_size:,} pieces the smallest "
        f"has {count(smallest):,}; take a larger budget, or a smaller vocabulary")
  best = min(_candidates(n, vocab_size, count), key=cost, default=smallest)
  if distance(best) > 0.5:
    raise UserError(f"no model of {n:.3g} parameters: shapes are made up to {_LAYERS} layers and "
                    "a width of 65,536; take a smaller budget")
  return best


def aspect_trend(n: float) -> float:
  """d_model / n_layers that Table A9 has at about n parameters; between points linear in log N."""
  if n <= _TREND[0][0]:
    return _TREND[0][1]
  for (low, a), (high, b) in zip(_TREND, _TREND[1:], strict=False):
    if n <= high:
      return a + (b - a) * math.log(n / low) / math.log(high / low)
  return _TREND[-1][1]


def thinned(rows: Sequence[Shape], at_most: int) -> list[Shape]:
  """At most so many of the rows, spread evenly in log N, both ends included."""
  rows = sorted(rows, key=count_parameters)
  if len(rows) <= at_most:
    return list(rows)
  low, high = (math.log(count_parameters(rows[end])) for end in (0, -1))
  marks = [low + (high - low) * i / (at_most - 1) for i in range(at_most)]
  chosen = [min(rows, key=lambda row: abs(math.log(count_parameters(row)) - mark))
            for mark in marks]
  return list(dict.fromkeys(chosen))


def non_embedding(shape) -> int:
  """N without the V x d_model of the tied embedding; the logit bias counts."""
  return count_parameters(shape) - parameter_groups(shape)["embedding"]


def _candidates(n: float, vocab_size: int, count: Count) -> Iterator[Shape]:
  """For every width the two depths next to n, within the ratios."""
  lowest, highest = ASPECTS if n >= _SMALL else SMALL_ASPECTS
  for d_model in _widths():
    one, two = (count(generated(d_model, layers, vocab_size)) for layers in (1, 2))
    depth = 1 + (n - one) / (two - one)  # N is linear in the number of layers.
    for n_layers in {max(1, math.floor(depth)), max(1, math.ceil(depth))}:
      if n_layers <= _LAYERS and lowest <= d_model / n_layers <= highest:
        yield generated(d_model, n_layers, vocab_size)


def _widths() -> Iterator[int]:
  yield from range(16, 64, 8)
  yield from range(64, 128, 16)
  yield from range(128, 256, 32)
  yield from range(256, 1280, 64)
  yield from range(1280, 4096, 128)
  # Heads in eights, so that a layer can be cut over 2, 4 or 8 devices.
  yield from range(4096, 65_536 + 1, 1024)


def generated(d_model: int, n_layers: int, vocab_size: int = 32_000) -> Shape:
  """A shape of the table's ratios; d_model a multiple of kv_size (8 below 64, ... 128)."""
  kv_size = next(size for below, size in _KV_SIZES if d_model < below)
  shape = Shape("", "", d_model, 4 * d_model, kv_size, d_model // kv_size, n_layers, vocab_size)
  return Shape(f"{d_model}x{n_layers}", short(count_parameters(shape)), d_model, 4 * d_model,
               kv_size, d_model // kv_size, n_layers, vocab_size)
