"""chinchilla fit: the scaling law that runs follow, and how sure it is."""

import argparse
import json
import math
import os
import pathlib
import sys
from typing import Any

from chinchilla_jax.config_io import shown
from chinchilla_jax.errors import UserError

TAKES_CONFIG = False
GOPHER_BUDGET = 5.76e23


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.description += (
      " The three approaches of Hoffmann et al. 2022, beside the published laws. RESULTS is a "
      "sweep's folder or its results.jsonl; or a .csv, .tsv, .jsonl or .parquet whose columns are "
      "named. See docs/scaling-laws.md.")
  parser.add_argument("results", metavar="RESULTS")
  parser.add_argument("--approach", default="all", choices=("all", "1", "2", "3"),
                      help="1: envelope of training curves, 2: IsoFLOP profiles, 3: parametric "
                           "loss")
  parser.add_argument("--out", default="fit", metavar="DIR",
                      help="for fit.json and the figures (fit)")
  which = parser.add_argument_group("conventions")
  which.add_argument("--params", choices=("params_table_a9", "params_non_embedding"),
                     help="which N: with the embedding, as the paper counts (default), or without; "
                          "of a table: which one its column holds")
  which.add_argument("--flops", choices=("six_n_d", "appendix_f", "layers_only", "matmul",
                                         "matmul_causal"),
                     help="which FLOPs of a sweep (six_n_d, over the N chosen)")
  which.add_argument("--loss", choices=("validation_loss", "train_loss_mean_last_1pct",
                                        "train_loss_last"),
                     help="which final loss of a sweep (validation_loss)")
  table = parser.add_argument_group("columns of a table that no sweep wrote")
  table.add_argument("--params-column", metavar="NAME", help="N")
  table.add_argument("--tokens-column", metavar="NAME", help="D")
  table.add_argument("--flops-column", metavar="NAME",
                     help="C; any one of the three may be left out and follows from C = 6ND")
  table.add_argument("--loss-column", metavar="NAME", help="in nats per token")
  table.add_argument("--run-column", metavar="NAME",
                     help="name of a run; rows of one name are the points of its training curve")
  table.add_argument("--params-scale", type=float, default=1.0, metavar="X",
                     help="times this is parameters: 1e6 for a column in millions")
  table.add_argument("--tokens-scale", type=float, default=1.0, metavar="X",
                     help="times this is tokens")
  out = parser.add_argument_group("runs left out, always by name in the output")
  out.add_argument("--drop", action="append", default=[], metavar="RUN",
                   help="leave a run out, by id or as 'line 17'; may be repeated")
  out.add_argument("--drop-highest", type=int, default=0, metavar="K",
                   help="leave out the K runs of the highest losses")
  how = parser.add_argument_group("fits")
  how.add_argument("--profile", default="parabola", choices=("parabola", "cubic", "akima"),
                   help="approach 2: what is laid through a budget's losses (parabola)")
  how.add_argument("--budget-tolerance", type=float, default=0.1, metavar="X",
                   help="approach 2: neighbours in FLOPs closer than this share are one budget "
                        "(0.1)")
  how.add_argument("--smoothing-window", type=float, default=10, metavar="STEPS",
                   help="approach 1: length of the Gaussian window (10); of a table, in rows")
  how.add_argument("--huber", type=float, default=1e-3, metavar="DELTA",
                   help="approach 3: where the loss of log L turns linear (1e-3); inf: squares")
  sure = parser.add_argument_group("intervals")
  sure.add_argument("--resamples", type=int, metavar="R", help="of runs (1000); 0: no intervals")
  sure.add_argument("--confidence", type=float, metavar="X", help="0.95 by default")
  sure.add_argument("--seed", type=int, default=0, help="of the resamples (0)")
  sure.add_argument("--paper-intervals", action="store_true",
                    help="as the paper's Table 2: 80 %% of the runs drawn 100 times, 10th and 90th "
                         "percentiles")
  parser.add_argument("--at", action="append", type=float, default=[], metavar="FLOPS",
                      help="predict the optimum for this budget; may be repeated (10 and 1,000 "
                           "times the largest of the runs, and Gopher's 5.76e23)")
  parser.add_argument("--no-figures", action="store_true", help="write fit.json only")
  parser.add_argument("--json", action="store_true", help="print fit.json instead of text")


def run(args: argparse.Namespace) -> int:
  folder = _folder(args.out)
  for flops in args.at:
    if not (math.isfinite(flops) and flops > 0):
      raise UserError(f"--at: got {flops:g}; give a budget in FLOPs above 0")
  # Small arrays in float64: nothing for an accelerator, which would only be held.
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  from chinchilla_jax.scaling import fit, results_table
  options = _options(args)
  columns = results_table.Columns(
      args.params_column, args.tokens_column, args.loss_column, args.flops_column,
      args.run_column, args.params_scale, args.tokens_scale)
  runs = results_table.read(
      args.results, columns=columns, params=args.params, flops=args.flops, loss=args.loss,
      drop=args.drop, drop_highest=args.drop_highest, curves=1 in options.approaches,
      window=args.smoothing_window)
  report = fit.run(runs, options)
  top = float(runs.flops.max())
  budgets = args.at or sorted({_round(10 * top), _round(1000 * top), GOPHER_BUDGET})
  found = fit.record(report, budgets)
  text = json.dumps(found, indent=2, allow_nan=False) + "\n"
  written, note = _write(folder, text, report, args.no_figures)
  print(text.rstrip() if args.json else
        "\n".join([*_text(report, budgets), "", f"written: {', '.join(map(str, written))}"]))
  if note:
    print(f"chinchilla fit: {note}", file=sys.stderr)
  return 0


