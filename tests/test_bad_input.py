"""Bad input of every kind: one line with cause and cure, exit status 2, nothing written or changed.

The table is the test. A case puts something bad into an empty folder, which is also the current
one, and gives the command line that meets it there. `cause` is what the line must say is wrong
and where, `cure` what it must say about mending it (regular expressions).
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import json
import os
import pathlib
import pickle
import re
import shlex
import shutil
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Iterator

import pytest
from tiny import ROOT, tiny_experiment

from chinchilla_jax import cli, config_io, durations
from chinchilla_jax.data import ledger as ledgers
from chinchilla_jax.data import tokens
from chinchilla_jax.errors import UserError
from chinchilla_jax.inference import generate
from chinchilla_jax.training import seals

TEXT = "Of the making of many books there is no end.\n"
READING = "reading the corpus ...\n"  # progress of `prepare`, which is no message


@dataclasses.dataclass(frozen=True)
class Room:
  """What a case may use.

  Attributes:
    path: the folder that the command runs in.
    stores: path of a good store, which must not be changed.
    runs: gives the path of a whole run on it, which must not be changed either.
    ending: what is to be done when the case is over.
  """

  path: pathlib.Path
  stores: str
  runs: Callable[[], pathlib.Path]
  ending: contextlib.ExitStack

  def write(self, name: str, content: str | bytes) -> pathlib.Path:
    path = self.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path

  def store(self, name: str = "store") -> pathlib.Path:
    """A copy of the good store, to be damaged."""
    return pathlib.Path(shutil.copytree(self.stores, self.path / name))

  def run(self, name: str = "run") -> pathlib.Path:
    """A copy of the whole run, to be damaged; its checkpoints are of steps 4, 8 and 12."""
    return pathlib.Path(shutil.copytree(self.runs(), self.path / name))

  def config(self, **sections) -> None:
    """Writes tiny.json, a config that trains on ./store, with some of its fields changed."""
    tree = config_io.to_dict(tiny_experiment("store"))
    for name, fields in sections.items():
      tree[name] = tree[name] | fields if isinstance(fields, dict) else fields
    self.write("tiny.json", json.dumps(tree))


@dataclasses.dataclass(frozen=True)
class Case:
  name: str
  argv: tuple[str, ...]
  cause: str
  cure: str
  make: Callable[[Room], object]
  progress: str = ""  # what stands on stderr before the message
  devices: int = 1    # simulated ones; more than one takes a process of its own


CASES: list[Case] = []


def case(name: str, argv: str | tuple[str, ...], cause: str, cure: str,
         make: Callable[[Room], object] = lambda room: None, progress: str = "",
         devices: int = 1) -> None:
  assert name not in [known.name for known in CASES], f"two cases are called {name}"
  words = tuple(shlex.split(argv)) if isinstance(argv, str) else argv
  CASES.append(Case(name, words, cause, cure, make, progress, devices))


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
case("evaluate a remote run", "evaluate --workdir=gs://bucket/run", r"'gs://bucket/run' is remote",
     r"keep the run's folder on a disk")
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


# -------------------------------------------------------------------- Text

_LINE = json.dumps({"text": TEXT})


def _parquet(room: Room, name: str, **columns) -> None:
  import pyarrow as pa
  import pyarrow.parquet as pq
  pq.write_table(pa.table(columns), room.path / name)


def _broken_parquet(room: Room) -> None:
  _parquet(room, "x.parquet", text=[f"{i} {TEXT}" for i in range(1000)])
  content = bytearray((room.path / "x.parquet").read_bytes())
  content[10:5000] = b"\xff" * 4990
  room.write("x.parquet", bytes(content))


def _zst(text: bytes) -> bytes:
  import pyarrow
  out = pyarrow.BufferOutputStream()
  with pyarrow.CompressedOutputStream(out, "zstd") as stream:
    stream.write(text)
  return out.getvalue().to_pybytes()


def _noise(size: int) -> bytes:
  return b"".join(hashlib.sha256(b"%d" % i).hexdigest().encode() for i in range(size // 64))


def text_case(name: str, sources: str, cause: str, cure: str, make: Callable[[Room], object],
              progress: str = READING) -> None:
  case(name, f"prepare {sources} --store=deep/down/store", cause, cure, make, progress)


NO_DOCUMENTS = r"mend them, or name other text in config\.corpus\.sources"
for name, content, cause in (
    ("empty.txt", b"", r"no documents in empty\.txt: 1 skipped, empty: empty\.txt"),
    ("binary.txt", bytes(range(256)), r"1 skipped, not valid UTF-8: binary\.txt"),
    ("latin.txt", "naïve\n".encode("latin-1"), r"1 skipped, not valid UTF-8: latin\.txt"),
    ("utf16.txt", TEXT.encode("utf-16"), r"1 skipped, not valid UTF-8: utf16\.txt"),
    ("broken.jsonl", _LINE[:20].encode(), r"1 skipped, not a JSON object: broken\.jsonl#0"),
    ("list.jsonl", b'["text", 1]\n3\n', r"2 skipped, not a JSON object: list\.jsonl#0, list"),
    ("typed.jsonl", b'{"text": 3}\n{"text": null}\n', r"2 skipped, field missing, null or not te"),
    ("nested.jsonl", b"[" * 100_000, r"1 skipped, not a JSON object: nested\.jsonl#0"),
    ("surrogate.jsonl", b'{"text": "\\ud800"}', r"1 skipped, not valid UTF-8: surrogate\.jsonl#0"),
):
  text_case(f"text in {name}", name, cause, NO_DOCUMENTS,
            functools.partial(lambda room, name, content: room.write(name, content),
                              name=name, content=content))
text_case("text in a link that leads nowhere", "folder", r"1 skipped, could not be opened: x\.txt",
          NO_DOCUMENTS, lambda room: (room.write("folder/.hidden", ""),
                                      (room.path / "folder/x.txt").symlink_to("gone")))
text_case("text in a pipe", "folder", r"1 skipped, could not be opened: pipe", NO_DOCUMENTS,
          lambda room: (room.write("folder/.hidden", ""), os.mkfifo(room.path / "folder/pipe")))
text_case("one document", "a.txt", r"a\.txt holds one document, and one more is needed to hold out",
          r"split it into several files, or use JSON lines", lambda room: room.write("a.txt", TEXT))
text_case("no record has the field", "a.jsonl --config.corpus.text_field=body",
          r"no record of a\.jsonl has a field 'body' \(found: text\)",
          r"set config\.corpus\.text_field", lambda room: room.write("a.jsonl", _LINE))
text_case("Parquet of numbers", "x.parquet", r"1 skipped, field missing, null or not text: x\.par",
          NO_DOCUMENTS, lambda room: _parquet(room, "x.parquet", text=[1]))
text_case("Parquet without the column", "x.parquet", r"x\.parquet has no column 'text' .*: body",
          r"set config\.corpus\.text_field", lambda room: _parquet(room, "x.parquet", body=["a"]))
text_case("Parquet that is none", "x.parquet", r"x\.parquet is no Parquet file",
          r"fetch it again or leave it out", lambda room: room.write("x.parquet", TEXT * 9))
text_case("Parquet that is empty", "x.parquet", r"x\.parquet is no Parquet file",
          r"fetch it again or leave it out", lambda room: room.write("x.parquet", ""))
text_case("Parquet with damaged pages", "x.parquet", r"x\.parquet (is damaged|cannot be read)",
          r"fetch it again or leave it out", _broken_parquet)
text_case("gzip cut short", "x.txt.gz", r"x\.txt\.gz is damaged", r"fetch it again or leave it out",
          lambda room: room.write("x.txt.gz", gzip.compress(_noise(9_000))[:-1_000]))
text_case("gzip that is none", "x.jsonl.gz", r"x\.jsonl\.gz is damaged .*gzip",
          r"fetch it again or leave it out", lambda room: room.write("x.jsonl.gz", _LINE))
text_case("zstd cut short", "x.txt.zst", r"x\.txt\.zst cannot be read",
          r"fetch it again or leave it out",
          lambda room: room.write("x.txt.zst", _zst(_noise(900_000))[:-1_000]))
text_case("zstd that is none", "x.txt.zst", r"x\.txt\.zst cannot be read",
          r"fetch it again or leave it out", lambda room: room.write("x.txt.zst", TEXT))
text_case("no such source", "nowhere.txt", r"source 'nowhere\.txt' does not exist",
          r"name a file, a folder, a glob", lambda room: None, "")
text_case("glob that matches nothing", "'*.md'", r"source '\*\.md' holds no files",
          r"mend it in config\.corpus\.sources", lambda room: None, "")
text_case("folder without text", "folder", r"source 'folder' holds no files",
          r"mend it in config\.corpus\.sources", lambda room: room.write("folder/.hidden", "x"), "")
text_case("a file as a folder", "a.txt/b.txt", r"source 'a\.txt/b\.txt' does not exist",
          r"name a file, a folder", lambda room: room.write("a.txt", TEXT), "")
text_case("a source twice", "a.txt ./a.txt", r"a\.txt is in two sources", r"make .* disjoint",
          lambda room: room.write("a.txt", TEXT), "")
text_case("a remote source", "gs://bucket/text", r"'gs://bucket/text' is remote",
          r"copy it to a local disk", lambda room: None, "")
text_case("a pipe as a source", "pipe", r"'pipe' is neither a file nor a folder",
          r"copy it into a file", lambda room: os.mkfifo(room.path / "pipe"), "")
text_case("no sources", "--config.corpus.sources=", r"config\.corpus\.sources is empty",
          r"name a file, a folder", lambda room: None, "")
text_case("TFDS dataset that nobody knows", "tfds:nosuch --config.corpus.tfds_data_dir=tfds",
          r"'tfds:nosuch': no such dataset, neither in TFDS's list nor prepared in tfds",
          r"mend its name, or name text of your own", lambda room: None, "")
text_case("TFDS dataset misspelt", "'tfds:a b'", r"source 'tfds:a b' is not tfds:NAME",
          r"write it like tfds:lm1b", lambda room: None, "")

# -------------------------------------------------------------------- Where the store goes


def _two(room: Room) -> None:
  for name in ("a", "b"):
    room.write(f"text/{name}.txt", TEXT * 20)


def place_case(name: str, flag: str, cause: str, cure: str,
               make: Callable[[Room], object] = lambda room: None) -> None:
  case(name, f"prepare text {flag}", cause, cure, lambda room: (_two(room), make(room)))


place_case("a store where a file is", "--store=s", r"s is a file", r"choose another --config\.data",
           lambda room: room.write("s", "mine"))
place_case("a store below a file", "--store=s/store", r"cannot write .*s/store \(Not a directory",
           r"choose another place", lambda room: room.write("s", "mine"))
place_case("a store where other files are", "--store=s", r"s holds files but no token store",
           r"choose another .*, or empty it yourself", lambda room: room.write("s/x", "mine"))
place_case("a store where nothing is", "--config.data.store=", r"config\.data\.store is empty",
           r"name the folder", lambda room: room.write("precious", "mine"))
place_case("a store at the current folder", "--store=.", r"\. holds files but no token store",
           r"choose another", lambda room: room.write("precious", "mine"))
place_case("a remote store", "--store=gs://bucket/s", r"gs://bucket/s is remote",
           r"keep the token store on a local disk")
place_case("a store in /proc", "--store=/proc/x/s", r"cannot write /proc/x/s",
           r"choose another place")
place_case("a store below a device", "--store=/dev/null/s", r"cannot write /dev/null/s",
           r"choose another place")
place_case("a store of an endless name", f"--store={'s' * 300}", r"cannot write .*sss",
           r"choose another place")
place_case("a store made with other settings", "--store=store", r"store was made with corpus\.",
           r"choose another .*, or pass --overwrite", lambda room: room.store())

# -------------------------------------------------------------------- Tokenizers


def _model(**settings) -> bytes:
  import io

  import sentencepiece
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter([TEXT * 9]), model_writer=out, minloglevel=2,
      **{"vocab_size": 300, "hard_vocab_limit": False, "byte_fallback": True,
         "normalization_rule_name": "identity", "add_dummy_prefix": False,
         "remove_extra_whitespaces": False, **settings})
  return out.getvalue()


def tokenizer_case(name: str, path: str, cause: str, cure: str,
                   make: Callable[[Room], object] = lambda room: None) -> None:
  case(name, f"prepare text --store=s --config.tokenizer.path={path}", cause, cure,
       lambda room: (_two(room), make(room)))


WHOLE = r"name a whole \.model file or a token store"
tokenizer_case("no tokenizer", "x.model", r"no tokenizer at x\.model \(No such file",
               r"name a \.model file or a token store")
tokenizer_case("tokenizer in a folder without one", "text", r"no tokenizer at text \(No such file",
               r"name a \.model file or a token store")
tokenizer_case("tokenizer that is text", "x.model", r"x\.model is no SentencePiece model", WHOLE,
               lambda room: room.write("x.model", TEXT))
tokenizer_case("tokenizer that is empty", "x.model", r"x\.model is no SentencePiece model", WHOLE,
               lambda room: room.write("x.model", ""))
tokenizer_case("tokenizer cut short", "x.model", r"x\.model is no SentencePiece model", WHOLE,
               lambda room: room.write("x.model", _model()[:-100]))
tokenizer_case("tokenizer without BOS", "x.model", r"x\.model has no BOS piece", r"train one with",
               lambda room: room.write("x.model", _model(bos_id=-1)))
tokenizer_case("tokenizer without PAD", "x.model", r"x\.model has no PAD piece", r"train one with",
               lambda room: room.write("x.model", _model()))
tokenizer_case("tokenizer without bytes", "x.model", r"x\.model has no byte fallback",
               r"train one with", lambda room: room.write(
                   "x.model", _model(byte_fallback=False, vocab_size=40, pad_id=3)))
case("vocabulary beyond all bounds",
     "prepare text --store=s --config.tokenizer.vocab_size=2147483647",
     r"SentencePiece makes no tokenizer of 2,147,483,647 pieces", r"lower config\.tokenizer\.vocab",
     _two, READING + "training a tokenizer of up to 2,147,483,647 pieces on 0.0 MB ...\n")
tokenizer_case("tokenizer that normalises", "x.model", r"x\.model does not give text back unchan",
               r"train one with", lambda room: room.write(
                   "x.model", _model(normalization_rule_name="nmt_nfkc", pad_id=3)))

# -------------------------------------------------------------------- Stores

AGAIN = r"copy the store again, or run `chinchilla prepare` with --overwrite"


def _ledger(room: Room, change: Callable[[dict], object], sign: bool = True) -> None:
  """A copy of the store whose ledger has been changed, and signed again like a true one."""
  folder = room.store()
  ledger = json.loads((folder / ledgers.FILE).read_text())
  change(ledger)
  if sign:
    ledger["fingerprint"] = ledgers.fingerprint(ledger)
  ledgers.write(str(folder), ledger)


def _damage(room: Room, name: str, change: Callable[[bytes], bytes | None], store="store") -> None:
  (path,) = (room.path / store).glob(name)
  content = change(path.read_bytes())
  path.unlink()
  if content is not None:
    path.write_bytes(content)


def _flip(content: bytes) -> bytes:
  return content[:1000] + bytes((content[1000] ^ 1,)) + content[1001:]


def store_case(name: str, cause: str, cure: str, make: Callable[[Room], object],
               flags: str = "", **rest) -> None:
  """The bad store meets a run that would start."""
  case(f"store: {name}", f"train --config=tiny.json --workdir=run {flags}", cause, cure,
       lambda room: (room.config(), make(room)), **rest)


def ledger_case(name: str, cause: str, change: Callable[[dict], object]) -> None:
  store_case(f"ledger {name}", rf"store/ledger\.json is damaged \({cause}", AGAIN,
             lambda room: _ledger(room, change))


store_case("missing", r"no token store at store", r"make it with `chinchilla prepare",
           lambda room: None)
store_case("missing, another near", r"no token store at store", r"did you mean \./stores\?",
           lambda room: room.store("stores"))
store_case("a file", r"store is a file, not a token store", r"make it with `chinchilla prepare",
           lambda room: room.write("store", "x"))
store_case("a folder without a ledger", r"no token store at store", r"make it with `chinchilla pre",
           lambda room: (room.store() / "ledger.json").unlink())
store_case("remote", r"gs://bucket/s is remote", r"keep the token store on a local disk",
           lambda room: None, "--config.data.store=gs://bucket/s")
store_case("nowhere", r"config\.data\.store is empty", r"name the folder of a token store",
           lambda room: None, "--config.data.store=")
store_case("shard missing", r"tokens-train.* is missing", AGAIN,
           lambda room: (room.store(), _damage(room, "tokens-train*", lambda content: None)))
store_case("shard cut short", r"tokens-train.* has [\d,]+ bytes, its ledger says", AGAIN,
           lambda room: (room.store(), _damage(room, "tokens-train*", lambda text: text[:-1])))
store_case("shard with a flipped bit", r"tokens-train.* has changed \(its checksum", AGAIN,
           lambda room: (room.store(), _damage(room, "tokens-train*", _flip)))
store_case("tokenizer of another store", r"tokenizer\.model has [\d,]+ bytes, its ledger", AGAIN,
           lambda room: (room.store(),
                         _damage(room, "tokenizer.model", lambda _: _model(pad_id=3))))
store_case("tokenizer of another store, in the ledger too",
           r"store: tokenizer\.model did not make these tokens", r"copy the store again",
           lambda room: (room.store(),
                         _damage(room, "tokenizer.model", lambda _: _model(pad_id=3)),
                         _describe_again(room.path / "store")))
store_case("newer version", r"store has ledger version 99, this program knows", r"update chinch",
           lambda room: _ledger(room, lambda ledger: ledger.update(version=99)))
store_case("ledger is not JSON", r"store/ledger\.json is damaged \(no JSON at line 1\)", AGAIN,
           lambda room: (room.store(), room.write("store/ledger.json", "{")))
store_case("ledger is empty", r"store/ledger\.json is damaged \(no JSON at line 1\)", AGAIN,
           lambda room: (room.store(), room.write("store/ledger.json", "")))
store_case("ledger is not UTF-8", r"store/ledger\.json is damaged", AGAIN,
           lambda room: (room.store(), room.write("store/ledger.json", b'{"a": "\xff"}')))
store_case("ledger is a list", r"store/ledger\.json is damaged", AGAIN,
           lambda room: (room.store(), room.write("store/ledger.json", "[]")))
store_case("ledger is nested without end", r"store/ledger\.json is damaged", AGAIN,
           lambda room: (room.store(), room.write("store/ledger.json", "[" * 100_000)))
store_case("ledger is a folder", r"store/ledger\.json cannot be read \(Is a directory\)", AGAIN,
           lambda room: ((room.store() / "ledger.json").unlink(),
                         (room.path / "store/ledger.json").mkdir()))
store_case("ledger without a tokenizer", r"ledger\.json is damaged \(it lacks 'tokenizer'", AGAIN,
           lambda room: _ledger(room, lambda ledger: ledger.pop("tokenizer"), sign=False))
store_case("ledger with edited counts", r"does not match its own fingerprint: it was edited", AGAIN,
           lambda room: _ledger(room, lambda ledger: _train(ledger).update(tokens=99), sign=False))


def _train(ledger: dict) -> dict:
  return ledger["splits"]["train"]


def _describe_again(folder: pathlib.Path) -> None:
  """Puts sizes and checksums of the files as they are into the ledger."""
  ledger = json.loads((folder / ledgers.FILE).read_text())
  for entry in ledgers.files(ledger):
    entry |= ledgers.describe_file(str(folder / entry["name"]))
  ledgers.write(str(folder), ledger)


def _outside(name: str) -> Callable[[dict], None]:
  return lambda ledger: _train(ledger)["files"][0].update(name=name)


for what, cause, change in (
    ("without splits", r"it has no split", lambda ledger: ledger.update(splits={})),
    ("with a count of text", r"split train has bytes '9'",
     lambda ledger: _train(ledger).update(bytes="9")),
    ("with a negative count", r"split train has tokens -1",
     lambda ledger: _train(ledger).update(tokens=-1)),
    ("with tokens that no chunk holds", r"split train has [\d,]+ tokens in [\d,]+ chunks",
     lambda ledger: _train(ledger).update(tokens=_train(ledger)["tokens"] * 2)),
    ("with more documents than tokens", r"split train has more documents than tokens",
     lambda ledger: _train(ledger).update(documents=10**9)),
    ("with chunks that are not there", r"split train has [\d,]+ tokens in [\d,]+ chunks",
     lambda ledger: _train(ledger)["files"][0].update(chunks=10**6)),
    ("with chunks of another size", r"its chunks hold 8 ids",
     lambda ledger: ledger.update(chunk=8)),
    ("with another dtype", r"its dtype is 'uint32'", lambda ledger: ledger.update(dtype="uint32")),
    ("with another vocabulary", r"it counts other pieces than tokenizer\.model",
     lambda ledger: ledger.update(vocab_size=ledger["vocab_size"] + 1)),
    ("with BOS beyond the vocabulary", r"its control pieces are no pieces",
     lambda ledger: ledger.update(bos_id=10**6)),
    ("with a file above it", r"it names the file '\.\./secret', which is not in the",
     _outside("../secret")),
    ("with a file at an absolute path", r"it names the file '/etc/passwd', which is not in",
     _outside("/etc/passwd")),
    ("with a file below a folder", r"it names the file 'a/b', which is not in", _outside("a/b")),
    ("with a file without a name", r"it names the file '', which is not in", _outside("")),
    ("with the folder as a file", r"it names the file '\.\.', which is not in", _outside("..")),
    ("with a number for a name", r"it names the file 3, which is not in", _outside(3)),
    ("with a tokenizer above it", r"it names the file '\.\./tokenizer\.model'",
     lambda ledger: ledger["files"][0].update(name="../tokenizer.model")),
    ("with a file twice", r"it names a file twice",
     lambda ledger: ledger["files"].append(ledger["files"][0])),
):
  ledger_case(what, cause, change) if "counts other" not in cause else store_case(
      f"ledger {what}", rf"ledger\.json is damaged \({cause}", AGAIN,
      functools.partial(_ledger, change=change))
store_case("ledger with another checksum of a file", r"tokens-train.* has changed", AGAIN,
           lambda room: _ledger(room, lambda ledger: _train(ledger)["files"][0].update(
               sha256="0" * 64)))
for what, fields in (("another checksum of the ids", {"sha256": "0" * 64}),
                     ("another count of documents", {"documents": 1})):
  store_case(f"ledger with {what}", r"train split does not hold the ids that its ledger tells of",
             AGAIN, functools.partial(
                 lambda room, fields: _ledger(room, lambda led: _train(led).update(fields)),
                 fields=fields))
store_case("ledger with a token too many", r"train split does not hold the ids that its ledger",
           AGAIN, lambda room: _ledger(room, lambda ledger: _train(ledger).update(
               tokens=_train(ledger)["tokens"] + 1)))
for what, content in (("pickle", pickle.dumps([1, 2, 3])), ("text", TEXT.encode())):
  store_case(f"{what} in place of a shard", r"tokens-train.* holds 0 chunks of ids, its ledger",
             AGAIN,
             functools.partial(lambda room, content: (
                 room.store(), _damage(room, "tokens-train*", lambda _: content),
                 _describe_again(room.path / "store")), content=content))
case("store: ledger without settings", "prepare text --store=store",
     r"store/ledger\.json does not say what the store was made from", AGAIN,
     lambda room: (_two(room), _ledger(room, lambda ledger: ledger.pop("settings"))))

# -------------------------------------------------------------------- Runs that do not fit

store_case("shorter than a sequence", r"train split has [\d,]+ tokens, one sequence takes 1,000,0",
           r"lower config\.data\.seq_len or prepare more", lambda room: room.store(),
           "--config.data.seq_len=1000000")
store_case("more pieces than the model", r"config\.model\.vocab_size: got 300, .* 512 pieces",
           r"set it to 512", lambda room: room.store(), "--config.model.vocab_size=300")
store_case("warm-up longer than the run", r"warm-up of 100 steps do not fit into a run of 12",
           r"set config\.schedule\.warmup", lambda room: room.store(),
           "'--config.schedule.warmup=100 steps'")
store_case("ramp out of order", r"batch\.ramp: '50%' falls on step", r"put the stages in order",
           lambda room: room.store(), "\"--config.batch.ramp=(('90%',8),('50%',12))\"")
store_case("more steps than can be counted", r"run_length: '1e30 steps' is 1,", r"give a shorter",
           lambda room: room.store(), "'--config.run_length=1e30 steps'")
store_case("more devices than there are", r"config\.mesh: .*tensor 64 does not make",
           r"change an axis", lambda room: room.store(), "--config.mesh.tensor=64")
store_case("heads that do not divide", r"2 heads do not divide by 4", r"choose a divisor",
           lambda room: room.store(),
           "--config.mesh.tensor=4 --config.mesh.strategy=fsdp_tensor", devices=4)
store_case("batch that does not divide", r"config\.batch: 4 sequences .* do not divide among 8 dev",
           r"choose a multiple of 8", lambda room: room.store(), devices=8)

# -------------------------------------------------------------------- Where a run goes


def run_case(name: str, flags: str, cause: str, cure: str,
             make: Callable[[Room], object] = lambda room: None) -> None:
  """Everything is fine but the run's folder."""
  case(f"run: {name}", f"train --config=tiny.json {flags}", cause, cure,
       lambda room: (room.config(), room.store(), make(room)))


