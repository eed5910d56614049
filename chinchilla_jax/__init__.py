"""chinchilla_jax: plan, train and prove compute-optimal language models in JAX."""

__version__ = "0.1.0"
