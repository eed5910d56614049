"""Laws that `chinchilla fit` wrote, read back from its fit.json. Pure Python."""

import json
import math
import os
from typing import Any

from chinchilla_jax.config_io import shown
from chinchilla_jax.errors import UserError
from chinchilla_jax.scaling import laws

_PREFERRED = ("3", "2", "1")  # The one with a loss first.
_AGAIN = "give the fit.json that `chinchilla fit` wrote"


def read(text: str) -> laws.Law:
  """The law in PATH or PATH:APPROACH, such as fit/fit.json or fit/fit.json:2.

  Without an approach: 3 if it was fitted, since it has a loss, else 2, else 1. The law's `source`
  says which, and the FLOPs that its runs span.

  Raises:
    UserError: no such file, not what `chinchilla fit` writes, an approach that was not fitted, or
      FLOPs of approaches 1 and 2 that are not 6ND.
  """
  path, approach = text, ""
  if not os.path.isfile(text) and ":" in text:
    path, approach = text.rsplit(":", 1)
  if not os.path.isfile(path):
    raise UserError(f"--law: no file {shown(path)}; {_AGAIN}, or the name of a published law")
  where = f"--law: {path}"
  try:
    with open(path, encoding="utf-8") as file:
      record = json.load(file)
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{where} cannot be read as JSON ({error}); {_AGAIN}") from None
  fitted = record.get("approaches") if isinstance(record, dict) else None
  if not isinstance(fitted, dict) or not fitted:
    raise UserError(f"{where} holds no fitted approach; {_AGAIN}")
  approach = approach or next((one for one in _PREFERRED if one in fitted), "")
  if approach not in fitted:
    raise UserError(f"{where} has no approach {shown(approach)}; fitted are "
                    f"{', '.join(sorted(fitted))}")
  try:
    return _law(record, approach, where, os.path.basename(path))
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise UserError(f"{where} is not what `chinchilla fit` writes ({type(error).__name__}: "
                    f"{error}); {_AGAIN}") from None


def _law(record: dict[str, Any], approach: str, where: str, name: str) -> laws.Law:
  constants = {key: float(one["value"])
               for key, one in record["approaches"][approach]["constants"].items()}
  words = record["conventions"]
  # The words begin with, or name, the column's key.
  params = (laws.NON_EMBEDDING if laws.NON_EMBEDDING in words["params"] else laws.WITH_EMBEDDING)
  low, high = record["ranges"]["flops"]
  source = f"{record['runs']} runs of {low:.3g} to {high:.3g} FLOPs, approach {approach}"
  if approach == "3":
    law = laws.ParametricLaw(name, *(constants[key] for key in ("E", "A", "B", "alpha", "beta")),
                             source=source, params=params)
    ok = min(law.A, law.B, law.alpha, law.beta) > 0 and law.E >= 0
  else:
    if not words["flops"].startswith(("6 N D", "column")):
      raise UserError(f"{where}: approach {approach} was fitted to {words['flops']}, and plans "
                      "count 6ND; fit again with --flops six_n_d, or use approach 3")
    law = laws.FrontierLaw(name, *(constants[key] for key in ("k_n", "a", "k_d", "b")),
                           source=source, params=params)
    ok = min(law.k_n, law.k_d, law.a, law.b) > 0
  if not ok or not all(map(math.isfinite, constants.values())):
    raise UserError(f"{where}: the constants of approach {approach} give no optimum; fit runs that "
                    "bracket it, or take another approach")
  return law
