"""What keeps the memory of a process flat that lives for weeks and saves all the time."""

import ctypes
import os
import sys

_M_ARENA_MAX = -8  # malloc.h of the GNU C library


def few_arenas(count: int | None = None) -> None:
  """Lets all threads share `count` heaps. Call it before there are threads.

  The GNU C library gives threads heaps of their own, eight a core, and each keeps what it was once
  given. A save runs in a hundred threads, and which one takes which piece changes from save to
  save, so that a process grew with every checkpoint (docs/performance.md). Other C libraries are
  left as they are. By default one more than cores, eight at most: with fewer, the threads that
  compile wait for one another.
  """
  if not sys.platform.startswith("linux"):
    return
  try:
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, count or min(8, (os.cpu_count() or 1) + 1))
  except (OSError, AttributeError):
    pass


def no_counters() -> None:
  """Keeps Orbax from asking TensorStore for its counters, twice a save and for a log line only.

  Every answer leaks some 15 kB (TensorStore 0.1.86). Where a later Orbax does not ask in this
  way, nothing changes.
  """
  from orbax.checkpoint._src.serialization import tensorstore_utils
  if hasattr(tensorstore_utils, "get_tensorstore_raw_bytes"):
    tensorstore_utils.get_tensorstore_raw_bytes = lambda *_, **__: 0
