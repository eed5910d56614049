"""Command lines, config files and fields that are wrong."""

import functools
import re

from cases import case

# -------------------------------------------------------------------- Command line

case("unknown command", "trian", r"trian: no such command", r"did you mean train\?")
case("unknown command, nothing near", "xyzzy", r"no such command", r"commands are prepare, .*train")
case("command is a flag", "--workdir=x", r"--workdir=x: no such command", r"commands are prepare")
case("unknown flag", "train --wrokdir=x", r"unrecognized arguments: --wrokdir=x",
     r"see chinchilla train --help")
case("abbreviated flag", "generate --work=x", r"required: --workdir", r"see chinchilla gen")
case("missing required argument", "evaluate", r"required: --workdir",
     r"see chinchilla evaluate --help")
case("flag without its value", "evaluate --workdir", r"--workdir: expected one argument",
     r"see chinchilla evaluate --help")
case("flag of another type", "evaluate --workdir=x --step=first", r"--step: invalid int.*'first'",
     r"see chinchilla evaluate --help")
case("config flag without a file", "train --config", r"--config: no file given",
     r"as in --config=configs/smoke.py")
case("field without a value", "train --config.model.d_model", r"model\.d_model: no value given",
     r"expected a whole number")
case("argument that is no flag", "train configs/smoke.py",
     r"unrecognized arguments: configs/smoke.py", r"see chinchilla train --help")
case("bytes that are not UTF-8", ("train", "--config=\udcff\udcfe.py"), r"no file .*udcff",
     r"give a \.py or \.json config file")
case("evaluate what is no run", "evaluate --workdir=empty", r"'empty' is not a run's folder",
     r"give the folder that `chinchilla train` wrote", lambda room: (room.path / "empty").mkdir())
case("evaluate what is not there", "evaluate --workdir=nowhere", r"'nowhere' is not a run's",
     r"give the folder that `chinchilla train` wrote")
case("evaluate a file", "evaluate --workdir=run", r"'run' is not a run's folder",
     r"give the folder that `chinchilla train` wrote", lambda room: room.write("run", "x"))
case("generate from what is no run", "generate --workdir=nowhere", r"'nowhere' is not a run's",
     r"give the folder that `chinchilla train` wrote")
case("inspect what is no run", "inspect --workdir=nowhere", r"'nowhere' is not a run's",
     r"give the folder that `chinchilla train` wrote")
case("inspect nothing", "inspect", r"nothing to inspect", r"give --config=FILE, --workdir")
case("evaluate a run of an unknown scheme", "evaluate --workdir=nosuch://bucket/run",
     r"nosuch:// is not understood here", r"use gs://, s3://")
case("negative length of text", "generate --workdir=x --max-tokens=-5", r"--max-tokens: got -5",
     r"at least 1")
case("negative temperature", "generate --workdir=x --temperature=-1", r"--temperature: got -1",
     r"at least 0")
case("temperature that is no number", "generate --workdir=x --temperature=nan",
     r"--temperature: got nan", r"at least 0")
case("negative top-k", "generate --workdir=x --top-k=-1", r"--top-k: got -1", r"at least 0")
case("top-p above one", "generate --workdir=x --top-p=1.5", r"--top-p: got 1\.5",
     r"above 0 and at most 1")
case("seed too large", "generate --workdir=x --seed=99999999999999999999",
     r"--seed: got 9{20}", r"at most")
case("prompt that is not UTF-8", ("generate", "--workdir=x", "--prompt=a\udcff"),
     r"--prompt: .*not UTF-8", r"give text in UTF-8")
case("no such topology", "compile --topology=v99:8x8", r"unknown generation 'v99'",
     r"one of: v2, v3")
case("topology without a shape", "compile --topology=v4", r"topology 'v4' cannot be read",
     r"such as|write")
case("slices of nothing", "compile --slices=2", r"--slices", r"with --topology")
case("no sequences", "compile --sequences=0", r"--sequences: got 0", r"at least 1")
case("program into no folder", "compile --topology=v4:2x2x1 --hlo=nowhere/x.hlo",
     r"--hlo: .*nowhere", r"make|choose")
case("report nothing", "report", r"required: RUN", r"--help")
case("report what is not there", "report nowhere", r"'nowhere' does not exist",
     r"give the folder that `chinchilla train` wrote")
case("report into a folder that is not there", "report nowhere --out=x/y/z.html",
     r"--out: there is no folder 'x/y'", r"make it, or choose another place")
