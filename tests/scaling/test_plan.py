"""What a budget buys: the laws' numbers, the shape, the run that comes out, and its file."""

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ROOT

from chinchilla_jax import cli, config_io, durations
from chinchilla_jax.model import shapes
from chinchilla_jax.scaling import laws, plan, plan_config
from chinchilla_jax.training.run_folder import RunFolder

CHINCHILLA = 5.76e23  # Gopher's budget, which Chinchilla was planned for
DEFAULT = laws.find(plan.DEFAULT_LAW)


def planned(capsys, *words):
  """The JSON of `chinchilla plan`."""
  assert cli.main(["plan", *map(str, words), "--json"]) == 0
  return json.loads(capsys.readouterr().out)


def budget_of(experiment):
  """(6ND, tokens per parameter) of a config's whole run, N by the rule of Table A9."""
  n = shapes.count_parameters(experiment.model)
  clock = durations.clock(
      experiment.run_length, experiment.batch.sequences, experiment.batch.ramp,
      seq_len=experiment.data.seq_len, n_params=n, epoch_tokens=10**9)
  return clock.flops(clock.total_steps), clock.tokens(clock.total_steps) / n


# -------------------------------------------------------------------- Numbers


def test_chinchillas_own_budget(capsys):
  found = planned(capsys, "--flops", CHINCHILLA)
  rows = {row["law"]: row for row in found["laws"]}
  for name, n in (("approach_1", 67e9), ("approach_2", 63e9), ("besiroglu_2024", 72.4e9),
                  ("approach_3_tex", 40.4e9), ("approach_3", 32.2e9)):
    assert rows[name]["params"] == pytest.approx(n, rel=0.02), name
    assert rows[name]["params"] * rows[name]["tokens"] * 6 == pytest.approx(CHINCHILLA, rel=0.03)
  assert rows["approach_1"]["loss"] is None and rows["approach_1"]["params_halved"] is None
  assert rows["besiroglu_2024"]["tokens_per_param"] == pytest.approx(18.3, abs=0.1)
  assert rows["approach_3"]["tokens_per_param"] == pytest.approx(93, abs=1)
  best = found["recommendation"]
  assert best["shape"]["name"] == "chinchilla-70b" and best["params_table_a9"] == 70_061_956_352
  assert best["flops_6nd_table_a9"] == pytest.approx(CHINCHILLA, rel=1e-3)
  assert 15 < best["tokens_per_param_table_a9"] < 25
  assert (best["peak_lr"], best["batch_sequences"], best["batch_ramp"]) == (
      pytest.approx(1e-4, rel=0.01), 768, [["50%", 1536]])


@settings(deadline=None)
@given(st.floats(17, 26), st.sampled_from(["approach_3", "approach_3_tex", "besiroglu_2024"]),
       st.sampled_from([0.25, 0.5, 2.0, 4.0]))
def test_being_off_costs_what_the_law_says(exponent, name, factor):
  law, flops = laws.find(name), 10**exponent
  off, best = plan.off_by(law, flops, factor), law.at(flops)
  assert off.loss > 0
  n = factor * best.params
  assert law.loss(n, flops / 6 / n) == pytest.approx(best.loss + off.loss, rel=1e-12)
  if off.flops is not None:  # As many FLOPs at that size have the loss of the optimum.
    assert off.flops > 1
    assert law.loss(n, off.flops * flops / 6 / n) == pytest.approx(best.loss, rel=1e-9)
  else:
    assert law.E + law.A / n**law.alpha >= best.loss


@pytest.mark.parametrize("name", ["approach_1", "approach_3_tex", "besiroglu_2024", "kaplan_2020"])
@settings(max_examples=10, deadline=None)
@given(exponent=st.floats(8.0, 11.5))
def test_params_give_the_budget_that_gives_them_back(name, exponent):
  law, n = laws.find(name), 10**exponent
  flops = plan.budget(plan.Ask(law, params=n))
  assert law.optimum(plan.budget(plan.Ask(law, flops=flops)))[0] == pytest.approx(n, rel=1e-9)
  tokens = law.optimum(flops)[1]
  again = law.optimum(plan.budget(plan.Ask(law, tokens=tokens)))
  assert again[1] == pytest.approx(tokens, rel=1e-9)


