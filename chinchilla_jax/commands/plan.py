"""chinchilla plan: what a budget buys, by every law, and one run that can be trained."""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import shlex
import textwrap
from typing import Any

from chinchilla_jax.errors import UserError

TAKES_CONFIG = False
_GIB = 2**30
_COLUMNS = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
  budget = parser.add_argument_group("budget", "exactly one of these")
  budget.add_argument("--flops", metavar="C", help="training FLOPs, counted as 6ND")
  budget.add_argument("--days", metavar="DAYS", help="of the devices that --chips names")
  budget.add_argument("--params", metavar="N", help="the budget for which N parameters are best")
  budget.add_argument("--tokens", metavar="D", help="the budget for which D tokens are best")
  devices = parser.add_argument_group("devices", "they need not be here")
  devices.add_argument("--chips", metavar="NAME", help="such as v4:8x8x16 or h100:8, in chips")
  devices.add_argument("--slices", type=int, metavar="N", help="of those chips (1)")
  devices.add_argument("--mfu", metavar="SHARE", help="assumed: 6ND FLOPs a second over the chips' "
                       "peak of dense bfloat16 (0.4)")
  parser.add_argument("--law", metavar="NAME|FILE", help="that the recommendation follows: a "
                      "published one, or FILE.json[:APPROACH] of `chinchilla fit` (besiroglu_2024)")
  parser.add_argument("--unique-tokens", metavar="U", help="of text that there is: more are "
                      "repetitions (Muennighoff et al. 2023)")
  parser.add_argument("--inference-tokens", metavar="T", help="that the model will read and write "
                      "in its life: train a smaller one longer (Sardana et al. 2024)")
  parser.add_argument("--rule", metavar="NAME", help="for learning rate and batch: paper, gpt3, "
                      "porian, deepseek (paper)")
  parser.add_argument("--vocab-size", type=int, default=32_000, metavar="V", help="pieces (32000)")
  parser.add_argument("--seq-len", type=int, default=2048, metavar="T", help="tokens (2048)")
  parser.add_argument("--store", metavar="PATH", help="token store that the config reads")
  parser.add_argument("--out", metavar="FILE.py", help="write the recommendation as a config file")
  parser.add_argument("--force", action="store_true", help="overwrite FILE.py")
  parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
  from chinchilla_jax.scaling import plan, plan_config
  out = None if args.out is None else _out(args.out, args.force)
  ask = _ask(args)
  made = plan.make(ask, "plan" if out is None else out.stem, args.store or "")
  if out is not None:
    from chinchilla_jax.training import durable
    try:
      durable.write(out, plan_config.text(made, f"chinchilla plan {_told(args)}"))
    except OSError as error:
      raise UserError(f"--out: {out} cannot be written ({error.strerror}); choose another place"
                      ) from None
  print(json.dumps(facts(made, out)) if args.json else text(made, out))
  return 0


def _told(args: argparse.Namespace) -> str:
  """The arguments that made the plan; where its file went is no part of it."""
  words = []
  for name in ("flops", "days", "params", "tokens", "chips", "slices", "mfu", "law",
               "unique_tokens", "inference_tokens", "rule", "store"):
    if (value := getattr(args, name)) is not None:
      words += [f"--{name.replace('_', '-')}", str(value)]
  for name, usual in (("vocab_size", 32_000), ("seq_len", 2048)):
    if getattr(args, name) != usual:
      words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
  return shlex.join(words).replace('"', "'")


# -------------------------------------------------------------------- Arguments


