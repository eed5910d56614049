"""chinchilla inspect: what is in a config, a run or a token store; trains nothing."""

import argparse
import dataclasses
import json
import logging
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
  parser.add_argument("--quick", action="store_true",
                      help="of checkpoints, compare the sizes of files and not their checksums")
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
    found["run"] = _run(folder, experiment, "sizes" if args.quick else "full")
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
    if "arrays" not in found:
      parts.append(f"its arrays, laid out on this machine: {problem}")
    print("\n\n".join(parts), flush=True)
  asked = args.topology is not None or args.devices is not None
  if problem and ("run" not in found or asked):
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
  if args.quick and not args.workdir:
    raise UserError("--quick: only checkpoints have checksums to leave out; give --workdir too")
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


def _run(folder: Any, experiment: schema.Experiment, how: str) -> Facts:
  """The checkpoints of a run, newest last, and what `train` would do now."""
  from chinchilla_jax.storage import paths
  from chinchilla_jax.training import checkpoint, start
  path, rows = folder.checkpoints, []
  for step in checkpoint.steps(path):
    row: Facts = {"step": step, "bytes": sum(paths.sizes(path / str(step)).values()),
                  "problem": checkpoint.problem(path, step, how)}
    if not row["problem"]:
      try:
        progress = checkpoint.progress(path, step)
        done = start.done(folder, step)
        row |= {"tokens": progress["tokens"],
                "owed": [duty for duty in progress["owed"] if duty not in done],
                "dtypes": checkpoint.dtypes(path, step), "surroundings": progress["surroundings"]}
      except UserError as error:  # It is whole, but not of this version.
        row["refused"] = str(error)
    rows.append(row)
  aside = paths.names(path / checkpoint.ASIDE)
  partial = [name for name in paths.names(path) if name.endswith(checkpoint.PARTIAL)]
  try:
    rollbacks = folder.read_rollbacks()
  except UserError:  # `resume` says so.
    rollbacks = []
  return {"path": str(folder.path), "checked": how, "checkpoints": rows, "aside": aside,
          "partial": partial, "rollbacks": rollbacks, "resume": _resume(folder, experiment, how)}


def _resume(folder: Any, experiment: schema.Experiment, how: str) -> Facts:
  """What `train` with this config would start from; `refuses` says why it would not."""
  from chinchilla_jax.training import checkpoint, loop, start
  checks = dataclasses.replace(experiment.checkpoint, verify=how)
  try:
    made = loop.plan(dataclasses.replace(experiment, checkpoint=checks))
    where = checkpoint.surroundings("", experiment.mesh.strategy)
    begin = start.choose(made, folder, where)
  except UserError as error:
    return {"refuses": str(error)}
  return {"step": begin.step, "total_steps": made.clock.total_steps,
          "from_checkpoint": begin.resumed, "owed": list(begin.owed),
          "skipped": [list(one) for one in begin.skipped],
          "set_aside": [{"step": step, "kind": kind, "why": why}
                        for step, kind, why in begin.aside]}


def _run_text(run: Facts) -> str:
  from chinchilla_jax.parallel.report import bytes_text
  words = {"full": "checksums compared", "sizes": "sizes compared, checksums not"}
  lines = [f"run {run['path']}: {_count(len(run['checkpoints']), 'checkpoint')} "
           f"({words[run['checked']]})"]
  for row in run["checkpoints"]:
    text = f"  step {row['step']:>9,}  {bytes_text(row['bytes']):>10} on disk"
    if row["problem"]:
      lines.append(f"{text}  DAMAGED: {row['problem']}")
      continue
    if "refused" in row:
      lines.append(f"{text}  NOT OF USE: {row['refused']}")
      continue
    where = row["surroundings"]
    owed = f", owes {' and '.join(row['owed'])}" if row["owed"] else ""
    lines += [f"{text}  {row['tokens']:>15,} tokens  whole{owed}",
              f"      {_dtypes_text(row['dtypes'])}; written on {where['mesh']} "
              f"({where['devices']}, {_count(where['processes'], 'process')}, "
              f"{where['strategy']}, jax {where['versions'].get('jax')})"]
  for name in run["aside"]:
    lines.append(f"  set aside: {name}")
  for name in run["partial"]:
    lines.append(f"  unfinished: {name} (the next start clears it away)")
  for one in run["rollbacks"]:
    lines.append(f"  rolled back at step {one['step']:,}: sequences {one['skipped'][0]:,} to "
                 f"{sum(one['skipped']) - 1:,} are left out")
  return "\n".join([*lines, _resume_text(run["resume"])])


def _resume_text(resume: Facts) -> str:
  if "refuses" in resume:
    return f"  train would refuse: {resume['refuses']}"
  step, total = resume["step"], resume["total_steps"]
  asides = "".join(f", setting checkpoint {one['step']:,} aside ({one['kind']})"
                   for one in resume["set_aside"])
  owed = f", doing the {' and '.join(resume['owed'])} of that step first" if resume["owed"] else ""
  if step >= total and not resume["owed"]:
    return f"  train would do nothing: complete at step {step:,} of {total:,}{asides}"
  if not resume["from_checkpoint"]:
    return f"  train would start from nothing, {total:,} steps{asides}"
  return f"  train would go on from step {step:,} of {total:,}{asides}{owed}"


def _dtypes_text(dtypes: Facts) -> str:
  """"bfloat16 params; float32 master, mu, nu": scalars are left out."""
  by_dtype: dict[str, list[str]] = {}
  for name, kinds in dtypes.items():
    part = name.split("/")[-1]
    if part not in ("step", "guard", "count"):
      by_dtype.setdefault(" and ".join(kinds), []).append(part)
  return "; ".join(f"{kind} {', '.join(parts)}" for kind, parts in by_dtype.items())


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
  plural = "es" if noun.endswith("s") else "s"
  return f"{number:,} {noun}{'' if number == 1 else plural}"
