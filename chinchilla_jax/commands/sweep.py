"""chinchilla sweep: a family of runs, here or as a job array."""

import argparse
import collections
import contextlib
import importlib
import json
import os
import pathlib
import signal
import sys
from collections.abc import Sequence

from chinchilla_jax.errors import AGAIN, UserError

TAKES_CONFIG = True
_MOST_ROWS = 30  # of the table on a terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.description += (
      " The config file needs a function sweep(), see docs/sweeps.md; --config.FIELD is for all "
      "members. Without --config, --workdir says which sweep.")
  parser.add_argument("--workdir", metavar="SWEEP", help="the sweep's folder; sweeps/NAME by "
                      "default")
  parser.add_argument("--list", action="store_true", help="only print the members and how far they "
                      "are; writes nothing")
  parser.add_argument("--collect", action="store_true",
                      help="only make results.jsonl anew from the runs' folders")
  parser.add_argument("--only", metavar="ID|INDEX", help="one member, by id or by its number in "
                      "the list, from 0")
  parser.add_argument("--parallel", type=int, metavar="K", help="members at a time, each on cores "
                      "and GPUs of its own; with --on slurm, array tasks at a time (1)")
  parser.add_argument("--cores", type=int, metavar="N",
                      help="for each member, whatever --parallel is; all of them, divided among "
                      "the members at a time, by default")
  parser.add_argument("--retries", type=int, default=3, metavar="N",
                      help="starts of a member after the first, when it was preempted, hung or "
                      "died (3)")
  parser.add_argument("--on", default="local", choices=("local", "slurm"),
                      help="where it runs (local)")
  parser.add_argument("--sbatch", action="append", default=[], metavar="FLAG",
                      help="with --on slurm: a flag for sbatch, such as --sbatch=--partition=gpu; "
                      "may be repeated")
  parser.add_argument("--json", action="store_true",
                      help="one JSON object; progress goes to stderr")


def run(args: argparse.Namespace) -> int:
  from chinchilla_jax.experiments import local, results, sweep
  _check(args)
  places = local.slots(args.parallel or 1, args.cores) if args.on == "local" else []
  submit = _slurm() if args.on == "slurm" else None
  if args.config is not None:
    found = sweep.members(args.config, args.overrides, args.workdir)
    folder = found[0].folder.parent.parent
  else:
    found, folder = sweep.read(args.workdir), pathlib.Path(args.workdir)
  chosen = found if args.only is None else [_only(args.only, found)]

  say = lambda text: print(text, file=sys.stderr if args.json else sys.stdout, flush=True)
  if args.list:
    rows = [_facts(local.status_of(member)) for member in chosen]
    print(json.dumps({"workdir": str(folder), "members": rows}) if args.json
          else _list_text(folder, rows))
    return 0
  if args.config is not None:
    sweep.write(folder, found, args.config, args.overrides)
  if args.collect:
    path = results.write(folder)
    print(json.dumps({"workdir": str(folder), "results": str(path)}) if args.json else path)
    return 0
  say(f"{folder}: {len(found)} member{'s' if len(found) > 1 else ''}"
      + (f" of {args.config}" if args.config else ""))
  if others := sweep.strangers(folder, found):
    say(f"note: {folder / sweep.RUNS} also has {len(others)} of another config, such as "
        f"{others[0]}; they are left alone, and not in the results")
  if submit is not None:
    missing = [member for member in chosen
               if sweep.state_of(member).state not in ("complete", "running")]
    if not missing:
      say("nothing to submit: every member is complete or running")
    else:
      say(submit(folder, missing, args.parallel, args.sbatch))
    return 0

  if places[0].cores is not None:
    say(f"{len(places)} at a time, on {'; '.join(map(str, places))}; another number of cores may "
        "change the last bits")
  with contextlib.closing(_Display(say, args.json)) as display:
    statuses, stopped = local.run(chosen, folder, places, retries=args.retries, show=display.show)
  path = folder / results.FILE
  if args.json:
    print(json.dumps({"workdir": str(folder), "results": str(path),
                      "members": [_facts(status) for status in statuses]}))
  count = collections.Counter(status.state for status in statuses)
  say(f"{', '.join(f'{n} {state}' for state, n in count.items())}; results in {path}")
  if stopped:
    say(f"{signal.Signals(stopped).name}: saved; the same command goes on from there")
    return AGAIN if stopped == signal.SIGTERM else 128 + stopped
  failed = [status for status in statuses if status.state == "failed"]
  if failed:
    first = failed[0]
    raise UserError(
        f"{len(failed)} of {len(statuses)} members failed: {_names(failed)}; {first.member.id}: "
        f"{first.note}; log: {first.member.log}; the same command tries again what is not complete")
  return 0 if count["complete"] == len(statuses) else AGAIN


def _check(args: argparse.Namespace) -> None:
  if args.config is None and (args.workdir is None or args.overrides):
    raise UserError("no config file given; give --config=FILE, or --workdir alone for a sweep that "
                    "was begun")
  if args.workdir is not None and "://" in args.workdir:
    raise UserError(f"--workdir: {args.workdir!r} is remote; keep the sweep's folder on a disk "
                    "that is mounted here")
  if args.workdir is not None and os.path.isfile(args.workdir):
    raise UserError(f"--workdir: {args.workdir} is a file; choose another place")
  if args.retries < 0:
    raise UserError(f"--retries: got {args.retries}, allowed is at least 0")
  if args.parallel is not None and args.parallel < 1:
    raise UserError(f"--parallel: got {args.parallel}, allowed is at least 1")
  if args.sbatch and args.on != "slurm":
    raise UserError("--sbatch: is for --on slurm; add that, or leave it out")


