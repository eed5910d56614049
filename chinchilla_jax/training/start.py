"""Where a run starts: which checkpoint, what it owes, what has to be set aside first."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from chinchilla_jax.errors import UserError
from chinchilla_jax.parallel import processes
from chinchilla_jax.parallel.layout import Layout
from chinchilla_jax.storage.paths import Place, Remote
from chinchilla_jax.training import checkpoint, durable, remote
from chinchilla_jax.training import state as state_lib
from chinchilla_jax.training.run_folder import RunFolder

if TYPE_CHECKING:
  from chinchilla_jax.training.loop import Plan

DAMAGED, ROLLED_BACK = "damaged", "rolled-back"
Ranges = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Start:
  """What a run starts from. Choosing it changes nothing.

  Attributes:
    step: steps it has behind it.
    resumed: whether that is a checkpoint's; a fresh state otherwise.
    skipped: (first, count) of the sequences that are left out.
    owed: what belongs to step `step` and was not done before.
    aside: (step, DAMAGED or ROLLED_BACK, why) of the checkpoints that are to be set aside.
    notes: lines that say what is another than it was.
    found: steps of all checkpoints that there were.
  """

  step: int
  resumed: bool
  found: tuple[int, ...]
  skipped: Ranges = ()
  owed: tuple[str, ...] = ()
  aside: tuple[tuple[int, str, str], ...] = ()
  notes: tuple[str, ...] = ()


def choose(made: "Plan", folder: RunFolder, where: checkpoint.Surroundings,
           afresh: bool = False) -> Start:
  """Finds the newest checkpoint that is whole and of this run. All processes take part.

  Args:
    made: the run.
    folder: its folder.
    where: it is going to be computed.
    afresh: start from nothing where no checkpoint is left that is whole.

  Raises:
    UserError: the newest checkpoint that is whole is of another run, or none is whole.
  """
  path = folder.checkpoints
  steps, rollbacks = processes.from_main(
      lambda: (checkpoint.steps(path), folder.read_rollbacks()))
  skipped = tuple(tuple(one["skipped"]) for one in rollbacks)
  aside: list[tuple[int, str, str]] = []
  for step in reversed(steps):
    problem = processes.first_problem(checkpoint.problem(
        path, step, made.experiment.checkpoint.verify, processes.index(), processes.count()))
    if problem:
      aside.append((step, DAMAGED, problem))
      continue
    progress = processes.from_main(functools.partial(checkpoint.progress, path, step))
    changed = checkpoint.refuse_other_run(progress, made.experiment, made.fingerprints,
                                          str(folder.path))
    before = tuple(tuple(one) for one in progress["skipped"])
    skipped = tuple(dict.fromkeys((*before, *skipped)))
    if _trained_on(made, step, before, skipped):
      aside.append((step, ROLLED_BACK, "it was trained on batches that are left out now"))
      continue
    with processes.together():  # Before anything is written, the lock included.
      checkpoint.check(path, step, state_lib.abstract(made.experiment.model, made.optimizer),
                       whole=True)
    notes = [f"config.{name} was {old!r}, is now {new!r}" for name, old, new in changed]
    notes += [f"{line}: results may differ in the last bits"
              for line in checkpoint.moved(progress, where)]
    finished = processes.from_main(lambda step=step: done(folder, step))
    owed = tuple(duty for duty in progress["owed"] if duty not in finished)
    return Start(step, True, tuple(steps), skipped, owed, tuple(aside), tuple(notes))
  damaged = {step: why for step, kind, why in aside if kind == DAMAGED}
  if damaged and not afresh:
    raise UserError(f"{path} has no checkpoint that is whole ({checkpoint.told(damaged)}); bring "
                    "back a copy, or start from nothing with --force, which sets these aside")
  if made.experiment.checkpoint.init_from:
    with processes.together():  # What is wrong with it is said before anything is written.
      source, step = _source(made.experiment)
      try:
        checkpoint.check_weights(source.checkpoints, step, state_lib.abstract(
            made.experiment.model, made.optimizer)["optimizer"]["mu"])
      except UserError as error:
        raise UserError(f"config.checkpoint.init_from: {error}, or give a run of the same "
                        "model") from error
  return Start(0, False, tuple(steps), skipped, (), tuple(aside))


def _trained_on(made: "Plan", step: int, before: Ranges, skipped: Ranges) -> bool:
  """Whether a checkpoint has seen what is left out now but was not when it was written."""
  seen = made.clock.batches.cursor(step)
  if not seen:
    return False
  newest = int(made.sequences.skipping(before).actual(np.array([seen - 1]))[0])
  return any(one[0] <= newest for one in skipped if one not in before)


def done(folder: RunFolder, step: int) -> list[str]:
  """Duties of a step whose outcome is in the log."""
  kinds = {record.get("kind") for record in folder.read_metrics() if record.get("step") == step}
  return [duty for duty, kind in (("evaluation", "eval"), ("sample", "sample"))
          if kind in kinds]


def set_aside(folder: RunFolder, aside: Sequence[tuple[int, str, str]]) -> list[str]:
  """Moves checkpoints out of the way, process 0 for all; returns lines that say so.

  Raises:
    UserError: they cannot be moved.
  """
  lines = []
  with processes.together():
    for step, kind, why in aside if processes.is_main() else ():
      target = _free(folder.checkpoints / checkpoint.ASIDE, f"{step}-{kind}")
      try:
        if isinstance(target, Remote):
          remote.set_aside(folder.checkpoints, step, target)
        else:
          target.parent.mkdir(exist_ok=True)
          durable.rename(folder.checkpoints / str(step), target)
      except OSError as error:
        raise UserError(f"{folder.checkpoints / str(step)} is {kind} ({why}) and cannot be moved "
                        f"aside ({error.strerror}); move it away") from error
      folder.note("checkpoint set aside", step=step, kind=kind, why=why, to=target.name)
      lines.append(f"checkpoint {step:,} is {kind}: {why}; kept as {target}")
  return lines


def _free(folder: Place, name: str) -> Place:
  for number in range(1, 1000):
    path = folder / (name if number == 1 else f"{name}-{number}")
    if not path.exists():
      return path
  raise UserError(f"{folder} is full of checkpoints set aside; look at them, and remove some")


def state_of(made: "Plan", folder: RunFolder, begin: Start,
             layout: Layout) -> tuple[state_lib.State, str]:
  """The train state that a run starts from, and a line that says which. The order is important:

  1. the checkpoint that was chosen, from whatever mesh it was saved;
  2. the newest parameters of the run in config.checkpoint.init_from, all else fresh;
  3. a fresh state, drawn from the seed.

  Raises:
    UserError: names the first array that is missing, or has another shape or dtype.
  """
  experiment = made.experiment
  wanted = layout.placed(state_lib.abstract(experiment.model, made.optimizer))
  if begin.resumed:
    state = checkpoint.restore(folder.checkpoints, begin.step, wanted, whole=True)
    return state, f"resuming at step {begin.step:,} from {folder.checkpoints / str(begin.step)}"
  shardings = layout.state(wanted)
  init = jax.jit(lambda key: state_lib.init(experiment.model, made.optimizer, key),
                 out_shardings=shardings, compiler_options=layout.compiler_options)
  state = init(jax.random.key(experiment.seed))
  if not experiment.checkpoint.init_from:
    return state, f"starting afresh from seed {experiment.seed}"
  source, step = _source(experiment)
  weights = checkpoint.restore_weights(source.checkpoints, step, wanted["optimizer"]["mu"])
  state["params"], state["optimizer"] = jax.jit(
      made.optimizer.init, out_shardings=(shardings["params"], shardings["optimizer"]))(weights)
  return state, f"starting from the parameters of {source.path} at step {step:,}"


def _source(experiment) -> tuple[RunFolder, int]:
  try:
    source = RunFolder(experiment.checkpoint.init_from)
    step, problems = checkpoint.newest_good(source.checkpoints, experiment.checkpoint.verify)
  except UserError as error:
    raise UserError(f"config.checkpoint.init_from: {error}") from error
  if step is None:
    what = checkpoint.told(problems) or "none is there"
    raise UserError(f"config.checkpoint.init_from: {str(source.path)!r} has no checkpoint that is "
                    f"whole ({what}); give the folder of a run")
  return source, step
