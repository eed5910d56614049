"""From files and flags (ml_collections) to a checked `Experiment`, and back to JSON.

  --config=configs/chinchilla.py:70b       a Python file; get_config("70b") returns a ConfigDict
  --config=runs/smoke/config.json          the resolved config of an earlier run
  --config.optimizer.peak_lr=2e-4          one field, read by the type in the schema
"""

import ast
import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from chinchilla_jax import config as schema
from chinchilla_jax import config_file, durations
from chinchilla_jax.errors import UserError

_LARGEST = 2**31 - 1  # of whole numbers: sizes and counts are int32 on devices
_LARGER = {"tokenizer.sample_bytes": 2**53, "evaluation.max_tokens": 2**53,
           "mesh.whole_below": 2**53}
_LARGEST_FLOAT = 3.4e38  # of float32, in which all of them are used
_NAME_BYTES = 200  # of a folder's name; file systems allow 255, and something may be added


def default_config():
  """The schema's defaults as a ConfigDict; config files start from it.

  The dictionary is locked: a misspelt name raises where it is written.
  """
  import ml_collections
  return ml_collections.ConfigDict(to_dict(schema.Experiment())).lock()


def to_dict(section: Any) -> dict[str, Any]:
  """A (section of an) experiment as nested dicts; tuples stay tuples."""
  return {
      field.name: to_dict(value) if dataclasses.is_dataclass(value) else value
      for field in dataclasses.fields(section)
      for value in [getattr(section, field.name)]
  }


def flat(experiment: schema.Experiment) -> dict[str, Any]:
  """{"model.d_model": 512, ...} for every field of the schema."""
  def walk(tree, prefix):
    for key, value in tree.items():
      if isinstance(value, dict):
        yield from walk(value, f"{prefix}{key}.")
      else:
        yield f"{prefix}{key}", value
  return dict(walk(to_dict(experiment), ""))


def load(config: str | None, overrides: Sequence[tuple[str, str | None]] = ()) -> schema.Experiment:
  """Reads a config file (Python or JSON; None: the defaults) and applies overrides in order.

  Args:
    config: PATH or PATH:ARGUMENT.
    overrides: (dotted field name, text of the value); None as text stands for "true".

  Raises:
    UserError: a file that does not load, an unknown field, a wrong type, an impossible value.
  """
  tree = to_dict(_build(schema.Experiment, {} if config is None else _load_file(config), ""))
  types_by_name = {name: field.type for name, field in schema.fields()}
  for name, text in overrides:
    if name not in types_by_name:
      raise _unknown(name, f"--config.{name}")
    *path, leaf = name.split(".")
    node = tree
    for key in path:
      node = node[key]
    node[leaf] = _parse(text, types_by_name[name], f"--config.{name}")
  return from_dict(tree)


def from_dict(tree: dict[str, Any]) -> schema.Experiment:
  """A checked experiment from nested dicts; missing fields take their defaults."""
  experiment = _build(schema.Experiment, tree, "")
  _check(experiment)
  return experiment


def _load_file(config: str) -> dict[str, Any]:
  if "://" in config:
    return _load_object(config)
  path, argument = config, None
  if not os.path.isfile(path) and ":" in config:
    path, argument = config.rsplit(":", 1)
  file = pathlib.Path(path)
  if os.path.isdir(path):
    raise UserError(f"--config: {path!r} is a folder; give a .py or .json config file")
  if not os.path.isfile(path):  # Unlike pathlib's, it takes a name that is too long.
    near = difflib.get_close_matches(
        file.name, [p.name for p in file.parent.glob("*") if p.suffix in (".py", ".json")], 1)
    hint = f"; did you mean {file.parent / near[0]}?" if near else ""
    raise UserError(f"--config: no file {shown(path)}"
                    f"{hint or '; give a .py or .json config file'}")
  if file.suffix not in (".py", ".json"):
    raise UserError(f"--config: {path} ends in {file.suffix or 'nothing'!r}; give a .py or .json "
                    "config file")
  try:
    content = file.read_bytes()
  except OSError as error:
    raise UserError(f"--config: {path} cannot be read ({error.strerror}); give another file, or "
                    "the right to read it") from None
  if file.suffix == ".py":
    return _to_plain(_run_config_file(file, argument))
  if argument is not None:
    raise UserError(f"--config: {path} takes no argument; leave out {':' + argument!r}")
  return _from_json(content, path)


