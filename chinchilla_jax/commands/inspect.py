"""chinchilla inspect: what is in a config, a run or a token store; trains nothing."""

import argparse
import contextlib
import json
import logging
import pathlib
from typing import Any

from chinchilla_jax import config as schema
from chinchilla_jax import config_io
from chinchilla_jax.errors import UserError

TAKES_CONFIG = True
Facts = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--workdir", metavar="RUN", help="a run's folder: its config and checkpoints")
  parser.add_argument("--store", metavar="PATH",
                      help="a token store; with a config, also its sequences of data.seq_len")
  devices = parser.add_argument_group(
      "devices", "that the config is laid out on; they need not be here. By default those of "
      "this machine")
  devices.add_argument("--topology", metavar="NAME", help="such as v4:8x8x16 or h100:8, in chips")
  devices.add_argument("--slices", type=int, metavar="N", help="of that topology (1)")
  devices.add_argument("--devices", type=int, metavar="N", help="so many, of no kind")
  parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
  from chinchilla_jax.parallel import report
  _check(args)
  logging.getLogger("absl").setLevel(logging.ERROR)
  configured = args.config is not None or bool(args.overrides)
  if args.store:
    experiment = config_io.load(args.config, args.overrides) if configured else None
    facts = {"store": _store(args.store, experiment)}
    print(json.dumps(facts) if args.json else _store_text(facts["store"]))
    return 0

  found: Facts = {}
  config = args.config
  if args.workdir:
    from chinchilla_jax.training.run_folder import RunFolder
    folder = RunFolder(args.workdir)
    folder.read_config()  # Says what is wrong if there is none.
    config = str(folder.config)
  experiment = config_io.load(config, args.overrides)
  if args.workdir:
    found["run"] = {"path": str(folder.path), "checkpoints": _checkpoints(folder.checkpoints)}
  try:
    mesh, kind, memory = _mesh(experiment, args)
    found |= report.facts(experiment, mesh, _state(experiment), devices=kind, memory=memory)
    problem = found["does_not_train"]
  except UserError as error:  # No layout, but the checkpoints are worth seeing.
    if not found:
      raise
    problem = str(error)
    found["does_not_train"] = problem
  if args.json:
    print(json.dumps(found), flush=True)
  else:
    parts = [_run_text(found["run"])] if "run" in found else []
    parts += [report.text(found)] if "arrays" in found else []
    print("\n\n".join(parts), flush=True)
  if problem:
    raise UserError(f"does not train: {problem}")
  return 0


def _check(args: argparse.Namespace) -> None:
  if args.store and args.workdir:
    raise UserError("--store and --workdir: give one of them")
  if args.workdir and args.config is not None:
    raise UserError("--workdir and --config: a run has its own config; give one of them "
                    "(--config.FIELD=VALUE goes with both)")
  if not (args.store or args.workdir or args.config is not None or args.overrides):
    raise UserError("nothing to inspect; give --config=FILE, --workdir=RUN or --store=PATH")
  given = [flag for flag, value in (("--topology", args.topology), ("--slices", args.slices),
                                    ("--devices", args.devices)) if value is not None]
  if args.store and given:
    raise UserError(f"{given[0]}: a token store lies on no devices; leave it out")
  if args.devices is not None and args.topology is not None:
    raise UserError("--devices and --topology: give one of them")
  if args.slices is not None and args.topology is None:
    raise UserError("--slices: of what? Give --topology too, such as --topology=v4:8x8x16")
  if args.devices is not None and args.devices < 1:
    raise UserError(f"--devices: got {args.devices}; use 1 or more")


# -------------------------------------------------------------------- Config


