"""chinchilla compile: memory, collectives and roofline of a training step, without its devices."""

import argparse
import dataclasses
import json
import os
from typing import Any

from chinchilla_jax import config_io
from chinchilla_jax.errors import UserError

TAKES_CONFIG = True
_GIB = 2**30
_WEEK = 7 * 24 * 60  # Minutes.


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--topology", metavar="NAME", help="such as v4:8x8x16 or v5e:16x16, in "
                      "chips; without it, the devices of this machine")
  parser.add_argument("--slices", type=int, default=1, metavar="N",
                      help="so many of that topology, joined by the data-centre network")
  parser.add_argument("--sequences", type=int, metavar="N",
                      help="in the batch; by default the largest of config.batch")
  parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
  parser.add_argument("--search", action="store_true", help="compile layouts instead of the "
                      "config's own (strategy, tensor, microbatches, remat) and name the best")
  parser.add_argument("--search-minutes", type=float, default=10.0, metavar="N",
                      help="time for --search; one layout is compiled in any case (10)")
  parser.add_argument("--hlo", metavar="FILE", help="also write the optimised program to a file")


def run(args: argparse.Namespace) -> int:
  experiment = config_io.load(args.config, args.overrides)
  from chinchilla_jax.parallel import topology
  if args.slices < 1 or (args.slices > 1 and not args.topology):
    raise UserError("--slices: give a positive number, with --topology")
  if args.sequences is not None and args.sequences < 1:
    raise UserError(f"--sequences: got {args.sequences}, allowed is at least 1")
  if args.search and (not args.topology or args.hlo is not None):
    raise UserError("--search: give --topology, and not --hlo; compile the best one alone for its "
                    "program")
  if not 0 < args.search_minutes <= _WEEK:  # subprocess takes no endless time.
    raise UserError(f"--search-minutes: got {args.search_minutes:g}, allowed is more than 0"
                    f" and at most {_WEEK:,}, a week")
  if args.hlo is not None:  # Known now, not after minutes of compiling.
    folder = os.path.dirname(args.hlo) or os.curdir
    if os.path.isdir(args.hlo) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
      raise UserError(f"--hlo: {args.hlo!r} cannot be written; choose a file in a folder that is "
                      "there")
  where = topology.parse(args.topology, args.slices) if args.topology else None

  import jax
  if where is not None:  # Nothing runs, so no accelerator of this machine is to be taken.
    jax.config.update("jax_platforms", "cpu")
  if args.search:
    from chinchilla_jax.commands import compile_search
    return compile_search.run(args, experiment, where)
  from chinchilla_jax.training import ahead
  found = ahead.devices(where) if where else jax.devices()
  report = ahead.compile_step(experiment, found, args.sequences, args.hlo)
  name = where.name if where else f"{len(found)} x {found[0].device_kind}"
  facts = _facts(experiment, report, name)
  print(json.dumps(facts) if args.json else _text(experiment, report, name))
  over = report.memory["capacity"] and report.memory["peak"] > report.memory["capacity"]
  if over:
    raise ahead.OutOfMemory(
        f"out of memory: peak {report.memory['peak'] / _GIB:.2f} GiB of "
        f"{report.memory['capacity'] / _GIB:.2f} GiB; what helps: "
        f"{', or '.join(ahead.levers(experiment, report.at_a_time))}")
  return 0


def _facts(experiment, report, name: str) -> dict[str, Any]:
  from chinchilla_jax.parallel import hlo_checks
  plain = dataclasses.asdict(report)
  plain.pop("seconds")
  plain["checks"] = hlo_checks.facts(report.checks)
  plain["program"] = {
      "matmul_flops": report.program.matmul_flops, "hbm_bytes": report.program.hbm_bytes,
      "loops": report.program.loops, "opaque": report.program.opaque,
      "collectives": [
          {"kind": kind, "axes": axes, "executions": count, "wire_bytes": wire,
           "asynchronous": hidden, "overlap": report.program.overlap((kind, axes)),
           "seconds": report.seconds.get((kind, axes))}
          for (kind, axes), (count, wire, hidden) in report.program.by_axes().items()]}
  return {"config": experiment.name, "topology": name, "strategy": experiment.mesh.strategy,
          "unit": "bytes, FLOPs and seconds of one device and one step", **plain}


