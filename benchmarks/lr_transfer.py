"""Does the best learning rate stay where it is as the model grows? python benchmarks/lr_transfer.py

Trains a small byte-level model on source code of the standard library at several widths (or
depths) and peak learning rates, in two or three parametrisations (docs/parametrisation.md), and
prints the final loss of each run and the best learning rate of each size: in nats per byte, mean
over the last tenth of the steps, on batches that are seen once. The factors of muP and CompleteP
are 1 at the first size, so there all parametrisations are the same runs.

Cosine to a tenth after a linear warm-up over a tenth of the steps; AdamW with the defaults of the
config, in float32.
"""

import argparse
import functools
import math
import pathlib
import sysconfig
import time

import jax
import jax.numpy as jnp
import numpy as np

from chinchilla_jax import config_io
from chinchilla_jax.errors import as_script, positive
from chinchilla_jax.training import optimizer
from chinchilla_jax.training import state as state_lib
from chinchilla_jax.training import step as step_lib

HEAD = 16


def experiment(args, rule: str, size: int):
  width, depth = (args.width, size) if args.over == "depth" else (size, args.depth)
  first = args.sizes[0]
  base = (args.width, first) if args.over == "depth" else (first, args.depth)
  return config_io.from_dict({
      "model": {"parametrisation": rule, "base_width": base[0], "base_depth": base[1],
                "base_kv_size": HEAD, "d_model": width, "n_layers": depth, "kv_size": HEAD,
                "n_heads": width // HEAD, "d_ff": 4 * width, "vocab_size": 256,
                "remat": "none", "attention_block": 0},
      "batch": {"sequences": args.sequences}, "data": {"seq_len": args.seq_len},
      "precision": {"parameters": "float32", "activations": "float32"}})


def text(count: int) -> np.ndarray:
  """The first `count` bytes of the standard library's modules, in the order of their names."""
  files, parts, have = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")), [], 0
  for file in files:
    parts.append(np.frombuffer(file.read_bytes(), np.uint8))
    have += len(parts[-1])
    if have >= count:
      return np.concatenate(parts)[:count]
  raise SystemExit(f"{count:,} bytes are asked for, the standard library has {have:,}: take fewer "
                   "--steps")


def batches(args) -> dict[str, jax.Array]:
  """Arrays of [steps, batch, time]; every window is seen once, in an order drawn at random."""
  n, t = args.steps * args.sequences, args.seq_len
  windows = text(n * (t + 1)).reshape(n, t + 1).astype(np.int32)
  windows = np.random.default_rng(0).permutation(windows).reshape(args.steps, -1, t + 1)
  shape = windows.shape[:-1] + (t,)
  return {"inputs_bt": jnp.asarray(windows[..., :-1]), "targets_bt": jnp.asarray(windows[..., 1:]),
          "segments_bt": jnp.zeros(shape, jnp.int32), "weights_bt": jnp.ones(shape, jnp.float32)}


@functools.cache
def trainer(made, steps: int, seeds: int):
  """Jitted (peak learning rate, data) -> final loss: one program for all rates of a size."""

  def run(peak, data, key):
    def rate(step):
      warm = jnp.minimum(1.0, (step + 1) / max(1, steps // 10))
      return peak * warm * (0.55 + 0.45 * jnp.cos(jnp.pi * step / steps))

    adamw = optimizer.AdamW(made.optimizer, made.precision, rate)
    train_step = step_lib.make_train_step(made, adamw)

    def advance(state, batch):
      state, metrics = train_step(state, batch)
      return state, metrics["loss"]

    _, losses = jax.lax.scan(advance, state_lib.init(made.model, adamw, key), data)
    return jnp.mean(losses[-max(1, steps // 10):])

  keys = jax.random.split(jax.random.key(0), seeds)
  return jax.jit(lambda peak, data: jnp.mean(
      jax.lax.map(functools.partial(run, peak, data), keys)))


def optimum(rates: list[float], losses: list[float]) -> float:
  """The learning rate at the vertex of the parabola through the best three, in log rate.

  The best rate itself where it is the first or the last, or a neighbour is not finite.
  """
  best = int(np.nanargmin(losses))
  around = losses[best - 1:best + 2] if best else []
  if len(around) < 3 or not all(map(math.isfinite, around)):
    return rates[best]
  a, b, _ = np.polyfit(np.log2(rates[best - 1:best + 2]), around, 2)
  return float(2 ** (-b / (2 * a))) if a > 0 else rates[best]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--over", choices=("width", "depth"), default="width")
  parser.add_argument("--sizes", type=positive, nargs="+", default=[32, 64, 128],
                      help="the first is the proxy; widths are multiples of 16")
  parser.add_argument("--width", type=positive, default=64, help="where depth is swept")
  parser.add_argument("--depth", type=positive, default=2, help="where width is swept")
  parser.add_argument("--rules", nargs="+", default=["standard", "mup"],
                      choices=("standard", "mup", "completep"))
  parser.add_argument("--rates", type=float, nargs="+",
                      default=[2.0**-n for n in range(10, 3, -1)])
  parser.add_argument("--steps", type=positive, default=150)
  parser.add_argument("--sequences", type=positive, default=16)
  parser.add_argument("--seq-len", type=positive, default=64)
  parser.add_argument("--seeds", type=positive, default=1)
  args = parser.parse_args()

  started = time.perf_counter()
  data = batches(args)
  print(f"{jax.devices()[0].device_kind}, {args.steps} steps of {args.sequences} x {args.seq_len} "
        f"bytes, {args.seeds} seeds; final loss in nats per byte by peak learning rate")
  print(f"{'':24}" + "".join(f"{rate:>9.2g}" for rate in args.rates) + f"{'optimum':>10}")
  for rule in args.rules:
    found = []
    for size in args.sizes:
      train = trainer(experiment(args, rule, size), args.steps, args.seeds)
      losses = [float(train(jnp.float32(rate), data)) for rate in args.rates]
      found.append(optimum(args.rates, losses))
      print(f"{rule:>10} {args.over} {size:>6} " + "".join(f"{loss:>9.3f}" for loss in losses)
            + f"{found[-1]:>10.2g}", flush=True)
    if len(found) > 1:
      slope = np.polyfit(np.log(args.sizes), np.log(found), 1)[0]
      print(f"{rule:>10} optimum ~ {args.over}^{slope:+.2f}")
  print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
  as_script(main)
