"""Chinchilla and the models of its analysis: --config=configs/chinchilla.py:70b, :1424m, ...

The argument is a row of Table A9 by its size in millions (44m ... 16183m), or 70b. After 70b a chip
may be named, 70b,v6e: the layout is then the one for that chip.
"""

from chinchilla_jax import config_io
from chinchilla_jax.errors import UserError
from chinchilla_jax.model import shapes
from chinchilla_jax.scaling import transfer

# What `chinchilla compile --search` found for the paper's batch of 1.5M tokens, on v4:8x8x16 (the
# paper's kind of slice), v5p:8x8x8 and v6e:16x16 (docs/performance.md): strategy, tensor, remat.
LAYOUTS_70B = {"v4": ("fsdp_tensor", 4, "dots"), "v5p": ("fsdp_tensor", 2, "dots"),
               "v6e": ("fsdp", 1, "full")}


def get_config(name="70b"):
  name, comma, chip = name.partition(",")
  if comma and (name != "70b" or chip not in LAYOUTS_70B):
    raise UserError(f"no layout for {name!r} on {chip!r}; there are 70b,v4 and 70b,v5p and "
                    "70b,v6e, and `chinchilla compile --search` finds others")
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
    layout = LAYOUTS_70B[chip or "v4"]
    config.mesh.strategy, config.mesh.tensor, config.model.remat = layout
  else:
    config.run_length = "20 tokens/param"
    config.batch.sequences = 128
    n_params = shapes.count_parameters(shape)  # For 20 tokens each, 6ND is 120 N² FLOPs.
    config.optimizer.peak_lr = transfer.paper(n_params, 120 * n_params**2).peak_lr
  return config
