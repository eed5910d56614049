"""chinchilla train: a run, from the start or from where it stands."""

import argparse
import logging
import pathlib
import signal

from chinchilla_jax import config_io

TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--workdir", help="the run's folder; runs/NAME by default")


def run(args: argparse.Namespace) -> int:
  experiment = config_io.load(args.config, args.overrides)
  workdir = pathlib.Path(args.workdir or pathlib.Path("runs") / experiment.name)
  from chinchilla_jax.training import loop
  logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file it touches.
  outcome = loop.train(experiment, workdir)
  if outcome.signal is not None:
    print(f"{signal.Signals(outcome.signal).name}: saved at step {outcome.step:,} of "
          f"{outcome.total_steps:,} in {workdir}; the same command goes on from there")
    return 128 + outcome.signal
  if outcome.tokens_per_second is not None:
    print(f"trained to step {outcome.step:,} at {outcome.tokens_per_second:,.0f} tokens/s "
          f"(median step), checkpoint and metrics in {workdir}")
  return 0