def _slurm():
  """`submit(folder, members, at_most, flags) -> text`: queues one array job for these members.

  folder: the sweep's; members: those to run, their files written; at_most: array tasks at a time,
  None for all; flags: for sbatch. A task runs `chinchilla sweep --workdir FOLDER --only ID`.
  """
  try:
    return importlib.import_module("chinchilla_jax.experiments.slurm").submit
  except ModuleNotFoundError as error:
    if error.name != "chinchilla_jax.experiments.slurm":
      raise
    raise UserError("--on slurm: is not available in this version; run the sweep here, or queue "
                    "`chinchilla sweep --workdir SWEEP --only INDEX` yourself") from None


def _only(which: str, found: Sequence) -> object:
  by_id = {member.id: member for member in found}
  if which in by_id:
    return by_id[which]
  if which.isdecimal() and int(which) < len(found):
    return found[int(which)]
  raise UserError(f"--only: got {which[:60]!r}; give the id of a member (--list shows them), or a "
                  f"number from 0 to {len(found) - 1}")


def _facts(status) -> dict:
  from chinchilla_jax.model import shapes
  member = status.member
  return {"index": member.index, "id": member.id, "state": status.state,
          "reason": status.note,
          "overrides": member.overrides, "step": status.step, "total_steps": member.total_steps,
          "total_tokens": member.total_tokens,
          "params_table_a9": shapes.count_parameters(member.experiment.model),
          "folder": str(member.folder), "log": str(member.log), "argv": list(member.argv)}


def _list_text(folder: pathlib.Path, rows: Sequence[dict]) -> str:
  width = max(len(row["id"]) for row in rows)
  lines = [f"{folder}: {len(rows)} member{'s' if len(rows) > 1 else ''} (parameters by the rule of "
           "Table A9, embedding included)"]
  for row in rows:
    lines.append(f"{row['index']:4}  {row['id']:{width}}  {row['state']:11}  step {row['step']:,} "
                 f"of {row['total_steps']:,}  {row['params_table_a9']:,} parameters  "
                 f"{row['total_tokens']:,} tokens  {row['reason']}".rstrip())
  return "\n".join(lines)


def _names(statuses: Sequence) -> str:
  names = [status.member.id for status in statuses[:3]]
  return ", ".join(names) + (f" and {len(statuses) - 3} more" if len(statuses) > 3 else "")


class _Display:
  """A table on a terminal; elsewhere a line when a member's state changes, or a quarter is done."""

  def __init__(self, say, plain: bool):
    import rich.console
    self._say, self._said = say, {}
    self._console = rich.console.Console(highlight=False, soft_wrap=True)
    self._live = None
    if self._console.is_terminal and not plain:
      import rich.live
      # What it shows comes from `show` alone, so it needs no thread of its own.
      self._live = rich.live.Live(console=self._console, auto_refresh=False)
      self._live.start()

  def close(self) -> None:
    if self._live is not None:
      self._live.stop()

  def show(self, statuses: Sequence) -> None:
    if self._live is not None:
      self._live.update(_table(statuses), refresh=True)
      return
    for number, status in enumerate(statuses, 1):
      quarter = 4 * status.step // status.member.total_steps
      now = (status.state, status.note, quarter if status.here else 0, status.here)
      if self._said.get(status.member.id) == now:
        continue
      new = status.member.id not in self._said
      self._said[status.member.id] = now
      # At the beginning only what is over already is worth a line.
      if new and status.state not in ("complete", "running"):
        continue
      self._say(f"[{number}/{len(statuses)}] {status.member.id}: {_progress(status)}")


def _progress(status) -> str:
  parts = [f"{status.state}{f' ({status.note})' if status.note else ''}",
           f"step {status.step:,}/{status.member.total_steps:,}"]
  if status.loss is not None:
    parts.append(f"loss {status.loss:.4f}")
  if status.tokens_per_second is not None:
    parts.append(f"{status.tokens_per_second:,.0f} tokens/s")
  return "  ".join(parts)


def _table(statuses: Sequence):
  import rich.markup
  import rich.table
  table = rich.table.Table(box=None, pad_edge=False)
  for name, justify in (("member", "left"), ("state", "left"), ("step", "right"),
                        ("loss", "right"), ("tokens/s", "right"), ("", "left")):
    table.add_column(name, justify=justify)
  shown = statuses
  if len(statuses) > _MOST_ROWS:  # What runs or has failed comes first, then what comes next.
    order = ("running", "failed", "interrupted", "pending", "complete")
    shown = sorted(statuses, key=lambda one: order.index(one.state))[:_MOST_ROWS]
  for one in shown:
    table.add_row(
        rich.markup.escape(one.member.id), one.state, f"{one.step:,}/{one.member.total_steps:,}",
        "" if one.loss is None else f"{one.loss:.4f}",
        "" if one.tokens_per_second is None else f"{one.tokens_per_second:,.0f}",
        rich.markup.escape(one.note[:60]))
  if len(shown) < len(statuses):
    count = collections.Counter(one.state for one in statuses)
    table.add_row(f"all {len(statuses)}: " + ", ".join(f"{n} {s}" for s, n in count.items()))
  return table
