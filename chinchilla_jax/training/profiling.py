"""A trace of a few steps, for TensorBoard (xprof) and Perfetto: `config.profile.steps`.

Process 0 writes it, of its own host and devices, to the run's `profile/`:

  plugins/profile/TIME/HOST.xplane.pb            TensorBoard's profile plugin
  plugins/profile/TIME/perfetto_trace.json.gz    ui.perfetto.dev

The step before is waited for, so that the trace has whole steps and nothing else. A trace that
cannot be made stops no run.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax

from chinchilla_jax import config as schema
from chinchilla_jax.errors import UserError
from chinchilla_jax.storage import objects, paths
from chinchilla_jax.storage.paths import Place, Remote
from chinchilla_jax.training import recorder


def steps(config: schema.Profile) -> tuple[int, int] | None:
  """(first, last), counted from 1; None where none is wanted. `config_io` checks the form."""
  if not config.steps:
    return None
  first, _, last = config.steps.partition("-")
  return int(first), int(last or first)


def refuse(config: schema.Profile, total_steps: int) -> None:
  """Refuses steps that the run does not have; a trace that begins in it ends with it at the latest.

  Raises:
    UserError: none of them is in the run.
  """
  if (wanted := steps(config)) and wanted[0] > total_steps:
    raise UserError(f"config.profile.steps: got {config.steps}, but the run ends at step "
                    f"{total_steps:,}; give steps up to it")


class Profiler:
  """Traces the steps that a config names, those that this process takes.

  Before the first of them and after the last one the records are paused, so that no step's time has
  the profiler's in it. So they are in every process, whether it traces or not: one that read a
  step's outcome sooner than the others would also stop sooner.

  Args:
    config: which steps.
    folder: where the trace goes, on a disk or in a bucket; None: another process traces.
    say: takes a line for the console.
  """

  def __init__(self, config: schema.Profile, folder: Place | None, say: Callable[[str], None]):
    self._wanted, self._folder, self._say = steps(config), folder, say
    self._scratch: paths.Scratch | None = None
    self._begun = self._running = False
    self._last = 0

  def before(self, step: int, ready: Any, record: recorder.Recorder) -> None:
    """Starts the trace if it starts with this step; `ready` is what the step before made."""
    if self._wanted is None or self._begun or step < self._wanted[0]:
      return
    if step > self._wanted[1]:  # Only where a run resumes behind them.
      if self._folder is not None:
        self._say(f"no trace: steps {self._wanted[0]:,} to {self._wanted[1]:,} of "
                  f"config.profile.steps were over before step {step:,}")
      self._wanted = None
      return
    self._begun = True
    record.pause()
    if self._folder is not None:
      jax.block_until_ready(ready)
      self._start()
    record.resume()

  def after(self, step: int, ready: Any, record: recorder.Recorder) -> None:
    """Ends the trace if it ends with this step, which made `ready`."""
    self._last = step
    if not self._begun or step != self._wanted[1]:
      return
    record.pause()
    if self._running:
      jax.block_until_ready(ready)
      self.close()
    record.resume()

  def _start(self) -> None:
    try:
      if isinstance(self._folder, Remote):
        self._scratch = paths.Scratch()
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # Every call of Python would drown the steps.
      jax.profiler.start_trace(str(self._local), create_perfetto_trace=True,
                               profiler_options=options)
      self._running = True
    except Exception as error:  # Whatever it is, the run goes on.
      self._give_up(error)

  def close(self) -> None:
    """Ends a trace that a stop cut short."""
    if not self._running:
      return
    self._running, first = False, self._wanted[0]
    try:
      jax.profiler.stop_trace()
      if self._scratch is not None:
        for name in paths.sizes(self._scratch.path):
          objects.upload(self._scratch.path / name, f"{self._folder.url}/{name}")
      self._say(f"trace of steps {first:,} to {self._last:,} in {self._folder}")
    except Exception as error:
      self._give_up(error)
    finally:
      if self._scratch is not None:
        self._scratch.remove()

  @property
  def _local(self) -> pathlib.Path:
    return self._folder if self._scratch is None else self._scratch.path

  def _give_up(self, error: Exception) -> None:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    self._say(f"no trace: {reason}")
