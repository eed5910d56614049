"""One training step at a time, for timing beside other projects' steps.

  python benchmarks/step_driver.py --shape tiny --dtype fp32 --steps 7      # alone
  python benchmarks/step_driver.py --shape tiny --dtype fp32 --serve        # under a harness

Under a harness it answers each line "step" on standard input with one step, and ends at "quit".
Events are JSON lines on standard output: `ready` after the first step (which compiles), `step`
with its seconds `dt` and its loss, `summary` when alone, `bye` with the peak memory. Anything
else that is printed goes to standard error.

A step is the product's own: forward, backward, clipping, AdamW, guard, on random tokens whose
transfer is part of the time. Matrices have no biases, as those of the projects beside it. On a CPU
the sequences go through in two microbatches, which is faster there and takes less memory; `small`
has larger blocks of attention and smaller ones of the loss than the product's defaults.

fp32 is float32 throughout. bf16 has bfloat16 activations and either the product's weights
(bfloat16 with a float32 master, gradients in bfloat16, summed over microbatches in float32) or,
with --parameters float32, float32 weights and gradients.
"""

import argparse
import dataclasses
import gc
import json
import os
import resource
import statistics
import sys
import time

from chinchilla_jax.errors import as_script, positive

SHAPES = {
    "small": dict(n_layers=8, d_model=512, n_heads=8, head_dim=64, d_ff=2048, vocab=32000,
                  seq=1024, batch=4),
    "tiny": dict(n_layers=8, d_model=256, n_heads=4, head_dim=64, d_ff=1024, vocab=8192, seq=512,
                 batch=8),
    "smoke": dict(n_layers=2, d_model=64, n_heads=1, head_dim=64, d_ff=256, vocab=512, seq=64,
                  batch=2),
    # For accelerators: Gopher's shapes (Rae et al. 2021, Table 1).
    "417m": dict(n_layers=12, d_model=1536, n_heads=12, head_dim=128, d_ff=6144, vocab=32000,
                 seq=2048, batch=16),
    "1.4b": dict(n_layers=24, d_model=2048, n_heads=16, head_dim=128, d_ff=8192, vocab=32000,
                 seq=2048, batch=8),
}

# What was fastest on two cores, where it is not the product's default (docs/performance.md).
TUNED = {"small": {"attention_block": 256, "chunk": 512}}


def build(shape: dict[str, int], args: argparse.Namespace):
  """(step, facts): a function that takes one step and returns its loss, and what was built."""
  import jax
  import numpy as np

  from chinchilla_jax import config as schema
  from chinchilla_jax.model import flops
  from chinchilla_jax.parallel import mesh, topology
  from chinchilla_jax.parallel.layout import Layout
  from chinchilla_jax.training import early, step
  from chinchilla_jax.training import state as state_lib
  from chinchilla_jax.training.optimizer import AdamW

  bf16 = args.dtype == "bf16"
  experiment = schema.Experiment(
      model=schema.Model(
          n_layers=shape["n_layers"], d_model=shape["d_model"], n_heads=shape["n_heads"],
          kv_size=shape["head_dim"], d_ff=shape["d_ff"], vocab_size=shape["vocab"],
          position=args.position, bias=args.bias, remat=args.remat,
          attention_block=args.attention_block),
      precision=schema.Precision(
          parameters=args.parameters or ("bfloat16" if bf16 else "float32"),
          activations="bfloat16" if bf16 else "float32"),
      batch=schema.Batch(sequences=shape["batch"], microbatches=args.microbatches or (
          2 if jax.default_backend() == "cpu" and shape["batch"] % 2 == 0 else 1)),
      data=dataclasses.replace(schema.Data(), seq_len=shape["seq"], document_mask=False),
      optimizer=schema.Optimizer(peak_lr=3e-4),
      loss=schema.Loss(chunk=args.chunk))
  adamw = AdamW(experiment.optimizer, experiment.precision, lambda step: jax.numpy.float32(3e-4))
  layout = Layout(experiment, mesh.make(experiment.mesh, jax.devices()[:1]))
  wanted = layout.placed(state_lib.abstract(experiment.model, adamw))
  shardings = layout.state(wanted)
  train_step = jax.jit(step.make_train_step(experiment, adamw, layout), donate_argnums=0,
                       out_shardings=(shardings, layout.replicated),
                       compiler_options=layout.compiler_options)
  arrays = layout.batch((shape["batch"], shape["seq"])) | {"segments_bt": None}
  compiled = early.compiling(train_step, wanted, arrays)
  init = jax.jit(lambda key: state_lib.init(experiment.model, adamw, key),
                 out_shardings=shardings, compiler_options=layout.compiler_options)
  state = init(jax.random.key(0))
  sizes = jax.tree_util.tree_leaves_with_path(state["params"])
  compiled()

  rng = np.random.default_rng(0)
  rows = [rng.integers(1, shape["vocab"], (shape["batch"], shape["seq"] + 1), dtype=np.int32)
          for _ in range(8)]
  ones = np.ones((shape["batch"], shape["seq"]), np.float32)
  count = 0

  def one() -> float:
    nonlocal state, count
    tokens = rows[count % len(rows)]
    count += 1
    batch = {"inputs_bt": tokens[:, :-1], "targets_bt": tokens[:, 1:],
             "segments_bt": None, "weights_bt": ones}
    state, metrics = train_step(state, jax.device_put(batch, layout.rows))
    jax.block_until_ready(state)
    return float(metrics["loss"])

  matrices = sum(leaf.size for path, leaf in sizes
                 if not any(word in jax.tree_util.keystr(path)
                            for word in ("bias", "gain", "'u'", "'v'")))
  device = jax.devices()[0].device_kind
  return one, {"n_params": sum(leaf.size for _, leaf in sizes), "n_matmul": matrices,
               "device": device, "peak_flops": topology.peak_flops(device),
               "flops_causal": flops.matmul_causal(experiment.model, shape["seq"]),
               "position": args.position, "bias": args.bias,
               "microbatches": experiment.batch.microbatches, "attention": layout.attention,
               "parameters": experiment.precision.parameters,
               "versions": {"jax": jax.__version__, "python": sys.version.split()[0]}}


