"""Chinchilla and the models of its analysis: --config=configs/chinchilla.py:70b, :1424m, ...

The argument is a row of Table A9 by its size in millions (44m ... 16183m), or 70b.
"""

from chinchilla_jax import config_io
from chinchilla_jax.model import shapes
from chinchilla_jax.scaling import transfer


def get_config(name="70b"):
  config = config_io.default_config()
  shape = shapes.find(name)
  config.name = f"chinchilla-{name}"
  for field in ("n_layers", "d_model", "n_heads", "kv_size", "d_ff", "vocab_size"):
    config.model[field] = getattr(shape, field)
  if shape.n_layers > 24 and name != "70b":
    config.model.remat = "full"

  if name == "70b":  # Table 4: 1.5M tokens a batch, doubled midway.
    config.run_length = "1.4e12 tokens"
    config.batch.sequences = 768
    config.batch.ramp = (("50%", 1536),)
    config.optimizer.peak_lr = 1e-4
    # For 1,024 v4 chips (docs/performance.md); `chinchilla compile --search` finds those of others.
    config.mesh.strategy = "fsdp_tensor"
    config.mesh.tensor = 4
  else:
    config.run_length = "20 tokens/param"
    config.batch.sequences = 128
    n_params = shapes.count_parameters(shape)  # For 20 tokens each, 6ND is 120 N² FLOPs.
    config.optimizer.peak_lr = transfer.paper(n_params, 120 * n_params**2).peak_lr
  return config
