"""How fast the data room makes batches: tokens per second of Batches.batch, shuffled.

  python benchmarks/data_throughput.py [--tokens 50000000] [--seq-len 2048] [--count 256]

Builds a store of synthetic tokens (Zipf-distributed ids, documents of about 1,000 tokens) in a
temporary folder and reads random batches through the real path: permutation, ArrayRecord, int32
arrays, segments, weights. The bar is 20 million tokens per second on two cores, so that the data
are never what training waits for. The store has just been written, so it is read from the
operating system's page cache.
"""

import argparse
import importlib.metadata
import os
import platform
import statistics
import tempfile
import time

import numpy as np

from chinchilla_jax import config
from chinchilla_jax.data import batches, staging, token_writer, tokenizer, tokens
from chinchilla_jax.errors import as_script, positive

BAR = 20e6  # tokens per second
DOCUMENT_TOKENS = 1000


def describe_machine() -> str:
  """Cores, processor and versions, on one line."""
  processor = platform.processor() or platform.machine()
  if os.path.exists("/proc/cpuinfo"):
    with open("/proc/cpuinfo") as file:
      names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    processor = names[0] if names else processor
  packages = ("numpy", "sentencepiece", "array_record", "tensorflow-datasets")
  versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
  return (f"{os.cpu_count()} cores, {processor}; Python {platform.python_version()}, {versions}; "
          f"load {os.getloadavg()[0]:.1f}")


def build(path: str, n_tokens: int):
  """Writes a store with a train split of n_tokens and a small validation split."""
  rng = np.random.default_rng(0)
  pieces = tokenizer.train(["some text for a tokenizer"], config.Tokenizer(vocab_size=300),
                           os.path.join(os.path.dirname(path), "x.model"))
  with staging.staged(path) as folder:
    writer = token_writer.StoreWriter(folder, pieces)
    writer.add("validation", np.full(10, 5), 10)
    for _ in range(n_tokens // DOCUMENT_TOKENS):
      ids = 3 + rng.zipf(1.3, DOCUMENT_TOKENS - 1) % (pieces.vocab_size - 3)
      writer.add("train", ids, len(ids))
    writer.finish({})


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--tokens", type=positive, default=50_000_000)
  parser.add_argument("--seq-len", type=positive, default=2048)
  parser.add_argument("--count", type=positive, default=256, help="sequences in a batch")
  parser.add_argument("--batches", type=positive, default=20, help="batches in a repetition")
  parser.add_argument("--repetitions", type=positive, default=7)
  args = parser.parse_args()
  print(describe_machine())
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "store")
    start = time.perf_counter()
    build(path, args.tokens)
    print(f"store of {args.tokens / 1e6:,.0f} million tokens written in "
          f"{time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    store = tokens.open_store(path, verify="full")
    print(f"opened with every checksum verified in {time.perf_counter() - start:.2f} s")
    data = batches.Batches(store.split("train"), seq_len=args.seq_len, seed=0)
    data.batch(0, args.count)  # opens the files
    cursor, speeds = args.count, []
    for _ in range(args.repetitions):
      start = time.perf_counter()
      for _ in range(args.batches):
        data.batch(cursor, args.count)
        cursor += args.count
      speeds.append(args.batches * args.count * args.seq_len / (time.perf_counter() - start))
  median = statistics.median(speeds)
  print(f"{args.repetitions} repetitions of {args.batches} batches of {args.count} x "
        f"{args.seq_len}: median {median / 1e6:.1f} million tokens/s, {min(speeds) / 1e6:.1f} to "
        f"{max(speeds) / 1e6:.1f}; bar {BAR / 1e6:.0f}: {'met' if median >= BAR else 'MISSED'}")


if __name__ == "__main__":
  as_script(main)
