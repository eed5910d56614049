"""chinchilla compile --search: runs the compiler on layouts, and prints what it found.

Every layout is compiled by a process of its own, `chinchilla compile --json` with the layout's
flags: a compiler that is at work cannot be interrupted from within its process, a process can be
ended when the time is over; its memory goes back to the machine; and what is measured is what the
printed command does.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections import Counter
from typing import Any

from chinchilla_jax import config as schema
from chinchilla_jax import leaving
from chinchilla_jax.errors import UserError

_GIB = 2**30
_SET = ("mesh.strategy", "mesh.data", "mesh.context", "mesh.tensor", "batch.microbatches",
        "model.remat")


def run(args: argparse.Namespace, experiment: schema.Experiment, where: Any) -> int:
  """Searches, prints, and returns the exit status.

  Args:
    args: of the command.
    experiment: its config.
    where: `topology.Slice`.

  Raises:
    UserError: no layout is legal.
    ahead.OutOfMemory: none fits; names the nearest.
  """
  from chinchilla_jax.training import ahead, search
  sequences = args.sequences or max(experiment.batch.sequences,
                                    *(n for _, n in experiment.batch.ramp), 0)
  candidates, illegal = search.candidates(experiment, ahead.devices(where), sequences, where.chip)
  if not candidates:
    raise UserError(f"--search: none of {sum(illegal.values())} layouts is legal on {where.name} "
                    f"({_reasons(illegal)}); change the batch or the topology")
  words = words_of(args, sequences)
  began, succeeded = time.monotonic(), []

  def compile_one(candidate, seconds):
    try:
      outcome = compiled([*words, *candidate.flags], seconds)
      succeeded.append(outcome)
    except UserError as error:
      if not succeeded:  # The next would fail as well.
        raise
      outcome = search.Outcome(False, 0.0, note=f"({error})")
    at = time.monotonic() - began
    if not args.json:
      result = ("stopped, time is over" if outcome is None else
                f"{outcome.step_s:.3f} s a step" if outcome.fits else
                f"does not fit {outcome.note}")
      print(f"{at:6.0f} s  {candidate.name}: {result}", file=sys.stderr, flush=True)
    return outcome

  found = search.search(candidates, illegal, where.chip.hbm_bytes_per_device,
                        60 * args.search_minutes, compile_one)
  best = found.ranked[0][0] if found.ranked else None
  command = best and " ".join(["chinchilla", "compile", *map(_quoted, words), *best.flags])
  if args.json:
    print(json.dumps(facts(found, experiment, where, sequences, command)))
  else:
    print(text(found, experiment, where, sequences, args.search_minutes, command))
  if best is None:
    candidate, outcome = found.nearest
    raise ahead.OutOfMemory(
        f"--search: no layout that was compiled fits {where.name}; the nearest is "
        f"{candidate.name}, {outcome.note or 'of unknown size'}; what helps: "
        f"{', or '.join(ahead.levers(candidate.experiment, _at_a_time(candidate, sequences)))}")
  return 0


def words_of(args: argparse.Namespace, sequences: int) -> list[str]:
  """The options of the command that say what is to be laid out, not how."""
  words = [f"--config={args.config}"] if args.config else []
  words += [f"--config.{name}" + ("" if value is None else f"={value}")
            for name, value in args.overrides if name not in _SET]
  words.append(f"--topology={args.topology}")
  if args.slices > 1:
    words.append(f"--slices={args.slices}")
  return [*words, f"--sequences={sequences}"]


def compiled(words: list[str], seconds: float | None):
  """What `chinchilla compile WORDS` says, as a `search.Outcome`; None if it takes too long.

  Raises:
    UserError: it fails for another reason than memory; gives its last line.
  """
  from chinchilla_jax.training.search import Outcome
  began = time.monotonic()
  try:
    with leaving.by_exception("compile"):  # `subprocess.run` kills what it runs when one comes.
      done = subprocess.run([sys.executable, "-m", "chinchilla_jax", "compile", *words, "--json"],
                            capture_output=True, text=True, timeout=seconds,
                            stdin=subprocess.DEVNULL)
  except subprocess.TimeoutExpired:
    return None
  took = time.monotonic() - began
  # libtpu complains of the missing TPU on the same file, at any time.
  said = [line for line in done.stderr.splitlines() if line.startswith("chinchilla compile:")]
  said = (said or done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
  if done.returncode == 0:
    facts = json.loads(done.stdout)
    bound = facts["bounds"]
    exposed = sum((1 - sent["overlap"]) * (sent["seconds"] or 0.0)
                  for sent in facts["program"]["collectives"])
    return Outcome(True, took, facts["memory"]["peak"], bound["step_s"], bound["serial_s"],
                   bound["mfu_ceiling"]["causal"], bound["mfu_serial"]["causal"], exposed)
  if done.returncode == 2 and "out of memory" in said:
    needs = re.search(r"(?:needs|peak) ([\d.]+) GiB of (?:the )?([\d.]+) GiB", said)
    return Outcome(False, took, float(needs[1]) * _GIB if needs else None,
                   note=f"({needs[1]} of {needs[2]} GiB)" if needs else "")
  raise UserError(f"--search: a layout does not compile: {said}; try it alone: chinchilla compile "
                  + " ".join(map(_quoted, words)))


def facts(found, experiment: schema.Experiment, where: Any, sequences: int,
          command: str | None) -> dict[str, Any]:
  """All of it as plain data."""
  named = lambda c: {"layout": c.name, "flags": list(c.flags), "mesh": dict(c.axes),
                     "least_bytes": c.memory, "least_seconds": dict(c.seconds)}
  result = lambda o: {"fits": o.fits, "peak": o.peak, "step_s": o.step_s, "serial_s": o.serial_s,
                      "exposed_s": o.exposed_s, "mfu_ceiling": o.ceiling,
                      "mfu_serial": o.serial, "compile_s": o.took}
  return {"config": experiment.name, "topology": where.name, "sequences": sequences,
          "seconds": found.took, "best": command,
          "compiled": [named(c) | result(o) for c, o in (*found.ranked, *_unfit(found))],
          "skipped": [named(c) | {"reason": reason, "detail": detail}
                      for c, reason, detail in found.skipped],
          "illegal": dict(found.illegal)}


def text(found, experiment: schema.Experiment, where: Any, sequences: int, minutes: float,
         command: str | None) -> str:
  """All of it as a table, and the command of the best."""
  count = len(found.compiled) + len(found.skipped)
  lines = [
      f"{experiment.name} on {where.name}, {sequences:,} x {experiment.data.seq_len:,} tokens: "
      f"{count} layouts, {len(found.compiled)} compiled in {found.took:.0f} s (time given: "
      f"{60 * minutes:.0f} s)", "",
      f"  {'layout (mb: microbatches; remat)':52} {'peak, GiB':>10} {'step, s':>8} {'least':>8} "
      f"{'sent, s':>8} {'MFU, all':>9} {'nothing':>8} {'compiled':>9}",
      f"  {'':52} {'':10} {'roofline':>8} {'analytic':>8} {'exposed':>8} {'overlaps':>9} "
      f"{'does':>8} {'in, s':>9}"]
  for c, o in (*found.ranked, *_unfit(found)):
    peak = "?" if o.peak is None else f"{o.peak / _GIB:.2f}"
    rest = (f"{o.step_s:8.3f} {c.step_s:8.3f} {o.exposed_s:8.3f} {o.ceiling:9.1%} {o.serial:8.1%}"
            if o.fits else
            f"{'no fit':>8} {c.step_s:8.3f} {'':8} {'':9} {'':8}")
    lines.append(f"  {c.name:52} {peak:>10} {rest} {o.took:9.0f}")
  lines += ["", *_not_tried(found)]
  if command:
    lines += ["", "the best of them:", f"  {command}"]
  return "\n".join(lines)


def _not_tried(found) -> list[str]:
  lines = []
  reasons = {"does not fit": "their least memory is above a device's",
             "cannot win": "their least time is above the best one's",
             "no time": "the time was over"}
  for reason, number in Counter(reason for _, reason, _ in found.skipped).items():
    c, detail = next((c, detail) for c, why, detail in found.skipped if why == reason)
    lines.append(f"  not compiled: {number}, {reasons[reason]}; the first: {c.name} ({detail})")
  if found.illegal:
    lines.append(f"  not legal: {sum(found.illegal.values())} ({_reasons(found.illegal)})")
  return lines


def _unfit(found) -> list:
  return [(c, o) for c, o in found.compiled if not o.fits]


def _reasons(illegal) -> str:
  return ", ".join(f"{number} by {why.split(' is ')[0]}" for why, number in illegal.items())


def _at_a_time(candidate, sequences: int) -> int:
  from chinchilla_jax import durations
  parts = durations.microbatches(candidate.experiment.batch, sequences)
  return sequences // parts // (candidate.axes["slice"] * candidate.axes["data"])


def _quoted(word: str) -> str:
  return f"'{word}'" if re.search(r"[^\w./:=,+@-]", word) else word