case("sweep nothing", "sweep", r"no config file given", r"give --config=FILE")
case("sweep a folder that is none", "sweep --workdir=nowhere", r"is not a sweep's folder",
     r"give the folder that `chinchilla sweep` wrote, or --config")
case("sweep a config that is one run", "sweep --config=one.py", r"one.py has no sweep function",
     r"write def sweep\(\)",
     lambda room: room.write("one.py", "def get_config(): return {}\n"))

# -------------------------------------------------------------------- Config files

for what, body, cause, cure in (
    ("is not Python", "def get_config(:", r"c\.py, line 1: SyntaxError", r"mend"),
    ("raises", "def get_config():\n  return 1 / 0", r"c\.py, line 2: ZeroDivisionError", r"mend"),
    ("imports what is not there", "import nosuch", r"c\.py, line 1: ModuleNotFoundError.*nosuch",
     r"mend"),
    ("has no get_config", "x = 1", r"c\.py has no get_config", r"write def get_config"),
    ("has a get_config that is none", "get_config = 3", r"c\.py.*get_config", r"def get_config"),
    ("returns something else", "def get_config(): return 3", r"c\.py returns int",
     r"start from .*default_config"),
    ("returns None", "def get_config(): pass", r"c\.py returns NoneType",
     r"start from .*default_config"),
    ("ends the program", "import sys\ndef get_config():\n  sys.exit(0)",
     r"c\.py, line 3: SystemExit", r"mend"),
    ("takes no argument", "def get_config(): return {}", r"c\.py: TypeError", r"mend"),
    ("misspells a field", "def get_config(): return {'model': {'d_modle': 3}}",
     r"config\.model\.d_modle: no such field", r"did you mean model\.d_model\?"),
    ("has a name that is no text", "def get_config(): return {3: 4}", r"config\.3: no such field",
     r"docs/configuration\.md"),
    ("holds a wrong type", "def get_config(): return {'model': {'d_model': [64]}}",
     r"config\.model\.d_model: got \[64\]", r"expected a whole number"),
    ("holds a value for a group", "def get_config(): return {'model': 3}",
     r"config\.model: got 3", r"expected a group of fields"),
    ("holds a number that is none", "def get_config(): return {'seed': float('nan')}",
     r"config\.seed: got nan", r"expected a whole number"),
):
  argument = ":70b" if what == "takes no argument" else ""
  case(f"config file {what}", f"train --config=c.py{argument}", cause, cure,
       functools.partial(lambda room, text: room.write("c.py", text), text=body))

case("config file missing", "train --config=smok.py", r"no file 'smok\.py'",
     r"did you mean smoke\.py\?", lambda room: room.write("smoke.py", ""))
case("config file is a folder", "train --config=c.py", r"'c\.py' is a folder",
     r"give a \.py or \.json", lambda room: (room.path / "c.py").mkdir())
case("config file of another kind", "train --config=c.yaml", r"c\.yaml", r"\.py or \.json",
     lambda room: room.write("c.yaml", "model: 3"))
case("config file of an endless name", f"train --config={'x' * 300}.py", r"no file 'x+",
     r"give a \.py or \.json")
case("config file is binary", "train --config=c.py", r"c\.py.*(SyntaxError|null bytes)", r"mend",
     lambda room: room.write("c.py", bytes(range(256))))
for what, text, cause, cure in (
    ("is broken", '{"model": {"d_model": 3', r"c\.json is not JSON", r"line 1 column"),
    ("is empty", "", r"c\.json is not JSON", r"line 1 column"),
    ("is not UTF-8", b"\xff\xfe\x00", r"c\.json is not JSON", "mend it"),
    ("is a list", "[1, 2]", r"c\.json does not hold a JSON object", r"with the fields of a config"),
    ("is nested without end", "[" * 100_000, r"c\.json is not JSON", r"nest|deep"),
    ("wraps something else", '{"config": 3}', r"c\.json does not hold", r"fields of a config"),
    ("has an unknown field", '{"config": {"modle": {}}}', r"config\.modle: no such field",
     r"did you mean|docs/configuration"),
    ("holds NaN", '{"optimizer": {"peak_lr": NaN}}', r"optimizer\.peak_lr: got nan",
     r"expected a number"),
    ("holds a group too few", '{"d_model": 3}', r"config\.d_model: no such field",
     r"did you mean model\.d_model\?"),
    ("holds null", '{"seed": null}', r"config\.seed: got None", r"expected a whole number"),
):
  case(f"JSON config {what}", "train --config=c.json", cause, cure,
       functools.partial(lambda room, text: room.write("c.json", text), text=text))

