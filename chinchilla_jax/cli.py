"""The command line. A command's module is imported only when the command is asked for.

Exit status: 0 done; 2 something the user can mend (one line on stderr says what); 75 preempted
(SIGTERM, saved) or hung, run the same command again; 130 ended by Ctrl-C, saved. Before `train` has
taken a step there is nothing to save (`leaving`); other commands end with 143 after a SIGTERM.
"""

import argparse
import contextlib
import difflib
import gc
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from chinchilla_jax import __version__, leaving
from chinchilla_jax.errors import AGAIN, UserError

COMMANDS = {
    "prepare": "turn text into a tokenizer and a token store",
    "plan": "what model, how many tokens, which batch, learning rate and mesh a budget buys",
    "compile": "memory, collectives and least time of a step on devices that are not here",
    "train": "train a model; run again to resume",
    "sweep": "train a family of models, here or on a cluster; run again to resume",
    "fit": "the scaling law that runs follow, and how sure it is",
    "evaluate": "bits per byte of a checkpoint on held-out text",
    "generate": "text from a checkpoint",
    "inspect": "what is in a config, a run or a token store",
    "report": "one page with the curves and figures of these runs",
}

# Commands that compile: what is said when a signal ends them before anything is to be saved, and
# the exit status after a SIGTERM if not 143.
_AT_ONCE = {
    "train": ("ended by {} before a step was taken: nothing to save, the same command starts again",
              AGAIN),
    "compile": (leaving.INTERRUPTED,), "evaluate": (leaving.INTERRUPTED,),
    "generate": (leaving.INTERRUPTED,),
}

_CONFIG_HELP = """\
configuration:
  --config=FILE[:ARGUMENT]     a Python file whose get_config(ARGUMENT) returns a ConfigDict,
                               or the config.json of a run
  --config.SECTION.FIELD=VALUE one field, such as --config.optimizer.peak_lr=2e-4
  Every field, its unit, default and reason: docs/configuration.md
"""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command and returns its exit status."""
  argv = list(sys.argv[1:] if argv is None else argv)
  if not argv or argv[0] in ("-h", "--help", "help"):
    print(_help())
    return 0
  if argv[0] == "--version":
    print(f"chinchilla_jax {__version__}")
    return 0
  try:
    return _run(argv[0], argv[1:])
  except UserError as error:
    print(f"chinchilla {argv[0]}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  except (RuntimeError, AssertionError) as error:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    platforms = os.environ.get("JAX_PLATFORMS")
    if not platforms or not frame.f_code.co_filename.endswith("xla_bridge.py"):
      raise
    why = f" ({' '.join(str(error).partition(' (')[0].split())})" if str(error) else ""
    print(f"chinchilla {argv[0]}: JAX_PLATFORMS={platforms}: JAX finds no such device here{why}; "
          "unset it, or say cpu", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(f"\nchinchilla {argv[0]}: interrupted", file=sys.stderr)
    return 130
  except BrokenPipeError:  # The reader (`| head`) has seen enough.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def leave() -> NoReturn:
  """Ends the process with the status of `main`, at once.

  A thread that compiles cannot be interrupted, and Python would wait for it, minutes perhaps, after
  the one line has been said or Ctrl-C has been pressed twice.
  """
  # Starting makes a million objects that stay. As Python has it, they would be gone through again
  # and again for garbage, 0.3 s of a start (docs/performance.md).
  gc.set_threshold(10_000, 20, 50)
  command = sys.argv[1] if len(sys.argv) > 1 else ""
  with (leaving.at_once(command, *_AT_ONCE[command]) if command in _AT_ONCE
        else contextlib.nullcontext()):
    _leave()


def _leave() -> NoReturn:
  try:
    status = main()
  except Exception:
    if not _compiling():
      raise
    sys.excepthook(*sys.exc_info())
    status = 1
  if _compiling():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)


def _compiling() -> bool:
  early = sys.modules.get("chinchilla_jax.training.early")
  return early is not None and early.at_it()


def _help() -> str:
  width = max(map(len, COMMANDS))
  lines = ["usage: chinchilla COMMAND [options]", "",
           "Plan, train and prove compute-optimal language models in JAX.", "", "commands:"]
  lines += [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
  lines += ["", "chinchilla COMMAND --help shows a command's options.", "", _CONFIG_HELP.rstrip()]
  return "\n".join(lines)


def _run(name: str, argv: list[str]) -> int:
  if name not in COMMANDS:
    near = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f"did you mean {near[0]}?" if near else f"commands are {', '.join(COMMANDS)}"
    raise UserError(f"no such command; {hint}")
  command = importlib.import_module(f"chinchilla_jax.commands.{name}")
  parser = _Parser(prog=f"chinchilla {name}", description=COMMANDS[name].capitalize() + ".",
                   epilog=_CONFIG_HELP if command.TAKES_CONFIG else None, allow_abbrev=False,
                   formatter_class=argparse.RawDescriptionHelpFormatter)
  command.add_arguments(parser)
  if command.TAKES_CONFIG:
    config, overrides, argv = split_config_flags(argv)
    args = parser.parse_args(argv)
    args.config, args.overrides = config, overrides
  else:
    args = parser.parse_args(argv)
  return command.run(args)


class _Parser(argparse.ArgumentParser):
  """argparse, whose complaints are one line like everybody else's."""

  def error(self, message: str):
    raise UserError(f"{message}; see {self.prog} --help")


def split_config_flags(
    argv: Sequence[str]) -> tuple[str | None, list[tuple[str, str | None]], list[str]]:
  """Takes --config and --config.FIELD out of the arguments.

  "--flag=value" and "--flag value" are the same; a field without a value is "true".

  Returns:
    (config file or None, [(dotted field, text or None)], the other arguments).
  """
  config, overrides, rest = None, [], []
  queue = list(argv)
  while queue:
    word = queue.pop(0)
    flag, equals, value = word.partition("=")
    if flag != "--config" and not flag.startswith("--config."):
      rest.append(word)
      continue
    text = value if equals else None
    if text is None and queue and not queue[0].startswith("--"):
      text = queue.pop(0)
    if flag != "--config":
      overrides.append((flag.removeprefix("--config."), text))
    elif not text:
      raise UserError("--config: no file given, as in --config=configs/smoke.py")
    else:
      config = text
  return config, overrides, rest
