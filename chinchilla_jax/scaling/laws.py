"""Scaling laws as values: loss, compute-optimal frontier, and the published constants.

Pure Python: planning needs no device and no JAX. N is parameters, D training tokens, C training
FLOPs with C = 6 N D, losses are nats per token. `params` of a law says which N it is about.
Functions of C, N or D also take numpy arrays.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

from chinchilla_jax.errors import UserError
from chinchilla_jax.scaling import paper_tables

FLOPS_PER_PARAM_TOKEN = 6  # C = 6 N D, forward and backward

# Which parameters N counts.
WITH_EMBEDDING = "params_table_a9"        # everything, as Hoffmann et al. count
NON_EMBEDDING = "params_non_embedding"    # as Kaplan et al. count
WITH_HEAD = "params_with_head"            # no input embedding, but the head: Porian et al.
UNSTATED = "not stated"

Intervals = Mapping[str, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Optimum:
  """The best model for a budget: C in FLOPs, N, D, and the predicted loss if the law has one."""

  flops: Any
  params: Any
  tokens: Any
  loss: Any = None

  @property
  def tokens_per_param(self) -> Any:
    return self.tokens / self.params


@dataclasses.dataclass(frozen=True)
class ParametricLaw:
  """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, section 3.3, equation 2).

  Attributes:
    name: key in PUBLISHED, or what the caller calls it.
    source: where the constants are from.
    params: which parameters N counts.
    intervals: of fields and of "a", where the source gives them; `interval_kind` says which.
  """

  name: str
  E: float
  A: float
  B: float
  alpha: float
  beta: float
  source: str = ""
  params: str = WITH_EMBEDDING
  intervals: Intervals = dataclasses.field(default_factory=dict, hash=False)
  interval_kind: str = ""

  def loss(self, n: Any, d: Any) -> Any:
    """Nats per token of N = n parameters after D = d tokens."""
    return self.E + self.A / n**self.alpha + self.B / d**self.beta

  @property
  def G(self) -> float:
    """(alpha A / (beta B))^(1 / (alpha + beta)), equation 4."""
    return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

  @property
  def a(self) -> float:
    """Exponent of N_opt ~ C^a."""
    return self.beta / (self.alpha + self.beta)

  @property
  def b(self) -> float:
    """Exponent of D_opt ~ C^b; a + b = 1."""
    return self.alpha / (self.alpha + self.beta)

  @property
  def k_n(self) -> float:
    """N_opt = k_n C^a."""
    return self.G / FLOPS_PER_PARAM_TOKEN**self.a

  @property
  def k_d(self) -> float:
    """D_opt = k_d C^b."""
    return 1 / (self.G * FLOPS_PER_PARAM_TOKEN**self.b)

  def optimum(self, flops: Any) -> tuple[Any, Any]:
    """(N, D) of the least loss at 6 N D = flops: N = G (C/6)^a, D = (C/6)^b / G (equation 4)."""
    nd = flops / FLOPS_PER_PARAM_TOKEN
    return self.G * nd**self.a, nd**self.b / self.G

  def flops_for(self, *, n: Any = None, d: Any = None) -> Any:
    """The budget whose optimum has N = n, or D = d. Exactly one of the two is given."""
    _one_of(n, d)
    if n is not None:
      return FLOPS_PER_PARAM_TOKEN * (n / self.G) ** (1 / self.a)
    return FLOPS_PER_PARAM_TOKEN * (d * self.G) ** (1 / self.b)

  def at(self, flops: Any) -> Optimum:
    """The optimum at a budget, with its loss."""
    n, d = self.optimum(flops)
    return Optimum(flops, n, d, self.loss(n, d))


@dataclasses.dataclass(frozen=True)
class FrontierLaw:
  """N_opt = k_n C^a, D_opt = k_d C^b: what approaches 1 and 2 give. It predicts no loss.

  Attributes: as of ParametricLaw. With C = 6 N D, k_d = 1 / (6 k_n) and b = 1 - a.
  """

  name: str
  k_n: float
  a: float
  k_d: float
  b: float
  source: str = ""
  params: str = WITH_EMBEDDING
  intervals: Intervals = dataclasses.field(default_factory=dict, hash=False)
  interval_kind: str = ""

  def optimum(self, flops: Any) -> tuple[Any, Any]:
    """(N, D) at a budget."""
    return self.k_n * flops**self.a, self.k_d * flops**self.b

  def flops_for(self, *, n: Any = None, d: Any = None) -> Any:
    """The budget whose optimum has N = n, or D = d. Exactly one of the two is given."""
    _one_of(n, d)
    if n is not None:
      return (n / self.k_n) ** (1 / self.a)
    return (d / self.k_d) ** (1 / self.b)

  def at(self, flops: Any) -> Optimum:
    """The optimum at a budget; its loss is None."""
    return Optimum(flops, *self.optimum(flops))


Law = ParametricLaw | FrontierLaw


def _one_of(n: Any, d: Any) -> None:
  if (n is None) == (d is None):
    raise TypeError("give exactly one of n and d")


# -------------------------------------------------------------------- Limited data


@dataclasses.dataclass(frozen=True)
class DataConstrainedLaw:
  """A law for data that is seen more than once (Muennighoff et al. 2023, section 3).

  L = E + A / N'^alpha + B / D'^beta, where D' and N' are what N and D are worth:
    D' = U_D + U_D R_D* (1 - exp(-R_D / R_D*)),  R_D = max(D / U_D - 1, 0)
    N' = U_N + U_N R_N* (1 - exp(-R_N / R_N*)),  R_N = max(N / U_N - 1, 0)
  U_D is the unique tokens, U_N the parameters that they are optimal for, if no more than N.
  The budget is C = 6 N D with the tokens that are passed through, repetitions included.

  Attributes:
    fresh: the law for data that is seen once.
    r_d_star, r_n_star: repetitions of data and of parameters after which a further one is
      worth 1/e of a fresh one.
  """

  name: str
  fresh: ParametricLaw
  r_d_star: float
  r_n_star: float
  source: str = ""

  def effective_tokens(self, d: float, unique: float) -> float:
    """D': fresh tokens that d tokens are worth when `unique` of them are different."""
    seen = min(d, unique)
    return _worth(d, seen, self.r_d_star)

  def effective_params(self, n: float, unique: float) -> float:
    """N': what n parameters are worth with `unique` different tokens."""
    best, _ = self.fresh.optimum(self.fresh.flops_for(d=unique))
    return _worth(n, min(n, best), self.r_n_star)

  def loss(self, n: float, d: float, unique: float) -> float:
    """Nats per token of n parameters after d tokens, of which `unique` are different."""
    # Fewer tokens than there are: only those passed through count as unique.
    unique = min(unique, d)
    return self.fresh.loss(self.effective_params(n, unique), self.effective_tokens(d, unique))

  def optimum(self, flops: float, unique: float) -> tuple[float, float]:
    """(N, D) of the least loss at 6 N D = flops with `unique` different tokens; numerical.

    Where the data last, this is the optimum of `fresh`.
    """
    nd = flops / FLOPS_PER_PARAM_TOKEN
    n_fresh, d_fresh = self.fresh.optimum(flops)
    if d_fresh <= unique:
      return n_fresh, d_fresh

    def loss(log_d: float) -> float:
      return self.loss(nd / math.exp(log_d), math.exp(log_d), unique)

    # Repeated data are worth more than surplus parameters (R_D* > R_N*), so the best D may lie
    # beyond that of fresh data. A grid finds the valley, golden section its floor.
    low, high = math.log(unique), math.log(d_fresh) + 10
    grid = [low + (high - low) * i / 400 for i in range(401)]
    best = min(range(401), key=lambda i: loss(grid[i]))
    log_d = _least(loss, grid[max(best - 1, 0)], grid[min(best + 1, 400)])
    return nd / math.exp(log_d), math.exp(log_d)


