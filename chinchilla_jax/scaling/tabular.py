"""Columns of a CSV, TSV, JSON-lines or Parquet file, with where each row stands."""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from chinchilla_jax.config_io import shown
from chinchilla_jax.errors import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


@dataclasses.dataclass(frozen=True)
class Table:
  """Wanted columns by name, and "line 3" or "row 3" for every row."""

  columns: dict[str, list[Any]]
  places: tuple[str, ...]


def read(path: pathlib.Path, numbers: Sequence[str], texts: Sequence[str] = ()) -> Table:
  """Reads the named columns.

  Raises:
    UserError: no such file, an unknown extension, a file that cannot be read, a missing column, a
      row that is too short, no rows.
  """
  if not path.is_file():
    raise UserError(f"no file at {shown(str(path))}; give a table of runs "
                    f"({', '.join(SUFFIXES)})")
  if path.suffix not in SUFFIXES:
    raise UserError(f"{path}: unknown extension {shown(path.suffix)}; one of "
                    f"{', '.join(SUFFIXES)}")
  wanted = [*numbers, *texts]
  try:
    if path.suffix == ".parquet":
      table = _parquet(path, wanted)
    elif path.suffix == ".jsonl":
      table = _jsonl(path, wanted)
    else:
      table = _csv(path, wanted, "\t" if path.suffix == ".tsv" else ",")
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); give "
                    "a table in UTF-8") from None
  if not table.places:
    raise UserError(f"{path}: has no rows; give one for every run")
  return table


def number(cell: Any, where: str) -> float:
  """A cell as a number, which may be NaN.

  Raises:
    UserError: it is none.
  """
  if isinstance(cell, bool) or cell is None or cell == "":
    raise UserError(f"{where} is empty; fill it in, or take the row out")
  try:
    return float(cell)
  except (TypeError, ValueError):
    raise UserError(f"{where} is {shown(cell)}, and must be a number; mend it, or take the row "
                    "out") from None


def _have(found: Sequence[str], wanted: Sequence[str], path: pathlib.Path) -> None:
  for name in wanted:
    if name not in found:
      raise UserError(f"{path}: has no column {shown(name)}; its columns are "
                      f"{', '.join(map(str, found)) or 'none'}")


def _csv(path: pathlib.Path, wanted: Sequence[str], separator: str) -> Table:
  with open(path, newline="", encoding="utf-8-sig") as file:
    reader = csv.reader(file, delimiter=separator)
    header = [name.strip() for name in next(reader, [])]
    _have(header, wanted, path)
    for name in wanted:
      if header.count(name) > 1:
        raise UserError(f"{path}: has {header.count(name)} columns called {shown(name)}; rename "
                        "one")
    columns, places = {name: [] for name in wanted}, []
    for row in reader:
      if not row:
        continue
      place = f"line {reader.line_num}"
      if len(row) != len(header):
        raise UserError(f"{path}, {place}: has {len(row)} values, and the header {len(header)}; "
                        "mend the line")
      for name in wanted:
        columns[name].append(row[header.index(name)].strip())
      places.append(place)
  return Table(columns, tuple(places))


def _jsonl(path: pathlib.Path, wanted: Sequence[str]) -> Table:
  columns, places = {name: [] for name in wanted}, []
  for count, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
    if not line.strip():
      continue
    place = f"line {count}"
    try:
      row = json.loads(line)
    except (ValueError, RecursionError):
      row = None
    if not isinstance(row, dict):
      raise UserError(f"{path}, {place}: is not a JSON object; mend the line")
    _have(list(row), wanted, f"{path}, {place}")
    for name in wanted:
      columns[name].append(row[name])
    places.append(place)
  return Table(columns, tuple(places))


def _parquet(path: pathlib.Path, wanted: Sequence[str]) -> Table:
  import pyarrow
  from pyarrow import parquet
  try:
    _have(parquet.read_schema(path).names, wanted, path)
    table = parquet.read_table(path, columns=list(dict.fromkeys(wanted)))
  except pyarrow.ArrowException as error:
    raise UserError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}); write it "
                    "again") from None
  return Table({name: table[name].to_pylist() for name in wanted},
               tuple(f"row {row}" for row in range(1, table.num_rows + 1)))
