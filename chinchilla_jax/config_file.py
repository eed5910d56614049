"""Python config files: programs of the user's, run as such. What goes wrong in one is one line."""

import contextlib
import importlib.machinery
import importlib.util
import pathlib
import types
from collections.abc import Iterator

from chinchilla_jax.errors import UserError


class _Loader(importlib.machinery.SourceFileLoader):
  """Leaves no __pycache__ beside the user's file, where a stale one could be taken for it."""

  def set_data(self, path, data, *, _mode=0o666):
    pass


def run(file: pathlib.Path) -> types.ModuleType:
  """The module that a file makes. A config file is a program by design: only run your own.

  Raises:
    UserError: it does not run; says where.
  """
  path, name = str(file.absolute()), f"config_{file.stem}"
  spec = importlib.util.spec_from_file_location(name, path, loader=_Loader(name, path))
  module = importlib.util.module_from_spec(spec)
  with telling(file):
    spec.loader.exec_module(module)
  return module


@contextlib.contextmanager
def telling(file: pathlib.Path) -> Iterator[None]:
  """A block that calls into a config file: what goes wrong in it becomes one line that says where.

  Raises:
    UserError: with the line of the file; one that the file itself raises keeps its words.
  """
  path = str(file.absolute())
  try:
    yield
  except (Exception, SystemExit) as error:
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == path else None
    trace = error.__traceback__
    while trace is not None:
      if trace.tb_frame.f_code.co_filename == path:
        line = trace.tb_lineno
      trace = trace.tb_next
    where = f"{file}, line {line}" if line else str(file)
    if isinstance(error, UserError):
      known = str(error).startswith("--config: ") or not line
      raise UserError(str(error) if known else f"--config: {where}: {error}") from None
    message = str(error.args[0] if error.args else error).splitlines() or [""]
    raise UserError(f"--config: {where}: {type(error).__name__}: {message[0]}; mend the file, or "
                    "give another") from None