def test_params_and_flops_agree_on_the_command_line(capsys):
  by_params = planned(capsys, "--params", "3e9")
  by_flops = planned(capsys, "--flops", repr(by_params["flops_6nd"]))
  assert by_flops["recommendation"]["params_wanted"] == pytest.approx(3e9, rel=1e-9)
  assert by_flops["recommendation"] == by_params["recommendation"] | {
      "params_wanted": by_flops["recommendation"]["params_wanted"],
      "tokens_wanted": by_flops["recommendation"]["tokens_wanted"]}
  # Each law's own budget, where N is given.
  assert len({row["flops_6nd"] for row in by_params["laws"]}) == len(by_params["laws"])


def test_days_of_chips(capsys):
  found = planned(capsys, "--chips", "v4:8x8x16", "--days", 30, "--mfu", 0.5)
  assert found["flops_6nd"] == pytest.approx(30 * 86_400 * 1024 * 275e12 * 0.5)
  assert found["recommendation"]["days"] == pytest.approx(30, rel=1e-3)
  twice = planned(capsys, "--chips", "v4:8x8x16", "--slices", 2, "--days", 15, "--mfu", 0.5)
  assert twice["flops_6nd"] == pytest.approx(found["flops_6nd"])


@settings(max_examples=30, deadline=None)
@given(exponent=st.floats(17.5, 25), name=st.sampled_from(["besiroglu_2024", "approach_1"]))
def test_the_run_spends_the_budget(exponent, name):
  flops = 10**exponent
  made = plan.make(plan.Ask(laws.find(name), flops=flops))
  spent, ratio = budget_of(made.experiment)
  assert spent == pytest.approx(flops, rel=2e-3)
  assert spent == made.training_flops
  assert 5 < ratio < 60
  # The shape is as near as it says, and the tokens are worth what the law thinks.
  assert made.params == pytest.approx(made.n, rel=0.055)


# -------------------------------------------------------------------- Options


def test_limited_data_means_repetition_and_a_smaller_model(capsys):
  free = planned(capsys, "--flops", 1e22)["recommendation"]
  tight = planned(capsys, "--flops", 1e22, "--unique-tokens", 25e9)["recommendation"]
  assert tight["tokens"] > 25e9
  assert tight["params_table_a9"] * tight["tokens"] * 6 == pytest.approx(1e22, rel=2e-3)
  assert tight["loss"] > laws.DATA_CONSTRAINED.fresh.at(1e22).loss
  n, d = laws.DATA_CONSTRAINED.optimum(1e22, 25e9)
  assert tight["params_wanted"] == pytest.approx(n) and tight["tokens_wanted"] == pytest.approx(d)
  assert "unique tokens, seen" in tight["why"]
  ample = planned(capsys, "--flops", 1e22, "--unique-tokens", 1e15)["recommendation"]
  assert ample["params_table_a9"] == free["params_table_a9"]
  assert "none is seen twice" in ample["why"]


def test_inference_makes_the_model_smaller_for_the_same_loss(capsys):
  free = planned(capsys, "--flops", 1e22)
  served = planned(capsys, "--flops", 1e22, "--inference-tokens", 2e12)["recommendation"]
  best = free["recommendation"]
  assert served["params_wanted"] < best["params_wanted"]
  assert served["tokens_wanted"] > best["tokens_wanted"]
  assert DEFAULT.loss(served["params_wanted"], served["tokens_wanted"]) == pytest.approx(
      DEFAULT.at(1e22).loss, rel=1e-9)
  whole = lambda n, d: 6 * n * d + 2 * n * 2e12
  assert whole(served["params_wanted"], served["tokens_wanted"]) < whole(
      best["params_wanted"], best["tokens_wanted"])
  nothing = planned(capsys, "--flops", 1e22, "--inference-tokens", 1)["recommendation"]
  assert nothing["params_wanted"] == pytest.approx(best["params_wanted"], rel=1e-3)


