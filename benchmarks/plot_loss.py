"""The loss curve of a run as a picture: python benchmarks/plot_loss.py RUN OUT.png"""

import argparse
import math

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

from chinchilla_jax.errors import UserError, as_script  # noqa: E402
from chinchilla_jax.training.run_folder import RunFolder  # noqa: E402


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("run")
  parser.add_argument("out")
  parser.add_argument("--gzip", type=float, help="bits per byte of gzip -9, for a line")
  args = parser.parse_args()

  records = RunFolder(args.run).read_metrics()
  train = [r for r in records if r["kind"] == "train"]
  evals = [r for r in records if r["kind"] == "eval"]
  if not train or not evals:
    raise UserError(f"{args.run} has no evaluation in its metrics.jsonl; give a run's folder")
  to_bits = evals[-1]["bits_per_byte"] / evals[-1]["loss"]  # Of the validation text.

  figure, axes = plt.subplots(figsize=(7.2, 3.8), dpi=120, layout="constrained")
  tokens = [r["tokens"] / 1e6 for r in train]
  axes.plot(tokens, [r["loss"] / math.log(2) for r in train], color="#b8c4d6", linewidth=0.6,
            label="training, every step")
  window = max(1, len(train) // 50)
  smooth = [sum(r["loss"] for r in train[i - window:i]) / window / math.log(2)
            for i in range(window, len(train) + 1)]
  axes.plot(tokens[window - 1:], smooth, color="#1f4e9c", linewidth=1.6,
            label=f"training, mean of {window} steps")
  axes.plot([r["tokens"] / 1e6 for r in evals], [r["loss"] / math.log(2) for r in evals],
            "o", color="#c23b22", markersize=5, label="held out")
  if args.gzip:
    axes.axhline(args.gzip / to_bits / math.log(2), color="black", linewidth=0.8,
                 linestyle="--", label="gzip -9 on the held-out bytes")
  axes.set(xlabel="training tokens (millions)", ylabel="bits per token", xlim=(0, None))
  right = axes.secondary_yaxis("right", functions=(
      lambda bits: bits * to_bits * math.log(2), lambda bits: bits / to_bits / math.log(2)))
  right.set_ylabel("bits per byte")
  axes.legend(frameon=False, fontsize=8)
  axes.spines[["top"]].set_visible(False)
  figure.savefig(args.out)


if __name__ == "__main__":
  as_script(main)
