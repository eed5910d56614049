"""The training loop, read from top to bottom."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable

import jax

from chinchilla_jax import config as schema
from chinchilla_jax import config_io, durations
from chinchilla_jax.data import batches, tokens
from chinchilla_jax.errors import UserError
from chinchilla_jax.evaluation.held_out import HeldOut
from chinchilla_jax.model import shapes
from chinchilla_jax.parallel import mesh as mesh_lib
from chinchilla_jax.parallel import processes
from chinchilla_jax.parallel.layout import Layout, refuse
from chinchilla_jax.training import checkpoint as checkpoint_lib
from chinchilla_jax.training import (
    guards,
    metrics,
    optimizer,
    recorder,
    run_folder,
    schedule,
)
from chinchilla_jax.training import state as state_lib
from chinchilla_jax.training import step as step_lib
from chinchilla_jax.training.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything that is fixed before the first step. Making one writes nothing."""

  experiment: schema.Experiment
  store: tokens.TokenStore
  sequences: batches.Batches
  clock: durations.Clock
  optimizer: optimizer.AdamW


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a call of `train` ended."""

  step: int
  total_steps: int
  signal: int | None               # The signal that ended it early.
  tokens_per_second: float | None  # Median over this call's steps.


def plan(experiment: schema.Experiment) -> Plan:
  """Checks a config against its store.

  Raises:
    UserError: the store is missing or damaged, the tokenizer has more pieces than the model,
      the schedule does not fit into the run.
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
  rate = schedule.learning_rate(experiment.schedule, experiment.optimizer.peak_lr, clock)
  adamw = optimizer.AdamW(experiment.optimizer, experiment.precision, rate)
  return Plan(experiment, store, sequences, clock, adamw)


def train(experiment: schema.Experiment, workdir: str | os.PathLike) -> Outcome:
  """Trains to the end of the run, from the newest checkpoint in `workdir` if there is one.

  Ctrl-C and SIGTERM save and return early; the same call goes on from there. With several
  processes (`processes.start` comes first) all of them call this; process 0 writes the logs.

  Raises:
    UserError: the config does not fit its store, the devices, or the run that `workdir` holds,
      or processes disagree; nothing has been written then. Or the loss stayed non-finite.
  """
  # ---------------------------------------------------------------- Plan
  folder = RunFolder(workdir)
  made, latest = agreed_plan(experiment, folder)
  mesh = mesh_lib.make(experiment.mesh)
  refuse(experiment, mesh.shape)
  layout = Layout(experiment, mesh)
  clock, total_steps = made.clock, made.clock.total_steps
  evaluate_every = clock.steps(experiment.evaluation.every, "config.evaluation.every")
  save_every = clock.steps(experiment.checkpoint.every, "config.checkpoint.every")
  keep_every = clock.steps(experiment.checkpoint.keep_every, "config.checkpoint.keep_every")
  log_every = max(1, clock.steps(experiment.logging.every, "config.logging.every"))
  print_every = max(1, clock.steps(experiment.logging.console, "config.logging.console"))

  # ---------------------------------------------------------------- State
  with processes.together():
    state, step, notes = starting_state(made, folder, latest, layout)
  if step >= total_steps:
    if processes.is_main():
      print(f"nothing to do: {folder.path} is complete at step {step:,} of {total_steps:,}")
    return Outcome(step, total_steps, None, None)

  with contextlib.ExitStack() as stack:
    # -------------------------------------------------------------- Sinks
    sinks = []
    if processes.is_main():
      folder.write_config(experiment)
      folder.rewind_metrics(step)
      console = metrics.Console(total_steps, step, print_every)
      sinks += [console, metrics.JsonLines(folder.metrics)]
      if experiment.logging.tensorboard:
        sinks.append(metrics.TensorBoard(folder.tensorboard, step))
      if experiment.logging.wandb:
        sinks.append(metrics.WeightsAndBiases(
            experiment.logging.wandb, experiment.name, folder.path, config_io.to_dict(experiment)))
      for sink in sinks:
        stack.callback(sink.close)
      for line in (*describe(made, layout), *notes):
        console.print(line)

    # -------------------------------------------------------------- Steps
    checkpoints = checkpoint_lib.Checkpoints(folder.checkpoints, experiment.checkpoint, keep_every)
    stack.callback(checkpoints.close)
    record = recorder.Recorder(experiment, clock, sinks, log_every)
    train_step = jit_step(made, layout)
    validate = HeldOut(experiment, made.store, layout)
    requests = ((clock.batches.cursor(s), clock.batches.sequences(s))
                for s in range(step, total_steps))
    feed = stack.enter_context(contextlib.closing(batches.prefetch(
        functools.partial(device_batch, made, layout), requests, experiment.data.prefetch)))
    interrupt = stack.enter_context(guards.Interrupt())
    stack.enter_context(jax.transfer_guard("disallow"))

    # -------------------------------------------------------------- Train
    for _, batch in feed:
      state, values = train_step(state, batch, processes.vote(mesh, interrupt.signal or 0))
      step += 1
      record.step(step, values)

      last = step == total_steps or record.stop_signal
      if step == total_steps or (evaluate_every and step % evaluate_every == 0):
        record.pause()
        result = validate(state["params"])
        record.event({"kind": "eval", "step": step, "loss": result.loss,
                      "bits_per_byte": result.bits_per_byte, "targets": result.targets,
                      "bytes": result.bytes})
        record.resume()
      if last or (save_every and step % save_every == 0):
        record.pause()
        record.flush()  # Before checkpoint s commits, every line up to s is on disk.
        checkpoints.save(step, state, checkpoint_lib.progress_of(
            experiment, made.store.fingerprint, step, clock.tokens(step)))
        record.resume()
      if last:
        break
    checkpoints.wait()
  processes.barrier("the end")  # While process 0 ends its logs, the others must not be gone.
  return Outcome(step, total_steps, record.stop_signal or None, record.median_tokens_per_second())


