"""chinchilla train: a run, from the start or from where it stands."""

import argparse
import logging
import pathlib
import signal

from chinchilla_jax import config_io

TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--workdir", help="the run's folder; runs/NAME by default")
  several = parser.add_argument_group(
      "several processes", "found by themselves under SLURM and on TPU pods; elsewhere give all "
      "three to each")
  several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
  several.add_argument("--processes", type=int, metavar="COUNT", help="in the run")
  several.add_argument("--process", type=int, metavar="INDEX", help="this one, from 0")


def run(args: argparse.Namespace) -> int:
  experiment = config_io.load(args.config, args.overrides)
  workdir = pathlib.Path(args.workdir or pathlib.Path("runs") / experiment.name)
  from chinchilla_jax.parallel import processes
  from chinchilla_jax.training import loop
  logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file it touches.
  processes.start(processes.Flags(args.coordinator, args.processes, args.process))
  outcome = loop.train(experiment, workdir)
  say = print if processes.is_main() else lambda text: None
  if outcome.signal is not None:
    say(f"{signal.Signals(outcome.signal).name}: saved at step {outcome.step:,} of "
          f"{outcome.total_steps:,} in {workdir}; the same command goes on from there")
    return 128 + outcome.signal
  if outcome.tokens_per_second is not None:
    say(f"trained to step {outcome.step:,} at {outcome.tokens_per_second:,.0f} tokens/s "
          f"(median step), checkpoint and metrics in {workdir}")
  return 0
