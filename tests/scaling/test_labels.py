import pytest

from chinchilla_jax.scaling.labels import short


@pytest.mark.parametrize("value, text", [
    (1.234e9, "1.23B"), (999.9e6, "1B"), (70e9, "70B"), (43_720_448, "43.7M"), (1e12, "1T"),
    (212e12, "212T"), (5e3, "5k"), (12.0, "12"), (3e17, "3e+17")])
def test_numbers_for_people(value, text):
  assert short(value) == text
