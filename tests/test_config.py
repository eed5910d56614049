import ast
import dataclasses
import json
import pathlib

import pytest
from tiny import ROOT, with_fields

from chinchilla_jax import config as schema
from chinchilla_jax import config_io
from chinchilla_jax.errors import UserError


def load(*overrides, config=None):
  return config_io.load(config, [tuple(item.split("=", 1)) for item in overrides])


def test_overrides_are_read_by_the_schemas_types():
  made = load("optimizer.peak_lr=2e-4", "batch.sequences=1e2", "data.shuffle=false",
              "corpus.sources=a.txt, b.txt", "batch.ramp=[('50%', 200)]", "name=x",
              "optimizer.clip_norm=1")
  assert made.optimizer.peak_lr == 2e-4
  assert made.batch.sequences == 100 and isinstance(made.batch.sequences, int)
  assert made.data.shuffle is False
  assert made.corpus.sources == ("a.txt", "b.txt")
  assert made.batch.ramp == (("50%", 200),)
  assert isinstance(made.optimizer.clip_norm, float)


def test_a_flag_without_a_value_is_true():
  assert config_io.load(None, [("model.qk_norm", None)]).model.qk_norm


@pytest.mark.parametrize("override, words", [
    ("optimizer.peaklr=1", ["optimizer.peaklr", "did you mean optimizer.peak_lr?"]),
    ("peak_lr=1", ["did you mean optimizer.peak_lr?"]),
    ("model=3", ["no such field"]),
    ("model.d_model=wide", ["model.d_model", "'wide'", "a whole number"]),
    ("model.d_model=1.5", ["1.5", "a whole number"]),
    ("model.d_model=0", ["model.d_model", "0", "at least 1"]),
    ("model.position=rotry", ["'rotry'", "relative, rotary", "did you mean rotary?"]),
    ("optimizer.peak_lr=nan", ["peak_lr"]),
    ("optimizer.peak_lr=1e999", ["peak_lr"]),
    ("optimizer.peak_lr=0", ["above 0"]),
    ("data.shuffle=maybe", ["true or false"]),
    ("run_length=20", ["run_length", "tokens/param"]),
    ("run_length=50%", ["run_length"]),
    ("schedule.warmup=fast", ["schedule.warmup"]),
    ("batch.ramp=3", ["batch.ramp", "a list of pairs"]),
    ("batch.ramp=(('5 parsecs', 8),)", ["batch.ramp", "parsecs"]),
    ("batch.microbatches=3", ["batch.microbatches", "128"]),
    ("optimizer.decay_patterns=(('(', 1.0),)", ["decay_patterns", "regular expression"]),
    ("seed=-1", ["seed", "at least 0"]),
])
def test_a_bad_override_is_one_line_that_names_field_value_and_cure(override, words):
  with pytest.raises(UserError) as error:
    load(override)
  message = str(error.value)
  assert "\n" not in message
  for word in words:
    assert word in message


def test_fields_that_exclude_each_other():
  with pytest.raises(UserError, match="even"):
    load("model.position=rotary", "model.kv_size=63")
  with pytest.raises(UserError, match="stochastic"):
    load("precision.rounding=stochastic", "precision.parameters=float32")


