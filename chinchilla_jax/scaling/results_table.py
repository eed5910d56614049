"""Runs to fit, from a sweep's results.jsonl or from anybody's CSV, JSON lines or Parquet.

What cannot be fitted honestly is refused with one line: values that are not finite and positive,
the same row twice, rows of different conventions. Nothing is left out without being named.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from chinchilla_jax.config_io import shown
from chinchilla_jax.errors import UserError
from chinchilla_jax.scaling import fit_envelope, tabular
from chinchilla_jax.scaling.fit_envelope import TrainingCurve
from chinchilla_jax.scaling.laws import FLOPS_PER_PARAM_TOKEN, WITH_EMBEDDING

PARAMS = ("params_table_a9", "params_non_embedding")
FLOPS = ("six_n_d", "appendix_f", "layers_only", "matmul", "matmul_causal")
LOSSES = ("validation_loss", "train_loss_mean_last_1pct", "train_loss_last")
_WIDEST_FLOPS = 5    # largest over smallest C / 6ND within one convention
_WIDEST_PARAMS = 1e6  # largest over smallest N in one unit


@dataclasses.dataclass(frozen=True)
class Runs:
  """Runs to fit, in the order of their file.

  Attributes:
    source: file that they are from.
    ids: a name for each; "line 3" where the file has none.
    params, tokens, flops, loss: (runs,), N, D, C, final loss in nats per token.
    curves: training curves, if there are any.
    params_convention: which N: a key of laws.py, such as "params_table_a9".
    conventions: what N, D, C and the loss are, in words, for people.
    dropped: (id, why) of every run left out.
    curve_note: why there are no curves, or "".
    notes: what the reader of a fit should know about these runs.
  """

  source: str
  ids: tuple[str, ...]
  params: np.ndarray
  tokens: np.ndarray
  flops: np.ndarray
  loss: np.ndarray
  curves: tuple[TrainingCurve, ...]
  params_convention: str
  conventions: dict[str, str]
  dropped: tuple[tuple[str, str], ...]
  curve_note: str = ""
  notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Columns:
  """Names of columns in a table that is no sweep's, and factors to parameters, tokens, FLOPs."""

  params: str | None = None
  tokens: str | None = None
  loss: str | None = None
  flops: str | None = None
  run: str | None = None
  params_scale: float = 1.0
  tokens_scale: float = 1.0

  def named(self) -> bool:
    return any((self.params, self.tokens, self.loss, self.flops, self.run))


def read(path: str | os.PathLike, *, columns: Columns | None = None,
         params: str | None = None, flops: str | None = None, loss: str | None = None,
         drop: Sequence[str] = (), drop_highest: int = 0, curves: bool = True,
         window: float = fit_envelope.WINDOW) -> Runs:
  """Reads runs.

  Args:
    path: a sweep's folder, its results.jsonl, or with `columns` a .csv, .tsv, .jsonl or .parquet.
    params: of a sweep: which N, one of PARAMS. Of a table: which N its column holds.
    flops: of a sweep: one of FLOPS; "six_n_d" is over the chosen N.
    loss: of a sweep: one of LOSSES.
    drop: ids (or "line 3") of runs to leave out.
    drop_highest: how many runs of the highest losses to leave out, after `drop`.
    curves: of a sweep: read the training curves too.
    window: of the smoothing that makes the final loss of a curve in a table of curves.

  Raises:
    UserError: names the file, the line, the column and the cure.
  """
  columns = columns or Columns()
  path = pathlib.Path(path)
  if columns.named():
    if flops not in (None, "six_n_d"):
      raise UserError(f"--flops {flops}: a table's FLOPs are a column; name it with "
                      "--flops-column, or leave both out for 6ND")
    if loss is not None:
      raise UserError(f"--loss {loss}: that is a column of a sweep's results; name a table's with "
                      "--loss-column only")
    runs = _from_table(path, columns, params or WITH_EMBEDDING, drop, window)
  else:
    runs = _from_sweep(path, params or PARAMS[0], flops or FLOPS[0], loss or LOSSES[0], drop,
                       curves)
  _consistent(runs)
  return _without_highest(runs, drop_highest) if drop_highest else runs


