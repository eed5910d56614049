"""Keeps back what libraries print of saves and restores: what fails is told here, in one line."""

import logging
import sys


def libraries() -> None:
  """For a process that saves or restores checkpoints; call it before."""
  # Orbax tells of every file it touches, and of what fails.
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  sys.unraisablehook = _unraisable


def _unraisable(what) -> None:
  """Leaves out what TensorStore says when Orbax has given up; that has been told."""
  if str(what.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(what)
