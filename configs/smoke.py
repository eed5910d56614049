"""The main job in minutes on two CPU cores: the paper's architecture on the standard library.

Sizes were chosen by measurement (docs/performance.md). Twenty tokens per parameter are more
than these minutes hold, so the run states its own length.
"""

from chinchilla_jax import config_io


def get_config():
  config = config_io.default_config()
  config.name = "smoke"
  config.run_length = "1.5e6 tokens"

  config.corpus.sources = ("stdlib",)
  config.corpus.validation_fraction = 0.05
  config.tokenizer.vocab_size = 4096
  config.data.store = "stores/smoke"
  config.data.seq_len = 256

  config.model.n_layers = 2
  config.model.d_model = 128
  config.model.n_heads = 2
  config.model.kv_size = 64
  config.model.d_ff = 512
  config.model.vocab_size = 4096

  # Parameters are bfloat16 over a float32 master, as in the paper; a CPU multiplies small
  # matrices at least as fast in float32.
  config.precision.activations = "float32"

  config.batch.sequences = 8
  config.optimizer.peak_lr = 3e-3
  config.schedule.warmup = "5%"
  config.evaluation.every = "20%"
  config.evaluation.batch = 32
  config.checkpoint.every = "20%"
  config.logging.console = "5%"
  return config
