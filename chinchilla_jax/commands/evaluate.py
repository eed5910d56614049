"""chinchilla evaluate: bits per byte on held-out text, beside general compressors."""

import argparse
import dataclasses
import json
import os
import statistics
import sys

from chinchilla_jax.errors import UserError

TAKES_CONFIG = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--workdir", required=True, help="a run's folder")
  parser.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
  parser.add_argument("--store", help="another token store, made with the same tokenizer")
  parser.add_argument("--split", default="validation", choices=("validation", "train"))
  parser.add_argument("--compressors", action="store_true",
                      help="compare with gzip -9, bzip2 -9 and xz -9 on the same bytes")
  parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
  from chinchilla_jax.storage import compiled
  compiled.keep()
  from chinchilla_jax.data import tokens
  from chinchilla_jax.evaluation import held_out
  from chinchilla_jax.training import quiet, trained
  from chinchilla_jax.training.run_folder import RunFolder

  quiet.libraries()
  # Looked at before a model is loaded, which may take minutes.
  other = None if args.store is None else tokens.open_store(args.store)
  model = trained.load(args.workdir, args.step)
  experiment, store = model.experiment, other or model.store
  if store.tokenizer.fingerprint != model.store.tokenizer.fingerprint:
    raise UserError(f"--store: {args.store} was made with another tokenizer than the run's store; "
                    f"prepare it with --config.tokenizer.path={experiment.data.store}")
  if args.compressors and experiment.evaluation.max_tokens:
    everything = dataclasses.replace(experiment.evaluation, max_tokens=0)
    experiment = dataclasses.replace(experiment, evaluation=everything)
  result = held_out.HeldOut(experiment, store, model.layout, args.split)(model.params)
  report = {"step": model.step, "split": args.split, "loss": result.loss,
            "bits_per_byte": result.bits_per_byte, "targets": result.targets,
            "bytes": result.bytes}
  if args.compressors:
    report["compressors"] = held_out.compressors(tokens.held_out_bytes(store, args.split))
  records = RunFolder(args.workdir).read_metrics()
  speeds = [r["tokens_per_second"] for r in records if "tokens_per_second" in r]
  if speeds:
    report["training_tokens_per_second"] = statistics.median(speeds)
  print(json.dumps(report) if args.json else _text(report, args.workdir))
  return 0


def _text(report: dict, workdir: str) -> str:
  # As it was called: in a virtual environment that is not active, the bare name is not found.
  program = sys.argv[0] if os.path.basename(sys.argv[0]) == "chinchilla" else "chinchilla"
  lines = [f"step {report['step']:,}, {report['split']} split: {report['loss']:.4f} nats/token "
           f"over {report['targets']:,.0f} tokens",
           "held-out bits per byte (lower is better):",
           f"  {'this model':12} {report['bits_per_byte']:.4f}"]
  for name, bits in report.get("compressors", {}).items():
    lines.append(f"  {name:12} {bits:.4f}   the model needs "
                 f"{report['bits_per_byte'] / bits:.3f} of its bits")
  if "training_tokens_per_second" in report:
    lines.append(f"trained at {report['training_tokens_per_second']:,.0f} tokens/s (median step)")
  lines += [f"checkpoint: {workdir}/checkpoints/{report['step']}",
            f"logs:       {workdir}/metrics.jsonl and {workdir}/tensorboard",
            f"next:       {program} generate --workdir {workdir} --prompt 'import '"]
  return "\n".join(lines)