def _worth(amount: float, unique: float, r_star: float) -> float:
  repeats = max(amount / unique - 1, 0.0)
  return unique + unique * r_star * -math.expm1(-repeats / r_star)


def _least(function, low: float, high: float) -> float:
  """Where a function with one minimum on [low, high] has it, by golden-section search."""
  ratio = (math.sqrt(5) - 1) / 2
  left, right = high - ratio * (high - low), low + ratio * (high - low)
  at_left, at_right = function(left), function(right)
  for _ in range(80):
    if at_left <= at_right:
      high, right, at_right = right, left, at_left
      left = high - ratio * (high - low)
      at_left = function(left)
    else:
      low, left, at_left = left, right, at_right
      right = low + ratio * (high - low)
      at_right = function(right)
  return (low + high) / 2


# -------------------------------------------------------------------- Inference


def inference_optimum(law: ParametricLaw, loss: float, inference_tokens: float) -> Optimum:
  """The model that reaches `loss` at the least training and inference FLOPs together.

  Minimises 6 N D + 2 N D_inf subject to L(N, D) = loss (Sardana et al. 2024, section 2). With
  x = A / N^alpha and r = loss - E - x = B / D^beta, the condition of first order is
    alpha x / (beta r) = 1 + D_inf / (3 D),
  whose left side rises and whose right side falls with x, so the root is the only one; it is
  found by bisection. D_inf = 0 gives the training optimum.

  Args:
    inference_tokens: D_inf, tokens that the model will read and write in its life.

  Returns:
    flops: 6 N D + 2 N D_inf, training and inference.

  Raises:
    UserError: no model of this law reaches the loss; or a negative number of tokens.
  """
  if not loss > law.E or not math.isfinite(loss):
    raise UserError(f"a loss of {loss:g} is out of reach under {law.name}: its least, of unlimited "
                    f"model and data, is E = {law.E:g} nats per token; ask for a higher one")
  if not inference_tokens >= 0 or not math.isfinite(inference_tokens):
    raise UserError(f"inference tokens: got {inference_tokens:g}; give a number of at least 0")
  reducible = loss - law.E

  def tokens(share: float) -> float:
    return (law.B / (reducible * (1 - share))) ** (1 / law.beta)

  # share = x / reducible. Bisection in its logit keeps digits at both ends.
  low, high = -700.0, 36.0
  for _ in range(200):
    middle = (low + high) / 2
    share = 1 / (1 + math.exp(-middle))
    excess = law.alpha / law.beta * math.exp(middle) - 1
    if excess < inference_tokens / (3 * tokens(share)):
      low = middle
    else:
      high = middle
  share = 1 / (1 + math.exp(-(low + high) / 2))
  n, d = (law.A / (reducible * share)) ** (1 / law.alpha), tokens(share)
  return Optimum(6 * n * d + 2 * n * inference_tokens, n, d, loss)