# -------------------------------------------------------------------- A sweep's results


def _from_sweep(path: pathlib.Path, params: str, flops: str, loss: str, drop: Sequence[str],
                with_curves: bool) -> Runs:
  for what, value, known in (("--params", params, PARAMS), ("--flops", flops, FLOPS),
                             ("--loss", loss, LOSSES)):
    if value not in known:
      raise UserError(f"{what}: got {shown(value)}; one of: {', '.join(known)}")
  if path.is_file() and not _of_a_sweep(path):
    raise UserError(f"{path}: a table that no sweep wrote; say what its columns are with "
                    "--params-column, --tokens-column and --loss-column")
  from chinchilla_jax.experiments import results
  file = path / results.FILE if path.is_dir() else path
  rows = results.read(path)
  left, dropped = [], []
  known = [row.id for row in rows]
  _all_known(drop, known, file)
  for row in rows:
    if row.id in drop:
      dropped.append((row.id, "--drop"))
    elif row.status != "complete":
      dropped.append((row.id, f"is {row.status}, not complete"))
    elif getattr(row, loss) is None:
      raise UserError(f"{file}: {loss} of the run {shown(row.id)} has no value; take another "
                      f"--loss ({', '.join(LOSSES)}), or leave the run out with --drop {row.id}")
    else:
      left.append(row)
  if not left:
    raise UserError(f"{file}: none of its {len(rows)} runs is complete; run `chinchilla sweep` "
                    "again, which goes on with them")
  stores = {row.store_fingerprint for row in left}
  if len(stores) > 1:
    other = next(row for row in left if row.store_fingerprint != left[0].store_fingerprint)
    raise UserError(f"{file}: the runs {shown(left[0].id)} and {shown(other.id)} are of different "
                    "token stores, and their losses cannot be compared; fit one store at a time "
                    "(--drop ID leaves runs out)")
  n = np.array([float(getattr(row, params)) for row in left])
  d = np.array([float(row.tokens) for row in left])
  c = (FLOPS_PER_PARAM_TOKEN * n * d if flops == "six_n_d"
       else np.array([getattr(row, f"flops_{flops}") for row in left]))
  losses = np.array([getattr(row, loss) for row in left], np.float64)
  for row, value in zip(left, losses, strict=True):
    _positive(value, f"{file}: {loss} of the run {shown(row.id)}")
  found, note = [], "training curves were not asked for"
  if with_curves:
    found, note = _sweep_curves(file.parent, left, n, c)
  conventions = {
      "params": f"{params} ({'embedding included' if params == PARAMS[0] else 'no embedding'})",
      "tokens": "targets trained on, repetitions included",
      "flops": (f"6 N D with N = {params}" if flops == "six_n_d"
                else f"{flops} of chinchilla_jax/model/flops.py, forward and backward"),
      "loss": f"{loss}, nats per token"}
  repeated = [row.epochs for row in left if row.epochs > 1]
  notes = () if not repeated else (
      f"{len(repeated)} of {len(left)} runs saw their data more than once, up to "
      f"{max(repeated):.3g} epochs: the laws are about fresh data, and D counts repetitions as "
      "fresh",)
  return Runs(str(file), tuple(row.id for row in left), n, d, c, losses, tuple(found), params,
              conventions, tuple(dropped), note, notes)


def _of_a_sweep(path: pathlib.Path) -> bool:
  """Whether a file may be a sweep's results; a broken one is for `results.read` to complain of."""
  if path.suffix != ".jsonl":
    return False
  try:
    with open(path, encoding="utf-8") as file:
      first = json.loads(file.readline() or "{}")
  except (OSError, ValueError, RecursionError):
    return True
  return not isinstance(first, dict) or "fingerprint" in first or "status" in first


