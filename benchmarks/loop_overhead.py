"""What the training loop costs over the bare jitted step: python benchmarks/loop_overhead.py

Times the same step twice in turn, block by block: alone on one batch that lies on the device,
and through the loop's own parts (prefetch, transfer, lagged metrics, JSON lines). Prints the
ratio of each pair of blocks. The bar is a median of at most 1.03.
"""

import argparse
import contextlib
import functools
import itertools
import pathlib
import platform
import statistics
import tempfile
import time

import jax

from chinchilla_jax import config_io
from chinchilla_jax.data import batches
from chinchilla_jax.errors import as_script, positive
from chinchilla_jax.parallel import mesh
from chinchilla_jax.parallel.layout import Layout
from chinchilla_jax.training import loop, metrics, recorder
from chinchilla_jax.training import state as state_lib
from chinchilla_jax.training import step as step_lib
from chinchilla_jax.training.run_folder import RunFolder


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--config", default="configs/smoke.py")
  parser.add_argument("--steps", type=positive, default=40, help="steps per block")
  parser.add_argument("--blocks", type=positive, default=7)
  args = parser.parse_args()

  experiment = config_io.load(args.config)
  made = loop.plan(experiment)
  layout = Layout(experiment, mesh.make(experiment.mesh))
  shardings = layout.state(state_lib.abstract(experiment.model, made.optimizer))
  train_step = jax.jit(step_lib.make_train_step(experiment, made.optimizer, layout),
                       donate_argnums=0, out_shardings=(shardings, layout.replicated))
  init = jax.jit(lambda key: state_lib.init(experiment.model, made.optimizer, key),
                 out_shardings=shardings)
  state = init(jax.random.key(0))
  sequences = experiment.batch.sequences
  fixed = loop.device_batch(made.sequences, layout, (0, sequences))
  state, values = train_step(state, fixed)
  jax.block_until_ready(values)

  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    run = RunFolder(pathlib.Path(folder))
    sinks = [metrics.Console(10**9, 0, 10**9), metrics.JsonLines(run.metrics),
             metrics.TensorBoard(run.tensorboard, 0)]
    for sink in sinks:
      stack.callback(sink.close)
    record = recorder.Recorder(experiment, made.clock, sinks, 1)
    requests = ((i * sequences, sequences) for i in itertools.count())
    feed = stack.enter_context(contextlib.closing(batches.prefetch(
        functools.partial(loop.device_batch, made.sequences, layout), requests,
        experiment.data.prefetch)))
    bare, looped, count = [], [], 0
    for _ in range(args.blocks):
      started = time.perf_counter()
      for _ in range(args.steps):
        state, values = train_step(state, fixed)
      jax.block_until_ready(values)
      bare.append((time.perf_counter() - started) / args.steps)

      started = time.perf_counter()
      for _ in range(args.steps):
        _, batch = next(feed)
        state, values = train_step(state, batch)
        count += 1
        record.step(count, values)
      record.pause()
      looped.append((time.perf_counter() - started) / args.steps)

  ratios = sorted(b / a for a, b in zip(bare, looped, strict=True))
  print(f"{platform.processor() or platform.machine()}, python {platform.python_version()}, "
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {args.config}")
  print(f"bare step  {statistics.median(bare) * 1e3:8.2f} ms   [{min(bare) * 1e3:.2f} - "
        f"{max(bare) * 1e3:.2f}]")
  print(f"loop       {statistics.median(looped) * 1e3:8.2f} ms   [{min(looped) * 1e3:.2f} - "
        f"{max(looped) * 1e3:.2f}]")
  print(f"loop/bare  {statistics.median(ratios):8.3f}      [{ratios[0]:.3f} - {ratios[-1]:.3f}]")


if __name__ == "__main__":
  as_script(main)