# -------------------------------------------------------------------- Published laws


def _from_table(name: str, approach: int, table: str) -> FrontierLaw:
  """The power law behind a column of Table 3 or A3, whose constants the paper does not print."""
  rows = [row for row in paper_tables.columns(approach) if row[0] != paper_tables.ODD_ROW]
  k_n, a = paper_tables.power_law((flops, n) for n, flops, _ in rows)
  return _with_6nd(name, k_n, a,
                   f"Hoffmann et al. 2022, approach {approach}: power law through {table}, all "
                   f"rows but 67B (the paper prints no constants), D by C = 6ND")


def _with_6nd(name: str, k_n: float, a: float, source: str, **more: Any) -> FrontierLaw:
  return FrontierLaw(name, k_n, a, 1 / (FLOPS_PER_PARAM_TOKEN * k_n), 1 - a, source, **more)


def _table_2(law: FrontierLaw, row: int) -> FrontierLaw:
  exponents = paper_tables.TABLE_2[row]
  return dataclasses.replace(
      law, intervals={"a": exponents.a_interval, "b": exponents.b_interval},
      interval_kind="10th and 90th percentile, 80 % of the data resampled 100 times (Table 2)")


def _porian(name: str, k_n: float, a: float, low: float, high: float, what: str) -> FrontierLaw:
  return _with_6nd(name, k_n, a, f"Porian et al. 2024, RefinedWeb, {what}; D by C = 6ND",
                   params=WITH_HEAD, intervals={"a": (low, high)}, interval_kind="95 %")