def _ask(args: argparse.Namespace):
  from chinchilla_jax.parallel import topology
  from chinchilla_jax.scaling import plan, transfer
  budgets = {name: _positive(name, getattr(args, name)) for name in
             ("flops", "days", "params", "tokens") if getattr(args, name) is not None}
  if len(budgets) != 1:
    names = ", ".join(f"--{name}" for name in budgets)
    raise UserError(f"{f'{names}: two budgets at once' if budgets else 'no budget given'}; give "
                    "exactly one of --flops, --params, --tokens, or --chips with --days")
  if "days" in budgets and args.chips is None:
    raise UserError("--days: of what? Give --chips too, such as --chips v4:8x8x16")
  for name in ("slices", "mfu"):
    if getattr(args, name) is not None and args.chips is None:
      raise UserError(f"--{name}: of what? Give --chips too, such as --chips v4:8x8x16")
  mfu = plan.MFU if args.mfu is None else _positive("mfu", args.mfu)
  if mfu > 1:
    raise UserError(f"--mfu: got {args.mfu}; it is a share of the peak, above 0 and at most 1, "
                    "such as 0.4")
  if args.unique_tokens is not None and args.inference_tokens is not None:
    raise UserError("--unique-tokens and --inference-tokens: no law has both; give one of them")
  if args.unique_tokens is not None and "tokens" in budgets:
    raise UserError("--unique-tokens and --tokens: D says how far the text goes already; give "
                    "another budget, such as --flops")
  for name, value, least in (("vocab-size", args.vocab_size, 2), ("seq-len", args.seq_len, 1)):
    if not least <= value < 2**24:
      raise UserError(f"--{name}: got {value}; give a whole number from {least} to {2**24 - 1}")
  if args.force and args.out is None:
    raise UserError("--force: overwrites the file that --out names; give that too")
  optional = {name: _positive(name, getattr(args, name)) for name in
              ("unique_tokens", "inference_tokens") if getattr(args, name) is not None}
  where = None
  if args.chips is not None:
    where = topology.parse(args.chips, 1 if args.slices is None else args.slices)
  rule = args.rule or transfer.DEFAULT
  transfer.recipe(rule, 1e9, 1e20)  # An unknown one is said before anything is worked out.
  return plan.Ask(_law(args.law), where=where, mfu=mfu, vocab_size=args.vocab_size,
                  seq_len=args.seq_len, rule=rule, **budgets, **optional)


def _positive(name: str, text: str) -> float:
  flag = f"--{name.replace('_', '-')}"
  try:
    value = float(text.replace("_", ""))
  except ValueError:
    value = math.nan
  if not 0 < value < math.inf:
    raise UserError(f"{flag}: got {text[:40]!r}; give a number above 0, such as "
                    f"{'30' if name == 'days' else '0.4' if name == 'mfu' else '1e20'}")
  return value


def _law(text: str | None):
  from chinchilla_jax.scaling import fitted_law, laws, plan
  if text is None:
    return laws.find(plan.DEFAULT_LAW)
  if ".json" in text or os.path.exists(text):
    return fitted_law.read(text)
  try:
    return laws.find(text)
  except UserError as error:
    raise UserError(f"--law: {error}; or give the JSON file that `chinchilla fit` wrote") from None


def _out(text: str, force: bool) -> pathlib.Path:
  """The file to write, if it can be: known now, not after the plan is made."""
  from chinchilla_jax import config_io
  path = pathlib.Path(text)
  if path.suffix != ".py":
    raise UserError(f"--out: {text[:80]!r} does not end in .py; name a Python file such as "
                    "configs/mine.py")
  if os.path.isdir(text) or not os.path.isdir(path.parent) or not os.access(path.parent, os.W_OK):
    raise UserError(f"--out: {text[:80]!r} cannot be written; choose a file in a folder that is "
                    "there")
  if os.path.lexists(text) and not force:
    raise UserError(f"--out: {text} is there already; choose another name, or overwrite it with "
                    "--force")
  config_io.from_dict({"name": path.stem})  # The config's name, and so its run's folder.
  return path


# -------------------------------------------------------------------- What is printed


