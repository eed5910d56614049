"""The training loop, read from top to bottom."""

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from chinchilla_jax import config as schema
from chinchilla_jax import config_io, durations, leaving
from chinchilla_jax.data import address, batches, tokens
from chinchilla_jax.errors import UserError
from chinchilla_jax.evaluation import held_out
from chinchilla_jax.inference import generate
from chinchilla_jax.model import shapes
from chinchilla_jax.parallel import mesh as mesh_lib
from chinchilla_jax.parallel import processes
from chinchilla_jax.parallel.layout import Layout, refuse
from chinchilla_jax.storage import paths
from chinchilla_jax.training import (
  checkpoint,
  description,
  early,
  metrics,
  optimizer,
  profiling,
  recorder,
  run_folder,
  run_lock,
  saving,
  schedule,
  start,
  trained,
)
from chinchilla_jax.training import state as state_lib
from chinchilla_jax.training import step as step_lib
from chinchilla_jax.training.interrupt import Interrupt
from chinchilla_jax.training.run_folder import RunFolder
from chinchilla_jax.training.watchdog import Watchdog

_COMPILING = 3600.0  # Seconds that the first step of a process may take at least.


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything that is fixed before the first step. Making one writes nothing."""

  experiment: schema.Experiment
  store: tokens.TokenStore
  sequences: batches.Batches
  clock: durations.Clock
  optimizer: optimizer.AdamW

  @property
  def fingerprints(self) -> dict[str, str]:
    """Of what a checkpoint belongs to, beside its config."""
    return {"store": self.store.fingerprint, "tokenizer": self.store.tokenizer.fingerprint}


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a call of `train` ended."""

  step: int
  total_steps: int
  signal: int | None               # The signal that ended it early.
  tokens_per_second: float | None  # Median over this call's steps.
  rollback: int = 0                # The step whose spike ended a leg; never how `train` ends.


@dataclasses.dataclass(frozen=True)
class Run:
  """What all legs of one call of `train` have in common: a rollback ends a leg."""

  plan: Plan
  folder: RunFolder
  layout: Layout
  where: checkpoint.Surroundings
  step: Callable[..., tuple[state_lib.State, dict]]
  evaluate: held_out.HeldOut
  check_lock: Callable[[], None]
  confirm_lock: Callable[[], None]
  ballot: Callable[[], int]  # The signal that this process has got, or 0.


def plan(experiment: schema.Experiment) -> Plan:
  """Checks a config against its store.

  Raises:
    UserError: the store is missing or damaged, the tokenizer has more pieces than the model,
      the schedule or the profile does not fit into the run.
  """
  data, model = experiment.data, experiment.model
  store = tokens.open_store(data.store, verify=data.verify)
  pieces = store.tokenizer.vocab_size
  if pieces > model.vocab_size:
    raise UserError(f"config.model.vocab_size: got {model.vocab_size:,}, but the tokenizer of "
                    f"{data.store} has {pieces:,} pieces; set it to {pieces} or more")
  sequences = batches.Batches(store.split("train"), seq_len=data.seq_len, seed=experiment.seed,
                              shuffle=data.shuffle, document_mask=data.document_mask)
  clock = durations.clock(
      experiment.run_length, experiment.batch.sequences, experiment.batch.ramp,
      seq_len=data.seq_len, n_params=shapes.count_parameters(model),
      epoch_tokens=sequences.n_windows * data.seq_len)
  profiling.refuse(experiment.profile, clock.total_steps)
  rate = schedule.learning_rate(experiment.schedule, experiment.optimizer.peak_lr, clock)
  adamw = optimizer.AdamW(experiment.optimizer, experiment.precision, rate)
  return Plan(experiment, store, sequences, clock, adamw)


