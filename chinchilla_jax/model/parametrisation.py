"""How sizes enter initialisation, forward pass and optimizer: standard, muP or CompleteP.

A parametrisation is a rule for what changes by which power of the width and of the depth, such
that the best learning rate of a small model is that of a large one. All of it follows from the
config; every number here is a Python float that the compiler sees as a constant:

  m = d_model / base_width        how much wider the model is than the proxy
  l = n_layers / base_depth       how much deeper; 1 unless the parametrisation is completep

  standard    m = l = 1 whatever the sizes
  mup         Yang et al. 2022, "Tensor Programs V", tables 3 and 8: transfer over width
  completep   Dey et al. 2025, table 1 with alpha = 1: over width and depth

At m = l = 1 and kv_size = base_kv_size all three are one model and one optimizer.
docs/parametrisation.md has the table and the reasons. Imports neither JAX nor Flax.
"""

import dataclasses
import math

from chinchilla_jax import config as schema


@dataclasses.dataclass(frozen=True)
class Factors:
  """What multiplies the optimizer's settings for one kind of parameter."""

  lr: float = 1.0
  decay: float = 1.0  # of weight_decay, which is multiplied by the learning rate as well
  eps: float = 1.0


def width_ratio(config: schema.Model) -> float:
  """m: d_model / base_width, or 1 in the standard parametrisation."""
  return 1.0 if config.parametrisation == "standard" else config.d_model / config.base_width


def depth_ratio(config: schema.Model) -> float:
  """l: n_layers / base_depth, or 1 unless the parametrisation is completep."""
  return config.n_layers / config.base_depth if config.parametrisation == "completep" else 1.0


def residual_scale(config: schema.Model) -> float:
  """What every branch is multiplied by before it is added to the residual stream: 1/l."""
  return 1 / depth_ratio(config)


def logit_scale(config: schema.Model) -> float:
  """What the product with the tied embedding is multiplied by: 1/m.

  The table is an input weight to the optimizer, with coordinates whose size does not depend on
  width, so a product over d_model of them grows with it (Tensor Programs V, table 8).
  """
  return 1 / width_ratio(config)


def score_divisor(config: schema.Model) -> float:
  """What attention scores are divided by: sqrt(kv_size), or kv_size / sqrt(base_kv_size).

  Query and key become correlated in training, so their product grows with kv_size and not with
  its root (Tensor Programs V, definition 4.1). The two agree where the head size is the proxy's.
  """
  ratio = 1.0 if config.parametrisation == "standard" else config.kv_size / config.base_kv_size
  return math.sqrt(config.kv_size) * math.sqrt(ratio)


def init_divisor(config: schema.Model, *, fan_in: int, residual: bool = False,
                 embedding: bool = False) -> float:
  """What a weight's draw is divided by: N(0, init_std) with init gpt2, unit width with fan_in.

  Args:
    config: the model.
    fan_in: inputs that one output sums over.
    residual: the matrix writes to the residual stream. "gpt2" divides by sqrt(2 * n_layers);
      completep by that of the base depth, since `residual_scale` has the rest.
    embedding: the table, whose coordinates must not depend on width.
  """
  width = width_ratio(config)
  if config.init == "fan_in":
    return math.sqrt(fan_in / width if embedding else fan_in)
  branches = math.sqrt(2 * config.n_layers / depth_ratio(config)) if residual else 1.0
  return branches * (1.0 if embedding else math.sqrt(width))


def groups(config: schema.Model) -> tuple[tuple[str, Factors], ...]:
  """(pattern, factors) by parameter path, first match wins; none in the standard one.

  Every parameter of the model matches one, of these kinds:
    - the logit bias, whose gradient does not depend on width;
    - the table, an input weight: its learning rate is that of the proxy;
    - matrices of blocks, whose inputs and outputs both grow with width: an Adam update has
      coordinates of one size, and m times as many of them add up, so the rate is divided by m;
      decay is multiplied by m, so that rate times decay stays what it was;
    - vectors of blocks (gains, biases, u, v): the rate of the proxy;
    - the final gain.
  Epsilon follows the size of the gradient: 1/m, and 1/l in blocks (Dey et al. 2025, table 1;
  Mlodozeniec et al. 2025 add the embedding's).
  """
  if config.parametrisation == "standard":
    return ()
  m, l = width_ratio(config), depth_ratio(config)  # noqa: E741
  return (
      (r"^embedding/logit_bias$", Factors()),
      (r"^embedding/table$", Factors(eps=1 / m)),
      (r"^blocks/.*/w_[a-z]+$", Factors(lr=1 / m, decay=m, eps=1 / (m * l))),
      (r"^blocks/.*(gain|/bias_[a-z]+|/u|/v)$", Factors(eps=1 / (m * l))),
      (r"^final_norm/gain$", Factors(eps=1 / m)),
  )
