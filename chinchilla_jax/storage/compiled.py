"""Compiled programs, kept from one run to the next: JAX's persistent compilation cache.

They lie in the user's cache folder, apart by processor: a program for one may end in an illegal
instruction on another, and home folders are shared. Least recently used ones go first when they
have more than `LIMIT` bytes together. Nothing but time depends on them; the folder may be
deleted whenever no run starts.

  CHINCHILLA_COMPILED=FOLDER   keep them there
  CHINCHILLA_COMPILED=off      keep none
  JAX_COMPILATION_CACHE_DIR    JAX's own setting; if it is there, JAX's settings hold
"""

import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
import sys
import warnings
from collections.abc import Callable

from chinchilla_jax.errors import UserError

VARIABLE = "CHINCHILLA_COMPILED"
LIMIT = 2 * 2**30      # Bytes.
_WORTH = 0.1           # Seconds of compiling from which a program is kept.
_OFF = ("off", "0", "no", "none", "false")  # Nobody means a folder of such a name.
_OF_THE_DISK = ("OSError", "FileNotFoundError", "PermissionError", "Timeout", "NotImplementedError",
                "BlockingIOError", "NotADirectoryError", "IsADirectoryError", "InterruptedError")


def keep() -> None:
  """Makes JAX keep what it compiles from now on; call it before JAX is imported.

  Where the default folder cannot be written, nothing is kept, and nothing is said. What goes
  wrong later is told in one line, once, and stops nothing.

  Raises:
    UserError: the folder that CHINCHILLA_COMPILED names cannot be written.
  """
  named = os.environ.get(VARIABLE, "").strip()
  if named.lower() in _OFF or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    return
  if "://" in named:
    raise UserError(f"{VARIABLE}: {named} is no folder on a disk; name one, or say off")
  folder = pathlib.Path(named)
  try:
    folder = (folder.expanduser() if named else default_folder()) / _processor()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
      raise PermissionError(13, "permission denied")
  except (OSError, RuntimeError) as error:
    if named:
      reason = getattr(error, "strerror", None) or error
      raise UserError(f"{VARIABLE}: {folder} cannot be written ({reason}); name another folder, or "
                      "say off") from error
    return
  _sweep(folder)
  warnings.showwarning = functools.partial(_told, folder, set(), warnings.showwarning)
  if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 12):
    # Of every program that is found, XLA's CPU backend says at length that it is of a processor
    # with "prefer-no-gather", which is no instruction.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  import jax
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_compilation_cache_max_size", LIMIT)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH)


def default_folder() -> pathlib.Path:
  """chinchilla_jax/compiled in the user's cache folder.

  Raises:
    RuntimeError: the user has no home.
  """
  if base := os.environ.get("XDG_CACHE_HOME"):
    return pathlib.Path(base) / "chinchilla_jax/compiled"
  caches = "Library/Caches" if sys.platform == "darwin" else ".cache"
  return pathlib.Path.home() / caches / "chinchilla_jax/compiled"


def _told(folder: pathlib.Path, said: set[str], otherwise: Callable[..., None],
          message: Warning | str, *rest, **more) -> None:
  """Takes JAX's warnings about kept programs; all others go to `otherwise`.

  JAX never replaces an entry that it cannot read, so every run would compile that program anew.
  """
  found = re.match(r"Error (reading|writing) persistent compilation cache entry for "
                   r"'(.*?)': (\w+): (.*)", str(message), re.DOTALL)
  if not found:
    return otherwise(message, *rest, **more)
  does, program, kind, why = found.groups()
  damaged = does == "reading" and kind not in _OF_THE_DISK
  if damaged:
    _sweep(folder, program)
  if does not in said:
    said.add(does)
    reason = (why.strip().splitlines() or [kind])[0]
    print(f"note: the compiled {program} in {folder} is damaged ({reason}): compiled anew"
          if damaged else
          f"note: compiled programs cannot be {'read from' if does == 'reading' else 'kept in'} "
          f"{folder} ({reason}): {VARIABLE} names another folder, or off",
          file=sys.stderr, flush=True)


def _sweep(folder: pathlib.Path, program: str = "") -> None:
  """Removes programs that a process was killed while writing: JAX would never replace them.

  It writes an entry and then, under the same lock, its time: what has no time is not whole.
  Of `program`, of which one cannot be read, all go.
  """
  import filelock
  try:
    with filelock.FileLock(folder / ".lockfile", timeout=1):
      for entry in folder.glob("*-cache"):
        of_it = bool(program) and entry.name.rpartition("-cache")[0].rpartition("-")[0] == program
        its_time = entry.with_name(entry.name.removesuffix("-cache") + "-atime")
        if of_it or not its_time.exists():
          entry.unlink()
          its_time.unlink(missing_ok=True)
  except (OSError, NotImplementedError):  # Another run starts here, and sweeps; or no locks.
    pass


def _processor() -> str:
  """The processor by its instructions, for the name of a folder."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = [platform.processor()]
  told = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
  return f"{platform.machine()}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
