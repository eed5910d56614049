"""Learning rate and batch size as a function of a model's size or of its compute.

Pure Python. Published rules, each with its source and the range that it was made in. They
disagree by more than a factor of ten for small models, since each belongs to an optimizer, a
schedule and an architecture: take a rule from its own recipe, or measure one rate and carry it to
other sizes with `carried`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from chinchilla_jax.errors import UserError

UNIT = 262_144  # tokens: the batches of the paper's analysis runs are multiples of it


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What a rule says for one run.

  Attributes:
    peak_lr: maximum learning rate of AdamW.
    batch_tokens: tokens per step at the start.
    doubles_at: share of the run's tokens after which the batch doubles; None: it does not.
    source: paper and place; says so where a value is extrapolated.
  """

  peak_lr: float
  batch_tokens: float
  doubles_at: float | None
  source: str


# (N, value, where it stands). N counts the embedding, by the rule of Table A9.
Anchors = Sequence[tuple[float, float, str]]

# Measured on the smoke run (957k parameters, docs/performance.md), not in a paper: the papers
# have nothing below 44M.
SMALL_LR = (1e6, 3e-3, "measured here, smoke run of docs/performance.md")
SMALL_BATCH = (1e6, 2048, "measured here, smoke run of docs/performance.md")

PAPER_LR: Anchors = (
    SMALL_LR,
    (43_720_448, 2e-4, "Chinchilla section 3.1, smallest models"),
    (16_183_281_920, 1.25e-4, "Chinchilla section 3.1, largest models"),
    (70_061_956_352, 1e-4, "Chinchilla Table 4"),
    (280e9, 4e-5, "Gopher Table 1"),
)
PAPER_BATCH: Anchors = (
    SMALL_BATCH,
    (43_720_448, UNIT, "Gopher Table 1"),
    (1.4e9, UNIT, "Gopher Table 1"),
    (2.8e9, 2 * UNIT, "Chinchilla Appendix D.4"),
    (70e9, 6 * UNIT, "Chinchilla Table 4"),
    (280e9, 12 * UNIT, "Gopher Table 1"),
)
DOUBLES_FROM = 70e9  # Chinchilla and Gopher 280B double midway; nothing smaller is said to.


def paper(n: float, flops: float) -> Recipe:
  """Chinchilla's and Gopher's own values: the default, for it is their recipe that runs here.

  The papers give points. Between them the learning rate goes linearly in log N and
  the batch as a power of N; below 44M both go to values measured in
  this repository, and below 1M on by Porian's exponents. Above 280B they stay.

  Args:
    n: parameters by the rule of Table A9, embedding included.
    flops: not read.
  """
  del flops
  lr, lr_from = _linear_in_log(n, PAPER_LR), _named(n, PAPER_LR)
  batch, batch_from = _power_between(n, PAPER_BATCH), _named(n, PAPER_BATCH)
  smallest = PAPER_LR[0][0]
  if n < smallest:
    lr, batch = carried(PAPER_LR[0][1], smallest, n), carried_batch(PAPER_BATCH[0][1], smallest, n)
  # Within a percent or so: the shape next to 70B has 70.06B, a plan may have 69.5B.
  doubles = 0.5 if n > 0.95 * DOUBLES_FROM else None
  return Recipe(lr, batch, doubles, f"LR: {lr_from}; batch: {batch_from}")


def porian(n: float, flops: float) -> Recipe:
  """Porian et al. 2024 (arXiv 2406.19146), rounded fits of a joint sweep of LR, batch and beta2.

  LR = 0.0047 (N / 108e6)^(-1/3), batch = 160 (N / 108e6)^(2/3) sequences of 2,048 tokens. Their
  models have QK-norm and z-loss, which allow larger rates, and a constant rate without decay.

  Args:
    n: their N counts the head and not the input embedding; with tied embeddings that is the rule
      of Table A9.
    flops: not read.
  """
  del flops
  return Recipe(0.0047 * (n / 108e6) ** (-1 / 3), 160 * (n / 108e6) ** (2 / 3) * 2048, None,
                "Porian et al. 2024, rounded fits (with QK-norm and z-loss, constant rate)")


def deepseek(n: float, flops: float) -> Recipe:
  """DeepSeek LLM, as Porian et al. 2024 quote it: a function of compute.

  LR = 0.3118 C^(-0.1250), batch = 0.2920 C^0.3271 tokens.

  Args:
    n: not read.
    flops: C. Theirs counts non-embedding FLOPs per token with attention; 6ND here, close to it
      for models whose embedding is a small part.
  """
  del n
  return Recipe(0.3118 * flops**-0.1250, 0.2920 * flops**0.3271, None,
                "DeepSeek LLM, quoted by Porian et al. 2024 (multi-step schedule)")