run_case("remote", "--workdir=gs://bucket/run", r"--workdir: 'gs://bucket/run' is remote",
         r"keep the run's folder on a disk")
run_case("at a file", "--workdir=run", r"--workdir: .*run .*(File exists|is a file)",
         r"choose another place", lambda room: room.write("run", "mine"))
run_case("below a file", "--workdir=file/run", r"--workdir: .*file/run.*Not a directory",
         r"choose another place", lambda room: room.write("file", "mine"))
run_case("in /proc", "--workdir=/proc/x/run", r"--workdir: /proc/x/run.*No such file",
         r"choose another place")
run_case("below a device", "--workdir=/dev/null/run", r"--workdir: /dev/null/run.*Not a directory",
         r"choose another place")
run_case("of an endless name", f"--workdir={'r' * 300}", r"--workdir: r+ .*File name too long",
         r"choose another place")
run_case("that starts from what is no run", "--workdir=run --config.checkpoint.init_from=nowhere",
         r"config\.checkpoint\.init_from: 'nowhere' has no checkpoint", r"give the folder of a run")
case("run: without a checkpoint", "evaluate --workdir=run", r"'run' has no checkpoint yet",
     r"train it first", lambda room: (room.config(), room.write(
         "run/config.json", (room.path / "tiny.json").read_text())))
