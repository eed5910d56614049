"""Documents come out of every kind of source, in a fixed order, and nothing vanishes silently."""

import gzip
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chinchilla_jax.config import Corpus
from chinchilla_jax.data import corpus, formats
from chinchilla_jax.errors import UserError


def read(*sources, **settings):
  """({id: utf8}, Skipped) of a corpus; parts are joined."""
  skipped, texts = corpus.Skipped(), {}
  for document in corpus.documents(Corpus(sources=tuple(map(str, sources)), **settings), skipped):
    assert document.first == (document.id not in texts), document.id
    texts[document.id] = texts.get(document.id, b"") + document.utf8
  return texts, skipped


def zstd(data: bytes) -> bytes:
  sink = pa.BufferOutputStream()
  with pa.CompressedOutputStream(sink, "zstd") as stream:
    stream.write(data)
  return sink.getvalue().to_pybytes()


def test_stdlib_is_sorted_stable_and_without_tests():
  texts, skipped = read("stdlib")
  assert list(texts)[:2] == sorted(texts)[:2] and "argparse.py" in texts
  assert texts["argparse.py"].startswith(b"# Author:")
  assert "pydoc_data/topics.py#if" in texts  # prose, one topic a document
  parts = {part for id in texts for part in id.split("/")}
  assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages"}
  assert 5e6 < sum(map(len, texts.values())) < 50e6
  assert "email/mime/__init__.py" not in texts and skipped.counts["empty"] >= 1


def test_stdlib_is_the_same_in_another_process():
  code = ("import hashlib\nfrom chinchilla_jax.config import Corpus\n"
          "from chinchilla_jax.data import corpus\nh = hashlib.sha256()\n"
          "for d in corpus.documents(Corpus()): h.update(d.id.encode() + d.utf8)\n"
          "print(h.hexdigest())")
  outputs = {subprocess.run([sys.executable, "-c", code], check=True, capture_output=True,
                            env={**os.environ, "PYTHONHASHSEED": seed}).stdout
             for seed in ("1", "2")}
  assert len(outputs) == 1


def test_text_is_kept_byte_for_byte(tmp_path):
  contents = {"crlf.txt": b"a\r\nb\r", "bom.md": b"\xef\xbb\xbfx",
              "deep/er.py": "é\0\u2581".encode()}
  for name, content in contents.items():
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
  assert read(tmp_path)[0] == contents