def test_another_count_of_n(capsys):
  found = planned(capsys, "--flops", 1e20, "--law", "kaplan_2020")
  best = found["recommendation"]
  assert best["params_convention"] == "params_non_embedding"
  shape = shapes.Shape(**best["shape"])
  embedding = shapes.parameter_groups(shape)["embedding"]
  assert best["params_table_a9"] - embedding == pytest.approx(best["params_wanted"], rel=0.055)
  # Kaplan's 6ND has no embedding in it: tokens follow its N.
  spent = 6 * (best["params_table_a9"] - embedding) * best["tokens"]
  assert spent == pytest.approx(1e20, rel=2e-3)


@pytest.fixture
def fitted(tmp_path):
  """A fit.json as `chinchilla fit` writes it, of points that lie on a law."""
  law = laws.ParametricLaw("planted", 1.7, 400.0, 1800.0, 0.34, 0.36)
  lines = ["params,tokens,loss"]
  for flops in (1e18, 1e19, 1e20):
    n_best, _ = law.optimum(flops)
    for n in [scale * n_best for scale in (0.25, 0.5, 1.0, 2.0, 4.0)]:
      d = flops / 6 / n
      lines.append(f"{n!r},{d!r},{law.loss(n, d)!r}")
  table = tmp_path / "runs.csv"
  table.write_text("\n".join(lines) + "\n")
  assert cli.main(["fit", str(table), "--params-column", "params", "--tokens-column", "tokens",
                   "--loss-column", "loss", "--approach", "3", "--resamples", "0", "--no-figures",
                   "--out", str(tmp_path / "fit")]) == 0
  return law, tmp_path / "fit" / "fit.json"


def test_a_law_of_ones_own(fitted, capsys):
  law, path = fitted
  capsys.readouterr()
  found = planned(capsys, "--flops", 1e21, "--law", path)
  best = found["recommendation"]
  assert best["law"] == "fit.json"
  assert best["params_wanted"] == pytest.approx(law.optimum(1e21)[0], rel=1e-2)
  own = next(row for row in found["laws"] if row["law"] == "fit.json")
  assert own["source"] == "15 runs of 1e+18 to 1e+20 FLOPs, approach 3"
  assert len(found["laws"]) == len(plan.SHOWN) + 1
  for text, message in (
      (f"{path}:2", r"has no approach '2'; fitted are 3"), (f"{path}x", r"no file")):
    assert cli.main(["plan", "--flops", "1e21", "--law", text]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content, message", [
    ("{", "cannot be read as JSON"), ("[]", "holds no fitted approach"),
    ('{"approaches": {"3": {}}}', "is not what `chinchilla fit` writes (KeyError"),
    (json.dumps({"approaches": {"3": {"constants": {
        name: {"value": -1} for name in ("E", "A", "B", "alpha", "beta")}}}, "runs": 5,
        "conventions": {"params": "", "flops": "6 N D"}, "ranges": {"flops": [1, 2]}}),
     "give no optimum"),
    (json.dumps({"approaches": {"1": {"constants": {
        name: {"value": 0.5} for name in ("k_n", "a", "k_d", "b")}}}, "runs": 5,
        "conventions": {"params": "", "flops": "appendix_f"}, "ranges": {"flops": [1, 2]}}),
     "plans count 6ND")])
def test_a_damaged_fit(content, message, tmp_path, capsys):
  (tmp_path / "fit.json").write_text(content)
  assert cli.main(["plan", "--flops", "1e21", "--law", str(tmp_path / "fit.json")]) == 2
  out, err = capsys.readouterr()
  assert message in err and err.count("\n") == 1 and not out


# -------------------------------------------------------------------- The file


@pytest.mark.parametrize("words", [
    ("--flops", CHINCHILLA, "--chips", "v4:8x8x16"), ("--params", 1e9, "--chips", "h100:8"),
    ("--flops", 3e19), ("--tokens", 300e9, "--rule", "porian"),
    ("--flops", 1e22, "--inference-tokens", 1e12, "--store", "stores/mine"),
    ("--flops", 1e15, "--vocab-size", 8192, "--seq-len", 512)])
