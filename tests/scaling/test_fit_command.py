"""`chinchilla fit` from the command line: what it prints, writes and refuses."""

import json
import subprocess
import sys

import numpy as np
import planted
import pytest
from test_results_table import write_sweep

from chinchilla_jax import cli
from chinchilla_jax.scaling import laws

COLUMNS = ["--params-column=params", "--tokens-column=tokens", "--loss-column=loss"]
QUICK = ["--resamples=40", "--no-figures"]


def fit(folder, *words) -> int:
  return cli.main(["fit", *map(str, words), "--out", str(folder / "out")])


def record(folder) -> dict:
  return json.loads((folder / "out" / "fit.json").read_text())


@pytest.fixture
def table(tmp_path):
  runs = planted.isoflop_runs(planted.BESIROGLU, budgets=(1e18, 1e19, 1e20, 1e21), sizes=8,
                              noise=0.002, seed=1)
  return planted.write_csv(tmp_path / "runs.csv", *runs)


def test_a_table_with_everything(tmp_path, table, capsys):
  assert fit(tmp_path, table, *COLUMNS, "--resamples=100", "--at=1e22") == 0
  out = capsys.readouterr().out
  for line in ("32 runs, 1e+18 to 1e+21 FLOPs", "N: column params, taken as params_table_a9",
               "C: 6 N D of these N and D", "95 % intervals, percentiles of 100 resamples",
               "approach 2, IsoFLOP profiles", "approach 3, parametric loss",
               "approach 1 not fitted: it needs training curves",
               "variable projection: the five parameters within", "at 1e+22 FLOPs",
               "Hoffmann et al. 2022, approach 1            0.500 (0.488, 0.502)"):
    assert line in out
  found = record(tmp_path)
  assert set(found["approaches"]) == {"2", "3"} and "1" in found["not_fitted"]
  for one in found["approaches"].values():
    a = one["constants"]["a"]
    assert a["interval"][0] < a["value"] < a["interval"][1]
    assert a["value"] == pytest.approx(planted.BESIROGLU.a, abs=0.06)
    (at,) = one["predictions"]
    assert at["flops"] == 1e22
    assert 6 * at["params"]["value"] * at["tokens"]["value"] == pytest.approx(1e22, rel=1e-6)
    assert at["params"]["interval"][0] < at["params"]["value"] < at["params"]["interval"][1]
  three = found["approaches"]["3"]
  assert three["gradient"] < 1e-11 and three["starts"] == 4500
  assert three["variable_projection"]["largest_difference"] < 1e-6
  assert set(found["published"]) == set(laws.PUBLISHED)
  names = ("isoflop", "parametric", "extrapolation")
  files = {path.name for path in (tmp_path / "out").iterdir()}
  assert files == {"fit.json"} | {f"{name}{end}" for name in names for end in (".png", ".svg")}
  for name in names:
    assert (tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "out" / f"{name}.svg").read_text()[:2000]


def test_a_sweeps_folder_with_curves(tmp_path, capsys):
  curves = planted.curves(planted.BESIROGLU, np.geomspace(5e7, 5e9, 8),
                          np.geomspace(3, 120, 8), points=40, noise=0.002)
  write_sweep(tmp_path / "sweep", curves)
  assert fit(tmp_path, tmp_path / "sweep", "--approach=1", "--resamples=40",
             "--smoothing-window=0") == 0
  assert "approach 1, envelope of training curves" in capsys.readouterr().out
  found = record(tmp_path)
  assert list(found["approaches"]) == ["1"] and found["runs"] == 64
  one = found["approaches"]["1"]
  assert 0 < one["share_in_last_15_percent"] <= 1 and one["runs_on_envelope"] > 5
  assert (tmp_path / "out" / "envelope.png").exists()
  assert found["conventions"]["loss"] == "validation_loss, nats per token"


def test_the_same_command_writes_the_same_bytes(tmp_path, table, capsys):
  words = [table, *COLUMNS, "--approach=2", "--resamples=40"]
  assert fit(tmp_path, *words) == 0
  first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
  assert fit(tmp_path, *words) == 0
  assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first
  assert fit(tmp_path, *words, "--seed=1", "--no-figures") == 0
  assert (tmp_path / "out" / "fit.json").read_bytes() != first["fit.json"]


def test_json_and_the_papers_intervals(tmp_path, table, capsys):
  assert fit(tmp_path, table, *COLUMNS, "--approach=2", "--paper-intervals", "--no-figures",
             "--json") == 0
  printed = json.loads(capsys.readouterr().out)
  assert printed == record(tmp_path)
  assert printed["options"]["resampling"] == {"kind": "paper", "count": 100, "confidence": 0.8,
                                              "seed": 0}


def test_no_intervals(tmp_path, table, capsys):
  assert fit(tmp_path, table, *COLUMNS, "--approach=2", "--resamples=0", "--no-figures") == 0
  assert "no intervals" in capsys.readouterr().out
  constants = record(tmp_path)["approaches"]["2"]["constants"]
  assert all(one["interval"] is None for one in constants.values())