# Brown et al. 2020, Table 2.1: parameters, LR, batch in tokens.
_GPT3 = ((125e6, 6e-4, 0.5e6), (350e6, 3e-4, 0.5e6), (760e6, 2.5e-4, 0.5e6), (1.3e9, 2e-4, 1e6),
         (2.7e9, 1.6e-4, 1e6), (6.7e9, 1.2e-4, 2e6), (13e9, 1e-4, 2e6), (175e9, 0.6e-4, 3.2e6))


def gpt3(n: float, flops: float) -> Recipe:
  """GPT-3 (Brown et al. 2020, Table 2.1): powers of N between its eight sizes, constant outside.

  Args:
    n: parameters, embedding included.
    flops: not read.
  """
  del flops
  where = "" if _GPT3[0][0] <= n <= _GPT3[-1][0] else ", outside its sizes: the nearest"
  return Recipe(_power_between(n, [(size, lr, "") for size, lr, _ in _GPT3]),
                _power_between(n, [(size, batch, "") for size, _, batch in _GPT3]), None,
                f"GPT-3 (Brown et al. 2020), Table 2.1{where}")


RULES: Mapping[str, Callable[[float, float], Recipe]] = {
    "paper": paper, "gpt3": gpt3, "porian": porian, "deepseek": deepseek}
DEFAULT = "paper"


def recipe(rule: str, n: float, flops: float) -> Recipe:
  """What a rule of `RULES` says for a run of n parameters (Table A9) and so many FLOPs (6ND).

  Raises:
    UserError: no such rule.
  """
  if rule not in RULES:
    raise UserError(f"unknown rule {rule!r} for learning rate and batch; one of: "
                    f"{', '.join(RULES)}")
  return RULES[rule](n, flops)


def carried(lr: float, measured_at: float, n: float, exponent: float = -1 / 3) -> float:
  """A learning rate that was found good at one size, at another.

  The exponent is that of Porian et al. 2024's tuned rates over their range of sizes. It assumes
  this project's standard parametrisation, where width changes the best rate.
  """
  return lr * (n / measured_at) ** exponent


def carried_batch(tokens: float, measured_at: float, n: float, exponent: float = 2 / 3) -> float:
  """The same for the tokens of a batch, with the exponent of Porian et al. 2024."""
  return tokens * (n / measured_at) ** exponent


def sequences(batch_tokens: float, seq_len: int, multiple: int = 1) -> int:
  """Sequences of a batch: the multiple of `multiple` nearest to batch_tokens, and at least that.

  From 262,144 tokens on a batch is a multiple of that, as the paper's are, where seq_len divides
  it.
  """
  if batch_tokens >= UNIT and UNIT % seq_len == 0:
    multiple = math.lcm(multiple, UNIT // seq_len)
  return multiple * max(1, round(batch_tokens / seq_len / multiple))


# -------------------------------------------------------------------- Between points


def _bracket(n: float, anchors: Anchors) -> tuple[int, float]:
  """(index of the anchor below, share of the way to the next in log N), clipped at both ends."""
  if n <= anchors[0][0]:
    return 0, 0.0
  for index, ((low, *_), (high, *_)) in enumerate(zip(anchors, anchors[1:], strict=False)):
    if n <= high:
      return index, math.log(n / low) / math.log(high / low)
  return len(anchors) - 2, 1.0


def _linear_in_log(n: float, anchors: Anchors) -> float:
  index, share = _bracket(n, anchors)
  low, high = anchors[index][1], anchors[index + 1][1]
  return low * (1 - share) + high * share


def _power_between(n: float, anchors: Anchors) -> float:
  index, share = _bracket(n, anchors)
  low, high = anchors[index][1], anchors[index + 1][1]
  return low ** (1 - share) * high**share


def _named(n: float, anchors: Anchors) -> str:
  """Where a value comes from: a point (within 5 %), between two of them, or outside of all."""
  for size, _, source in anchors:
    if abs(math.log(n / size)) < 0.05:
      return source
  if n < anchors[0][0]:
    return f"below {anchors[0][2]}, by the exponents of Porian et al. 2024"
  if n > anchors[-1][0]:
    return f"beyond {anchors[-1][2]}, kept"
  index, _ = _bracket(n, anchors)
  below, above = anchors[index][2], anchors[index + 1][2]
  return below if below == above else f"between {below} and {above}"