def _sweep_curves(folder: pathlib.Path, rows: Sequence[Any], n: np.ndarray,
                  c: np.ndarray) -> tuple[list[TrainingCurve], str]:
  found = []
  for row, params, flops in zip(rows, n, c, strict=True):
    path = folder / row.curve
    points = []
    try:
      for line in path.read_text().splitlines():
        try:
          record = json.loads(line)
        except ValueError:  # The last line of a run that was killed.
          continue
        if isinstance(record, dict) and record.get("kind") == "train":
          points.append((record["tokens"], record["loss"], record["step"]))
    except (OSError, UnicodeDecodeError, KeyError) as error:
      reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
      return [], f"the curve of {row.id} cannot be read ({path}: {reason})"
    # A step that the guard skipped has no loss.
    points = {point[0]: point for point in points
              if point[1] is not None and np.isfinite(point[1]) and point[1] > 0 and point[0] > 0}
    if len(points) < 2:
      return [], f"the curve of {row.id} has {len(points)} points ({path})"
    tokens, loss, steps = np.array([points[at] for at in sorted(points)], np.float64).T
    found.append(TrainingCurve(row.id, float(params), tokens, tokens * flops / row.tokens, loss,
                               float(row.total_tokens), float(np.median(np.diff(steps)))))
  return found, ""


# -------------------------------------------------------------------- Anybody's table


def _from_table(path: pathlib.Path, columns: Columns, params: str, drop: Sequence[str],
                window: float) -> Runs:
  if not columns.loss:
    raise UserError("--loss-column is missing; name the column of final losses, in nats per token")
  given = [columns.params, columns.tokens, columns.flops]
  if sum(name is not None for name in given) < 2:
    raise UserError("name two of --params-column, --tokens-column and --flops-column; the third "
                    "follows from C = 6ND")
  for what, scale in (("--params-scale", columns.params_scale),
                      ("--tokens-scale", columns.tokens_scale)):
    if not (scale > 0 and np.isfinite(scale)):
      raise UserError(f"{what}: got {scale:g}; give a factor above 0, such as 1e6 for millions")
  wanted = [name for name in (*given, columns.loss) if name]
  table = tabular.read(path, wanted, [columns.run] if columns.run else [])
  where = [f"{path}, {at}" for at in table.places]
  values = {name: np.array([tabular.number(cell, f"{place}: {name}")
                            for cell, place in zip(table.columns[name], where, strict=True)])
            for name in wanted}
  names = ([str(cell) for cell in table.columns[columns.run]] if columns.run
           else list(table.places))
  _all_known(drop, names, path)
  keep = np.array([name not in drop for name in names])
  for name, column in values.items():
    for row in np.flatnonzero(keep):
      _positive(column[row], f"{where[row]}: {name}", names[row])
  if not keep.any():
    raise UserError(f"{path}: no rows are left to fit")
  scale = {columns.params: columns.params_scale, columns.tokens: columns.tokens_scale}
  n, d, c = (None if name is None else values[name][keep] * scale.get(name, 1.0)
             for name in given)
  n = c / d / FLOPS_PER_PARAM_TOKEN if n is None else n
  d = c / n / FLOPS_PER_PARAM_TOKEN if d is None else d
  c = FLOPS_PER_PARAM_TOKEN * n * d if c is None else c
  loss = values[columns.loss][keep]
  left = [name for name, kept in zip(names, keep, strict=True) if kept]
  places = [place for place, kept in zip(where, keep, strict=True) if kept]
  seen: dict[tuple, int] = {}
  for row, key in enumerate(zip(left if columns.run else [""] * len(left), n, d, c, loss,
                                strict=True)):
    if key in seen:
      raise UserError(f"{places[row]} says the same as {table_place(places[seen[key]])}; take one "
                      "of them out")
    seen[key] = row
  conventions = {
      "params": f"column {columns.params}" if columns.params else "C / 6D",
      "tokens": f"column {columns.tokens}" if columns.tokens else "C / 6N",
      "flops": f"column {columns.flops}" if columns.flops else "6 N D of these N and D",
      "loss": f"column {columns.loss}, nats per token"}
  conventions["params"] += f", taken as {params}"
  dropped = tuple(dict.fromkeys((name, "--drop") for name, kept in zip(names, keep, strict=True)
                                if not kept))
  if not columns.run:
    return Runs(str(path), tuple(left), n, d, c, loss, (), params, conventions, dropped,
                "the table has no curves (--run-column says which run a row is a point of)")
  curves, last = [], []
  for run in dict.fromkeys(left):
    rows = np.array([i for i, name in enumerate(left) if name == run])
    rows = rows[np.argsort(d[rows], kind="stable")]
    if n[rows].max() > n[rows].min() * (1 + 1e-9):
      raise UserError(f"{path}: the run {shown(run)} has rows of {n[rows].min():g} and "
                      f"{n[rows].max():g} parameters; give every run a name of its own")
    curves.append(TrainingCurve(run, float(n[rows[0]]), d[rows], c[rows], loss[rows],
                                float(d[rows[-1]])))
    last.append(rows[-1])
  finals = np.array([curve.smoothed(window)[-1] for curve in curves])
  note = ""
  if short := [curve.run for curve in curves if len(curve.loss) < 2]:
    curves, note = [], f"the run {short[0]} has a single row; a curve needs two"
  conventions["loss"] += ", at the end of each run's smoothed curve"
  return Runs(str(path), tuple(dict.fromkeys(left)), n[last], d[last], c[last], finals,
              tuple(curves), params, conventions, dropped, note)