def agreed_plan(experiment: schema.Experiment, folder: RunFolder) -> tuple[Plan, int | None]:
  """The plan, and the newest checkpoint's step, once all processes have the same.

  Raises:
    UserError: what `plan` raises, or the first thing that processes disagree about; on all of
      them, so that none waits for one that has gone.
  """
  with processes.together():
    made = plan(experiment)
    latest = checkpoint_lib.newest_step(folder.checkpoints)
  processes.agree({
      **{f"config.{name}": value for name, value in config_io.flat(experiment).items()},
      "the store's fingerprint": made.store.fingerprint,
      "the newest checkpoint": latest,
      "the folder of the run": folder.path.name,
      "the number of devices": jax.local_device_count(),
      **{f"the version of {name}": version for name, version in run_folder.versions().items()},
  })
  return made, latest


def device_batch(made: Plan, layout: Layout, request: tuple[int, int]) -> step_lib.Batch:
  """Batch (first sequence, sequences) on the devices; each process makes its own rows."""
  first, count = request
  return processes.global_batch(
      lambda start, stop: made.sequences.batch(first + start, stop - start), layout.rows, count)


def jit_step(made: Plan, layout: Layout) -> Callable[..., tuple[state_lib.State, dict]]:
  """(state, batch, vote) -> (state, metrics); the old state is given up. See `processes.vote`."""
  train_step = step_lib.make_train_step(made.experiment, made.optimizer, layout)

  def voted(state, batch, vote):
    state, values = train_step(state, batch)
    return state, values | {"stop_signal": processes.counted(vote)}

  wanted = state_lib.abstract(made.experiment.model, made.optimizer)
  return jax.jit(voted, donate_argnums=0,
                 out_shardings=(layout.state(wanted), layout.replicated))


