"""How step time, compile time and memory grow: python benchmarks/growth.py --out docs/growth

One thing at a time is changed in a small model: depth, width, sequence length, batch. Steps of all
variants are taken in turn, so that a slow minute of the machine hits them all; compile time is
processor time. Prints log-log slopes beside those of the step's FLOPs (attention over visible
pairs) and writes growth.json and growth.png. Needs matplotlib; about ten minutes on two cores.
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from chinchilla_jax import config as schema
from chinchilla_jax.errors import UserError, as_script, positive
from chinchilla_jax.model import flops
from chinchilla_jax.parallel import mesh
from chinchilla_jax.parallel.layout import Layout
from chinchilla_jax.training import state as state_lib
from chinchilla_jax.training import step
from chinchilla_jax.training.optimizer import AdamW

BASE = dict(depth=4, width=256, sequence=512, batch=4)
VARIED = {"depth": (2, 4, 8, 16), "width": (128, 256, 512, 768),
          "sequence": (256, 512, 1024, 2048), "batch": (1, 2, 4, 8)}
COMPILED = (2, 4, 8, 16, 32)  # Depths whose compile time is taken.
HEAD = 64


def experiment_of(depth: int, width: int, sequence: int, batch: int) -> schema.Experiment:
  return schema.Experiment(
      model=schema.Model(n_layers=depth, d_model=width, n_heads=width // HEAD, kv_size=HEAD,
                         d_ff=4 * width, vocab_size=8192),
      precision=schema.Precision(parameters="float32", activations="float32"),
      batch=schema.Batch(sequences=batch),
      data=dataclasses.replace(schema.Data(), seq_len=sequence))


class Variant:
  """A compiled step and what is needed to take it."""

  def __init__(self, **sizes: int):
    self.sizes, self.seconds = sizes, []
    experiment = experiment_of(**sizes)
    layout = Layout(experiment, mesh.make(experiment.mesh, jax.devices()[:1]))
    adamw = AdamW(experiment.optimizer, experiment.precision, lambda _: jnp.float32(3e-4))
    abstract = layout.placed(state_lib.abstract(experiment.model, adamw))
    shape = sizes["batch"], sizes["sequence"]
    train_step = jax.jit(step.make_train_step(experiment, adamw, layout), donate_argnums=0)
    jax.clear_caches()
    started = time.process_time()
    self._step = train_step.lower(abstract, layout.batch(shape)).compile()
    self.compile_s = time.process_time() - started
    held = self._step.memory_analysis()
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 8192, (shape[0], shape[1] + 1), dtype=np.int32)
    self._batch = {"inputs_bt": tokens[:, :-1], "targets_bt": tokens[:, 1:],
                   "segments_bt": np.zeros(shape, np.int32),
                   "weights_bt": np.ones(shape, np.float32)}
    self._init = jax.jit(lambda key: state_lib.init(experiment.model, adamw, key))
    self._state = None
    self.facts = {
        "flops": flops.training(experiment.model, shape[0] * shape[1], shape[1], "matmul_causal"),
        "compile_s": self.compile_s,
        "inspect_bytes": sum(entry.bytes_per_device(layout.mesh.shape)
                             for entry in layout.entries(abstract)),
        "argument_bytes": held.argument_size_in_bytes,
        "temporary_bytes": held.temp_size_in_bytes}

  def take(self) -> None:
    if self._state is None:
      self._state = self._init(jax.random.key(0))
      self._state, _ = self._step(self._state, self._batch)
    started = time.perf_counter()
    self._state, _ = self._step(self._state, self._batch)
    jax.block_until_ready(self._state)
    self.seconds.append(time.perf_counter() - started)


def slope(x, y) -> float:
  """Of log y against log x, least squares."""
  return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", required=True, type=pathlib.Path, help="folder of the figure")
  parser.add_argument("--rounds", type=positive, default=7)
  args = parser.parse_args()
  # Known now, not after ten minutes.
  if importlib.util.find_spec("matplotlib") is None:
    raise UserError("needs matplotlib: pip install matplotlib")
  try:
    args.out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"--out: {args.out} cannot be written ({error.strerror})") from error
  jax.config.update("jax_enable_compilation_cache", False)

  variants: dict[tuple, Variant] = {}
  for name, values in VARIED.items():
    for value in values:
      sizes = BASE | {name: value}
      if tuple(sizes.values()) not in variants:
        variants[tuple(sizes.values())] = Variant(**sizes)
  for turn in range(args.rounds):
    for variant in list(variants.values())[::1 if turn % 2 else -1]:
      variant.take()
  compiled = {depth: Variant(**BASE | {"depth": depth}).compile_s for depth in COMPILED}

  found = {}
  for name, values in VARIED.items():
    rows = []
    for value in values:
      variant = variants[tuple((BASE | {name: value}).values())]
      rows.append({name: value, "median_s": statistics.median(variant.seconds),
                   "min_s": min(variant.seconds), "max_s": max(variant.seconds), **variant.facts})
    found[name] = rows
    print(f"{name:9} time ~ {name}^{slope(values, [r['median_s'] for r in rows]):.2f}, FLOPs ~ "
          f"{name}^{slope(values, [r['flops'] for r in rows]):.2f}   " + ", ".join(
              f"{r[name]}: {r['median_s'] * 1e3:.0f} ms" for r in rows))
  print(f"compile   time ~ depth^{slope(list(compiled), list(compiled.values())):.2f}   "
        + ", ".join(f"{depth}: {seconds:.1f} s" for depth, seconds in compiled.items()))
  ratios = [r["argument_bytes"] / r["inspect_bytes"] for rows in found.values() for r in rows]
  print(f"memory    arguments of the compiled step / train state by inspect: {min(ratios):.4f} to "
        f"{max(ratios):.4f} (a batch is in the first)")
  facts = {"jax": jax.__version__, "base": BASE, "steps": found, "compile_s": compiled}
  (args.out / "growth.json").write_text(json.dumps(facts, indent=1) + "\n")
  draw(found, compiled, args.out / "growth.png")


def draw(found, compiled, path: pathlib.Path) -> None:
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
  for axis, (name, rows) in zip(axes.flat, found.items(), strict=False):
    x, y = [r[name] for r in rows], np.array([r["median_s"] for r in rows])
    axis.errorbar(x, y, [y - [r["min_s"] for r in rows], [r["max_s"] for r in rows] - y],
                  marker="o", capsize=3, label=f"measured, slope {slope(x, y):.2f}")
    by_flops = np.array([r["flops"] for r in rows])
    axis.plot(x, by_flops * y[-1] / by_flops[-1], "--", color="gray",
              label=f"FLOPs, slope {slope(x, by_flops):.2f}")
    axis.set(xlabel=name, ylabel="s a step", title=f"step time by {name}")
    _log(axis, x)
    axis.legend()
  axis = axes[1, 1]
  axis.plot(list(compiled), list(compiled.values()), marker="o")
  axis.set(xlabel="depth", ylabel="s of processor time", title="compile time by depth",
           xscale="log", ylim=(0, 1.2 * max(compiled.values())))
  axis.set_xticks(list(compiled), map(str, compiled))
  axis.minorticks_off()
  axis = axes[1, 2]
  rows = [row for rows in found.values() for row in rows]
  mib = lambda key: [row[key] / 2**20 for row in rows]
  axis.plot(mib("inspect_bytes"), mib("argument_bytes"), "o")
  ends = [min(mib("inspect_bytes")), max(mib("inspect_bytes"))]
  axis.plot(ends, ends, "--", color="gray", label="equal")
  axis.set(xlabel="train state by inspect, MiB", ylabel="arguments of the compiled step, MiB",
           title="memory, predicted and compiled", xscale="log", yscale="log")
  _log(axis, [20, 50, 100, 200, 400])
  axis.legend()
  figure.savefig(path, dpi=130)


def _log(axis, ticks) -> None:
  axis.set(xscale="log", yscale="log")
  axis.set_xticks(ticks, map(str, ticks))
  axis.minorticks_off()


if __name__ == "__main__":
  as_script(main)
