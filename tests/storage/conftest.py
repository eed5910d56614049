"""A bucket of each kind, on a server of its own, for all tests of this folder."""

import pathlib
import shutil
import sys

import pytest

_TESTS = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(_TESTS / "survival"), str(_TESTS / "parallel")]  # `launch`, `ports`.

from servers import Server  # noqa: E402

from chinchilla_jax.storage import objects  # noqa: E402


@pytest.fixture(scope="session")
def servers(tmp_path_factory):
  """The server of a kind, started when it is asked for."""
  running = {}

  def of(kind: str) -> Server:
    if kind not in running:
      running[kind] = Server(kind, tmp_path_factory.mktemp(kind)).start()
    return running[kind]

  yield of
  for one in running.values():
    one.stop()


@pytest.fixture(scope="session", params=["gs", "s3"])
def kind(request) -> str:
  return request.param


@pytest.fixture(scope="session")
def _kept(tmp_path_factory):
  """One cache for tests that do not care: a store is copied into it once."""
  return tmp_path_factory.mktemp("cache")


@pytest.fixture
def server(kind, servers, reach):
  return reach(servers(kind))


@pytest.fixture
def gs_server(servers, reach):
  return reach(servers("gs"))


@pytest.fixture
def reach(monkeypatch, _kept):
  """Leads this process, and those that it starts, to a server."""
  def to(server: Server) -> Server:
    objects._file_system.cache_clear()
    for name, value in server.environ.items():
      monkeypatch.setenv(name, value)
    return server

  monkeypatch.setenv("CHINCHILLA_CACHE", str(_kept))
  yield to
  objects._file_system.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty place for what this test's processes keep."""
  monkeypatch.setenv("CHINCHILLA_CACHE", str(tmp_path / "cache"))
  yield tmp_path / "cache"
  shutil.rmtree(tmp_path / "cache", ignore_errors=True)