case("run: config cut short", "generate --workdir=run", r"run/config\.json is not JSON",
     r"mend it, or copy it again", lambda room: room.write("run/config.json", '{"config": {'))

# -------------------------------------------------------------------- Checkpoints

STEPS = (4, 8, 12)
RESUME = "train --config=tiny.json --workdir=run"
FLIPPED = r"state/\S+ has changed \(its checksum is not the seal's\)"
OTHER_VERSION = r"of another version of chinchilla_jax|by another version of chinchilla_jax"
NEW_RUN = r"start a new run with another --workdir"


def checkpoint_case(name: str, argv: str, cause: str, cure: str, make: Callable[[Room], object],
                    **rest) -> None:
  """A whole run in ./run and its store in ./store; then `make` does something to them."""
  case(f"checkpoint: {name}", argv, cause, cure,
       lambda room: (room.config(), room.store(), _run(room), make(room)), **rest)


def _run(room: Room, name: str = "run", **changes) -> None:
  """The run, as if it had been trained on ./store."""
  path = room.run(name) / "config.json"
  content = json.loads(path.read_text())
  content["config"]["data"]["store"] = "store"
  path.write_text(json.dumps(content))


def _damaged(*at: int, run: str = "run") -> Callable[[Room], None]:
  """Flips a bit in the largest file of checkpoints: no size tells."""
  def make(room: Room) -> None:
    for step in at:
      folder = room.path / run / f"checkpoints/{step}/state"
      path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
      content = bytearray(path.read_bytes())
      content[len(content) // 2] ^= 1
      path.write_bytes(content)
  return make


def _sealed(name: str, change: Callable[[str], str], at: int = 12,
            run: str = "run") -> Callable[[Room], None]:
  """Changes a text in a checkpoint, and seals it again: it is whole, and says something else."""
  def make(room: Room) -> None:
    folder = room.path / run / f"checkpoints/{at}"
    path = folder / name
    path.write_text(change(path.read_text()))
    seals.write(folder, 0, 1)
  return make


def _progress(change: Callable[[dict], object], at: int = 12) -> Callable[[Room], None]:
  """A whole checkpoint whose progress.json says something else."""
  def edited(text: str) -> str:
    progress = json.loads(text)
    change(progress)
    return json.dumps(progress)
  return _sealed("progress.json", edited, at)


def _state(change: Callable[[dict], object]) -> Callable[[Room], None]:
  """A whole checkpoint at step 12 with another state than its config tells of."""
  def make(room: Room) -> None:
    import orbax.checkpoint as ocp
    folder = room.path / "run/checkpoints/12"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
      tree = orbax.restore((folder / "state").absolute())
      change(tree)
      orbax.save((folder / "state").absolute(), args=ocp.args.PyTreeSave(tree), force=True)
    seals.write(folder, 0, 1)
  return make


def _escaping(name: str) -> Callable[[Room], None]:
  """Every seal names a file outside of its checkpoint."""
  def make(room: Room) -> None:
    for path in room.path.glob("run/checkpoints/*/seals/0.json"):
      seal = json.loads(path.read_text())
      seal["files"][name] = seal["files"].pop("progress.json")
      path.write_text(json.dumps(seal))
  return make


def _config_of_run(change: Callable[[dict], object]) -> Callable[[Room], None]:
  def make(room: Room) -> None:
    path = room.path / "run/config.json"
    content = json.loads(path.read_text())
    change(content["config"])
    path.write_text(json.dumps(content))
  return make


def _other_store(room: Room, name: str = "other") -> None:
  """A good store of other text, with a tokenizer of its own."""
  _two(room)
  assert cli.main(["prepare", "text", f"--store={name}", "--config.tokenizer.vocab_size=300"]) == 0


def _replaced_store(room: Room) -> None:
  shutil.rmtree(room.path / "store")
  _other_store(room, "store")


def _locked(room: Room) -> None:
  """Another process, which lives, holds ./run."""
  program = ("import pathlib, sys; from chinchilla_jax.training import run_lock; "
             "lock = run_lock.KernelLock(pathlib.Path(sys.argv[1])); print('held', flush=True); "
             "sys.stdin.read()")
  process = room.ending.enter_context(subprocess.Popen(
      [sys.executable, "-c", program, str(room.path / "run")], stdin=subprocess.PIPE,
      stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}))
  room.ending.callback(process.stdin.close)
  assert process.stdout.readline() == "held\n"