# -------------------------------------------------------------------- Config fields

_ALSO = {  # What a field needs beside it to be wrong.
    "model.kv_size": "--config.model.position=rotary",
    "precision.rounding": "--config.precision.parameters=float32",
}

for field, value, cause, cure in (
    ("batch.sequences", "0", "got 0", "at least 1"),
    ("batch.sequences", "-4", "got -4", "at least 1"),
    ("batch.microbatches", "3", "128 sequences do not divide into 3", "use a divisor"),
    ("batch.ramp", "(('50%',0),)", "got 0 sequences", "at least 1"),
    ("batch.ramp", "('50%',8)", "got", "a list of pairs such as"),
    ("batch.ramp", "(('5 parsecs',256),)", "'5 parsecs'", "a duration is a number and a unit"),
    ("model.n_layers", "-1", "got -1", "at least 1"),
    ("model.d_model", "0", "got 0", "at least 1"),
    ("model.d_model", "wide", "got 'wide'", "expected a whole number"),
    ("model.d_model", "1.5", "got 1.5", "expected a whole number"),
    ("model.d_model", "1e300", "got 1", "at most"),
    ("model.d_model", "9" * 30, r"got 9+", "allowed is at most"),
    ("model.d_model", "9" * 5000, "got '9+", "expected a whole number"),
    ("model.d_model", "(" * 500, r"got '\(+", "expected a whole number"),
    ("model.d_model", "-" * 50_000 + "1", "got '-+", "expected a whole number"),
    ("model.kv_size", "63", "got 63", "even"),
    ("model.position", "rotry", "got 'rotry', allowed are relative, rotary",
     r"did you mean rotary\?"),
    ("model.modle", "3", "no such field", "did you mean"),
    ("model", "3", "no such field; model is a group", r"fields such as model\.n_layers"),
    ("optimizer.peak_lr", "nan", "got 'nan'", "expected a number"),
    ("optimizer.peak_lr", "1e999", "got inf", "expected a number"),
    ("optimizer.peak_lr", "1" + "0" * 400, r"got 10+\.\.\.", "allowed is at most"),
    ("optimizer.peak_lr", "0", "got 0.0", "above 0"),
    ("optimizer.b2", "1.5", "got 1.5", "at most 1"),
    ("optimizer.decay_patterns", "(('(',1.0),)", r"'\(' is not a regular expression", r"mend it"),
    ("data.seq_len", "0", "got 0", "at least 1"),
    ("data.shuffle", "maybe", "got 'maybe'", "expected true or false"),
    ("tokenizer.vocab_size", "10", "got 10", "at least 300"),
    ("corpus.validation_fraction", "1.5", "got 1.5", "at most 0.5"),
    ("corpus.validation_fraction", "-0.1", "got -0.1", "above 0"),
    ("run_length", "20", "got '20'", "a number and a unit, one of steps, tokens"),
    ("run_length", "20 parsecs", "got '20 parsecs'", "one of steps, tokens"),
    ("run_length", "-5 steps", "got '-5 steps'", "one of steps, tokens"),
    ("run_length", "50%", "a percentage of itself", "give steps, tokens"),
    ("run_length", "1e999 steps", "got '1e999 steps'", "allowed is at most"),
    ("run_length", "0 steps", "got '0 steps'", "give a positive length"),
    ("run_length", "1,5 tokens/param", "got '1,5 tokens/param'", "a number and a unit"),
    ("schedule.warmup", "fast", "got 'fast'", "a number and a unit"),
    ("seed", "-1", "got -1", "at least 0"),
    ("seed", "4294967296", "got 4294967296", "at most 2,147,483,647"),
    ("precision.rounding", "stochastic",
     "stochastic rounding is for bfloat16", "set config.precision.parameters=bfloat16"),
    ("name", "../../escape", r"got '\.\./\.\./escape'", "a plain name"),
    ("name", "/etc", "got '/etc'", "a plain name"),
    ("name", "..", r"got '\.\.'", "a plain name"),
    ("name", "", "got ''", "a plain name"),
    ("name", "x" * 300, "got 'x+", "a plain name"),
):
  label = value if len(value) < 40 else f"{value[:10]}... ({len(value):,} characters)"
  case(f"config {field} = {label!r}", ("train", f"--config.{field}={value}",
                                       *filter(None, [_ALSO.get(field)])),
       rf"config\.{re.escape(field)}\b.*{cause}", cure)