def test_the_file_is_the_plan(words, tmp_path, capsys):
  out = tmp_path / "mine.py"
  found = planned(capsys, *words, "--out", out)
  experiment = config_io.load(str(out))
  assert experiment == config_io.from_dict(found["config"])
  assert experiment.name == "mine"
  spent, _ = budget_of(experiment)
  best = found["recommendation"]
  assert spent == pytest.approx(best["flops_6nd_table_a9"], rel=1e-12)
  assert spent == pytest.approx(6 * best["params_wanted"] * best["tokens_wanted"], rel=2e-3)
  source = out.read_text()
  assert max(map(len, source.splitlines())) <= 100
  assert all(line == line.rstrip() for line in source.splitlines())


def test_the_file_reads_as_those_in_configs(tmp_path, capsys):
  out = tmp_path / "mine.py"
  planned(capsys, "--flops", CHINCHILLA, "--chips", "v4:8x8x16", "--out", out)
  for line in ("config = config_io.default_config()", "config.model.n_layers = 80",
               "config.model.d_model = 8192", "config.optimizer.peak_lr = 0.0001",
               'config.batch.ramp = (("50%", 1536),)', 'config.mesh.strategy = "fsdp_tensor"'):
    assert f"  {line}" in out.read_text(), line


@settings(max_examples=15, deadline=None)
@given(exponent=st.floats(17.5, 24), rule=st.sampled_from(["paper", "gpt3", "porian", "deepseek"]))
def test_every_plan_round_trips(exponent, rule, tmp_path_factory):
  made = plan.make(plan.Ask(DEFAULT, flops=10**exponent, rule=rule), "any")
  path = tmp_path_factory.mktemp("plan") / "any.py"
  path.write_text(plan_config.text(made, "a test"))
  assert config_io.load(str(path)) == made.experiment


