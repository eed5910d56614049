"""The one exception that means: the user can mend this. And the status that means: run me again."""

AGAIN = 75  # EX_TEMPFAIL of sysexits.h: preempted or hung; the same command goes on.


class UserError(Exception):
  """Something the user asked for cannot be done.

  The message is one line: what is wrong, where, and the cure. The command line prints
  it without a traceback and exits with status 2; nothing has been written by then.
  """
