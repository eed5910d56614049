"""One row a run, in one file that `fit` and `report` read: results.jsonl in a sweep's folder.

The file is made anew from the runs' folders every time, so it cannot disagree with them. A column
that depends on a convention has it in its name; `Row` says what each one is.
"""

import dataclasses
import fcntl
import json
import math
import os
import pathlib
import statistics
import types
import typing
from collections.abc import Sequence
from typing import Any

from chinchilla_jax.config_io import shown
from chinchilla_jax.errors import UserError
from chinchilla_jax.experiments import run_state, sweep
from chinchilla_jax.model import flops, shapes
from chinchilla_jax.training.run_folder import RunFolder

FILE = "results.jsonl"
_FEWEST = 10  # steps in a mean of the last ones


@dataclasses.dataclass(frozen=True)
class Row:
  """A run. None: not known (yet); never NaN.

  Tokens, FLOPs, epochs and ratios are of what has been trained: of the whole run when `status` is
  complete. Losses are in nats per token, without the z-loss.
  """

  id: str
  status: str                   # one of run_state.STATES
  reason: str                   # why it failed, in one line; "" otherwise
  overrides: dict               # what sets this run apart, by dotted field
  seed: int
  fingerprint: str              # SHA-256 over the fields of classes identity and length, and store
  store_fingerprint: str
  params_table_a9: int          # N by the rule of Table A9, embedding included
  params_non_embedding: int     # the same without the V x d_model of the (tied) embedding
  steps: int                    # taken
  total_steps: int              # of the whole run
  tokens: int                   # D: targets trained on, repetitions included
  total_tokens: int             # of the whole run
  tokens_per_param_table_a9: float
  epochs: float                 # passes over the training split
  flops_six_n_d: float          # conventions of model/flops.py, times tokens
  flops_appendix_f: float
  flops_layers_only: float
  flops_matmul: float
  flops_matmul_causal: float
  train_loss_last: float | None           # of the newest step
  train_loss_mean_last_1pct: float | None  # mean over the last 1 % of all steps, at least 10
  validation_loss: float | None           # after the last step of the whole run
  validation_bits_per_byte: float | None  # the same evaluation
  tokens_per_second_median: float | None  # over logged steps; evaluations and saves left out
  seconds_of_steps: float | None  # tokens x mean of 1 / (tokens per second) over logged steps
  starts: int                   # processes that trained at it: 1 for one that was never resumed
  devices: str | None           # that the newest start computed on: "1 x cpu"
  cores: int | None             # that it could use: on CPUs, bits depend on it
  git_commit: str | None
  versions: dict                # of Python and the libraries, at the newest start
  curve: str                    # metrics.jsonl, relative to the folder of this file


_KINDS = typing.get_type_hints(Row)


def write(folder: str | os.PathLike) -> pathlib.Path:
  """Makes results.jsonl of a sweep's folder anew; returns its path. Left alone if it says the same.

  Several processes may do this at once: they take turns.

  Raises:
    UserError: the folder is not a sweep's, or cannot be written.
  """
  folder = pathlib.Path(folder)
  found = sweep.read(folder)
  path = folder / FILE
  with _turn(folder / f".{FILE}.lock"):
    lines = [json.dumps(dataclasses.asdict(row_of(member, folder)), allow_nan=False)
             for member in found]
    sweep.put(path, "".join(f"{line}\n" for line in lines))
  return path


class _turn:
  """Whoever reads the runs last also writes last. Where there are no locks: whoever comes."""

  def __init__(self, path: pathlib.Path):
    self._path = path

  def __enter__(self):
    self._file = None
    try:
      self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
      fcntl.flock(self._file, fcntl.LOCK_EX)
    except OSError:
      pass

  def __exit__(self, *unused):
    if self._file is not None:
      os.close(self._file)


