"""Fixtures of the sweeps' tests."""

import pytest
from sweep_bench import Bench


@pytest.fixture
def bench(tmp_path, tiny_store, monkeypatch) -> Bench:
  return Bench(tmp_path, tiny_store, monkeypatch)