def _file_for(name: str) -> Callable[[Room], None]:
  """A file where a folder of the run should be."""
  return lambda room: (shutil.rmtree(room.path / name), room.write(name, "mine"))


for what, make, cause in (
    ("damaged", _damaged(*STEPS), rf"12: {FLIPPED}"),
    ("without seals", lambda room: [shutil.rmtree(room.path / f"run/checkpoints/{step}/seals")
                                    for step in STEPS], r"12: seals/0\.json is missing"),
    ("a file", lambda room: [_file_for(f"run/checkpoints/{step}")(room) for step in STEPS],
     r"12: it is not a folder"),
    ("sealed with a file above it", _escaping("../../config.json"),
     r"12: its seal names a file outside of it, '\.\./\.\./config\.json'"),
    ("sealed with an absolute path", _escaping("/etc/passwd"),
     r"12: its seal names a file outside of it, '/etc/passwd'"),
    ("sealed with an endless name", _escaping("x" * 300),
     r"12: x+\.\.\. \(300 characters\) is missing"),
    ("sealed by nobody", lambda room: [
        path.write_text(path.read_text().replace('"processes": 1', '"processes": 0'))
        for path in room.path.glob("run/checkpoints/*/seals/0.json")],
     r"12: there are more seals in seals/ than the 0"),
    ("sealed without end", lambda room: [
        room.write(f"run/checkpoints/{step}/seals/0.json", "[" * 100_000) for step in STEPS],
     r"12: a file in seals/ is damaged"),
):
  checkpoint_case(f"every one is {what}", RESUME,
                  rf"run/checkpoints has no checkpoint that is whole \({cause}",
                  r"bring back a copy, or start from nothing with --force", make)
  if what in ("damaged", "a file"):
    for command in ("evaluate", "generate"):
      checkpoint_case(f"every one is {what}, {command}", f"{command} --workdir=run",
                      rf"--workdir: 'run' has no checkpoint that is whole \({cause}",
                      r"bring back a copy", make)