def _load_object(url: str) -> dict[str, Any]:
  """The config of a run in a bucket. Programs are not run from there."""
  from chinchilla_jax.storage import paths
  if not url.endswith(".json"):
    raise UserError(f"--config: {shown(url)} is no .json file; give the config.json of a run, or a "
                    "file on this machine")
  try:
    return _from_json(paths.at(url).read_bytes(), url)
  except FileNotFoundError:
    raise UserError(f"--config: no object {shown(url)}; give the config.json of a run") from None


def _from_json(content: bytes, path: str) -> dict[str, Any]:
  try:
    tree = json.loads(content)
  except RecursionError:
    raise UserError(f"--config: {path} is not JSON of a config (nested too deeply); mend it"
                    ) from None
  except ValueError as error:  # Also bytes that are not UTF-8.
    raise UserError(f"--config: {path} is not JSON ({error}); mend it, or copy it again") from None
  tree = tree.get("config", tree) if isinstance(tree, dict) else tree
  if not isinstance(tree, dict):
    raise UserError(f"--config: {path} does not hold a JSON object with the fields of a config; "
                    "give the config.json of a run, or write one like it")
  return tree


def _run_config_file(file: pathlib.Path, argument: str | None):
  """What the file's get_config returns."""
  module = config_file.run(file)
  if not callable(getattr(module, "get_config", None)):
    raise UserError(f"--config: {file} has no get_config function; write def get_config(), which "
                    "returns a ConfigDict")
  with config_file.telling(file):
    result = module.get_config() if argument is None else module.get_config(argument)
  if not hasattr(result, "to_dict") and not isinstance(result, dict):
    raise UserError(f"--config: get_config of {file} returns {type(result).__name__}, not a "
                    "ConfigDict; start from chinchilla_jax.config_io.default_config()")
  return result


def _to_plain(tree: Any) -> dict[str, Any]:
  """ConfigDict to nested dicts, references resolved."""
  return tree.copy_and_resolve_references().to_dict() if hasattr(tree, "to_dict") else dict(tree)


def _build(section: type, tree: Any, prefix: str) -> Any:
  if not isinstance(tree, dict):
    raise UserError(f"config.{prefix.rstrip('.')}: got {shown(tree)}, expected a group of fields")
  by_name = {field.name: field for field in dataclasses.fields(section)}
  for name in tree:
    if name not in by_name:
      raise _unknown(f"{prefix}{name}", f"config.{prefix}{name}")
  values = {}
  for name, value in tree.items():
    field = by_name[name]
    if dataclasses.is_dataclass(field.type):
      values[name] = _build(field.type, value, f"{prefix}{name}.")
    else:
      values[name] = _coerce(value, field.type, f"config.{prefix}{name}")
  return section(**values)


def _unknown(name: str, where: str) -> UserError:
  names = [known for known, _ in schema.fields()]
  groups = sorted({known.rsplit(".", 1)[0] for known in names if "." in known})
  if name in groups:
    inside = next(known for known in names if known.startswith(f"{name}."))
    return UserError(f"{where}: no such field; {name} is a group of fields such as {inside}")
  leaf = name.rsplit(".", 1)[-1]
  leaves = {known.rsplit(".", 1)[-1]: known for known in names}
  if "." in name:
    near = difflib.get_close_matches(name, names, 1, 0.5)
  elif leaf in leaves:
    near = [leaves[leaf]]
  else:
    near = difflib.get_close_matches(name, [*groups, *names], 1, 0.7)
  if not near:  # The right leaf in the wrong group is the commonest slip.
    near = [leaves[hit] for hit in difflib.get_close_matches(leaf, leaves, 1)]
  hint = f"did you mean {near[0]}?" if near else "the names are in docs/configuration.md"
  return UserError(f"{shorten(where)}: no such field; {hint}")


def shown(value: Any) -> str:
  """A value for a message, cut where it is endless."""
  try:
    return shorten(repr(value))
  except (ValueError, RecursionError):  # A number of thousands of digits.
    return f"a {type(value).__name__} too large to show"


def shorten(text: str) -> str:
  """At most about a hundred characters of a text."""
  return text if len(text) <= 100 else f"{text[:60]}... ({len(text):,} characters)"