def row_of(member: sweep.Member, folder: pathlib.Path) -> Row:
  """The row of a member of the sweep in `folder`."""
  state = sweep.state_of(member)
  run, model = RunFolder(member.folder), member.experiment.model
  records = run.read_metrics()
  train = [record for record in records if record.get("kind") == "train"]
  evals = [record for record in records
           if record.get("kind") == "eval" and record.get("step") == member.total_steps]
  starts = [event for event in run.read_journal() if event.get("event") in ("start", "resume")]
  newest = train[-1] if train else {"step": 0, "tokens": 0, "loss": None}
  window = max(_FEWEST, math.ceil(member.total_steps / 100))
  tail = [record["loss"] for record in train if record["step"] > newest["step"] - window]
  speeds = [record["tokens_per_second"] for record in train if record.get("tokens_per_second")]
  tokens, n_params = newest["tokens"], shapes.count_parameters(model)
  versions = _versions(run)
  spent = {f"flops_{name}": flops.training(model, tokens, member.experiment.data.seq_len, name)
           for name in flops.CONVENTIONS}
  return Row(
      id=member.id, status=state.state, reason=state.reason,
      overrides=member.overrides, seed=member.experiment.seed, fingerprint=member.fingerprint,
      store_fingerprint=member.store_fingerprint, params_table_a9=n_params,
      params_non_embedding=n_params - shapes.parameter_groups(model)["embedding"],
      steps=newest["step"], total_steps=member.total_steps, tokens=tokens,
      total_tokens=member.total_tokens, tokens_per_param_table_a9=tokens / n_params,
      epochs=tokens / member.epoch_tokens, **spent,
      train_loss_last=_finite(newest["loss"]),
      train_loss_mean_last_1pct=_finite(statistics.fmean(tail)) if tail else None,
      validation_loss=_finite(evals[-1]["loss"]) if evals else None,
      validation_bits_per_byte=_finite(evals[-1]["bits_per_byte"]) if evals else None,
      tokens_per_second_median=statistics.median(speeds) if speeds else None,
      seconds_of_steps=(tokens * statistics.fmean(1 / speed for speed in speeds)
                        if speeds else None),
      starts=len(starts), devices=starts[-1].get("devices") if starts else None,
      cores=starts[-1].get("cores") if starts else None,
      git_commit=versions.pop("git_commit", None), versions=versions,
      curve=os.path.relpath(run.metrics, folder))


def _versions(run: RunFolder) -> dict[str, Any]:
  try:
    return dict(json.loads(run.config.read_text())["versions"])
  except (OSError, ValueError, KeyError, TypeError):
    return {}


def _finite(value: float | None) -> float | None:
  return value if value is not None and math.isfinite(value) else None


# -------------------------------------------------------------------- Reading


def read(path: str | os.PathLike, needed: Sequence[str] = ()) -> list[Row]:
  """The rows of a results file. Columns that `Row` does not have are passed over.

  Args:
    path: of the file, or of the sweep's folder that it lies in.
    needed: columns that must have a value in every row whose status is complete.

  Raises:
    UserError: names the file, the line and the column of the first thing that is wrong: no JSON,
      a column missing, another type, NaN, an unknown status, an id that occurs twice.
  """
  path = pathlib.Path(path)
  path = path / FILE if os.path.isdir(path) else path
  if not os.path.isfile(path):
    raise UserError(f"no results at {path}; give the {FILE} that `chinchilla sweep` wrote")
  if unknown := [name for name in needed if name not in _KINDS]:
    raise ValueError(f"no such column: {unknown[0]}")
  rows: list[Row] = []
  lines: dict[str, int] = {}
  try:
    text = path.read_text()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path} cannot be read ({error}); make it again with `chinchilla sweep "
                    "--collect`") from error
  for number, line in enumerate(text.splitlines(), 1):
    if not line.strip():
      continue
    where = f"{path}, line {number}"
    row = _row(line, where)
    if row.id in lines:
      raise UserError(f"{where}: id {shown(row.id)} is also on line {lines[row.id]}; take one out")
    lines[row.id] = number
    for name in needed if row.status == "complete" else ():
      if getattr(row, name) is None:
        raise UserError(f"{where}: {name} has no value, and the run {shown(row.id)} is complete; "
                        "take the line out, or run it again")
    rows.append(row)
  return rows


def _row(line: str, where: str) -> Row:
  again = "make the file again with `chinchilla sweep --collect`"
  try:
    found = json.loads(line)
  except (ValueError, RecursionError):
    raise UserError(f"{where}: is not JSON; {again}") from None
  if not isinstance(found, dict):
    raise UserError(f"{where}: is not a JSON object; {again}")
  values = {}
  for name, kind in _KINDS.items():
    if name not in found:
      raise UserError(f"{where}: has no column {name}; {again}")
    values[name] = _value(found[name], kind, f"{where}: {name}")
  if values["status"] not in run_state.STATES:
    raise UserError(f"{where}: status is {shown(values['status'])}, and must be one of "
                    f"{', '.join(run_state.STATES)}")
  return Row(**values)


def _value(value: Any, kind: Any, where: str) -> Any:
  if isinstance(kind, types.UnionType):
    if value is None:
      return None
    kind = typing.get_args(kind)[0]
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if kind in (int, float):
    if not is_number or not math.isfinite(value) or (kind is int and value != int(value)):
      what = "a whole number" if kind is int else "a finite number"
      raise UserError(f"{where} is {shown(value)}, and must be {what}; mend it, or take the line "
                      "out")
    return kind(value)
  if not isinstance(value, kind):
    raise UserError(f"{where} is {shown(value)}, and must be "
                    f"{'text' if kind is str else 'a JSON object'}; mend it, or take the line out")
  return value
