"""The one exception that means: the user can mend this."""


class UserError(Exception):
  """Something the user asked for cannot be done.

  The message is one line: what is wrong, where, and the cure. The command line prints
  it without a traceback and exits with status 2; nothing has been written by then.
  """