def facts(made, out: pathlib.Path | None) -> dict[str, Any]:
  """The plan as plain data. Units: FLOPs as 6ND, nats per token, bytes of one device."""
  from chinchilla_jax import config_io
  from chinchilla_jax.scaling import plan
  ask = made.ask
  off = lambda one: one and dataclasses.asdict(one)
  fit = made.fit and {
      "axes": dict(made.fit.axes), "strategy": made.experiment.mesh.strategy,
      "microbatches": made.experiment.batch.microbatches, "state_bytes": made.fit.state_bytes,
      "step_bytes_estimate": made.fit.step_bytes, "memory_bytes": made.fit.memory,
      "share_estimate": made.fit.share}
  return {
      "flops_6nd": made.flops,
      "laws": [{"law": row.law.name, "source": row.law.source, "params_convention": row.law.params,
                "flops_6nd": row.best.flops, "params": row.best.params, "tokens": row.best.tokens,
                "tokens_per_param": row.best.tokens_per_param, "loss": row.best.loss,
                "params_halved": off(row.halved), "params_doubled": off(row.doubled)}
               for row in made.rows],
      "recommendation": {
          "law": made.by, "why": _why(made),
          "params_convention": ask.law.params, "params_wanted": made.n, "tokens_wanted": made.d,
          "shape": dataclasses.asdict(made.shape), "params_table_a9": made.params,
          "tokens": made.tokens, "steps": made.steps,
          "tokens_per_param_table_a9": made.tokens / made.params,
          "flops_6nd_table_a9": made.training_flops, "loss": made.loss,
          "peak_lr": made.experiment.optimizer.peak_lr,
          "batch_sequences": made.experiment.batch.sequences,
          "batch_ramp": made.experiment.batch.ramp, "rule": ask.rule,
          "rule_source": made.recipe.source,
          "topology": ask.where and ask.where.name, "mesh": fit,
          "mfu_assumed": ask.mfu if ask.where else None, "days": made.days},
      "default_law": plan.DEFAULT_LAW,
      "config": config_io.to_dict(made.experiment), "out": out and str(out)}


def _why(made) -> str:
  from chinchilla_jax.scaling import plan
  if made.why:
    return made.why
  return plan.WHY_DEFAULT if made.ask.law.name == plan.DEFAULT_LAW else "as --law says"


def text(made, out: pathlib.Path | None) -> str:
  parts = [_head(made), *_laws_table(made), "", *_recommendation(made)]
  if out is not None:
    parts += ["", f"written to {out}; next: chinchilla {_next(made.ask.where, out)}"]
  return "\n".join(parts)


def _next(where, out: pathlib.Path) -> str:
  if where is None:
    return f"prepare --config={out}, then chinchilla train --config={out}"
  slices = f" --slices={where.slices}" if where.slices > 1 else ""
  # Only TPUs can be compiled for from afar.
  command = "compile" if where.chip.ici_dims else "inspect"
  return f"{command} --config={out} --topology={where.topology}{slices}"


def _head(made) -> str:
  ask = made.ask
  how = f"{made.flops:.4g} training FLOPs (6ND)"
  if ask.days is not None:
    how += (f": {ask.days:g} days of {ask.where.name} ({ask.where.chips:,} chips) at an assumed "
            f"MFU of {ask.mfu:.0%}")
  elif ask.params is not None:
    how += f", for which {ask.params:.4g} parameters are best by {ask.law.name}"
  elif ask.tokens is not None:
    how += f", for which {ask.tokens:.4g} tokens are best by {ask.law.name}"
  return f"budget: {how}"


def _laws_table(made) -> list[str]:
  from chinchilla_jax.scaling.labels import short
  from chinchilla_jax.scaling.plan import FITTED_TO, SHOWN
  own = made.ask.params is not None or made.ask.tokens is not None
  lines = ["", "the best N and D by each law (C = 6 N D; loss in nats per token of the law's own "
           "text), and what half and twice that N cost:",
           "more loss at the same FLOPs, and times the FLOPs for the same loss",
           f"  {'law':24} {'FLOPs':>9} {'N':>7} {'D':>7} {'D/N':>6} {'loss':>7}   "
           f"{'half N':>15}   {'twice N':>15}   N counts"]
  for row in made.rows:
    best, mark = row.best, "*" if row.law.name == made.ask.law.name else " "
    loss = "" if best.loss is None else f"{best.loss:.4f}"
    lines.append(
        f"{mark} {row.law.name:24} {best.flops:9.3g} {short(best.params):>7} "
        f"{short(best.tokens):>7} {best.tokens_per_param:6.1f} {loss:>7}   "
        f"{_off(row.halved):>15}   {_off(row.doubled):>15}   "
        f"{_COUNTS.get(row.law.params, row.law.params)}")
  if own:
    lines.append("  each law's FLOPs are those for which what was given is best by it")
  low, high = FITTED_TO
  beyond = max(low / made.flops, made.flops / high)
  if beyond > 10 and made.ask.law.name in SHOWN:
    lines.append(f"  note: these laws were fitted to runs of {low:g} to {high:g} FLOPs; the budget "
                 f"is {beyond:,.0f} times beyond that")
  return lines


