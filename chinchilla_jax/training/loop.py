"""The training loop, read from top to bottom."""

import contextlib
import dataclasses
import os

import jax

from chinchilla_jax import config as schema
from chinchilla_jax import config_io, durations
from chinchilla_jax.data import batches, tokens
from chinchilla_jax.errors import UserError
from chinchilla_jax.evaluation.held_out import HeldOut
from chinchilla_jax.model import shapes
from chinchilla_jax.training import checkpoint as checkpoint_lib
from chinchilla_jax.training import guards, metrics, optimizer, recorder, schedule
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

  Ctrl-C and SIGTERM save and return early; the same call goes on from there.

  Raises:
    UserError: the config does not fit its store, or the run that `workdir` holds; nothing has
      been written then. Or the loss stayed non-finite.
  """
  # ---------------------------------------------------------------- Plan
  made = plan(experiment)
  clock, total_steps = made.clock, made.clock.total_steps
  folder = RunFolder(workdir)
  evaluate_every = clock.steps(experiment.evaluation.every, "config.evaluation.every")
  save_every = clock.steps(experiment.checkpoint.every, "config.checkpoint.every")
  keep_every = clock.steps(experiment.checkpoint.keep_every, "config.checkpoint.keep_every")
  log_every = max(1, clock.steps(experiment.logging.every, "config.logging.every"))
  print_every = max(1, clock.steps(experiment.logging.console, "config.logging.console"))

  # ---------------------------------------------------------------- State
  state, step, notes = starting_state(made, folder)
  if step >= total_steps:
    print(f"nothing to do: {folder.path} is complete at step {step:,} of {total_steps:,}")
    return Outcome(step, total_steps, None, None)

  with contextlib.ExitStack() as stack:
    # -------------------------------------------------------------- Sinks
    folder.write_config(experiment)
    folder.rewind_metrics(step)
    console = metrics.Console(total_steps, step, print_every)
    sinks = [console, metrics.JsonLines(folder.metrics)]
    if experiment.logging.tensorboard:
      sinks.append(metrics.TensorBoard(folder.tensorboard, step))
    if experiment.logging.wandb:
      sinks.append(metrics.WeightsAndBiases(
          experiment.logging.wandb, experiment.name, folder.path, config_io.to_dict(experiment)))
    for sink in sinks:
      stack.callback(sink.close)
    for line in (*describe(made), *notes):
      console.print(line)

    # -------------------------------------------------------------- Steps
    checkpoints = checkpoint_lib.Checkpoints(folder.checkpoints, experiment.checkpoint, keep_every)
    stack.callback(checkpoints.close)
    record = recorder.Recorder(experiment, clock, sinks, log_every)
    train_step = jax.jit(step_lib.make_train_step(experiment, made.optimizer), donate_argnums=0)
    validate = HeldOut(experiment, made.store)
    requests = ((clock.batches.cursor(s), clock.batches.sequences(s))
                for s in range(step, total_steps))
    feed = stack.enter_context(contextlib.closing(batches.prefetch(
        made.sequences, requests, experiment.data.prefetch, transform=jax.device_put)))
    interrupt = stack.enter_context(guards.Interrupt())
    stack.enter_context(jax.transfer_guard("disallow"))

    # -------------------------------------------------------------- Train
    for _, batch in feed:
      state, values = train_step(state, batch)
      step += 1
      record.step(step, values)

      last = step == total_steps or interrupt.signal is not None
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
  return Outcome(step, total_steps, interrupt.signal, record.median_tokens_per_second())


def starting_state(made: Plan, folder: RunFolder) -> tuple[state_lib.State, int, list[str]]:
  """Decides where a run starts. The order is important:

  1. the newest checkpoint in the run's own folder;
  2. the newest parameters of the run in config.checkpoint.init_from, all else fresh;
  3. a fresh state, drawn from the seed.

  Returns:
    (state, steps it has behind it, lines that say what was done).
  """
  experiment = made.experiment
  wanted = checkpoint_lib.placed(state_lib.abstract(experiment.model, made.optimizer))
  if (latest := checkpoint_lib.newest_step(folder.checkpoints)) is not None:
    with contextlib.closing(checkpoint_lib.Checkpoints(folder.checkpoints)) as checkpoints:
      changed = checkpoint_lib.refuse_other_run(
          checkpoints.progress(latest), experiment, made.store.fingerprint, str(folder.path))
      state = checkpoints.restore(latest, wanted)
    notes = [f"resuming at step {latest:,} from {folder.checkpoints / str(latest)}"]
    notes += [f"  config.{name} was {old!r}, is now {new!r}" for name, old, new in changed]
    return state, latest, notes

  init = jax.jit(lambda key: state_lib.init(experiment.model, made.optimizer, key))
  state = init(jax.random.key(experiment.seed))
  if experiment.checkpoint.init_from:
    source = RunFolder(experiment.checkpoint.init_from)
    if (latest := checkpoint_lib.newest_step(source.checkpoints)) is None:
      raise UserError(f"config.checkpoint.init_from: {str(source.path)!r} holds no checkpoint; "
                      "give the folder of a run")
    with contextlib.closing(checkpoint_lib.Checkpoints(source.checkpoints)) as checkpoints:
      weights = checkpoints.restore_weights(latest, wanted["params"])
    state["params"], state["optimizer"] = made.optimizer.init(weights)
    return state, 0, [f"starting from the parameters of {source.path} at step {latest:,}"]
  return state, 0, [f"starting afresh from seed {experiment.seed}"]


def describe(made: Plan) -> list[str]:
  """What is about to be trained, on what, for how long; every number with its convention."""
  model, clock = made.experiment.model, made.clock
  precision = made.experiment.precision
  train, total = made.store.split("train"), clock.tokens(clock.total_steps)
  device = jax.devices()[0]
  lines = [
      f"model: {clock.n_params:,} parameters (rule of Table A9, embedding included), "
      f"{model.n_layers} x {model.d_model}, {model.position} positions, "
      f"{precision.parameters} parameters, {precision.activations} activations",
      f"data: {made.experiment.data.store}, {train.n_tokens:,} tokens in {train.n_documents:,} "
      f"documents, vocabulary {made.store.tokenizer.vocab_size:,}",
      f"run: {clock.total_steps:,} steps, {total:,} tokens = {total / clock.n_params:.3g} per "
      f"parameter = {total / clock.epoch_tokens:.2f} epochs, {clock.flops(clock.total_steps):.3g} "
      f"FLOPs (6ND), on {device.device_kind}",
  ]
  if len(jax.devices()) > 1:
    lines.append(f"note: {len(jax.devices())} devices are here; this version trains on one")
  if made.store.tokenizer.vocab_size < model.vocab_size:
    lines.append(f"note: {model.vocab_size - made.store.tokenizer.vocab_size:,} rows of the "
                 "embedding stand for no piece of the tokenizer")
  return lines