def test_what_is_left_out_is_printed_and_recorded(tmp_path, table, capsys):
  assert fit(tmp_path, table, *COLUMNS, *QUICK, "--approach=2", "--drop=line 5",
             "--drop-highest=2") == 0
  out, found = capsys.readouterr().out, record(tmp_path)
  assert found["runs"] == 29 and len(found["dropped"]) == 3
  assert "left out: line 5 (--drop)" in out and out.count("--drop-highest 2: loss") == 2


def test_without_matplotlib_the_numbers_are_written(tmp_path, table):
  code = ("import sys; sys.modules['matplotlib'] = None; from chinchilla_jax import cli; "
          "sys.exit(cli.main(sys.argv[1:]))")
  words = ["fit", str(table), *COLUMNS, "--approach=2", "--resamples=40", "--out",
           str(tmp_path / "out")]
  done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
  assert done.returncode == 0
  assert done.stderr == ("chinchilla fit: no figures: matplotlib is not installed; pip install "
                         "'chinchilla_jax[figures]', or --no-figures\n")
  assert [path.name for path in (tmp_path / "out").iterdir()] == ["fit.json"]


def test_matplotlib_is_imported_for_figures_only(tmp_path, table):
  code = ("import sys; from chinchilla_jax import cli; cli.main(sys.argv[1:]); "
          "print([m for m in ('matplotlib', 'flax', 'optax', 'orbax') if m in sys.modules])")
  words = ["fit", str(table), *COLUMNS, *QUICK, "--approach=2", "--out", str(tmp_path / "out")]
  done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True,
                        check=True)
  assert done.stdout.splitlines()[-1] == "[]"


def test_six_runs_have_a_fit_and_a_word_of_warning(tmp_path, capsys):
  n = np.array([1e8, 3e8, 1e9, 1e8, 3e8, 1e9])
  d = np.array([2e9, 2e9, 2e9, 2e10, 2.1e10, 5e10])
  table = planted.write_csv(tmp_path / "six.csv", n, d, 6 * n * d, planted.BESIROGLU.loss(n, d))
  assert fit(tmp_path, table, *COLUMNS, *QUICK, "--approach=3") == 0
  assert record(tmp_path)["approaches"]["3"]["constants"]["alpha"]["value"] == pytest.approx(
      planted.BESIROGLU.alpha, rel=1e-4)
  # Hardly a resample has six different runs: intervals would be of nothing.
  assert "could not be fitted: no intervals; there are too few runs" in capsys.readouterr().out


BAD = {
    "one budget": (["one.csv", *COLUMNS, "--approach=2"], "the runs have 1 budget with at least"),
    "fewer runs than parameters": (["few.csv", *COLUMNS, "--approach=3"],
                                   "4 runs are too few for its 5 parameters"),
    "no approach": (["few.csv", *COLUMNS], "no approach can be fitted; approach 1: it needs"),
    "no curves": (["one.csv", *COLUMNS, "--approach=1"], "it needs training curves"),
    "no such file": (["none.csv", *COLUMNS], "no file at 'none.csv'"),
    "no such sweep": (["nowhere"], "no results at nowhere"),
    "no columns": (["one.csv"], "say what its columns are with --params-column"),
    "NaN": (["nan.csv", *COLUMNS], "nan.csv, line 3: loss is nan"),
    "out is a file": (["one.csv", *COLUMNS, "--out=one.csv"], "--out: 'one.csv' is a file"),
    "budget": (["one.csv", *COLUMNS, "--at=-1"], "--at: got -1; give a budget in FLOPs"),
    "huber": (["one.csv", *COLUMNS, "--huber=0"], "--huber: got 0; give a number above 0"),
    "window": (["one.csv", *COLUMNS, "--smoothing-window=-1"], "--smoothing-window: got -1"),
    "tolerance": (["one.csv", *COLUMNS, "--budget-tolerance=2"], "--budget-tolerance: got 2"),
    "confidence": (["one.csv", *COLUMNS, "--confidence=95"], "confidence: got 95; give a number"),
    "resamples": (["one.csv", *COLUMNS, "--resamples=3"], "resamples: got 3; give at least 20"),
    "seed": (["one.csv", *COLUMNS, "--seed=-1"], "--seed: got -1"),
    "both intervals": (["one.csv", *COLUMNS, "--paper-intervals", "--resamples=50"],
                       "leave --resamples and --confidence out"),
    "approach": (["one.csv", *COLUMNS, "--approach=4"], "invalid choice: '4'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, name):
  monkeypatch.chdir(tmp_path)
  one = planted.isoflop_runs(planted.BESIROGLU, budgets=(1e19,), sizes=8)
  planted.write_csv(tmp_path / "one.csv", *one)
  planted.write_csv(tmp_path / "few.csv", *(column[:4] for column in one))
  text = (tmp_path / "one.csv").read_text().splitlines()
  text[2] = text[2].rsplit(",", 1)[0] + ",nan"
  (tmp_path / "nan.csv").write_text("\n".join(text))
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  words, says = BAD[name]
  assert cli.main(["fit", *words]) == 2
  err = capsys.readouterr().err
  assert err.startswith("chinchilla fit: ") and err.count("\n") == 1 and says in err
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