def _describe(kind: Any) -> str:
  if isinstance(kind, type) and not typing.get_args(kind):
    return {"int": "a whole number", "float": "a number", "str": "text",
            "bool": "true or false"}[kind.__name__]
  return {  # The schema has these kinds of tuple.
      tuple[str, ...]: "a list of texts such as ('a', 'b')",
      tuple[tuple[str, int], ...]: "a list of pairs such as (('50%', 256),)",
      tuple[tuple[str, float], ...]: "a list of pairs such as (('bias', 0.0),)",
      tuple[tuple[str, str], ...]: "a list of pairs such as (('table', 'tensor,-'),)",
  }[kind]


def _parse(text: str | None, kind: Any, where: str) -> Any:
  """The value that a flag's text stands for, by the type in the schema."""
  if text is None:
    if kind is bool:
      return True
    raise UserError(f"{where}: no value given, expected {_describe(kind)}")
  if kind is str:
    return text
  if kind is bool:
    lowered = text.lower()
    if lowered not in ("true", "false", "1", "0", "yes", "no"):
      raise UserError(f"{where}: got {shown(text)}, expected true or false")
    return lowered in ("true", "1", "yes")
  if kind == tuple[str, ...] and not text.lstrip().startswith(("(", "[", "'", '"')):
    return tuple(part.strip() for part in text.split(",") if part.strip())
  try:
    value = ast.literal_eval(text)
  except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
    raise UserError(f"{where}: got {shown(text)}, expected {_describe(kind)}") from None
  return _coerce(value, kind, where)


def _coerce(value: Any, kind: Any, where: str) -> Any:
  """The value in the schema's type: 1 is a fine float, 1e6 a fine int, a list a fine tuple."""
  wrong = UserError(f"{where}: got {shown(value)}, expected {_describe(kind)}")
  if kind is bool or kind is str:
    if not isinstance(value, kind):
      raise wrong
    return value
  if kind in (int, float):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
      raise wrong
    if abs(value) == float("inf") or (kind is int and value != int(value)):
      raise wrong
    if kind is float and abs(value) > _LARGEST_FLOAT:
      raise UserError(f"{where}: got {shown(value)}, allowed is at most {_LARGEST_FLOAT}")
    return kind(value)
  item = typing.get_args(kind)[0]
  if isinstance(value, str) or not isinstance(value, Sequence):
    raise wrong
  if item is str:
    if not all(isinstance(part, str) for part in value):
      raise wrong
    return tuple(value)
  second_kind = typing.get_args(item)[1]
  for pair in value:
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
      raise wrong
    if not isinstance(pair[0], str):
      raise wrong
  return tuple((first, _coerce(second, second_kind, where)) for first, second in value)