def test_a_tiny_plan_trains(tiny_store, tmp_path, capsys):
  out = tmp_path / "tiny_plan.py"
  found = planned(capsys, "--flops", "2e10", "--law", "approach_3", "--vocab-size", 512,
                  "--seq-len", 32, "--store", tiny_store, "--out", out)
  steps = found["recommendation"]["steps"]
  assert 150 <= steps < 2000
  done = subprocess.run(
      [sys.executable, "-m", "chinchilla_jax", "train", f"--config={out}",
       f"--workdir={tmp_path / 'run'}", "--config.evaluation.max_tokens=2000",
       "--config.evaluation.every=0 steps", "--config.checkpoint.every=0 steps",
       "--config.logging.tensorboard=false"], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  records = RunFolder(tmp_path / "run").read_metrics()
  train = [record for record in records if record["kind"] == "train"]
  assert train[-1]["step"] == steps
  assert train[-1]["flops_6nd"] == pytest.approx(2e10, rel=0.005)
  losses = [record["loss"] for record in train]
  assert losses[0] == pytest.approx(math.log(512), abs=0.3)
  assert sum(losses[-20:]) / 20 < losses[0] - 1


def test_existing_file_is_kept_without_force(tmp_path, capsys):
  out = tmp_path / "mine.py"
  out.write_text("precious")
  assert cli.main(["plan", "--flops", "1e20", "--out", str(out)]) == 2
  assert "mine.py is there already" in capsys.readouterr().err
  assert out.read_text() == "precious"
  assert cli.main(["plan", "--flops", "1e20", "--out", str(out), "--force"]) == 0
  assert "get_config" in out.read_text()
  assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


# -------------------------------------------------------------------- Bad input


BAD = [
    ((), "no budget given", "exactly one of --flops, --params, --tokens"),
    (("--flops", "1e20", "--params", "1e9"), "--flops, --params: two budgets at once", "exactly"),
    (("--flops", "-1"), "--flops: got '-1'", "a number above 0, such as 1e20"),
    (("--flops", "nan"), "--flops: got 'nan'", "above 0"),
    (("--flops", "inf"), "--flops: got 'inf'", "above 0"),
    (("--flops", "much"), "--flops: got 'much'", "above 0"),
    (("--flops", "1e300"), "cannot be planned for", "below 1e40"),
    (("--flops", "1e39"), "shapes are made up to", "a smaller budget"),
    (("--flops", "10"), "with a vocabulary of 32,000 pieces", "a larger budget"),
    (("--flops", "1e12"), "with a vocabulary of 32,000 pieces", "a smaller vocabulary"),
    (("--flops", "1e11", "--vocab-size", "512", "--seq-len", "65536", "--law", "approach_3"),
     "150 steps of one sequence", "a smaller --seq-len"),
    (("--params", "0"), "--params: got '0'", "above 0"),
    (("--days", "30"), "--days: of what?", "Give --chips"),
    (("--flops", "1e20", "--mfu", "0.5"), "--mfu: of what?", "Give --chips"),
    (("--flops", "1e20", "--slices", "2"), "--slices: of what?", "Give --chips"),
    (("--chips", "v4:8x8x16", "--days", "30", "--mfu", "1.5"), "--mfu: got 1.5", "at most 1"),
    (("--chips", "v4:8x8x16", "--days", "30", "--mfu", "0"), "--mfu: got '0'", "above 0"),
    (("--chips", "v99:8x8", "--flops", "1e20"), "unknown generation 'v99'", "one of: v2"),
    (("--chips", "v4:8x8x16", "--slices", "0", "--flops", "1e24"), "0 slices", "1 or more"),
    (("--chips", "h100:8", "--flops", "1e24"), "do not fit h100:8", "take more chips"),
    (("--chips", "v4:8x8x16", "--flops", "1e18"), "1,024 devices, and 128 sequences a step do not "
     "divide", "take fewer chips"),
    (("--flops", "1e20", "--law", "besiroglu"), "no published law is called 'besiroglu'",
     "did you mean besiroglu_2024"),
    (("--flops", "1e20", "--law", "nowhere.json"), "no file 'nowhere.json'", "fit.json"),
    (("--flops", "1e20", "--rule", "papr"), "unknown rule 'papr'", "one of: paper"),
    (("--flops", "1e20", "--unique-tokens", "-5"), "--unique-tokens: got '-5'", "above 0"),
    (("--flops", "1e20", "--unique-tokens", "1e9", "--inference-tokens", "1e9"),
     "no law has both", "give one of them"),
    (("--tokens", "1e9", "--unique-tokens", "1e9"), "--unique-tokens and --tokens",
     "give another budget"),
    (("--flops", "1e20", "--inference-tokens", "1e9", "--law", "approach_1"),
     "approach_1 has no loss to keep", "--law besiroglu_2024"),
    (("--flops", "1e20", "--vocab-size", "0"), "--vocab-size: got 0", "from 2"),
    (("--flops", "1e20", "--seq-len", "-1"), "--seq-len: got -1", "from 1"),
    (("--flops", "1e20", "--force"), "--force: overwrites", "give that too"),
    (("--flops", "1e20", "--out", "mine.txt"), "does not end in .py", "configs/mine.py"),
    (("--flops", "1e20", "--out", "nowhere/mine.py"), "cannot be written",
     "a folder that is there"),
    (("--flops", "1e20", "--out", ".py"), "does not end in .py", "name a Python file"),
    (("--flops", "1e20", "extra"), "unrecognized arguments: extra", "see chinchilla plan --help"),
]


@pytest.mark.parametrize("words, cause, cure", BAD, ids=[" ".join(case[0]) or "-" for case in BAD])
def test_bad_input_is_one_line(words, cause, cure, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert cli.main(["plan", *words]) == 2
  out, err = capsys.readouterr()
  assert err.startswith("chinchilla plan: ") and err.count("\n") == 1 and not out
  assert cause in err and cure in err, err
  assert not list(tmp_path.iterdir())


def test_text_says_its_conventions(capsys):
  assert cli.main(["plan", "--flops", "5.76e23", "--chips", "v4:8x8x16", "--mfu", "0.5"]) == 0
  out = capsys.readouterr().out
  for words in ("training FLOPs (6ND)", "C = 6 N D", "N counts", "rule of Table A9, embedding",
                "assumed MFU of 50%", "* besiroglu_2024", "(exact)", "(estimated)"):
    assert words in out, words
  assert max(map(len, out.splitlines())) <= 140


def test_a_law_without_a_loss_recommends_too():
  made = plan.make(plan.Ask(laws.find("approach_2"), flops=1e21))
  assert made.loss is None