def _options(args: argparse.Namespace) -> Any:
  from chinchilla_jax.scaling import bootstrap, fit
  if not args.huber > 0:
    raise UserError(f"--huber: got {args.huber:g}; give a number above 0, such as 1e-3, or inf")
  if not 0 <= args.smoothing_window < 1e9:
    raise UserError(f"--smoothing-window: got {args.smoothing_window:g}; give a number of steps, "
                    "at least 0")
  if not 0 < args.budget_tolerance < 1:
    raise UserError(f"--budget-tolerance: got {args.budget_tolerance:g}; give a share between 0 "
                    "and 1")
  if args.seed < 0:
    raise UserError(f"--seed: got {args.seed}; give at least 0")
  if args.paper_intervals:
    if args.resamples is not None or args.confidence is not None:
      raise UserError("--paper-intervals says how many resamples and which percentiles; leave "
                      "--resamples and --confidence out")
    paper = bootstrap.PAPER
    resampling = bootstrap.Resampling(paper.kind, paper.count, paper.confidence, args.seed)
  else:
    resampling = bootstrap.Resampling(
        "bootstrap", 1000 if args.resamples is None else args.resamples,
        0.95 if args.confidence is None else args.confidence, args.seed)
  approaches = fit.APPROACHES if args.approach == "all" else (int(args.approach),)
  return fit.Options(approaches, args.profile, args.budget_tolerance, args.smoothing_window,
                     delta=args.huber, resampling=resampling)


def _folder(name: str) -> pathlib.Path:
  """Where the results go; made only when there are some."""
  folder = pathlib.Path(name)
  try:
    if folder.exists() and not folder.is_dir():
      raise UserError(f"--out: {shown(name)} is a file; give a folder")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
      raise UserError(f"--out: {shown(str(nearest))} cannot be written; choose another place")
  except (OSError, ValueError) as error:
    raise UserError(f"--out: {shown(name)} cannot be used "
                    f"({getattr(error, 'strerror', None) or error}); choose another place"
                    ) from None
  return folder


def _write(folder: pathlib.Path, text: str, report: Any,
           no_figures: bool) -> tuple[list[pathlib.Path], str]:
  """Returns (files, a line if there could be no figures)."""
  from chinchilla_jax.training import durable
  try:
    folder.mkdir(parents=True, exist_ok=True)
    durable.write(folder / "fit.json", text, suffix=f".{os.getpid()}.partial")
    written = [folder / "fit.json"]
    if no_figures:
      return written, ""
    try:
      from chinchilla_jax.scaling import figures
    except ModuleNotFoundError as error:
      if (error.name or "").split(".")[0] != "matplotlib":
        raise
      return written, ("no figures: matplotlib is not installed; pip install "
                       "'chinchilla_jax[figures]', or --no-figures")
    return written + figures.write(report, folder), ""
  except OSError as error:
    raise UserError(f"--out: {folder} cannot be written ({error.strerror or error}); make room, or "
                    "choose another place") from None


def _round(flops: float) -> float:
  return float(f"{flops:.2g}")


# -------------------------------------------------------------------- Text


def _text(report: Any, budgets: list[float]) -> list[str]:
  runs = report.runs
  span = lambda values, unit: f"{values.min():.3g} to {values.max():.3g} {unit}"
  lines = [f"{runs.source}: {len(runs.ids)} runs, {span(runs.flops, 'FLOPs')}, "
           f"{span(runs.params, 'parameters')}, {span(runs.tokens, 'tokens')}",
           f"  N: {runs.conventions['params']}", f"  D: {runs.conventions['tokens']}",
           f"  C: {runs.conventions['flops']}", f"  L: {runs.conventions['loss']}",
           f"  {report.options.resampling.describe()}"]
  lines += [f"  left out: {name} ({why})" for name, why in runs.dropped]
  lines += [f"  note: {note}" for note in runs.notes]
  for one in report.fitted:
    lines += ["", *_approach(one)]
  lines += [f"\napproach {approach} not fitted: {why.removeprefix(f'approach {approach}: ')}"
            for approach, why in report.skipped]
  return [*lines, "", *_exponents(report), "", *_predictions(report, budgets)]


