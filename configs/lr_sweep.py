"""Three peak learning rates on the smoke run's model, a fifth of its length: chinchilla sweep.

About half a minute a member on two cores; `chinchilla prepare --config=configs/smoke.py` makes the
store that all of them read.
"""

import pathlib
import runpy

from chinchilla_jax.experiments import sweep as sweeps

_SMOKE = runpy.run_path(str(pathlib.Path(__file__).with_name("smoke.py")))


def get_config():
  config = _SMOKE["get_config"]()
  config.name = "lr_sweep"
  config.run_length = "3e5 tokens"
  return config


def sweep():
  return sweeps.product(
      sweeps.over("optimizer.peak_lr", [1e-3, 3e-3, 1e-2]),
      sweeps.over("seed", range(1)))