PF_DAY = 8.64e19  # FLOPs

_PUBLISHED: tuple[Law, ...] = (
    _table_2(_from_table("approach_1", 1, "Table 3"), 0),
    _table_2(_from_table("approach_2", 2, "Table A3"), 1),
    ParametricLaw("approach_3", 1.69, 406.4, 410.7, 0.34, 0.28,
                  "Hoffmann et al. 2022, section 3.3: constants as printed, rounded"),
    ParametricLaw("approach_3_tex", math.exp(0.5267228), math.exp(6.0073404),
                  math.exp(6.0179186), 0.33917084, 0.2849083,
                  "Hoffmann et al. 2022, approach 3: unrounded constants of the TeX source"),
    _from_table("approach_3_table_a3", 3, "Table A3, the 175B row's FLOPs by 6ND"),
    ParametricLaw(
        "besiroglu_2024", 1.81686, 482.01, 2085.43, 0.34781, 0.36585,
        "Besiroglu et al. 2024: approach 3 fitted again to 240 points of Figure 4",
        intervals={"A": (285.2, 743.6), "B": (1042.4, 5810.3), "E": (1.769, 1.871),
                   "alpha": (0.317, 0.373), "beta": (0.331, 0.415)},
        interval_kind="95 %, 4,000 bootstraps"),
    ParametricLaw("muennighoff_2023", math.exp(0.6254804), math.exp(6.255414),
                  math.exp(7.3049974), 0.3526596, 0.3526596,
                  "Muennighoff et al. 2023: C4, data seen once, alpha = beta imposed",
                  params=UNSTATED),
    _with_6nd("kaplan_2020", 1.3e9 / PF_DAY**0.73, 0.73,
              "Kaplan et al. 2020: N = 1.3e9 (C / PF-day)^0.73; D by C = 6ND",
              params=NON_EMBEDDING),
    _with_6nd("kaplan_2020_fixed_batch", 1.6e9 / PF_DAY**0.88, 0.88,
              "Kaplan et al. 2020, not adjusted for batch size: N = 1.6e9 (C / PF-day)^0.88; "
              "D by C = 6ND", params=NON_EMBEDDING),
    _porian("porian_2024_kaplan", 4.23e-8, 0.835, 0.82, 0.85, "Kaplan's set-up reproduced"),
    _porian("porian_2024_last_layer", 1.27e-5, 0.706, 0.69, 0.72, "and the last layer's FLOPs"),
    _porian("porian_2024_warmup", 1.43e-3, 0.602, 0.59, 0.62, "and warm-up scaled with the model"),
    _porian("porian_2024_cosine", 4.77e-3, 0.571, 0.56, 0.59, "and cosine decay matched"),
    _porian("porian_2024", 0.1189, 0.497, 0.49, 0.50,
            "tuned learning rate, batch size and beta2, constant learning rate"),
    _with_6nd("twenty_tokens_per_param", 120**-0.5, 0.5,
              "the rule of thumb D = 20 N, which is N = (C / 120)^0.5"),
)

PUBLISHED: Mapping[str, Law] = {law.name: law for law in _PUBLISHED}

DATA_CONSTRAINED = DataConstrainedLaw(
    "muennighoff_2023_data_constrained", PUBLISHED["muennighoff_2023"], 15.387756, 5.309743,
    "Muennighoff et al. 2023, equations 5 to 7 and the constants of their fit")


def find(name: str) -> Law:
  """A published law by name.

  Raises:
    UserError: no such law.
  """
  if name not in PUBLISHED:
    near = difflib.get_close_matches(name, PUBLISHED, 1)
    hint = f"did you mean {near[0]}?" if near else f"one of: {', '.join(PUBLISHED)}"
    raise UserError(f"no published law is called {name!r}; {hint}")
  return PUBLISHED[name]