def test_skipped_documents_are_counted_by_kind(tmp_path):
  (tmp_path / "good.txt").write_text("x")
  (tmp_path / "empty.txt").write_text("")
  (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
  (tmp_path / "link.txt").symlink_to(tmp_path / "nowhere")
  texts, skipped = read(tmp_path)
  assert list(texts) == ["good.txt"]
  assert skipped.counts == {"empty": 1, "not_utf8": 1, "unreadable": 1}
  assert skipped.examples["not_utf8"] == ["latin.txt"]
  assert any("latin.txt" in line for line in skipped.lines())


@pytest.mark.parametrize("suffix, pack", [
    ("", lambda data: data), (".gz", gzip.compress), (".zst", zstd)])
def test_json_lines(tmp_path, suffix, pack):
  lines = [b'{"text": "one"}', b"", b"{broken", b'{"other": 1}', b'{"text": null}', b'{"text": 5}',
           b'{"text": ""}', b'{"text": "\\ud800"}', b'[1]', b'{"text": "caf\xe9"}',
           '{"text": "zw\u00f6lf \U0001f642"}'.encode()]
  (tmp_path / f"x.jsonl{suffix}").write_bytes(pack(b"\n".join(lines)))
  texts, skipped = read(tmp_path)
  assert texts == {f"x.jsonl{suffix}#0": b"one", f"x.jsonl{suffix}#10": "zwölf 🙂".encode()}
  assert skipped.counts == {"malformed_json": 2, "no_text": 3, "empty": 1, "not_utf8": 2}


def test_zstd_of_several_frames(tmp_path):
  (tmp_path / "x.jsonl.zst").write_bytes(zstd(b'{"text": "a"}\n') + zstd(b'{"text": "b"}\n'))
  assert list(read(tmp_path)[0].values()) == [b"a", b"b"]


@pytest.mark.parametrize("column_type", [pa.string(), pa.large_string(), pa.binary(),
                                         pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path, column_type):
  column = pa.array(["one", None, "", "zwölf"]).cast(column_type if column_type != pa.binary()
                                                    else pa.string())
  if column_type == pa.binary():
    column = pa.array([b"one", None, b"", "zwölf".encode(), b"\xff"])
  pq.write_table(pa.table({"body": column, "n": range(len(column))}), tmp_path / "x.parquet")
  texts, skipped = read(tmp_path, text_field="body")
  assert texts == {"x.parquet#0": b"one", "x.parquet#3": "zwölf".encode()}
  assert skipped.counts == {"no_text": 1, "empty": 1} | (
      {"not_utf8": 1} if column_type == pa.binary() else {})


def test_large_files_come_in_parts(tmp_path, monkeypatch):
  monkeypatch.setattr(formats, "PART_BYTES", 64)
  contents = {"a.txt": ("zeile é\n" * 40).encode(), "b.txt": ("é" * 100).encode(),
              "c.txt.gz": b"x" * 1000, "e.txt": b"short"}
  for name, content in contents.items():
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
  (tmp_path / "d.txt").write_bytes(b"good line\n" * 20 + b"\xff")
  texts, skipped = read(tmp_path)
  assert texts == contents
  assert skipped.counts == {"not_utf8": 1}
  parts = [d for d in corpus.documents(Corpus(sources=(str(tmp_path / "a.txt"),)))]
  assert len(parts) > 3 and all(len(d.utf8) <= 64 + 64 for d in parts)
  assert all(d.utf8.endswith(b"\n") for d in parts)
  (tmp_path / "x.jsonl").write_text(json.dumps({"text": "long record\n" * 30 + "é" * 99}))
  assert read(tmp_path / "x.jsonl")[0] == {"x.jsonl#0": ("long record\n" * 30 + "é" * 99).encode()}


def test_globs_and_ids(tmp_path):
  for name in ("a/x.md", "a/y.txt", "b/c/z.md"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name)
  assert list(read(tmp_path / "**" / "*.md")[0]) == ["a/x.md", "b/c/z.md"]
  assert list(read(tmp_path / "a" / "*.txt")[0]) == ["y.txt"]
  assert list(read(tmp_path / "b" / "c" / "z.md")[0]) == ["z.md"]


def test_links_to_folders_are_followed_once(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "x.txt").write_text("x")
  (tmp_path / "a" / "loop").symlink_to(tmp_path)
  assert len(read(tmp_path)[0]) == 1


def refused(*sources, match, **settings):
  with pytest.raises(UserError, match=match) as caught:
    read(*sources, **settings)
  assert "\n" not in str(caught.value)


def test_wrong_sources_are_refused(tmp_path):
  refused(tmp_path / "none", match="does not exist")
  refused(tmp_path / "*.txt", match="holds no files")
  refused(tmp_path, match="holds no files")
  refused("gs://bucket/x", match="remote")
  refused(match="empty")
  (tmp_path / "x.txt").write_text("x")
  refused(tmp_path, tmp_path / "x.txt", match="two sources")
  refused(tmp_path, tmp_path, match="twice")


def test_a_field_that_no_record_has_is_refused(tmp_path):
  (tmp_path / "x.jsonl").write_text('{"body": "a"}\n{"title": "b"}\n')
  refused(tmp_path, match="no field|no record .* has a field 'text' .*body, title")
  pq.write_table(pa.table({"body": ["a"]}), tmp_path / "y.parquet")
  refused(tmp_path / "y.parquet", match="no column 'text' .found: body")


def test_damaged_files_are_refused(tmp_path):
  data = gzip.compress(json.dumps({"text": "x" * 1000}).encode() + b"\n")
  (tmp_path / "x.jsonl.gz").write_bytes(data[:-20])
  refused(tmp_path / "x.jsonl.gz", match="x.jsonl.gz is damaged")
  (tmp_path / "y.parquet").write_bytes(b"no")
  refused(tmp_path / "y.parquet", match="y.parquet is no Parquet file")
  (tmp_path / "z.jsonl.zst").write_bytes(b"not zstd at all")
  refused(tmp_path / "z.jsonl.zst", match="z.jsonl.zst cannot be read")


def test_the_split_is_fixed_for_ever():
  """Golden: a change would move held-out documents into training."""
  assert corpus.split_hash("argparse.py") == 0x56DD8D1DC3FD7954
  ids = [f"doc{i}" for i in range(10_000)]
  held = {id for id in ids if corpus.is_validation(id, 0.1)}
  assert 850 < len(held) < 1150
  assert {id for id in ids if corpus.is_validation(id, 0.01)} < held


def test_tfds_by_name_without_tensorflow(tmp_path):
  code = f"""
import sys
import numpy as np
import tensorflow_datasets as tfds

class TinyText(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.2.0")
  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(
        {{"text": tfds.features.Text(), "n": np.int64}}))
  def _split_generators(self, download_manager):
    return {{"train": self._generate_examples(5), "test": self._generate_examples(2)}}
  def _generate_examples(self, n):
    for i in range(n):
      yield i, {{"text": f"dokument {{i}} é" if i else "", "n": i}}

TinyText(data_dir={str(tmp_path)!r}, file_format="array_record").download_and_prepare()

from chinchilla_jax.config import Corpus
from chinchilla_jax.data import corpus
from chinchilla_jax.errors import UserError

def read(source, field="text"):
  skipped = corpus.Skipped()
  settings = Corpus(sources=(source,), tfds_data_dir={str(tmp_path)!r}, text_field=field)
  return {{d.id: d.text for d in corpus.documents(settings, skipped)}}, skipped.counts

texts, skipped = read("tfds:tiny_text")
assert sorted(texts.values()) == [f"dokument {{i}} é" for i in range(1, 5)], texts
assert all(id.startswith("tiny_text/train#") for id in texts), texts
assert skipped == {{"empty": 1}}, skipped
assert list(read("tfds:tiny_text:1.2.0@test")[0].values()) == ["dokument 1 é"]
assert len(read("tfds:tiny_text@train[:2]")[0]) <= 2
for source, field, message in (
    ("tfds:tiny_text@dev", "text", "no split 'dev' (found: "),
    ("tfds:tiny_text", "body", "field 'body' (found: n, text)"),
    ("tfds:no_such_dataset", "text", "no such dataset"),
    ("tfds:?", "text", "is not tfds:NAME")):
  try:
    read(source, field)
  except UserError as error:
    assert message in str(error) and "\\n" not in str(error), error
  else:
    raise AssertionError(source)
# What is stored as TFRecord needs TensorFlow: refused.
import pathlib
info = pathlib.Path({str(tmp_path)!r}, "tiny_text/1.2.0/dataset_info.json")
info.write_text(info.read_text().replace("array_record", "tfrecord"))
try:
  read("tfds:tiny_text")
except UserError as error:
  assert "needs TensorFlow" in str(error), error
else:
  raise AssertionError("tfrecord")
assert "tensorflow" not in sys.modules and "jax" not in sys.modules
"""
  subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
