"""Runs from sweeps and tables, and every way in which they may be bad: one line, with a cure."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import planted
import pyarrow as pa
import pytest
from pyarrow import parquet

from chinchilla_jax.errors import UserError
from chinchilla_jax.experiments import results
from chinchilla_jax.scaling import results_table
from chinchilla_jax.scaling.results_table import Columns

NAMED = Columns("params", "tokens", "loss", "flops")
WITHOUT_FLOPS = Columns("params", "tokens", "loss")


def write_sweep(folder: pathlib.Path, curves, **changes) -> pathlib.Path:
  """A sweep's folder whose members followed `curves`: results.jsonl and a metrics.jsonl each.

  changes: field of Row -> value in the last row.
  """
  rows = []
  for index, curve in enumerate(curves):
    run = folder / "runs" / curve.run
    run.mkdir(parents=True)
    lines = [{"kind": "train", "step": 10 * (i + 1), "tokens": int(d), "loss": float(loss)}
             for i, (d, loss) in enumerate(zip(curve.tokens, curve.loss, strict=True))]
    lines.insert(3, {"kind": "eval", "step": 30, "tokens": 1, "loss": 9.0})
    lines.append({"kind": "train", "step": 10**6, "tokens": int(curve.tokens[-1]) + 1,
                  "loss": None})
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "train", "st'
    (run / "metrics.jsonl").write_text(text)
    n, d = curve.params, curve.tokens[-1]
    rows.append(results.Row(
        id=curve.run, status="complete", reason="", overrides={}, seed=index, fingerprint="f",
        store_fingerprint="s", params_table_a9=int(n), params_non_embedding=int(0.8 * n), steps=10,
        total_steps=10, tokens=int(d), total_tokens=int(d), tokens_per_param_table_a9=d / n,
        epochs=0.1, flops_six_n_d=6.0 * int(n) * int(d), flops_appendix_f=7.0 * n * d,
        flops_layers_only=6.2 * n * d, flops_matmul=6.4 * n * d, flops_matmul_causal=6.3 * n * d,
        train_loss_last=float(curve.loss[-1]),
        train_loss_mean_last_1pct=float(curve.loss[-1]) + 0.01,
        validation_loss=float(curve.loss[-1]) + 0.1, validation_bits_per_byte=1.0,
        tokens_per_second_median=1.0, seconds_of_steps=1.0, starts=1, devices="1 x cpu", cores=2,
        git_commit=None, versions={}, curve=f"runs/{curve.run}/metrics.jsonl"))
  if changes:
    rows[-1] = dataclasses.replace(rows[-1], **changes)
  (folder / results.FILE).write_text(
      "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
  return folder


@pytest.fixture
def curves():
  return planted.curves(planted.BESIROGLU, (1e8, 3e8, 1e9), (10, 20, 40), points=30)


def test_a_sweeps_folder(tmp_path, curves):
  runs = results_table.read(write_sweep(tmp_path, curves))
  assert runs.ids == tuple(curve.run for curve in curves)
  assert runs.params == pytest.approx([int(curve.params) for curve in curves])
  assert runs.flops == pytest.approx(6 * runs.params * runs.tokens, rel=1e-15)
  assert runs.loss == pytest.approx([curve.loss[-1] + 0.1 for curve in curves])
  assert len(runs.curves) == 9 and not runs.dropped
  for mine, theirs in zip(runs.curves, curves, strict=True):
    # Neither the evaluation, nor the step without a loss, nor the torn line is a point.
    assert mine.loss == pytest.approx(theirs.loss) and mine.steps_per_point == 10
    assert mine.flops == pytest.approx(theirs.flops, rel=1e-6)
  same = results_table.read(tmp_path / results.FILE)
  assert np.array_equal(same.loss, runs.loss) and same.source == runs.source


def test_conventions_of_a_sweep(tmp_path, curves):
  write_sweep(tmp_path, curves)
  for params, factor in (("params_table_a9", 1.0), ("params_non_embedding", 0.8)):
    runs = results_table.read(tmp_path, params=params)
    assert runs.params == pytest.approx([factor * c.params for c in curves], rel=1e-6)
    # 6ND is over the N that was chosen.
    assert runs.flops == pytest.approx(6 * runs.params * runs.tokens, rel=1e-15)
    assert runs.params_convention == params and params in runs.conventions["params"]
    assert params in runs.conventions["flops"]
  other = results_table.read(tmp_path, flops="appendix_f", loss="train_loss_mean_last_1pct")
  assert other.flops == pytest.approx([7 * c.params * c.tokens[-1] for c in curves])
  assert other.loss == pytest.approx([c.loss[-1] + 0.01 for c in curves])
  assert "appendix_f" in other.conventions["flops"]
  assert "train_loss_mean_last_1pct, nats per token" == other.conventions["loss"]


def test_runs_that_are_not_complete_are_named(tmp_path, curves):
  write_sweep(tmp_path, curves, status="failed", reason="out of memory", validation_loss=None)
  runs = results_table.read(tmp_path, drop=[curves[0].run], drop_highest=1)
  assert len(runs.ids) == 6 and len(runs.curves) == 6
  why = dict(runs.dropped)
  assert why[curves[0].run] == "--drop" and why[curves[-1].run] == "is failed, not complete"
  highest = curves[1]
  assert why[highest.run].startswith("--drop-highest 1: loss ")


def test_data_seen_more_than_once_are_noted(tmp_path, curves):
  assert results_table.read(write_sweep(tmp_path / "a", curves)).notes == ()
  (note,) = results_table.read(write_sweep(tmp_path / "b", curves, epochs=2.5)).notes
  assert note.startswith("1 of 9 runs saw their data more than once, up to 2.5 epochs")


def test_a_sweep_without_its_curves(tmp_path, curves):
  write_sweep(tmp_path, curves)
  (tmp_path / "runs" / curves[1].run / "metrics.jsonl").unlink()
  runs = results_table.read(tmp_path)
  assert runs.curves == () and f"the curve of {curves[1].run} cannot be read" in runs.curve_note


@pytest.mark.parametrize("changes, flags, says", [
    ({"store_fingerprint": "t"}, {}, "different token stores, and their losses cannot be compared"),
    ({"validation_loss": None}, {}, "validation_loss of the run '.*' has no value; take another"),
    ({"validation_loss": -1.0}, {}, "is -1, and must be a finite number above 0"),
    ({"validation_loss": float("nan")}, {}, "validation_loss is nan, and must be a finite number"),
    ({"flops_appendix_f": 1e12}, {"flops": "appendix_f"}, "the rows mix conventions or units"),
    ({}, {"drop": ["nothing"]}, "--drop 'nothing': .* has no such run; runs are called"),
    ({}, {"drop_highest": 9}, "--drop-highest: got 9; give a number from 1 to 8"),
    ({}, {"loss": "bits"}, "--loss: got 'bits'; one of: validation_loss")])
def test_bad_sweeps(tmp_path, curves, changes, flags, says):
  write_sweep(tmp_path, curves, **changes)
  with pytest.raises(UserError, match=says) as caught:
    results_table.read(tmp_path, **flags)
  assert "\n" not in str(caught.value)


@pytest.fixture
def runs():
  return planted.isoflop_runs(planted.BESIROGLU, budgets=(1e18, 1e19), sizes=4)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_table(tmp_path, runs, suffix):
  path = tmp_path / f"runs{suffix}"
  columns = dict(zip(("params", "tokens", "flops", "loss"), runs, strict=True))
  if suffix == ".parquet":
    parquet.write_table(pa.table(columns), path)
  elif suffix == ".jsonl":
    rows = zip(*columns.values(), strict=True)
    path.write_text("\n".join(json.dumps(dict(zip(columns, map(float, row), strict=True)))
                              for row in rows))
  else:
    planted.write_csv(tmp_path / "runs.csv", *runs)
    path.write_text((tmp_path / "runs.csv").read_text().replace(
        ",", "\t" if suffix == ".tsv" else ","))
  found = results_table.read(path, columns=NAMED)
  for mine, theirs in zip((found.params, found.tokens, found.flops, found.loss), runs, strict=True):
    assert mine.tolist() == theirs.tolist()
  assert found.ids[0] in ("line 2", "line 1", "row 1") and not found.curves


def test_the_third_of_n_d_c_follows(tmp_path, runs):
  path = planted.write_csv(tmp_path / "runs.csv", *runs)
  for columns in (Columns("params", "tokens", "loss"), Columns("params", None, "loss", "flops"),
                  Columns(None, "tokens", "loss", "flops")):
    found = results_table.read(path, columns=columns)
    assert found.params == pytest.approx(runs[0]) and found.tokens == pytest.approx(runs[1])
    assert found.flops == pytest.approx(runs[2])


def test_units_of_a_table(tmp_path, runs):
  n, d, c, loss = runs
  path = planted.write_csv(tmp_path / "runs.csv", n / 1e6, d / 1e9, c, loss)
  found = results_table.read(path, columns=dataclasses.replace(NAMED, params_scale=1e6,
                                                               tokens_scale=1e9))
  assert found.params == pytest.approx(n) and found.tokens == pytest.approx(d)


def test_curves_in_a_table(tmp_path, curves):
  columns = [np.concatenate([np.full(len(c.tokens), c.params) for c in curves]),
             np.concatenate([c.tokens for c in curves]), np.concatenate([c.flops for c in curves]),
             np.concatenate([c.loss for c in curves])]
  names = [c.run for c in curves for _ in c.tokens]
  path = planted.write_csv(tmp_path / "curves.csv", *columns, run=names)
  found = results_table.read(path, columns=Columns("params", "tokens", "loss", run="run"))
  assert found.ids == tuple(c.run for c in curves)
  assert found.tokens == pytest.approx([c.tokens[-1] for c in curves])
  assert found.loss == pytest.approx([c.smoothed()[-1] for c in curves])
  assert [c.loss.tolist() for c in found.curves] == [c.loss.tolist() for c in curves]
  fewer = results_table.read(path, columns=Columns("params", "tokens", "loss", run="run"),
                             drop=[curves[2].run])
  assert len(fewer.ids) == 8 and fewer.dropped == ((curves[2].run, "--drop"),)


HEAD = "params,tokens,flops,loss\n"
GOOD = "1e8,2e9,1.2e18,3.1\n2e8,1e9,1.2e18,3.2\n"
BAD_TABLES = {
    "no file": (None, NAMED, "no file at '.*runs.csv'; give a table"),
    "NaN": (HEAD + GOOD + "1e8,1e9,6e17,nan\n", NAMED, "line 4: loss is nan, and must be a finite "
            "number above 0; mend it, or leave it out with --drop 'line 4'"),
    "infinite": (HEAD + GOOD + "1e8,1e9,6e17,inf\n", NAMED, "line 4: loss is inf"),
    "negative FLOPs": (HEAD + GOOD + "1e8,1e9,-6e17,3\n", NAMED, "line 4: flops is -6e"),
    "zero parameters": (HEAD + GOOD + "0,1e9,6e17,3\n", NAMED, "line 4: params is 0, and must"),
    "empty cell": (HEAD + GOOD + "1e8,,6e17,3\n", NAMED, "line 4: tokens is empty; fill it in"),
    "words": (HEAD + GOOD + "1e8,many,6e17,3\n", NAMED, "line 4: tokens is 'many', and must be"),
    "the same row twice": (HEAD + GOOD + GOOD, NAMED, "line 4 says the same as line 2; take one"),
    "units mixed": (HEAD + GOOD + "100,1e9,6e11,3\n", WITHOUT_FLOPS, "the rows mix units; give"),
    "FLOPs mixed": (HEAD + GOOD + "1e8,1e9,6e15,3\n", NAMED, "rows mix conventions or units; give"),
    "column missing": (HEAD + GOOD, Columns("size", "tokens", "loss"),
                       "has no column 'size'; its columns are params, tokens, flops, loss"),
    "column twice": ("loss,params,tokens,loss\n3,1e8,1e9,3\n", WITHOUT_FLOPS,
                     "has 2 columns called 'loss'; rename one"),
    "row too short": (HEAD + GOOD + "1e8,1e9\n", NAMED, "line 4: has 2 values, and the header 4"),
    "no rows": (HEAD, NAMED, "has no rows; give one for every run"),
    "nothing": ("", NAMED, "has no column 'params'; its columns are none"),
    "no loss": (HEAD + GOOD, Columns("params", "tokens"), "--loss-column is missing"),
    "one of three": (HEAD + GOOD, Columns("params", loss="loss"), "name two of --params-column"),
    "bad scale": (HEAD + GOOD, dataclasses.replace(NAMED, params_scale=-1.0),
                  "--params-scale: got -1; give a factor above 0"),
    "two sizes in a run": ("run,params,tokens,loss\na,1e8,1e9,3\na,2e8,2e9,3\n",
                           Columns("params", "tokens", "loss", run="run"),
                           "the run 'a' has rows of 1e[+]08 and 2e[+]08 parameters"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables(tmp_path, name):
  text, columns, says = BAD_TABLES[name]
  path = tmp_path / "runs.csv"
  if text is not None:
    path.write_text(text)
  with pytest.raises(UserError, match=says) as caught:
    results_table.read(path, columns=columns)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file, content, columns, says", [
    ("runs.xlsx", b"PK", NAMED, "unknown extension '.xlsx'; one of .csv, .tsv, .jsonl, .parquet"),
    ("runs.csv", b"params,tokens\n\xff\xfe", NAMED, "cannot be read"),
    ("runs.parquet", b"params", NAMED, "cannot be read as Parquet"),
    ("runs.jsonl", b'{"params": 1}\nnothing\n', NAMED, "line 1: has no column 'tokens'"),
    ("runs.jsonl", b"[1]\n", NAMED, "line 1: is not a JSON object"),
    ("runs.csv", b"params,tokens,loss\n1e8,1e9,3\n", Columns(),
     "a table that no sweep wrote; say what its columns are with --params-column"),
    ("runs.jsonl", b'{"params": 1}\n', Columns(), "a table that no sweep wrote; say what")])
def test_files_that_are_no_tables(tmp_path, file, content, columns, says):
  (tmp_path / file).write_bytes(content)
  with pytest.raises(UserError, match=says):
    results_table.read(tmp_path / file, columns=columns)


def test_flags_that_do_not_go_together(tmp_path, runs):
  path = planted.write_csv(tmp_path / "runs.csv", *runs)
  for flags, says in (({"flops": "matmul"}, "--flops matmul: a table's FLOPs are a column"),
                      ({"loss": "validation_loss"}, "--loss validation_loss: that is a column of")):
    with pytest.raises(UserError, match=re.escape(says)):
      results_table.read(path, columns=NAMED, **flags)
