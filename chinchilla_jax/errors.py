"""The one exception that means: the user can mend this. And the status that means: run me again."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

AGAIN = 75  # EX_TEMPFAIL of sysexits.h: preempted or hung; the same command goes on.


class UserError(Exception):
  """Something the user asked for cannot be done.

  The message is one line: what is wrong, where, and the cure. The command line prints
  it without a traceback and exits with status 2; nothing has been written by then.
  """


def as_script(main: Callable[[], None]) -> NoReturn:
  """Runs a script's `main`; says what its user can mend as the command line does."""
  name, status = os.path.basename(sys.argv[0]), 0
  try:
    main()
  except UserError as error:
    print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
    status = 2
  except KeyboardInterrupt:
    print(f"\n{name}: interrupted", file=sys.stderr)
    status = 130
  sys.exit(status)


def positive(text: str) -> int:
  """A type for argparse: a whole number from 1 on."""
  if not text.isdecimal() or not int(text):
    raise argparse.ArgumentTypeError(f"got {text!r}, allowed is a whole number from 1 on")
  return int(text)
