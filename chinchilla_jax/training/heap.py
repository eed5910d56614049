"""What the C library does with memory: flat for weeks of saves, and at hand for the next step."""

import ctypes
import os
import pathlib
import platform
import sys

_M_ARENA_MAX = -8  # malloc.h of the GNU C library
_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def few_arenas(count: int = 2) -> None:
  """Lets all threads share `count` heaps. Call it before there are threads.

  The GNU C library gives threads heaps of their own, eight a core, and each keeps what it was once
  given. A save runs in a hundred threads, and which one takes which piece changes from save to
  save, so that a process grew with every checkpoint (docs/performance.md). Other C libraries are
  left as they are.
  """
  if not sys.platform.startswith("linux"):
    return
  try:
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, count)
  except (OSError, AttributeError):
    pass


def huge_pages() -> None:
  """Starts this command anew with huge pages for large pieces of memory, where that helps.

  XLA's CPU backend asks for all of a step's temporaries at its start and frees them at its end;
  the C library maps such a piece anew each time, and the kernel clears every page of it, a tenth
  of a step (docs/performance.md). The GNU C library asks for huge pages only if its environment
  says so when it starts. A setting that is there already is left alone.

  Call it before anything else: the process keeps its number, and nothing of its memory.
  """
  told = os.environ.get("GLIBC_TUNABLES", "")
  if "glibc.malloc.hugetlb" in told or not sys.platform.startswith("linux"):
    return
  try:
    if platform.libc_ver()[0] != "glibc" or "[madvise]" not in _PAGES.read_text():
      return
    tunables = ":".join(filter(None, (told, "glibc.malloc.hugetlb=1")))
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]],
              os.environ | {"GLIBC_TUNABLES": tunables})
  except OSError:  # No such file, or no leave to start a program: then without.
    return


def no_counters() -> None:
  """Keeps Orbax from asking TensorStore for its counters, twice a save and for a log line only.

  Every answer leaks some 15 kB (TensorStore 0.1.86). Where a later Orbax does not ask in this
  way, nothing changes.
  """
  from orbax.checkpoint._src.serialization import tensorstore_utils
  if hasattr(tensorstore_utils, "get_tensorstore_raw_bytes"):
    tensorstore_utils.get_tensorstore_raw_bytes = lambda *_, **__: 0
