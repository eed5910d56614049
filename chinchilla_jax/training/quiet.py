"""Keeps back what libraries print of saves and restores: what fails is told here, in one line."""

import inspect
import logging
import sys


def libraries() -> None:
  """For a process that saves or restores checkpoints; call it before."""
  # Orbax tells of every file it touches, and of what fails.
  logging.getLogger("absl").setLevel(logging.CRITICAL)
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  sys.unraisablehook = _unraisable


def _unraisable(what) -> None:
  """Leaves out what Orbax's coroutines and TensorStore say once a read has been given up.

  The first array that cannot be read has been told; the others fail when they are collected.
  """
  of_orbax = inspect.iscoroutine(what.object) and "orbax" in what.object.cr_code.co_filename
  if not of_orbax and str(what.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(what)