_COUNTS = {"params_table_a9": "all", "params_non_embedding": "no embedding",
           "params_with_head": "all but input"}


def _off(off) -> str:
  if off is None:
    return ""
  return f"+{off.loss:.4f}, {'never' if off.flops is None else f'x{off.flops:.2f}'}"


def _recommendation(made) -> list[str]:
  from chinchilla_jax.scaling.labels import short
  ask, shape, experiment = made.ask, made.shape, made.experiment
  off = made.counted / made.n - 1
  batch = experiment.batch.sequences * ask.seq_len
  ramp = "".join(f", {n:,} after {at} of the tokens" for at, n in experiment.batch.ramp)
  lines = [
      *textwrap.wrap(f"recommended, by {made.by}: {_why(made)}", _COLUMNS,
                     subsequent_indent="  "),
      f"  model   {shape.name}: {shape.n_layers} layers of {shape.d_model:,}, {shape.n_heads} "
      f"heads of {shape.kv_size}, d_ff {shape.d_ff:,}, {shape.vocab_size:,} pieces",
      f"          N = {made.params:,} (rule of Table A9, embedding included), {off:+.1%} of the "
      "law's",
      f"  tokens  {made.tokens:,} = {made.tokens / made.params:.1f} per parameter, "
      f"{made.steps:,} steps; {made.training_flops:.4g} FLOPs (6ND)"]
  if made.loss is not None:
    lines.append(f"          predicted loss {made.loss:.4f} nats per token of the law's own text")
  lines += [
      f"  batch   {experiment.batch.sequences:,} x {ask.seq_len:,} = {short(batch)} tokens{ramp}",
      f"  LR      {experiment.optimizer.peak_lr:g}, warm-up {experiment.schedule.warmup}, cosine "
      "to a tenth at the end of the run",
      *textwrap.wrap(f"rule {ask.rule}: {made.recipe.source}", _COLUMNS,
                     initial_indent=" " * 10, subsequent_indent=" " * 10)]
  if made.fit is None:
    lines.append("  mesh    no devices named: the config cuts everything over all it finds (fsdp)")
    return lines
  fit = made.fit
  axes = " x ".join(f"{name} {n}" for name, n in fit.axes.items() if n > 1) or "one device"
  lines += [
      f"  mesh    {ask.where.name}: {axes}, strategy {experiment.mesh.strategy}, "
      f"{experiment.batch.microbatches} microbatch{'es' * (experiment.batch.microbatches > 1)}, "
      f"remat {experiment.model.remat}",
      f"          a device holds {fit.state_bytes / _GIB:.2f} GiB of train state (exact) and about "
      f"{fit.step_bytes / _GIB:.1f} GiB in a step (estimated) of {fit.memory / _GIB:g}",
      "          `chinchilla compile` has the compiler's own figure"
      + ("" if ask.where.chip.ici_dims else ", on such a machine"),
      f"  time    {_days(made.days)} at an assumed MFU of {ask.mfu:.0%} (6ND over "
      f"{ask.where.chips:,} x {ask.where.chip.peak_bf16:.4g} FLOP/s)"]
  return lines


def _days(days: float) -> str:
  if days >= 2:
    return f"{days:,.1f} days"
  return f"{days * 24:.1f} hours" if days * 24 >= 1 else f"{days * 86_400:.3g} seconds"