def seconds_alive() -> float | None:
  """Since this process was started, the interpreter's own start included; None if not known."""
  try:
    with open("/proc/self/stat") as file:
      started = int(file.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
  except OSError:
    return None
  return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
  parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
  parser.add_argument("--position", choices=["rotary", "relative"], default="rotary")
  parser.add_argument("--parameters", choices=["float32", "bfloat16"],
                      help="by default float32 for fp32 and bfloat16 with a master for bf16")
  parser.add_argument("--remat", choices=["none", "dots", "full"], default="dots")
  parser.add_argument("--attention-block", type=int,
                      help="rows at a time, by default 128, for small 256; 0: all")
  parser.add_argument("--chunk", type=int,
                      help="tokens of the loss at a time, by default 1024, for small 512; 0: all")
  parser.add_argument("--batch", type=positive, help="sequences, by default those of the shape")
  parser.add_argument("--microbatches", type=positive, help="by default 2 on a CPU, else 1")
  parser.add_argument("--bias", action="store_true", help="the product's default: biases")
  parser.add_argument("--steps", type=positive, default=7)
  parser.add_argument("--warmup", type=int, default=2)
  parser.add_argument("--cache", action="store_true",
                      help="keep compiled programs and use kept ones, as `chinchilla train` does")
  parser.add_argument("--serve", action="store_true")
  args = parser.parse_args()
  for name, value in ({"attention_block": 128, "chunk": 1024} | TUNED.get(args.shape, {})).items():
    if getattr(args, name) is None:
      setattr(args, name, value)
  for name in ("attention_block", "chunk", "warmup"):
    if getattr(args, name) < 0:
      parser.error(f"argument --{name.replace('_', '-')}: allowed is 0 and more")
  from chinchilla_jax.training import heap
  gc.set_threshold(10_000, 20, 50)  # This and the heaps as `chinchilla train` has them.
  heap.few_arenas()
  if args.cache:
    from chinchilla_jax.storage import compiled
    compiled.keep()

  events = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)

  def say(event: str, **facts) -> None:
    events.write(json.dumps({"event": event, **facts}) + "\n")

  shape = SHAPES[args.shape] | ({"batch": args.batch} if args.batch else {})
  step, facts = build(shape, args)
  built = seconds_alive()
  tokens = shape["batch"] * shape["seq"]
  # 6N and attention over all pairs, N with the embedding: PaLM, appendix B.
  flops = 6 * facts["n_matmul"] + (
      12 * shape["n_layers"] * shape["n_heads"] * shape["head_dim"] * shape["seq"])
  loss = step()
  say("ready", **facts, shape=args.shape, dtype=args.dtype, tokens_per_step=tokens,
      flops_per_token=flops, t_built_s=built, t_first_step_s=seconds_alive(), loss0=loss)

  def timed() -> float:
    started = time.perf_counter()
    loss = step()
    took = time.perf_counter() - started
    say("step", dt=took, loss=loss)
    return took

  if args.serve:
    for line in sys.stdin:
      if line.strip() == "quit":
        break
      if line.strip() == "step":
        timed()
  else:
    rates = sorted(tokens / took
                   for took in [timed() for _ in range(args.warmup + args.steps)][args.warmup:])
    middle, peak = statistics.median(rates), facts["peak_flops"]
    # MFU: products with weights (the embedding once) and attention over visible pairs, forward
    # and backward, of the device's dense bfloat16 peak.
    say("summary", tok_s_median=middle, tok_s_min=rates[0], tok_s_max=rates[-1],
        model_gflops=middle * flops / 1e9,
        mfu_causal=peak and middle * facts["flops_causal"] / peak)
  say("bye", peak_rss_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
      children_peak_rss_mb=0)


if __name__ == "__main__":
  as_script(main)