def _approach(one: Any) -> list[str]:
  from chinchilla_jax.scaling import fit
  from chinchilla_jax.scaling.labels import short
  lines = [f"approach {one.approach}, {fit.TITLES[one.approach]}"]
  names = ("E", "A", "B", "alpha", "beta", "a", "b") if one.approach == 3 else ("a", "b", "k_n",
                                                                                "k_d")
  lines += [f"  {name:6}{getattr(one.law, name):>12.5g}  {_band(one.interval(name))}".rstrip()
            for name in names]
  detail = one.detail
  if one.approach == 1:
    kept = detail.flops[detail.kept]
    ends = "" if detail.kept.all() else (" (at the others the best size may lie beyond the sampled "
                                         "ones)")
    lines.append(f"  {detail.runs_used} runs on the envelope, {len(kept):,} of "
                 f"{len(detail.flops):,} FLOP values, from {kept[0]:.3g} to {kept[-1]:.3g}{ends}; "
                 f"{100 * detail.share_in_last:.1f} % of them in the last 15 % of their run")
  elif one.approach == 2:
    lines.append(f"  {detail.profile}s, loss of the minima = {detail.loss_constant:.4g} "
                 f"C^-{detail.loss_exponent:.4f}")
    lines.append(f"  {'budget':>10} {'runs':>5} {'N_opt':>8} {'D_opt':>8} {'D/N':>8} {'loss':>8}")
    lines += [f"  {p.flops:>10.3g} {len(p.runs):>5} {short(p.n_opt):>8} {short(p.d_opt):>8} "
              f"{p.d_opt / p.n_opt:>8.3g} {p.loss:>8.4f}" for p in detail.profiles]
  else:
    varpro = one.agreement
    lines += [
        f"  {detail.at_best:,} of {detail.starts:,} starts end at this optimum "
        f"({detail.converged:,} where the gradient vanishes); objective {detail.objective:.6g}, "
        f"gradient norm {detail.gradient:.1e}, rms residual of log L {detail.rms:.4f}",
        f"  variable projection: the five parameters within {varpro.largest_difference:.1e}, the "
        f"objective within {varpro.objective_difference:.1e} of it; condition number "
        f"{detail.condition:.1e} in (a, b, e, alpha, beta), {varpro.condition:.1f} in two"]
  return lines + [f"  warning: {warning}" for warning in one.warnings]


def _exponents(report: Any) -> list[str]:
  from chinchilla_jax.scaling import laws, paper_tables
  lines = ["exponents, N_opt ~ C^a and D_opt ~ C^b",
           f"  {'':42}{'a':>7} {'':18}{'b':>7}"]
  row = lambda name, a, a_band, b, b_band: (
      f"  {name:42}{a:>7.3f} {_band(a_band):18}{b:>7.3f} {_band(b_band)}").rstrip()
  for one in report.fitted:
    lines.append(row(f"these runs, approach {one.approach}", one.law.a, one.interval("a"),
                     one.law.b, one.interval("b")))
  for exponents in (*paper_tables.TABLE_2[:3], *paper_tables.TABLE_A2):
    name = exponents.name.partition(",")[0]
    lines.append(row(f"Hoffmann et al. 2022, {name}", exponents.a, exponents.a_interval,
                     exponents.b, exponents.b_interval))
  for name, title in (("besiroglu_2024", "Besiroglu et al. 2024, approach 3 again"),
                      ("porian_2024", "Porian et al. 2024, RefinedWeb, tuned"),
                      ("kaplan_2020", "Kaplan et al. 2020")):
    law = laws.PUBLISHED[name]
    lines.append(row(title, law.a, law.intervals.get("a"), law.b, law.intervals.get("b")))
  return lines + ["  intervals of Table 2: 10th and 90th percentiles; of Porian et al.: 95 %"]


def _predictions(report: Any, budgets: list[float]) -> list[str]:
  from chinchilla_jax.scaling import laws
  from chinchilla_jax.scaling.labels import short
  lines = ["compute-optimal models"]
  for flops in budgets:
    lines.append(f"  {f'at {flops:.3g} FLOPs':40}{'N':>7} {'':18}{'D':>7} {'':18}{'D/N':>6}")
    rows = [(f"these runs, approach {one.approach}", one.predict(flops)) for one in report.fitted]
    for name, title in (("approach_1", "Hoffmann et al. 2022, approach 1"),
                        ("approach_2", "Hoffmann et al. 2022, approach 2"),
                        ("approach_3_tex", "Hoffmann et al. 2022, approach 3"),
                        ("besiroglu_2024", "Besiroglu et al. 2024")):
      best = laws.PUBLISHED[name].at(flops)
      rows.append((title, {"params": (best.params, None, None), "tokens":
                           (best.tokens, None, None),
                           "tokens_per_param": (best.tokens_per_param, None, None)}))
    for title, found in rows:
      cells = [f"{short(value):>7} {'' if low is None else f'({short(low)}, {short(high)})':18}"
               for value, low, high in (found["params"], found["tokens"])]
      ratio = found["tokens_per_param"]
      cells.append(f"{ratio[0]:>6.3g} {_band(ratio[1:], '.3g')}")
      lines.append(f"    {title:38}{''.join(cells)}".rstrip())
  return lines


def _band(band: Any, form: str = "") -> str:
  if band is None or band[0] is None:
    return ""
  low, high = band
  if not form:
    form = ".3f" if 0.01 <= abs(low) < 10 and abs(high) < 10 else ".4g"
  return f"({low:{form}}, {high:{form}})"