def _check(experiment: schema.Experiment) -> None:
  """Limits of single fields, then those between fields."""
  values = flat(experiment)
  _check_name(experiment.name)
  for name, field in schema.fields():
    value, meta = values[name], field.metadata
    if meta["choices"] and value not in meta["choices"]:
      near = difflib.get_close_matches(str(value), meta["choices"], 1)
      hint = f"; did you mean {near[0]}?" if near else ""
      raise UserError(f"config.{name}: got {shown(value)}, allowed are "
                      f"{', '.join(meta['choices'])}{hint}")
    for bound, bad, words in (("at_least", lambda v, b: v < b, "at least"),
                              ("above", lambda v, b: v <= b, "above"),
                              ("at_most", lambda v, b: v > b, "at most")):
      if meta[bound] is not None and bad(value, meta[bound]):
        raise UserError(f"config.{name}: got {shown(value)}, allowed is {words} {meta[bound]:,}")
    largest = _LARGER.get(name, _LARGEST)
    if field.type is int and abs(value) > largest:
      raise UserError(f"config.{name}: got {shown(value)}, allowed is at most {largest:,}")
    if meta["duration"]:
      durations.parse(value, f"config.{name}")
  steps = re.fullmatch(r"(\d{1,12})(?:-(\d{1,12}))?", experiment.profile.steps)
  if experiment.profile.steps and not (
      steps and 1 <= int(steps[1]) <= int(steps[2] or steps[1])):
    raise UserError(f"config.profile.steps: got {shown(experiment.profile.steps)}; give the first "
                    "step and the last one, counted from 1, such as 100-102")
  model, batch = experiment.model, experiment.batch
  if model.position == "rotary" and model.kv_size % 2:
    raise UserError(f"config.model.kv_size: got {model.kv_size}, but rotary positions turn pairs "
                    "of numbers; set an even size, or config.model.position=relative")
  if experiment.precision.rounding == "stochastic" and (
      experiment.precision.parameters != "bfloat16"):
    raise UserError("config.precision.rounding: stochastic rounding is for bfloat16 parameters; "
                    "set config.precision.parameters=bfloat16 or rounding=master")
  for at, count in batch.ramp:
    durations.parse(at, "config.batch.ramp")
    if not 1 <= count <= _LARGEST:
      raise UserError(f"config.batch.ramp: got {shown(count)} sequences, allowed is at least 1 and "
                      f"at most {_LARGEST:,}")
  for count in (batch.sequences, *(count for _, count in batch.ramp)):
    parts = durations.microbatches(batch, count)
    if count % parts:
      raise UserError(f"config.batch.microbatches: {count} sequences do not divide into "
                      f"{parts} microbatches; use a divisor, or config.batch.ramp_by=size")
  for name, found in (("optimizer.decay_patterns", experiment.optimizer.decay_patterns),
                      ("optimizer.lr_patterns", experiment.optimizer.lr_patterns),
                      ("mesh.overrides", experiment.mesh.overrides)):
    for pattern, _ in found:
      try:
        re.compile(pattern)
      except re.error as error:
        raise UserError(f"config.{name}: {pattern!r} is not a regular expression "
                        f"({error}); mend it, or write \\ before what stands for itself") from None
  length = durations.parse(experiment.run_length)
  if length.unit == "%":
    raise UserError("config.run_length: a percentage of itself means nothing; give steps, "
                    "tokens, epochs, flops or tokens/param")
  if not length.value:
    raise UserError(f"config.run_length: got {experiment.run_length!r}; give a positive length, "
                    "such as '20 tokens/param'")


def _check_name(name: str) -> None:
  """The default folder of a run is runs/NAME: it must lie in runs."""
  if (not name.strip() or name.startswith(".") or any(mark in name for mark in "/\\:")
      or not name.isprintable() or len(name.encode(errors="replace")) > _NAME_BYTES):
    raise UserError(f"config.name: got {shown(name)}, which does not name a folder in runs; give a "
                    f"plain name of up to {_NAME_BYTES} bytes such as 'smoke' (no /, \\ or :, no "
                    "dot in front), and choose the place with --workdir")


def of_kinds(experiment: schema.Experiment, *kinds: str) -> dict[str, Any]:
  """The fields of the given classes, by dotted name."""
  values = flat(experiment)
  return {name: values[name] for name, field in schema.fields() if field.metadata["kind"] in kinds}


def fingerprint(experiment: schema.Experiment, *kinds: str) -> str:
  """SHA-256 over the fields of the given classes (see `config.KINDS`)."""
  text = json.dumps(of_kinds(experiment, *kinds), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def differences(old: schema.Experiment, new: schema.Experiment,
                *kinds: str) -> list[tuple[str, Any, Any]]:
  """(dotted name, old value, new value) of every differing field of the given classes."""
  before, after = of_kinds(old, *kinds), of_kinds(new, *kinds)
  return [(name, before[name], after[name]) for name in before if before[name] != after[name]]


def table() -> str:
  """The schema as Markdown tables, one a section; docs/configuration.md holds this text."""
  lines, heading = [], None
  values = flat(schema.Experiment())
  for name, field in schema.fields():
    section = name.rsplit(".", 1)[0] if "." in name else "top level"
    if section != heading:
      heading = section
      lines += ["", f"### {section}", "", "| field | default | type, unit | class | why |",
                "| --- | --- | --- | --- | --- |"]
    meta = field.metadata
    kind = " \\| ".join(meta["choices"]) or (
        "duration" if meta["duration"] else
        field.type.__name__ if not isinstance(field.type, types.GenericAlias) else "list")
    unit = f"{kind}, {meta['unit']}" if meta["unit"] else kind
    default = json.dumps(values[name]).replace("|", "\\|")
    lines.append(f"| `{name}` | `{default}` | {unit} | {meta['kind']} | {meta['why']} |")
  return "\n".join(lines[1:]) + "\n"


if __name__ == "__main__":
  print(table(), end="")
