"""The Gopher family (Rae et al. 2021, Table 1): --config=configs/gopher.py:117m, ..., :280b.

The same architecture under the older recipe: Adam without weight decay, 300B tokens; float32
parameters below 7.1B, bfloat16 parameters with stochastic rounding from there on.
"""

from chinchilla_jax import config_io
from chinchilla_jax.model import shapes

_SEQUENCES = {"0.25M": 128, "2M": 1024, "3M": 1536, "6M": 3072}

# Peak learning rate, batch in tokens.
_RECIPES = {
    "44m": (6e-4, "0.25M"),
    "117m": (6e-4, "0.25M"),
    "417m": (2e-4, "0.25M"),
    "1.4b": (2e-4, "0.25M"),
    "7.1b": (1.2e-4, "2M"),
    "280b": (4e-5, "3M"),
}


def get_config(name="280b"):
  config = config_io.default_config()
  shape = shapes.find(f"gopher-{name}")
  config.name = f"gopher-{name}"
  for field in ("n_layers", "d_model", "n_heads", "kv_size", "d_ff", "vocab_size"):
    config.model[field] = getattr(shape, field)

  large = name in ("7.1b", "280b")
  if large:
    config.precision.rounding = "stochastic"
    config.optimizer.clip_norm = 0.25
    config.model.remat = "full"
  else:
    config.precision.parameters = "float32"
  config.optimizer.peak_lr, batch = _RECIPES[name]
  config.optimizer.weight_decay = 0.0
  config.run_length = "300e9 tokens"
  config.batch.sequences = _SEQUENCES[batch]
  if name == "280b":
    config.mesh.strategy = "fsdp_tensor"
    config.mesh.tensor = 16
    config.model.attention_block = 0
    config.batch.ramp = (("50%", _SEQUENCES["6M"]),)
  return config
