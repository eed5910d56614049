"""Documents from a TensorFlow Datasets dataset, read without TensorFlow.

TFDS reads ArrayRecord in pure Python (`as_data_source`). A dataset that is prepared in another
format, or whose preparation needs TensorFlow, is refused with the way out.
"""

import re
from collections.abc import Iterator

from chinchilla_jax.data import formats
from chinchilla_jax.errors import UserError

_SPEC = re.compile(r"tfds:(?P<name>[\w./-]+(:\d+\.\d+\.\d+)?)(@(?P<split>.+))?")


def read(spec: str, text_field: str, data_dir: str) -> Iterator[formats.Item]:
  """The records of `tfds:NAME[/CONFIG][:VERSION][@SPLIT]` (split: train), numbered from 0.

  Ids are `NAME[/CONFIG]/SPLIT#record`.

  Raises:
    UserError: the dataset is unknown, cannot be prepared here, is stored in a format that needs
      TensorFlow, or has no such split or field.
  """
  match = _match(spec)
  split = match["split"] or "train"
  builder = _prepared(spec, match["name"], data_dir)
  if text_field not in builder.info.features:
    raise UserError(f"no record of {spec} has a field {text_field!r} (found: "
                    f"{', '.join(sorted(builder.info.features))}): set config.corpus.text_field")
  try:
    records = builder.as_data_source(split=split)
  except ValueError as error:
    raise UserError(f"source {spec!r} has no split {split!r} (found: "
                    f"{', '.join(builder.info.splits)}): name one as tfds:NAME@SPLIT") from error
  except NotImplementedError as error:
    raise _wrong_format(spec, builder.info.file_format.value) from error
  prefix = f"{match['name'].split(':')[0]}/{split}"
  for number in range(len(records)):
    yield f"{prefix}#{number}", formats.to_utf8(_scalar(records[number][text_field])), True


def identity(spec: str, data_dir: str) -> str:
  """Name, version and record counts of the dataset: changes when its records may have."""
  builder = _prepared(spec, _match(spec)["name"], data_dir)
  counts = {name: info.num_examples for name, info in sorted(builder.info.splits.items())}
  return f"{builder.info.full_name} {counts}"


def _match(spec: str) -> re.Match:
  match = _SPEC.fullmatch(spec)
  if not match:
    raise UserError(f"source {spec!r} is not tfds:NAME[/CONFIG][:VERSION][@SPLIT]: write it like "
                    "tfds:lm1b or tfds:wikipedia/20230601.en@train")
  return match


def _prepared(spec: str, name: str, data_dir: str):
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise UserError(f"source {spec!r} needs TensorFlow Datasets: pip install tensorflow-datasets"
                    ) from error
  try:
    builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
  except tfds.core.DatasetNotFoundError as error:
    where = data_dir or "TFDS's default folder (config.corpus.tfds_data_dir)"
    raise UserError(f"source {spec!r}: no such dataset, neither in TFDS's list nor prepared in "
                    f"{where}: mend its name, or name text of your own") from error
  except ValueError as error:
    if "file format" not in str(error).lower():
      raise UserError(f"source {spec!r}: {formats.first_line(error)}") from error
    raise _wrong_format(spec, "another format") from error
  try:
    builder.download_and_prepare()
  except ImportError as error:
    raise UserError(f"source {spec!r} is not prepared yet, and preparing it needs the package "
                    f"{error.name}: install it, or prepare the dataset elsewhere with "
                    f"file_format='array_record' and copy its folder") from error
  except Exception as error:  # network, disk, a builder's own faults: anything can come
    raise UserError(f"source {spec!r} could not be prepared ({type(error).__name__}: "
                    f"{formats.first_line(error)}): prepare it elsewhere with "
                    f"file_format='array_record' and copy its folder") from error
  return builder


def _wrong_format(spec: str, stored: str) -> UserError:
  return UserError(f"source {spec!r} is prepared as {stored}, which needs TensorFlow to read: "
                   f"prepare it with file_format='array_record' in another "
                   f"config.corpus.tfds_data_dir")


def _scalar(value):
  """A Text feature comes as bytes, or as a zero-dimensional array of them."""
  return value.item() if hasattr(value, "item") else value
