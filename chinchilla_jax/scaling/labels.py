"""Numbers for people."""

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def short(value: float) -> str:
  """Three digits and a letter: 1.234e9 is "1.23B". Without a letter from 1e16."""
  for size, letter in _UNITS:
    if 0.9995 * size <= value < 1e16:
      digits = f"{value / size:.3g}"
      return f"{float(digits):g}{letter}"
  return f"{value:.3g}"