def train(experiment: schema.Experiment, workdir: str | os.PathLike,
          force: bool = False) -> Outcome:
  """Trains to the end of the run, from the newest good checkpoint in `workdir` if there is one.

  Ctrl-C and SIGTERM save and return early; the same call goes on from there. (In the command,
  with one process, they end it at once before the first step: see `leaving`.) With several
  processes (`joining.start` comes first) all of them call this; process 0 writes the logs.

  Args:
    experiment: the run.
    workdir: its folder.
    force: take over from a process that may still be at it, where no lock but a lease says so;
      start from nothing where every checkpoint is damaged. Neither loses anything.

  Raises:
    UserError: the config does not fit its store, the devices, or the run that `workdir` holds,
      processes disagree, or another one is training there; nothing has been written then. Or the
      loss stayed non-finite, spikes came back, saves kept failing.
  """
  with processes.together():
    folder = RunFolder(workdir)
  made = agreed_plan(experiment, folder)
  mesh = mesh_lib.make(experiment.mesh)
  refuse(experiment, mesh.shape)
  layout = Layout(experiment, mesh)
  if experiment.evaluation.sample_tokens and processes.count() > 1:
    raise UserError("config.evaluation.sample_tokens: texts are sampled with one process only; set "
                    "it to 0, and use `chinchilla generate` on the checkpoints")
  # Both say what they cannot do before anything is written.
  step, evaluate = jit_step(made, layout), held_out.HeldOut(experiment, made.store, layout)
  where = checkpoint.surroundings(mesh_lib.shape_text(mesh), experiment.mesh.strategy)
  begin = start.choose(made, folder, where, force)
  if begin.step >= made.clock.total_steps and not begin.owed:
    if processes.is_main():
      print(f"nothing to do: {folder.path} is complete at step {begin.step:,} of "
            f"{made.clock.total_steps:,}")
    return Outcome(begin.step, made.clock.total_steps, None, None)

  with contextlib.ExitStack() as stack:
    lock = None
    with processes.together():
      if processes.is_main():
        folder.create()
        lock = stack.enter_context(run_lock.held(folder.path, force))
    if processes.from_main(lambda: checkpoint.steps(folder.checkpoints)) != list(begin.found):
      begin = start.choose(made, folder, where, force)  # Another process was at it until now.
    interrupt = stack.enter_context(Interrupt())
    if processes.count() > 1:
      leaving.no_longer()  # One that goes alone would keep the others waiting: they vote.
    elif lock:
      leaving.undo(lambda number: lock.release())
    run = Run(made, folder, layout, where, step, evaluate,
              lock.check if lock else lambda: None, lock.confirm if lock else lambda: None,
              lambda: interrupt.signal or 0)
    try:
      while (outcome := leg(run, begin)).rollback:
        roll_back(run, outcome.rollback, begin.skipped)
        if outcome.signal:
          break
        begin = start.choose(made, folder, where, afresh=True)
    except UserError as error:
      if processes.is_main():
        folder.note("failed", why=str(error))
      raise
  processes.barrier("the end")  # While process 0 ends its logs, the others must not be gone.
  return outcome


