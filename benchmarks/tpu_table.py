"""Compiles the paper's models for TPU slices, without a TPU, and writes docs/tpu.md:

  python benchmarks/tpu_table.py [--only PATTERN] [--keep FOLDER]

Needs libtpu. About 2 minutes a row on 2 idle cores, 25 in all, and up to 6 GiB of memory.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys

from chinchilla_jax.errors import UserError, as_script

ROOT = pathlib.Path(__file__).parent.parent
GIB = 2**30
_70B = "--config=configs/chinchilla.py:70b"
_PAPER = ("--config.mesh.strategy=deepmind", "--config.mesh.tensor=16", "--config.model.remat=full")
_LONG = ("--config.data.seq_len=8192", "--sequences=256", "--config.batch.sequences=256",
         "--config.batch.ramp=()")

# Name, words of the command.
ROWS = (
    ("70B, 1.5M tokens", (_70B, "--topology=v4:8x8x16", "--sequences=768")),
    ("the same, as the paper lays it out", (_70B, "--topology=v4:8x8x16", "--sequences=768",
                                            *_PAPER)),
    ("70B, 3M tokens", (_70B, "--topology=v4:8x8x16", "--sequences=1536")),
    ("70B, 3M tokens, two slices", (_70B, "--topology=v4:8x8x16", "--slices=2",
                                    "--sequences=1536", "--config.batch.sequences=1536",
                                    "--config.batch.ramp=()")),
    ("70B, 1.5M tokens", (_70B, "--topology=v5p:8x8x8", "--sequences=768",
                          "--config.mesh.tensor=2")),
    ("70B, 2.1M tokens, sequences of 8,192", (_70B, "--topology=v5p:8x8x8", *_LONG)),
    ("70B, 1.5M tokens", (_70B, "--topology=v6e:16x16", "--sequences=768",
                          "--config.mesh.strategy=fsdp", "--config.mesh.tensor=1",
                          "--config.model.remat=full")),
    ("70B, 1.5M tokens", (_70B, "--topology=v6e:16x16", "--sequences=768",
                          "--config.model.remat=full")),
    ("70B, 1.5M tokens", (_70B, "--topology=v5e:16x16", "--sequences=768",
                          "--config.mesh.tensor=8", "--config.batch.microbatches=4",
                          "--config.model.remat=full")),
    ("64.7B, rotary, one sequence a chip", (
        _70B, "--topology=v4:8x8x16", "--sequences=1024", "--config.batch.sequences=1024",
        "--config.batch.ramp=()", "--config.model.position=rotary", "--config.mesh.strategy=fsdp",
        "--config.mesh.tensor=1", "--config.model.remat=full", "--config.mesh.whole_below=0")),
    ("Gopher 280B, 3M tokens, four slices", (
        "--config=configs/gopher.py:280b", "--topology=v3:32x32", "--slices=4",
        "--sequences=1536")),
)


def compiled(words: tuple[str, ...], kept: pathlib.Path) -> dict:
  """The facts of one row; those of an earlier run with the same words, if `kept` has them."""
  path = kept / (re.sub(r"[^a-zA-Z0-9]+", "_", " ".join(words)) + ".json")
  if not path.exists():
    made = subprocess.run([sys.executable, "-m", "chinchilla_jax", "compile", *words, "--json"],
                          cwd=ROOT, capture_output=True, text=True)
    if not made.stdout:
      return {"error": made.stderr.strip().splitlines()[-1]}
    path.write_text(made.stdout)
  return json.loads(path.read_text())


def row(name: str, facts: dict) -> str:
  mesh = " x ".join(f"{axis} {n}" for axis, n in facts["mesh_shape"].items() if n > 1)
  memory, bound = facts["memory"], facts["bounds"]
  gib = lambda *names: f"{sum(memory[n] for n in names) / GIB:.2f}"
  sent: dict[str, float] = {}
  for item in facts["program"]["collectives"]:
    for axis in item["axes"] or ("none",):
      sent[axis] = sent.get(axis, 0) + item["wire_bytes"] / len(item["axes"] or (1,))
  checks = facts["checks"]
  over = ", ".join(f"{axis} {n / 1e9:.1f}" for axis, n in sorted(sent.items()) if n > 5e7)
  return " | ".join((
      "", name, facts["topology"], f"{facts['strategy']}: {mesh}", str(facts["microbatches"]),
      facts["attention"],
      gib("parameters"), gib("master", "moments"), gib("temporaries"),
      f"{gib('peak')} of {memory['capacity'] / GIB:g}", over,
      f"{checks['sent_over_least']:.2f}" if checks["sent_over_least"] else "",
      f"{checks['overlap']:.0%}",
      f"{facts['program']['matmul_flops'] / facts['model_flops']['causal']:.2f}",
      f"{bound['compute_s']:.2f} / {bound['hbm_s']:.2f} / {bound['ici_s']:.2f} / "
      f"{bound['dcn_s']:.2f}",
      f"{bound['mfu_ceiling']['causal']:.0%} / {bound['mfu_serial']['causal']:.0%}",
      f"{facts['lower_s'] + facts['compile_s']:.0f} s, {facts['compiler_bytes'] / GIB:.1f} GiB",
      "")).strip()


HEAD = """\
# Compiled for TPUs that were not there

Every row is one training step (forward, backward, clipping, AdamW), compiled by libtpu on a
machine without a TPU. `python benchmarks/tpu_table.py` makes this page again; how to read the
columns is in [parallelism.md](parallelism.md#what-compile-prints). Sequences are of 2,048 tokens
where nothing else is said, parameters bfloat16. Rematerialisation is `dots` where the command does
not name it (`full` for Gopher). GiB and GB are of one JAX device and step; v3 has two a chip.

| model, batch | slice | layout | microbatches | attention | parameters, GiB | master and moments, \
GiB | temporaries, GiB | peak, GiB | sent, GB | sent / least | can overlap | FLOPs done / model \
(causal) | least seconds: compute / HBM / ICI / DCN | MFU ceiling: all overlaps / nothing does | \
compiler |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--only", default="", help="rows whose command contains this; writes nothing")
  parser.add_argument("--keep", default="build/tpu_table", help="folder of the rows' facts")
  args = parser.parse_args()
  if not any(args.only in " ".join(words) for _, words in ROWS):
    raise UserError(f"--only: no row's command contains {args.only!r}")
  kept = pathlib.Path(args.keep)
  try:
    kept.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"--keep: {kept} cannot be written ({error.strerror})") from error
  lines, commands = [], []
  for name, words in ROWS:
    if args.only not in " ".join(words):
      continue
    facts = compiled(words, kept)
    line = f"| {name} | {facts['error']} |" if "error" in facts else row(name, facts)
    print(line, flush=True)
    lines.append(line)
    commands.append("chinchilla compile " + " ".join(
        f"'{word}'" if "(" in word else word for word in words))
  if not args.only:
    text = HEAD + "\n".join(lines) + "\n\nThe commands, in that order:\n\n```sh\n"
    (ROOT / "docs/tpu.md").write_text(text + "\n".join(commands) + "\n```\n")


if __name__ == "__main__":
  as_script(main)