def test_config_files(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text("from chinchilla_jax import config_io\n"
                  "def get_config(arg='1'):\n"
                  "  config = config_io.default_config()\n"
                  "  config.seed = int(arg)\n"
                  "  return config\n")
  assert load(config=str(file)).seed == 1
  assert load(config=f"{file}:7").seed == 7
  assert load("seed=8", config=f"{file}:7").seed == 8


@pytest.mark.parametrize("body, words", [
    ("def get_config(): return 3", ["ConfigDict"]),
    ("x = 1", ["no get_config"]),
    ("def get_config(:", ["SyntaxError"]),
    ("from chinchilla_jax import config_io\ndef get_config():\n"
     "  c = config_io.default_config()\n  c.model.d_modle = 3\n  return c", ["line 4", "d_modle"]),
    ("def get_config(): return {'model': {'d_modle': 3}}", ["did you mean model.d_model?"]),
    ("def get_config(): return {'model': 3}", ["config.model"]),
    ("def get_config(): return {'seed': 'x'}", ["config.seed"]),
    ("def get_config(arg): return {}", ["TypeError"]),
])
def test_a_bad_config_file_is_one_line(tmp_path, body, words):
  file = tmp_path / "mine.py"
  file.write_text(body)
  with pytest.raises(UserError) as error:
    config_io.load(str(file))
  assert "\n" not in str(error.value)
  for word in words:
    assert word in str(error.value)


def test_a_missing_config_file_names_the_nearest():
  with pytest.raises(UserError, match=r"did you mean .*smoke\.py"):
    config_io.load(str(ROOT / "configs/smok.py"))
  with pytest.raises(UserError, match="no file"):
    config_io.load("nowhere.py:arg")


def test_the_resolved_config_can_be_given_back(tmp_path):
  made = load("batch.ramp=(('50%', 256),)", "optimizer.peak_lr=3e-4")
  text = json.dumps({"config": config_io.to_dict(made), "versions": {}})
  (tmp_path / "config.json").write_text(text)
  assert load(config=str(tmp_path / "config.json")) == made
  (tmp_path / "config.json").write_text(text[:100])
  with pytest.raises(UserError, match="not JSON"):
    load(config=str(tmp_path / "config.json"))


@pytest.mark.parametrize("name", ["smoke", "chinchilla", "chinchilla:44m", "chinchilla:16183m",
                                  "gopher", "gopher:44m", "gopher:7.1b"])
def test_every_config_file_loads(name):
  file, _, argument = name.partition(":")
  made = load(config=str(ROOT / f"configs/{file}.py") + (f":{argument}" if argument else ""))
  assert made != schema.Experiment()


def test_chinchilla_70b_is_the_papers():
  made = load(config=str(ROOT / "configs/chinchilla.py:70b"))
  assert (made.model.n_layers, made.model.d_model, made.model.n_heads) == (80, 8192, 64)
  assert made.optimizer.peak_lr == 1e-4
  assert made.batch.sequences * made.data.seq_len == 1_572_864
  assert made.batch.ramp == (("50%", 1536),)


def test_chinchilla_70b_has_a_layout_for_each_chip():
  base = load(config=str(ROOT / "configs/chinchilla.py:70b"))
  by_chip = {chip: load(config=str(ROOT / f"configs/chinchilla.py:70b,{chip}"))
             for chip in ("v4", "v5p", "v6e")}
  assert by_chip["v4"] == base and len(set(by_chip.values())) == 3
  for made in by_chip.values():
    assert config_io.differences(made, base, "identity") == []
  for argument in ("70b,v5", "70b,", "74m,v4"):
    with pytest.raises(UserError, match="no layout for .*70b,v6e"):
      load(config=str(ROOT / f"configs/chinchilla.py:{argument}"))


def test_fingerprints_follow_the_class_of_the_changed_field():
  made = schema.Experiment()
  layout = with_fields(made, model__attention_block=64)
  identity = with_fields(made, optimizer__peak_lr=1e-5)
  print_of = lambda e: config_io.fingerprint(e, "identity")
  assert print_of(made) == print_of(layout) != print_of(identity)
  assert config_io.differences(made, identity, "identity") == [
      ("optimizer.peak_lr", made.optimizer.peak_lr, 1e-5)]
  assert config_io.differences(made, layout, "identity") == []


def test_every_field_has_a_reason_and_a_known_class():
  for name, field in schema.fields():
    assert field.metadata["why"], name
    assert field.metadata["kind"] in schema.KINDS, name


def test_every_field_is_read_somewhere():
  """No flag that does nothing: outside the schema, code names every field as an attribute."""
  read = set()
  for path in pathlib.Path(config_io.__file__).parent.rglob("*.py"):
    if path.name != "config.py":
      tree = ast.parse(path.read_text())
      read |= {node.attr for node in ast.walk(tree)
               if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
  unread = [name for name, _ in schema.fields() if name.rsplit(".", 1)[-1] not in read]
  assert not unread


def test_documentation_holds_the_schema():
  text = (ROOT / "docs/configuration.md").read_text()
  assert config_io.table() in text, (
      "docs/configuration.md is behind the schema: paste what python -m chinchilla_jax.config_io "
      "prints below its heading")


def test_sections_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    schema.Experiment().seed = 1
