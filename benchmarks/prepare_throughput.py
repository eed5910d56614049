"""How fast `prepare` turns text into a token store, and in how much memory.

  python benchmarks/prepare_throughput.py [--megabytes 100] [--vocab-size 4096]

The corpus is the standard library of the running Python, over and over in JSON lines until it
has the size asked for. A tokenizer is trained once and timed; then whole stores are made with it,
each in a process of its own, with one and with all workers.
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from data_throughput import describe_machine

from chinchilla_jax import config
from chinchilla_jax.data import corpus, prepare, tokenizer, workers
from chinchilla_jax.errors import as_script, positive

_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


def write_corpus(path: str, n_bytes: int) -> int:
  """Writes JSON lines; returns the bytes of text in them."""
  documents = list(corpus.documents(config.Corpus()))
  done = 0
  with open(path, "w", encoding="utf-8") as file:
    while done < n_bytes:
      for document in documents:
        file.write(json.dumps({"text": document.text}) + "\n")
        done += len(document.utf8)
  return done


def measure(store: str, source: str, model: str, n_workers: int):
  """Prepares one store and prints what it took, as JSON."""
  experiment = dataclasses.replace(
      config.Experiment(), corpus=config.Corpus(sources=(source,)),
      tokenizer=config.Tokenizer(path=model), data=config.Data(store=store))
  start = time.perf_counter()
  ledger = prepare.prepare(experiment, n_workers=n_workers, quiet=True)
  print(json.dumps({
      "seconds": time.perf_counter() - start,
      "tokens": sum(split["tokens"] for split in ledger["splits"].values()),
      "bytes": ledger["corpus"]["bytes"],
      "peak_mb": peak_mb(),
      "worker_peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _UNIT / 1e6}))


def peak_mb() -> float:
  """Peak resident memory of this process."""
  if os.path.exists("/proc/self/status"):  # Linux's ru_maxrss counts what the parent had, too
    with open("/proc/self/status") as file:
      return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024 / 1e6
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT / 1e6


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--megabytes", type=positive, default=100)
  parser.add_argument("--vocab-size", type=positive, default=4096)
  parser.add_argument("--repetitions", type=positive, default=3)
  parser.add_argument("--measure", nargs=4, metavar=("STORE", "CORPUS", "MODEL", "WORKERS"),
                      help="make one store and print JSON (what this program calls itself with)")
  args = parser.parse_args()
  if args.measure:
    measure(*args.measure[:3], int(args.measure[3]))
    return
  print(describe_machine())
  with tempfile.TemporaryDirectory() as folder:
    model = os.path.join(folder, "x.model")
    sample = [document.utf8 for document in corpus.documents(config.Corpus())]
    start = time.perf_counter()
    tokenizer.train(sample, config.Tokenizer(vocab_size=args.vocab_size), model)
    print(f"tokenizer of {args.vocab_size:,} pieces from {sum(map(len, sample)) / 1e6:.1f} MB "
          f"trained in {time.perf_counter() - start:.1f} s")
    source = os.path.join(folder, "corpus.jsonl")
    n_bytes = write_corpus(source, args.megabytes * 10**6)
    print(f"corpus: {n_bytes / 1e6:.0f} MB of text, read twice (survey, encoding)")
    for n_workers in sorted({1, workers.default_workers(n_bytes)}):
      runs = []
      for repetition in range(args.repetitions):
        store = os.path.join(folder, f"store-{n_workers}-{repetition}")
        done = subprocess.run([sys.executable, __file__, "--measure", store, source, model,
                               str(n_workers)], check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout))
      speeds = [run["bytes"] / 1e6 / run["seconds"] for run in runs]
      tokens = [run["tokens"] / 1e6 / run["seconds"] for run in runs]
      worker = f", largest worker {max(r['worker_peak_mb'] for r in runs):.0f} MB"
      print(f"{n_workers} worker{'s'[:n_workers > 1]}, {len(runs)} repetitions: median "
            f"{statistics.median(speeds):.1f} MB/s ({min(speeds):.1f} to {max(speeds):.1f}), "
            f"{statistics.median(tokens):.2f} million tokens/s; peak memory "
            f"{max(r['peak_mb'] for r in runs):.0f} MB{worker if n_workers > 1 else ''}")


if __name__ == "__main__":
  as_script(main)