def _text(experiment, report, name: str) -> str:
  from chinchilla_jax.parallel import hlo_checks
  axes = " x ".join(f"{axis} {n}" for axis, n in report.mesh_shape.items() if n > 1)
  tokens = report.sequences * report.seq_len
  lines = [
      f"{experiment.name} on {name}: {report.devices:,} device{'s' if report.devices > 1 else ''} "
      f"({report.device_kind}), mesh "
      f"{axes or 'of one'}, strategy {experiment.mesh.strategy}",
      f"batch {report.sequences:,} x {report.seq_len:,} = {tokens:,} tokens in "
      f"{report.microbatches} microbatch{'es' if report.microbatches > 1 else ''}, remat "
      f"{experiment.model.remat}, attention {_attention(experiment, report)}",
      f"compiled in {report.lower_s + report.compile_s:.0f} s with "
      f"{report.compiler_bytes / _GIB:.1f} GiB of memory",
      "", "memory of one device, GiB", *_memory(report),
      "", "collectives of one step, per device", *_collectives(report),
      "", "is it as lean as its layout allows?", *hlo_checks.lines(report.checks),
      "", *_bounds(report)]
  return "\n".join(lines)


def _attention(experiment, report) -> str:
  if report.attention != "blockwise":
    return report.attention
  return f"in blocks of {experiment.model.attention_block} rows" if (
      experiment.model.attention_block) else "in one block"


def _memory(report) -> list[str]:
  memory = report.memory
  row = lambda label, n, note="": f"  {label:24} {n / _GIB:9.3f}  {note}".rstrip()
  lines = [row(name, memory[name]) for name in ("parameters", "master", "moments", "batch")]
  lines += [row("all arguments", memory["arguments"], "as the compiler lays them out"),
            row("temporaries", memory["temporaries"], "gradients, activations, gathered weights"),
            row("program", memory["program"])]
  peak = row("peak", memory["peak"])
  if memory["capacity"] is None:
    return [*lines, peak]
  share = memory["peak"] / memory["capacity"]
  return [*lines, f"{peak}  {share:.0%} of the {memory['capacity'] / _GIB:g} GiB of a device"]


def _collectives(report) -> list[str]:
  rows = sorted(report.program.by_axes().items(), key=lambda item: -item[1][1])
  if not rows:
    return ["  none"]
  lines = [f"  {'over':14} {'kind':20} {'times':>7} {'sent, GB':>10} {'async':>6} "
           f"{'hidden':>6} {'time, s':>9}"]
  for (kind, axes), (count, wire, hidden) in rows:
    took = report.seconds.get((kind, axes))
    lines.append(f"  {'+'.join(axes) or '-':14} {kind:20} {count:7,} {wire / 1e9:10.3f} "
                 f"{hidden:6.0%} {report.program.overlap((kind, axes)):6.0%} "
                 f"{'' if took is None else f'{took:9.4f}'}".rstrip())
  return lines


def _bounds(report) -> list[str]:
  model, done = report.model_flops, report.program.matmul_flops
  lines = ["FLOPs of one step, per device (matrix products; forward and backward)"]
  for name, note in (("6ND", "6 x N x tokens, N with embedding"),
                     ("full", "attention over all pairs"),
                     ("causal", "attention over visible pairs")):
    lines.append(f"  {'model, ' + name:24} {model[name]:9.3e}  {note}")
  lines.append(f"  {'done':24} {done:9.3e}  with what is computed twice: "
               f"{done / model['causal']:.3f} x model, causal")
  if report.program.opaque:
    names = ", ".join(f"{name} x {count}" for name, count in report.program.opaque)
    lines.append(f"  not counted: {names}")
  if (bound := report.bounds) is None:
    return [*lines, "", f"no roofline: nothing is known of {report.device_kind}"]
  lines += ["", "least time of one step, s (each resource at its data sheet's figure)"]
  lines += [f"  {label:24} {seconds:9.4f}" for label, seconds in (
      ("compute", bound.compute_s), ("HBM", bound.hbm_s), ("ICI or NVLink", bound.ici_s),
      ("data-centre network", bound.dcn_s))]
  lines.append(f"  bound by {bound.bound}: {bound.step_s:.4f} s if all overlap, "
               f"{bound.serial_s:.4f} s if nothing does")
  ceilings = lambda table: ", ".join(f"{share:.1%} ({name})" for name, share in table.items())
  lines += [f"  MFU ceiling, all overlap: {ceilings(bound.mfu_ceiling)}",
            f"  MFU, nothing overlaps:    {ceilings(bound.mfu_serial)}",
            "  limits: latencies, congestion and kernels below their peak are not in it; HBM bytes "
            "are those of whole", "  instructions, without what stays on the chip between them"]
  return lines
