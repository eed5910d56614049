"""How much memory a command takes."""

import re
import subprocess
import sys

PROGRAM = """
import pathlib, sys
from chinchilla_jax.cli import main
status = main()
print(pathlib.Path("/proc/self/status").read_text())
sys.exit(status)
"""


def of_command(*words: str) -> tuple[str, int]:
  """(what `chinchilla WORDS` prints, its peak resident bytes), run in a process of its own.

  VmHWM is the peak since the program began; `getrusage` hands a child the peak of its parent.
  """
  done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True,
                        check=False)
  assert done.returncode == 0, done.stderr
  printed, status = done.stdout.rsplit("Name:", 1)
  return printed, int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
