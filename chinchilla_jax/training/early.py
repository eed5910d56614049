"""The training step is compiled while the train state is made and the run's logs are opened.

Making a fresh state is a program of its own, and compiling it leaves a core idle, as tracing the
step in Python does; a state from a checkpoint waits for the disk.
"""

import threading
from collections.abc import Callable
from typing import Any

_NAME = "compile the step"


def at_it() -> bool:
  """Whether such a thread is still at work; after an error nobody waits for it."""
  return any(thread.name == _NAME for thread in threading.enumerate())


def compiling(step: Any, *abstract: Any) -> Callable[[], Exception | None]:
  """Begins to compile a jitted function in a thread.

  A call with arrays of these shapes, dtypes and shardings then finds the program (JAX 0.10 to
  0.12 keep what `lower(...).compile()` makes by the same key).

  Args:
    step: what `jax.jit` gave back.
    abstract: its arguments, `jax.ShapeDtypeStruct`s or arrays.

  Returns:
    A function that waits until it is done, and returns why it could not be compiled, or None.
  """
  failed: list[Exception] = []

  def work() -> None:
    try:
      step.lower(*abstract).compile()
    except Exception as error:
      failed.append(error)

  def wait() -> Exception | None:
    thread.join()
    return failed[0] if failed else None

  thread = threading.Thread(target=work, name=_NAME)
  thread.start()
  return wait