def _mesh(experiment: schema.Experiment, args: argparse.Namespace) -> tuple[Any, str, int | None]:
  """(mesh, what its devices are, bytes of memory of one of them if known)."""
  import jax

  from chinchilla_jax.parallel import mesh, report, topology
  if args.topology is None and args.devices is None:
    try:
      made = mesh.make(experiment.mesh)
    except UserError as error:
      raise UserError(f"{error}; or say which devices, with --devices or --topology") from None
    kind = jax.devices()[0].device_kind
    return made, f"{kind}, this machine", topology.hbm_bytes(kind)
  # Shapes need no accelerator, and another process may be using the one that is here.
  jax.config.update("jax_platforms", "cpu")
  if args.devices is not None:
    return report.abstract_mesh(experiment.mesh, args.devices), "", None
  slices = topology.parse(args.topology, 1 if args.slices is None else args.slices)
  made = report.abstract_mesh(experiment.mesh, slices.devices, slices.networks)
  return made, slices.name, slices.chip.hbm_bytes_per_device


def _state(experiment: schema.Experiment) -> Any:
  """The abstract train state. No schedule is needed for its shapes."""
  from chinchilla_jax.training import optimizer, state
  adamw = optimizer.AdamW(experiment.optimizer, experiment.precision, lambda step: 0.0)
  return state.abstract(experiment.model, adamw)


# -------------------------------------------------------------------- Run


def _checkpoints(path: pathlib.Path) -> list[Facts]:
  """Step, tokens seen and bytes on disk of every committed checkpoint."""
  from chinchilla_jax.training import checkpoint
  if not path.is_dir():
    return []
  with contextlib.closing(checkpoint.Checkpoints(path)) as checkpoints:
    return [{"step": step, "tokens": checkpoints.progress(step)["tokens"],
             "bytes": _size(path / str(step))} for step in checkpoints.steps()]


def _size(folder: pathlib.Path) -> int:
  return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _run_text(run: Facts) -> str:
  from chinchilla_jax.parallel.report import bytes_text
  lines = [f"run {run['path']}: {_count(len(run['checkpoints']), 'checkpoint')}"]
  lines += [f"  step {row['step']:>9,}  {row['tokens']:>17,} tokens  "
            f"{bytes_text(row['bytes']):>12} on disk" for row in run["checkpoints"]]
  return "\n".join(lines)


# -------------------------------------------------------------------- Store


def _store(path: str, experiment: schema.Experiment | None) -> Facts:
  """What the ledger says, once the files have the sizes that it says."""
  from chinchilla_jax.data import batches, ledger, tokens
  store = tokens.open_store(path, verify="sizes")
  splits: Facts = {}
  for name in store.ledger["splits"]:
    split = store.split(name)
    splits[name] = {"tokens": split.n_tokens, "documents": split.n_documents,
                    "bytes": split.n_bytes,
                    "bytes_per_token": split.n_bytes / split.n_tokens if split.n_tokens else None}
    if experiment is not None and name == "train":
      length = experiment.data.seq_len
      made = batches.Batches(split, seq_len=length, seed=experiment.seed)
      splits[name] |= {"seq_len": length, "sequences": made.n_windows}
  return {"path": path, "fingerprint": store.fingerprint,
          "tokenizer": {"pieces": store.tokenizer.vocab_size,
                        "fingerprint": store.tokenizer.fingerprint},
          "bytes_on_disk": sum(file["bytes"] for file in ledger.files(store.ledger)),
          "splits": splits}


def _store_text(store: Facts) -> str:
  from chinchilla_jax.parallel.report import bytes_text
  lines = [f"token store {store['path']}: {bytes_text(store['bytes_on_disk'])} on disk "
           "(sizes checked, checksums not)",
           f"  fingerprint {store['fingerprint']}",
           f"  tokenizer   {store['tokenizer']['pieces']:,} pieces, "
           f"fingerprint {store['tokenizer']['fingerprint'][:12]}"]
  for name, split in store["splits"].items():
    lines.append(f"  {name:11} {split['tokens']:,} tokens in "
                 f"{_count(split['documents'], 'document')}, {split['bytes']:,} bytes of text")
    if split["bytes_per_token"]:
      lines[-1] += f", {split['bytes_per_token']:.3f} bytes a token"
    if "sequences" in split:
      lines.append(f"  {'':11} {split['sequences']:,} sequences of {split['seq_len']:,} tokens "
                   "in an epoch")
  return "\n".join(lines)


def _count(number: int, noun: str) -> str:
  return f"{number:,} {noun}{'' if number == 1 else 's'}"