def leg(run: Run, begin: start.Start) -> Outcome:
  """Trains from one start until the run is complete, a signal comes, or a rollback is due."""
  # ---------------------------------------------------------------- Plan
  made, folder, layout, experiment = run.plan, run.folder, run.layout, run.plan.experiment
  sequences = made.sequences.skipping(begin.skipped)
  clock, total_steps = made.clock, made.clock.total_steps
  evaluate_every = clock.steps(experiment.evaluation.every, "config.evaluation.every")
  save_every = clock.steps(experiment.checkpoint.every, "config.checkpoint.every")
  keep_every = clock.steps(experiment.checkpoint.keep_every, "config.checkpoint.keep_every")
  log_every = max(1, clock.steps(experiment.logging.every, "config.logging.every"))
  print_every = max(1, clock.steps(experiment.logging.console, "config.logging.console"))

  # ---------------------------------------------------------------- State
  step, owed = begin.step, list(begin.owed)
  compiled = lambda: None  # Returns an error where there was one.
  # Of several processes each would do this in its own time, and their programs talk to each other.
  if step < total_steps and processes.count() == 1:
    wanted = layout.placed(state_lib.abstract(experiment.model, made.optimizer))
    shape = clock.batches.sequences(step), experiment.data.seq_len
    compiled = early.compiling(run.step, wanted, layout.batch(shape),
                               processes.abstract_vote(layout.mesh))
  with processes.together():
    state, note = start.state_of(made, folder, begin, layout)
  notes = [note, *(f"  {line}" for line in begin.notes), *start.set_aside(folder, begin.aside)]

  with contextlib.ExitStack() as stack:
    # -------------------------------------------------------------- Sinks
    sinks: list[Any] = []
    say = lambda text: print(text, file=sys.stderr, flush=True)
    if processes.is_main():
      folder.write_config(experiment)
      rolled_back = any(kind == start.ROLLED_BACK for _, kind, _ in begin.aside)
      folder.rewind_metrics(step, keep=rolled_back)
      folder.note("resume" if begin.resumed else "start", step=step, notes=notes,
                  **dataclasses.asdict(run.where))
      leaving.undo(lambda number: folder.note("stop", step=step, signal=number))
      console = metrics.Console(total_steps, step, print_every)
      leaving.undo(lambda number: console.close())
      say = console.print
      sinks += [console, metrics.JsonLines(folder.metrics)]
      if experiment.logging.tensorboard:
        sinks.append(metrics.TensorBoard(folder.tensorboard, step))
      if experiment.logging.wandb:
        sinks.append(metrics.WeightsAndBiases(
            experiment.logging.wandb, experiment.name, folder.path, config_io.to_dict(experiment)))
      for sink in sinks:
        stack.callback(sink.close)
      for line in (*description.of(made, layout), *notes):
        say(line)

    # -------------------------------------------------------------- Steps
    with processes.together():
      saver = saving.Saver(folder.checkpoints, experiment.checkpoint, keep_every, say, folder.note)
      stack.callback(saver.close)
    record = recorder.Recorder(experiment, clock, sinks, log_every, step,
                               functools.partial(address.of, sequences))
    requests = ((clock.batches.cursor(s), clock.batches.sequences(s))
                for s in range(step, total_steps))
    feed = stack.enter_context(contextlib.closing(batches.prefetch(
        functools.partial(device_batch, sequences, layout), requests, experiment.data.prefetch)))
    hang = experiment.guard.hang_after
    note_hang = lambda text: folder.note("hung", step=record.done, why=text)
    watchdog = stack.enter_context(Watchdog(
        hang, max(hang, _COMPILING), lambda: f"last completed step {record.done:,}",
        note_hang if processes.is_main() else lambda text: None))
    profiler = profiling.Profiler(
        experiment.profile, folder.profile if processes.is_main() else None, say)
    stack.callback(profiler.close)
    stack.enter_context(jax.transfer_guard("disallow"))

    def before_save() -> None:
      run.confirm_lock()
      record.flush()

    def save() -> None:
      with processes.together():
        run.check_lock()
      # Before checkpoint s is complete, every line up to s is on disk.
      saver.save(step, state, checkpoint.progress_of(
          experiment, made.fingerprints, step, clock.tokens(step), run.where,
          [list(one) for one in begin.skipped], list(owed)), before_save)
      record.resume()

    def pay() -> None:
      """Does what belongs to this step, unless a signal comes."""
      if owed:
        record.pause()
      while owed and not record.stop_signal:
        try:
          do = {"evaluation": evaluation, "sample": sample}[owed[0]]
          record.event({"step": step, **do()})
          owed.pop(0)
        except held_out.Stopped as stopped:
          record.stop_signal = stopped.signal
        record.resume()

    def evaluation() -> dict[str, Any]:
      result = run.evaluate(state["params"], watchdog.beat, run.ballot)
      return {"kind": "eval", "loss": result.loss, "bits_per_byte": result.bits_per_byte,
              "targets": result.targets, "bytes": result.bytes}

    def sample() -> dict[str, Any]:
      prompt, ids = experiment.evaluation.sample_prompt, []
      model = trained.Trained(experiment, made.store, step, layout, state["params"])
      with jax.transfer_guard("allow"):  # Every piece goes to the host.
        for token in generate.generate(
            model, prompt, max_tokens=experiment.evaluation.sample_tokens):
          ids.append(token)
          watchdog.beat()
          if signal := run.ballot():
            raise held_out.Stopped(signal)
      text = made.store.tokenizer.decode_bytes(ids).decode(errors="replace")
      return {"kind": "sample", "prompt": prompt, "text": text}

    # -------------------------------------------------------------- Train
    if error := compiled():
      from chinchilla_jax.training import ahead  # Reads programs: nothing else here needs it.
      raise ahead.explained(error, layout, experiment, clock.batches.sequences(step)) from None
    pay()  # What a stop or a crash came before.
    for _, batch in feed:
      if record.stop_signal:
        break
      leaving.no_longer()  # What this step learns is to be saved.
      profiler.before(step + 1, state, record)
      state, values = run.step(state, batch, processes.vote(layout.mesh, run.ballot()))
      step += 1
      record.step(step, values)
      profiler.after(step, state, record)
      watchdog.beat()

      evaluates = step == total_steps or (evaluate_every and step % evaluate_every == 0)
      saves = step == total_steps or (save_every and step % save_every == 0)
      if evaluates or saves or record.stop_signal:
        record.pause()  # From here, what is known of this step is known.
      if record.rollback:
        break
      if evaluates:
        owed += ["evaluation", "sample"][:1 + bool(experiment.evaluation.sample_tokens)]
      if saves or record.stop_signal:
        save()
      if record.stop_signal:
        break  # What is owed can wait; whoever takes the machine may not.
      pay()
      if record.stop_signal and not saves:
        save()
    if not record.rollback:
      saver.finish()
  if processes.is_main():
    event = "rollback" if record.rollback else "stop" if record.stop_signal else "complete"
    folder.note(event, step=record.rollback or step, signal=record.stop_signal)
  return Outcome(step, total_steps, record.stop_signal or None,
                 record.median_tokens_per_second(), record.rollback)


