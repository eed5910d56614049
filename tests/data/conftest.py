"""A small real store for the tests of the data room."""

import pytest
from tiny_corpora import experiment, make_corpus

from chinchilla_jax.data import prepare, tokens


@pytest.fixture(scope="session")
def texts_and_store(tmp_path_factory):
  """({id: text}, path of a store made from them); do not change it."""
  folder = tmp_path_factory.mktemp("store")
  texts = make_corpus(folder / "corpus")
  prepare.prepare(experiment(folder / "store", [folder / "corpus"]), quiet=True)
  return texts, str(folder / "store")


@pytest.fixture(scope="session")
def store(texts_and_store) -> tokens.TokenStore:
  return tokens.open_store(texts_and_store[1])
