"""Everything here runs on eight simulated devices."""

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
  if jax.device_count() != 8:
    pytest.skip("needs 8 simulated devices: run with "
                "XLA_FLAGS=--xla_force_host_platform_device_count=8; `make test` does")
