"""chinchilla train: a run, from the start or from where it stands."""

import argparse
import os
import signal

from chinchilla_jax import config_io
from chinchilla_jax.errors import AGAIN

TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--workdir", help="the run's folder; runs/NAME by default")
  parser.add_argument(
      "--force", action="store_true", help="take over the folder from a process that holds its "
      "lease; start from nothing where every checkpoint is damaged (they are kept aside)")
  several = parser.add_argument_group(
      "several processes", "found by themselves under SLURM and on TPU pods; elsewhere give all "
      "three to each")
  several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
  several.add_argument("--processes", type=int, metavar="COUNT", help="in the run")
  several.add_argument("--process", type=int, metavar="INDEX", help="this one, from 0")


def run(args: argparse.Namespace) -> int:
  from chinchilla_jax.training import heap
  heap.few_arenas()
  experiment = config_io.load(args.config, args.overrides)
  workdir = args.workdir or os.path.join("runs", experiment.name)
  from chinchilla_jax.storage import compiled
  compiled.keep()
  from chinchilla_jax.parallel import joining, processes
  from chinchilla_jax.training import loop, quiet
  quiet.libraries()
  heap.no_counters()
  joining.start(joining.Flags(args.coordinator, args.processes, args.process))
  outcome = loop.train(experiment, workdir, args.force)
  say = print if processes.is_main() else lambda text: None
  if outcome.signal is not None:
    say(f"{signal.Signals(outcome.signal).name}: saved at step {outcome.step:,} of "
        f"{outcome.total_steps:,} in {workdir}; the same command goes on from there")
    # A SIGTERM comes before a machine is taken away; Ctrl-C from somebody who wants it to stop.
    return AGAIN if outcome.signal == signal.SIGTERM else 128 + outcome.signal
  if outcome.tokens_per_second is not None:
    say(f"trained to step {outcome.step:,} at {outcome.tokens_per_second:,.0f} tokens/s "
          f"(median step), checkpoint and metrics in {workdir}")
  return 0