def table_place(place: str) -> str:
  """"line 3" of "folder/file.csv, line 3"."""
  return place.rsplit(", ", 1)[-1]


# -------------------------------------------------------------------- What all runs must obey


def _positive(value: float, where: str, name: str | None = None) -> None:
  if not (np.isfinite(value) and value > 0):
    cure = f"mend it, or leave it out with --drop {shown(name)}" if name else "mend it"
    raise UserError(f"{where} is {value:g}, and must be a finite number above 0; {cure}")


def _all_known(drop: Sequence[str], known: Sequence[str], path: pathlib.Path) -> None:
  for name in drop:
    if name not in known:
      raise UserError(f"--drop {shown(name)}: {path} has no such run; runs are called "
                      f"{', '.join(list(dict.fromkeys(known))[:3])}, ...")


def _consistent(runs: Runs) -> None:
  ratio = runs.flops / (FLOPS_PER_PARAM_TOKEN * runs.params * runs.tokens)
  low, high = int(ratio.argmin()), int(ratio.argmax())
  if ratio[high] > _WIDEST_FLOPS * ratio[low]:
    raise UserError(f"{runs.source}: FLOPs are {ratio[low]:.3g} x 6ND in {runs.ids[low]} and "
                    f"{ratio[high]:.3g} x 6ND in {runs.ids[high]}: the rows mix conventions or "
                    "units; give one for all, or leave the FLOPs out for 6ND")
  low, high = int(runs.params.argmin()), int(runs.params.argmax())
  if runs.params[high] > _WIDEST_PARAMS * runs.params[low]:
    raise UserError(f"{runs.source}: {runs.params[low]:g} parameters in {runs.ids[low]} and "
                    f"{runs.params[high]:g} in {runs.ids[high]}: the rows mix units; give all N "
                    "in one")


def _without_highest(runs: Runs, count: int) -> Runs:
  if not 0 < count < len(runs.ids):
    raise UserError(f"--drop-highest: got {count}; give a number from 1 to {len(runs.ids) - 1}, "
                    "fewer than there are runs")
  order = np.argsort(-runs.loss, kind="stable")[:count]
  keep = np.ones(len(runs.ids), bool)
  keep[order] = False
  gone = tuple((runs.ids[row], f"--drop-highest {count}: loss {runs.loss[row]:.4f}")
               for row in order)
  ids = tuple(name for name, kept in zip(runs.ids, keep, strict=True) if kept)
  return dataclasses.replace(
      runs, ids=ids, params=runs.params[keep], tokens=runs.tokens[keep], flops=runs.flops[keep],
      loss=runs.loss[keep], dropped=runs.dropped + gone,
      curves=tuple(curve for curve in runs.curves if curve.run in set(ids)))