for command in ("evaluate", "generate"):
  checkpoint_case(f"{command} a damaged step", f"{command} --workdir=run --step=8",
                  rf"--step: the checkpoint of step 8 is damaged: {FLIPPED}",
                  r"choose another of 4, 12", _damaged(8))
  checkpoint_case(f"{command} a step that is not there", f"{command} --workdir=run --step=7",
                  r"--step: no checkpoint at step 7", r"there are 4, 8, 12", lambda room: None)
  checkpoint_case(f"{command} step -1", f"{command} --workdir=run --step=-1",
                  r"--step: no checkpoint at step -1", r"there are 4, 8, 12", lambda room: None)
  checkpoint_case(f"{command} a step that is no number", f"{command} --workdir=run --step=last",
                  r"--step: invalid int value: 'last'", rf"see chinchilla {command} --help",
                  lambda room: None)
checkpoint_case("evaluate a step that is a file", "evaluate --workdir=run --step=12",
                r"--step: the checkpoint of step 12 is damaged: it is not a folder",
                r"choose another of 4, 8", _file_for("run/checkpoints/12"))
for argv in (RESUME, "evaluate --workdir=run", "inspect --workdir=run"):
  checkpoint_case(f"checkpoints is a file, {argv.split()[0]}", argv,
                  r"run/checkpoints cannot be read \(Not a directory\)", r"move it away",
                  _file_for("run/checkpoints"))

