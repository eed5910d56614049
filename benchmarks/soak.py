"""Does a long run stay as it began? python benchmarks/soak.py

Trains with a checkpoint every 50 steps and watches the process from outside: resident memory, open
files, threads, and the speed of its steps. Prints the slope of the memory over the run after its
first fifth, the files open early and late, and the speed of the last fifth over that of the first
(evaluations and saves left out). A step of the smoke model on one sequence takes about 30 ms on
two cores, so 20,000 steps with 400 checkpoints take about a quarter of an hour.
"""

import argparse
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from chinchilla_jax.errors import as_script, positive
from chinchilla_jax.training.run_folder import RunFolder


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--config", default="configs/smoke.py")
  parser.add_argument("--steps", type=positive, default=20_000)
  parser.add_argument("--sequences", type=positive, default=1, help="per step")
  parser.add_argument("--every", type=positive, default=50, help="steps between checkpoints")
  parser.add_argument("--workdir", help="kept afterwards; by default a temporary folder")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(args.workdir or folder) / "run"
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, python "
          f"{platform.python_version()}, {args.config}, {args.steps:,} steps of {args.sequences} "
          f"sequences, a checkpoint every {args.every}", flush=True)
    report(watch(train(args, workdir)), workdir, args.steps)


def train(args: argparse.Namespace, workdir: pathlib.Path) -> subprocess.Popen:
  command = [sys.executable, "-m", "chinchilla_jax", "train", f"--config={args.config}",
             f"--workdir={workdir}", f"--config.run_length={args.steps} steps",
             f"--config.batch.sequences={args.sequences}",
             f"--config.checkpoint.every={args.every} steps"]
  return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def watch(process: subprocess.Popen, every: float = 1.0) -> np.ndarray:
  """[samples, 4]: seconds, resident bytes, open files, threads; one every so many seconds."""
  samples, started = [], time.monotonic()
  page = os.sysconf("SC_PAGE_SIZE")
  proc = pathlib.Path(f"/proc/{process.pid}")
  while process.poll() is None:
    try:
      resident = int((proc / "statm").read_text().split()[1]) * page
      samples.append((time.monotonic() - started, resident, len(os.listdir(proc / "fd")),
                      len(os.listdir(proc / "task"))))
    except (OSError, IndexError):
      break
    time.sleep(every)
  if process.wait():
    sys.exit(f"training ended with status {process.returncode}")
  return np.array(samples)


def report(samples: np.ndarray, workdir: pathlib.Path, steps: int) -> None:
  records = [r for r in RunFolder(workdir).read_metrics() if r["kind"] == "train"]
  if [r["step"] for r in records] != list(range(1, steps + 1)):
    sys.exit("metrics.jsonl does not hold every step once")
  seconds, resident, files, threads = samples[len(samples) // 5:].T  # Start-up left out.
  mib = resident / 2**20
  (slope, _), covariance = np.polyfit(seconds, mib, 1, cov=True)
  per_step = seconds[-1] / steps  # Seconds, start-up included: the slope is a little too large.
  print(f"resident memory  {mib[:20].mean():8.1f} MiB early, {mib[-20:].mean():.1f} MiB late; "
        f"slope {slope * per_step * 1000:+.3f} +- "
        f"{covariance[0, 0]**0.5 * per_step * 1000:.3f} MiB per 1,000 steps")
  print(f"open files       {files[:20].max():8.0f} early, {files[-20:].max():.0f} late at most")
  print(f"threads          {threads[:20].max():8.0f} early, {threads[-20:].max():.0f} late at most")
  speeds = [r["tokens_per_second"] for r in records if "tokens_per_second" in r]
  fifth = len(speeds) // 5
  first, last = statistics.median(speeds[:fifth]), statistics.median(speeds[-fifth:])
  print(f"speed            {first:8,.0f} tokens/s in the first fifth, {last:,.0f} in the last, "
        f"ratio {last / first:.3f} (medians of steps)")


if __name__ == "__main__":
  as_script(main)
