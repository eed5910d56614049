"""What a Pallas kernel says of itself in an optimised HLO program.

A kernel is opaque to XLA; its author tells what it does (`pallas_call(cost_estimate=...)`), and
the compiled program repeats that. One that says nothing is left uncounted, and named.
"""

import dataclasses
import re

from chinchilla_jax.parallel.hlo_text import Instruction


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one execution: FLOPs of products, and bytes between it and HBM."""

  flops: float
  hbm_bytes: float


def cost(i: Instruction) -> Cost | None:
  """The cost of a custom call that tells it; None for any other."""
  told = re.search(r'"cost_estimate":\{([^}]*)\}', i.attributes)
  numbers = dict(re.findall(r'"(\w+)":"?(\d+)', told[1])) if told else {}
  if not {"flops", "bytes_accessed"} <= numbers.keys():
    return None
  return Cost(float(numbers["flops"]), float(numbers["bytes_accessed"]))