# What is sealed was written so: by another version of the program, or by somebody.
for what, text in (("not JSON", "{"), ("empty", ""), ("a list", "[]"), ("a number", "3"),
                   ("nested without end", "[" * 100_000)):
  checkpoint_case(f"progress is {what}, but sealed", "evaluate --workdir=run --step=12",
                  r"the checkpoint of step 12 is damaged: progress\.json is damaged",
                  r"choose another of", _sealed("progress.json", lambda _, text=text: text))
for what, change, cause in (
    ("lacks its config", lambda progress: progress.pop("config"), r"there is no config in"),
    ("lacks its step", lambda progress: progress.pop("step"), r"there is no step in"),
    ("lacks the store", lambda progress: progress["fingerprints"].pop("store"),
     r"there is no fingerprints\.store in"),
    ("lacks surroundings", lambda progress: progress.pop("surroundings"),
     r"there is no surroundings\.mesh in"),
    ("has tokens that are text", lambda progress: progress.update(tokens="9"),
     r"tokens is no int in"),
    ("owes what nobody knows", lambda progress: progress.update(owed=["cleaning"]),
     r"it owes 'cleaning' in"),
    ("leaves out half a range", lambda progress: progress.update(skipped=[[3]]),
     r"skipped holds no ranges in"),
):
  for argv in (RESUME, "evaluate --workdir=run")[:1 if "surround" in what else 2]:
    checkpoint_case(f"progress {what}, {argv.split()[0]}", argv,
                    rf"checkpoint run/checkpoints/12 was written {OTHER_VERSION} \({cause}",
                    r"use that version", _progress(change))
checkpoint_case("progress is of another step", "generate --workdir=run --step=12",
                r"the checkpoint of step 12 is damaged: it is of step 13", r"choose another of",
                _progress(lambda progress: progress.update(step=13)))
for what, change, cause in (
    ("an unknown field", lambda config: config["model"].update(n_experts=8),
     r"config\.model\.n_experts: no such field"),
    ("a field that became a group", lambda config: config.update(seed={"data": 3}),
     r"config\.seed: got \{'data': 3\}"),
    ("a choice that is gone", lambda config: config["model"].update(position="alibi"),
     r"config\.model\.position: got 'alibi'"),
):
  checkpoint_case(f"config of a checkpoint has {what}", RESUME,
                  rf"run holds a run {OTHER_VERSION} \({cause}", rf"use that version, or {NEW_RUN}",
                  _progress(lambda progress, change=change: change(progress["config"])))
  checkpoint_case(f"config of a run has {what}", "evaluate --workdir=run",
                  rf"run/config\.json is {OTHER_VERSION}, or was edited \({cause}",
                  r"use that version, or bring back", _config_of_run(change))


def _as(dtype: str) -> Callable[[dict], None]:
  def change(tree: dict) -> None:
    tree["params"]["embedding"]["table"] = tree["params"]["embedding"]["table"].astype(dtype)
  return change


def _shorter(tree: dict) -> None:
  tree["params"]["embedding"]["table"] = tree["params"]["embedding"]["table"][:, :8]


def _nonsense(room: Room, at_least: int = 0) -> None:
  """Sealed again with other bytes in every file of the arrays that is so large."""
  folder = room.path / "run/checkpoints/12"
  for path in (folder / "state").rglob("*"):
    if path.is_file() and path.name[0] != "_" and path.stat().st_size >= at_least:
      path.write_bytes(bytes(range(256)) * 8)
  seals.write(folder, 0, 1)