def starting_state(made: Plan, folder: RunFolder, latest: int | None,
                   layout: Layout) -> tuple[state_lib.State, int, list[str]]:
  """Decides where a run starts. The order is important:

  1. the newest checkpoint in the run's own folder, `latest`, from whatever mesh it was saved;
  2. the newest parameters of the run in config.checkpoint.init_from, all else fresh;
  3. a fresh state, drawn from the seed.

  Returns:
    (state, steps it has behind it, lines that say what was done).
  """
  experiment = made.experiment
  wanted = layout.placed(state_lib.abstract(experiment.model, made.optimizer))
  if latest is not None:
    with contextlib.closing(checkpoint_lib.Checkpoints(folder.checkpoints)) as checkpoints:
      changed = checkpoint_lib.refuse_other_run(
          checkpoints.progress(latest), experiment, made.store.fingerprint, str(folder.path))
      state = checkpoints.restore(latest, wanted)
    notes = [f"resuming at step {latest:,} from {folder.checkpoints / str(latest)}"]
    notes += [f"  config.{name} was {old!r}, is now {new!r}" for name, old, new in changed]
    return state, latest, notes

  shardings = layout.state(wanted)
  init = jax.jit(lambda key: state_lib.init(experiment.model, made.optimizer, key),
                 out_shardings=shardings)
  state = init(jax.random.key(experiment.seed))
  if experiment.checkpoint.init_from:
    source = RunFolder(experiment.checkpoint.init_from)
    if (latest := checkpoint_lib.newest_step(source.checkpoints)) is None:
      raise UserError(f"config.checkpoint.init_from: {str(source.path)!r} holds no checkpoint; "
                      "give the folder of a run")
    with contextlib.closing(checkpoint_lib.Checkpoints(source.checkpoints)) as checkpoints:
      weights = checkpoints.restore_weights(latest, wanted["optimizer"]["mu"])
    state["params"], state["optimizer"] = jax.jit(
        made.optimizer.init, out_shardings=(shardings["params"], shardings["optimizer"]))(weights)
    return state, 0, [f"starting from the parameters of {source.path} at step {latest:,}"]
  return state, 0, [f"starting afresh from seed {experiment.seed}"]


def describe(made: Plan, layout: Layout) -> list[str]:
  """What is about to be trained, on what, for how long; every number with its convention."""
  model, clock = made.experiment.model, made.clock
  precision = made.experiment.precision
  train, total = made.store.split("train"), clock.tokens(clock.total_steps)
  devices = jax.devices()
  entries = layout.entries(state_lib.abstract(model, made.optimizer))
  held = sum(entry.bytes_per_device(layout.mesh.shape) for entry in entries)
  lines = [
      f"model: {clock.n_params:,} parameters (rule of Table A9, embedding included), "
      f"{model.n_layers} x {model.d_model}, {model.position} positions, "
      f"{precision.parameters} parameters, {precision.activations} activations",
      f"data: {made.experiment.data.store}, {train.n_tokens:,} tokens in {train.n_documents:,} "
      f"documents, vocabulary {made.store.tokenizer.vocab_size:,}",
      f"run: {clock.total_steps:,} steps, {total:,} tokens = {total / clock.n_params:.3g} per "
      f"parameter = {total / clock.epoch_tokens:.2f} epochs, {clock.flops(clock.total_steps):.3g} "
      f"FLOPs (6ND)",
      f"mesh: {mesh_lib.shape_text(layout.mesh)} ({len(devices)} x {devices[0].device_kind}, "
      f"{processes.count()} process{'es' if processes.count() > 1 else ''}), strategy "
      f"{made.experiment.mesh.strategy}, {held / 2**20:,.1f} MiB of train state per device",
  ]
  if made.store.tokenizer.vocab_size < model.vocab_size:
    lines.append(f"note: {model.vocab_size - made.store.tokenizer.vocab_size:,} rows of the "
                 "embedding stand for no piece of the tokenizer")
  return lines
