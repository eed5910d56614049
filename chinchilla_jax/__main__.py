"""`python -m chinchilla_jax` is `chinchilla`."""

from chinchilla_jax.cli import leave

if __name__ == "__main__":
  leave()