THERE = r"checkpoint run/checkpoints/12"
for what, change, cause in (
    ("of another dtype", _as("float32"),
     r": params/embedding/table is float32\[512, 32\], the config wants bfloat16\[512, 32\]"),
    ("of another shape", _shorter,
     r": params/embedding/table is bfloat16\[512, 8\], the config wants bfloat16\[512, 32\]"),
    ("without an array", lambda tree: tree["params"]["embedding"].pop("table"),
     r" has no params/embedding/table"),
):
  for argv in (RESUME, "evaluate --workdir=run"):
    checkpoint_case(f"state {what}, {argv.split()[0]}", argv, THERE + cause,
                    r"use the config\.json of its run", _state(change))
for argv in (RESUME, "evaluate --workdir=run"):
  checkpoint_case(f"state is nonsense, but sealed, {argv.split()[0]}", argv,
                  rf"{THERE} cannot be read \(", r"look at it with `chinchilla inspect`", _nonsense)
checkpoint_case("arrays are nonsense, but sealed", "evaluate --workdir=run",
                rf"{THERE} cannot be read \(OUT_OF_RANGE: Error reading", r"look at it with `ch",
                lambda room: _nonsense(room, at_least=30_000))
checkpoint_case("state with an array more", RESUME, THERE + r" has optimizer/third, the config",
                r"use the config\.json of its run",
                _state(lambda tree: tree["optimizer"].update(third=tree["optimizer"]["count"])))
for what, text in (("empty", ""), ("no JSON", "{"), ("a list", "[]"), ("an object", "{}"),
                   ("another object", '{"tree_metadata": {"x": 3}}')):
  checkpoint_case(f"state's description is {what}, but sealed", RESUME,
                  rf"{THERE} cannot be read", r"look at it with `chinchilla inspect`",
                  _sealed("state/_METADATA", lambda _, text=text: text))

# The rest of a run's folder.
for what, text in (("not JSON", "[{"), ("an object", '{"a": 1}'), ("a number", "3"),
                   ("of half a range", '[{"step": 5, "skipped": [3]}]'),
                   ("of negative ranges", '[{"step": 5, "skipped": [-3, 4]}]'),
                   ("of no step", '[{"skipped": [3, 4]}]')):
  checkpoint_case(f"rollbacks.json is {what}", RESUME, r"run/rollbacks\.json is damaged, so it is",
                  rf"bring back a copy, or {NEW_RUN}",
                  functools.partial(lambda room, text: room.write("run/rollbacks.json", text),
                                    text=text))
for what, text, cause in (
    ("not JSON", "{", r"run/config\.json is not JSON"),
    ("empty", "", r"run/config\.json is not JSON"),
    ("a list", "[]", r"run/config\.json does not hold a JSON object"),
    ("nested without end", "[" * 100_000, r"run/config\.json is not JSON"),
):
  for argv in ("evaluate --workdir=run", "inspect --workdir=run"):
    checkpoint_case(f"config.json is {what}, {argv.split()[0]}", argv, cause, r"mend it|give the c",
                    functools.partial(lambda room, text: room.write("run/config.json", text),
                                      text=text))
checkpoint_case("config.json is gone", "generate --workdir=run",
                r"'run' is not a run's folder \(it has no config\.json\)", r"give the folder that",
                lambda room: (room.path / "run/config.json").unlink())
checkpoint_case("config.json of a wider model", "evaluate --workdir=run",
                rf"{THERE}: params/\S+ is bfloat16.*, the config wants bfloat16",
                r"use the config\.json of its run",
                _config_of_run(lambda config: config["model"].update(d_model=64)))

# What belongs to it.
checkpoint_case("store moved away", RESUME, r"no token store at store", r"did you mean \./moved\?",
                lambda room: (room.path / "store").rename(room.path / "moved"))
for command in ("evaluate", "generate"):
  checkpoint_case(f"store moved away, {command}", f"{command} --workdir=run",
                  r"no token store at store", r"say so in data\.store of run/config\.json",
                  lambda room: (room.path / "store").rename(room.path / "moved"))
  checkpoint_case(f"store replaced, {command}", f"{command} --workdir=run",
                  r"config\.data\.store: store is not the store that run was trained on",
                  r"prepare that one again, or say in data\.store of run/config\.json",
                  _replaced_store)
checkpoint_case("store replaced", RESUME,
                r"run holds a run with another tokenizer \(fingerprint [0-9a-f]{12}, now",
                rf"set config\.data\.store to the old store, or {NEW_RUN}", _replaced_store)
checkpoint_case("tokenizer of another store in this one", RESUME,
                r"tokenizer\.model has [\d,]+ bytes, its ledger says", AGAIN,
                lambda room: (_other_store(room), shutil.copy(
                    room.path / "other/tokenizer.model", room.path / "store/tokenizer.model")))
checkpoint_case("evaluate on a store of another tokenizer", "evaluate --workdir=run --store=other",
                r"--store: other was made with another tokenizer than the run's store",
                r"prepare it with --config\.tokenizer\.path=store", _other_store)
checkpoint_case("evaluate on a remote store", "evaluate --workdir=run --store=gs://bucket/s",
                r"gs://bucket/s is remote", r"keep the token store on a local disk",
                lambda room: None)
checkpoint_case("evaluate on no store", "evaluate --workdir=run --store=nowhere",
                r"no token store at nowhere", r"make it with `chinchilla prepare|did you mean",
                lambda room: None)
for field, old, new in (("seed", 0, 1), ("model.n_layers", 2, 3), ("data.seq_len", 32, 16),
                        ("precision.parameters", "bfloat16", "float32")):
  for force in ("", " --force"):
    checkpoint_case(f"another {field}{force}", f"{RESUME} --config.{field}={new}{force}",
                    rf"run holds a run with config\.{re.escape(field)}={old!r}, not {new!r}",
                    rf"keep the old value, or {NEW_RUN}", lambda room: None)
for flag in ("", " --force"):
  checkpoint_case(f"a process is at it{flag}", f"{RESUME} '--config.run_length=20 steps'{flag}",
                  r"--workdir: run is in use by process \d+ on \S+ \(since 20",
                  r"wait for it, stop it, or choose another --workdir.*--force does not help",
                  _locked)
NEW = "train --config=tiny.json --workdir=new --config.checkpoint.init_from=run"
checkpoint_case("start from a damaged run", NEW,
                rf"config\.checkpoint\.init_from: 'run' has no checkpoint .*whole \(12: {FLIPPED}",
                r"give the folder of a run", _damaged(*STEPS))