def roll_back(run: Run, step: int, skipped: start.Ranges) -> None:
  """Records that the batches around a step's are left out from now on, whatever comes next.

  Raises:
    UserError: there have been too many rollbacks.
  """
  guard, stages = run.plan.experiment.guard, run.plan.clock.batches
  with processes.together():
    if processes.is_main():
      limit, so_far = guard.rollback_limit, len(run.folder.read_rollbacks())
      if so_far >= limit:
        raise UserError(f"a spike at step {step:,} after {limit} rollbacks; lower "
                        "config.optimizer.peak_lr, look at the batches in "
                        f"{run.folder.rollbacks}, or raise config.guard.rollback_limit")
      kept = np.array([stages.cursor(max(0, step - 1 - guard.rollback_before)),
                       stages.cursor(step + guard.rollback_after) - 1])
      first, last = run.plan.sequences.skipping(skipped).actual(kept).tolist()
      run.folder.add_rollback({"step": step, "skipped": [first, last - first + 1]})


def agreed_plan(experiment: schema.Experiment, folder: RunFolder) -> Plan:
  """The plan, once all processes have the same.

  Raises:
    UserError: what `plan` raises, or the first thing that processes disagree about; on all of
      them, so that none waits for one that has gone.
  """
  with processes.together():
    made = plan(experiment)
  processes.agree({
      **{f"config.{name}": value for name, value in config_io.flat(experiment).items()},
      "the store's fingerprint": made.store.fingerprint,
      "the folder of the run": (str(folder.path) if paths.is_remote(folder.path)
                                else folder.path.name),
      "the number of devices": jax.local_device_count(),
      **{f"the version of {name}": version for name, version in run_folder.versions().items()},
  })
  return made


def device_batch(sequences: batches.Batches, layout: Layout,
                 request: tuple[int, int]) -> step_lib.Batch:
  """Batch (first sequence, sequences) on the devices; each process makes its own rows."""
  first, count = request
  return processes.global_batch(
      lambda start, stop: sequences.batch(first + start, stop - start), layout.rows, count)


def jit_step(made: Plan, layout: Layout) -> Callable[..., tuple[state_lib.State, dict]]:
  """(state, batch, vote) -> (state, metrics); the old state is given up. See `processes.vote`."""
  train_step = step_lib.make_train_step(made.experiment, made.optimizer, layout)

  def voted(state, batch, vote):
    state, values = train_step(state, batch)
    return state, values | {"stop_signal": processes.counted(vote)}

  wanted = state_lib.abstract(made.experiment.model, made.optimizer)
  return jax.jit(voted, donate_argnums=0,
                 out_shardings=(layout.state(wanted), layout.replicated),
                 compiler_options=layout.compiler_options)
