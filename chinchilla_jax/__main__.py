"""`python -m chinchilla_jax` is `chinchilla`."""

import sys

from chinchilla_jax.cli import main

if __name__ == "__main__":
  sys.exit(main())