checkpoint_case("start from a run of another width",
                f"{NEW} --config.model.d_model=64 --config.model.kv_size=32",
                rf"config\.checkpoint\.init_from: {THERE}: optimizer/master/\S+ is float32\[2, 32",
                r"use the config\.json of its run, or give a run of the same model",
                lambda room: None)
checkpoint_case("start from a file", NEW, r"config\.checkpoint\.init_from: 'run' has no checkpoint",
                r"give the folder of a run", _file_for("run"))
checkpoint_case("start from a run whose checkpoints are a file", NEW,
                r"config\.checkpoint\.init_from: run/checkpoints cannot be read", r"move it away",
                _file_for("run/checkpoints"))
checkpoint_case("start from a remote run", NEW.replace("=run", "=gs://bucket/run"),
                r"config\.checkpoint\.init_from: .*'gs://bucket/run' is remote",
                r"keep the run's folder on a disk", lambda room: None)


@pytest.fixture
def room(tmp_path, tiny_store, monkeypatch, request) -> Iterator[Room]:
  path = tmp_path / "here"
  path.mkdir()
  monkeypatch.chdir(path)
  with contextlib.ExitStack() as ending:
    yield Room(path, tiny_store, lambda: request.getfixturevalue("tiny_run")[1], ending)


def snapshot(folder: pathlib.Path) -> dict[str, tuple]:
  """Everything under a folder: kinds, sizes, contents, times of change."""
  found = {}
  for path in sorted(folder.rglob("*")):
    name, stat = str(path.relative_to(folder)), path.lstat()
    if path.is_symlink():
      found[name] = ("link", os.readlink(path))
    elif path.is_file():
      found[name] = ("file", stat.st_size, stat.st_mtime_ns, stat.st_mode,
                     hashlib.sha256(path.read_bytes()).hexdigest())
    else:
      found[name] = ("folder", stat.st_mode)
  return found


def check(case: Case, status: int, err: str) -> None:
  assert "Traceback" not in err
  assert err.startswith(case.progress)
  message = err.removeprefix(case.progress)
  assert message.count("\n") == 1 and message.endswith("\n"), message
  assert message.startswith(f"chinchilla {case.argv[0]}: "), message
  assert re.search(case.cause, message), message
  assert re.search(case.cure, message), message
  assert len(message) < 1000, "a line that can be read"
  assert status == 2


HERE = [case for case in CASES if case.devices == 1]
APART = [case for case in CASES if case.devices > 1 or case.name in (
    "unknown flag", "bytes that are not UTF-8", "tokenizer that is empty",
    "store: shard with a flipped bit", "store: ledger with a file above it",
    "checkpoint: every one is damaged", "checkpoint: state of another shape, evaluate",
    "checkpoint: arrays are nonsense, but sealed", "checkpoint: a process is at it")]


@pytest.mark.parametrize("case", HERE, ids=lambda case: case.name)
def test_one_line_with_cause_and_cure_and_nothing_written(case, room, capfd):
  case.make(room)
  before = snapshot(room.path.parent)
  capfd.readouterr()
  status = cli.main(list(case.argv))
  captured = capfd.readouterr()
  check(case, status, captured.err)
  assert captured.out == ""
  assert snapshot(room.path.parent) == before


@pytest.mark.parametrize("case", APART, ids=lambda case: case.name)
def test_the_same_from_a_shell(case, room):
  """What a process prints, C++ libraries included, and leaves."""
  case.make(room)
  before = snapshot(room.path.parent)
  flags = f"--xla_force_host_platform_device_count={case.devices}"
  done = subprocess.run(
      [sys.executable, "-m", "chinchilla_jax", *map(os.fsencode, case.argv)], capture_output=True,
      env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}, timeout=120)
  check(case, done.returncode, done.stderr.decode())
  assert done.stdout == b""
  assert snapshot(room.path.parent) == before


def test_there_are_cases_enough():
  assert len(CASES) >= 70 and len(APART) >= 5
  assert {case.argv[0] for case in CASES} >= set(cli.COMMANDS)


def test_a_dataset_that_nobody_knows_is_refused_without_asking_the_network(room, monkeypatch):
  """So it is refused at once where there is no network, or one that swallows packets."""
  asked = []
  for name in ("getaddrinfo", "create_connection"):
    monkeypatch.setattr(socket, name, lambda *args, **kwargs: asked.append(args))
  monkeypatch.setattr(socket.socket, "connect", lambda *args: asked.append(args))
  assert cli.main(["prepare", "tfds:nosuch", "--config.corpus.tfds_data_dir=tfds"]) == 2
  assert asked == []


def test_a_store_may_hold_links_to_elsewhere(room):
  """Shards on another disk: what the ledger names has to be in the folder, not its content."""
  folder, elsewhere = room.store(), room.path / "elsewhere"
  elsewhere.mkdir()
  for path in list(folder.glob("tokens-*")):
    path.rename(elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)
  store = tokens.open_store(str(folder), "full")
  assert len(store.split("train").read(0, 100)) == 100


def test_preparing_anew_what_a_link_leads_to_keeps_the_link(room):
  _two(room)
  (room.path / "disk").mkdir()
  (room.path / "link").symlink_to("disk/store")
  words = ["prepare", "text", "--store=link", "--config.tokenizer.vocab_size=300"]
  assert cli.main(words) == 0
  assert cli.main([*words, "--config.corpus.validation_fraction=0.4", "--overwrite"]) == 0
  assert (room.path / "link").is_symlink()
  assert os.listdir(room.path / "disk") == ["store"]


def test_text_too_long_for_the_memory_is_refused_before_any_is_made(room):
  model = types.SimpleNamespace(store=tokens.open_store(room.stores),
                                experiment=tiny_experiment(room.stores))
  with pytest.raises(UserError, match=r"--max-tokens: a prompt of .* GiB .*; lower it"):
    generate.generate(model, "import", max_tokens=10**12)


def test_a_config_file_leaves_no_bytecode_and_is_never_stale(room):
  for seed in (1, 2):  # same size, same second
    room.write("c.py", f"def get_config(): return {{'seed': {seed}}}")
    assert config_io.load("c.py").seed == seed
  assert os.listdir(room.path) == ["c.py"]


def test_lengths_are_read_as_they_are_meant():
  assert durations.parse("1,000,000 steps").value == 1_000_000
  for text in ("1,5 steps", "1,00 steps", "10,0000 steps", "1e40 flops"):
    with pytest.raises(UserError):
      durations.parse(text)
