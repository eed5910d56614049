"""The token store gives back what went in, and refuses to open when it cannot."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_corpora import WORDS

from chinchilla_jax import config
from chinchilla_jax.data import corpus, staging, token_writer, tokens
from chinchilla_jax.data import ledger as ledgers
from chinchilla_jax.data import tokenizer as tokenizers
from chinchilla_jax.errors import UserError


@pytest.fixture
def copy(texts_and_store, tmp_path):
  """A store that may be damaged."""
  shutil.copytree(texts_and_store[1], tmp_path / "copy")
  return tmp_path / "copy"


def a_tokenizer(tmp_path) -> tokenizers.Tokenizer:
  return tokenizers.train([" ".join(WORDS)], config.Tokenizer(vocab_size=300),
                          str(tmp_path / "x.model"))


def write_store(path, tokenizer, documents, shard_bytes=token_writer.SHARD_BYTES) -> dict:
  """A store of (split, ids, n_bytes) documents."""
  with staging.staged(str(path)) as folder:
    writer = token_writer.StoreWriter(folder, tokenizer, shard_bytes)
    for document in documents:
      writer.add(*document)
    return writer.finish({})


def test_held_out_bytes_are_the_documents(texts_and_store, store):
  texts, _ = texts_and_store
  below = int(store.ledger["corpus"]["split"]["held_out_below"], 16)
  expected = {"train": b"", "validation": b""}
  for id in sorted(texts):
    expected["validation" if corpus.split_hash(id) < below else "train"] += texts[id].encode()
  for name, text in expected.items():
    split = store.split(name)
    assert tokens.held_out_bytes(store, name) == text and text
    assert split.n_bytes == len(text)
    ids = split.read(0, split.n_tokens)
    assert (ids == split.bos_id).sum() == split.n_documents == len(list(split.documents()))
    assert ids[0] == split.bos_id and ids.dtype == np.uint16
    assert store.tokenizer.piece_bytes_v[ids].sum() == split.n_bytes


def test_plain_tfds_reads_the_store_without_tensorflow(texts_and_store):
  code = f"""
import sys
import numpy as np
import tensorflow_datasets as tfds
from chinchilla_jax.data import tokens
builder = tfds.builder_from_directory({texts_and_store[1]!r})
for name in ("train", "validation"):
  split = tokens.open_store({texts_and_store[1]!r}).split(name)
  source = builder.as_data_source(split=name)
  assert len(source) == -(-split.n_tokens // tokens.CHUNK) == builder.info.splits[name].num_examples
  ids = np.concatenate([source[i]["ids"] for i in range(len(source))])
  assert ids.dtype == np.uint16
  assert (ids[:split.n_tokens] == split.read(0, split.n_tokens)).all()
  assert (ids[split.n_tokens:] == split.pad_id).all()
assert "tensorflow" not in sys.modules and "jax" not in sys.modules
"""
  subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_reading_imports_neither_tfds_nor_tensorflow_nor_jax(texts_and_store):
  code = (f"import sys\nfrom chinchilla_jax.data import batches, tokens\n"
          f"split = tokens.open_store({texts_and_store[1]!r}).split('train')\n"
          "batches.Batches(split, seq_len=8, seed=0).batch(0, 2)\n"
          "print({'tensorflow', 'tensorflow_datasets', 'jax', 'pyarrow'} & set(sys.modules))")
  done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
  assert done.stdout.strip() == "set()"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
  """(ids of the train stream, split) of a store of many small shards."""
  folder = tmp_path_factory.mktemp("sharded")
  tokenizer = a_tokenizer(folder)
  rng = np.random.default_rng(0)
  documents = [("train", rng.integers(3, tokenizer.vocab_size, n), 7)
               for n in (1, tokens.CHUNK - 2, 1, 5 * tokens.CHUNK, 0, 17, 3 * tokens.CHUNK)]
  documents.append(("validation", np.array([5]), 1))
  write_store(folder / "store", tokenizer, documents, shard_bytes=2 * tokens.CHUNK * 2)
  store = tokens.open_store(str(folder / "store"))
  assert len(store.ledger["splits"]["train"]["files"]) >= 4
  stream = np.concatenate([np.append(store.tokenizer.bos_id, ids) for split, ids, _ in documents
                           if split == "train"])
  return stream, store.split("train"), [ids for split, ids, _ in documents if split == "train"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_access(sharded, data):
  stream, split, _ = sharded
  length = data.draw(st.integers(1, 3 * tokens.CHUNK))
  starts = data.draw(st.lists(st.integers(0, len(stream) - length), min_size=1, max_size=6))
  assert (split.windows(np.array(starts), length) ==
          np.stack([stream[start:start + length] for start in starts])).all()
  assert (split.read(starts[0], length) == stream[starts[0]:starts[0] + length]).all()


def test_documents_and_ends_of_the_stream(sharded):
  stream, split, documents = sharded
  assert split.n_tokens == len(stream)
  assert (split.read(0, len(stream)) == stream).all()
  for ids, expected in zip(split.documents(), documents, strict=True):
    assert ids.tolist() == expected.tolist()
  assert split.read(5, 0).shape == (0,) and split.windows(np.array([]), 3).shape == (0, 3)
  for start, count in ((-1, 2), (len(stream) - 1, 2)):
    with pytest.raises(IndexError):
      split.read(start, count)


def test_few_open_files_are_enough(sharded, monkeypatch):
  stream, split, _ = sharded
  monkeypatch.setattr(tokens, "_OPEN_FILES", 1)
  starts = np.arange(0, len(stream) - 10, 3001)[::-1]
  assert (split.windows(starts, 10) == np.stack([stream[s:s + 10] for s in starts])).all()


def test_large_vocabularies_take_four_bytes():
  assert tokens.dtype_for(2**16) == np.uint16 and tokens.dtype_for(2**16 + 1) == np.uint32


@pytest.mark.parametrize("n_bytes", [1, 2 * tokens.CHUNK, 4 * tokens.CHUNK, 10**6])
def test_the_frame_is_protobuf(n_bytes):
  from tensorflow_datasets.proto import tf_example_pb2
  record = tokens.frame(n_bytes) + b"x" * n_bytes
  message = tf_example_pb2.Example.FromString(record)
  assert list(message.features.feature) == ["ids"]
  assert list(message.features.feature["ids"].bytes_list.value) == [b"x" * n_bytes]
  assert message.SerializeToString() == record


def test_the_fingerprint_is_of_the_content(sharded, tmp_path):
  tokenizer = a_tokenizer(tmp_path)
  documents = [("train", np.arange(3, 50), 60), ("validation", np.arange(3, 9), 6)]
  first = write_store(tmp_path / "a", tokenizer, documents)
  same = write_store(tmp_path / "b" / "c", tokenizer, documents, shard_bytes=1)
  other = write_store(tmp_path / "d", tokenizer, documents[::-1] + documents[:1])
  assert first["fingerprint"] == same["fingerprint"] != other["fingerprint"]
  assert str(tmp_path) not in (tmp_path / "a" / "ledger.json").read_text()
  assert str(tmp_path) not in (tmp_path / "a" / "dataset_info.json").read_text()


def files_of(folder) -> list[str]:
  return [file["name"] for file in ledgers.files(json.loads((folder / ledgers.FILE).read_text()))]


def refused(path, verify="auto", *, match):
  with pytest.raises(UserError, match=match) as caught:
    tokens.open_store(str(path), verify)
  assert "\n" not in str(caught.value)


def test_every_file_is_checked(copy):
  names = files_of(copy)
  assert sorted([*names, ledgers.FILE]) == sorted(os.listdir(copy))
  for name in names:
    path = copy / name
    content = path.read_bytes()
    path.unlink()
    refused(copy, "sizes", match=f"{name} is missing")
    path.write_bytes(content[:-1])
    refused(copy, "sizes", match=f"{name} has .* bytes")
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes((content[middle] ^ 1,)) + content[middle + 1:])
    refused(copy, match=f"{name} has changed")
    path.write_bytes(content)
  tokens.open_store(str(copy), "full")


def test_large_stores_are_checked_by_size_only(copy, monkeypatch):
  monkeypatch.setattr(ledgers, "FULL_CHECK_BYTES", 10)
  info = copy / "dataset_info.json"
  info.write_bytes(info.read_bytes().replace(b"Token", b"token"))
  tokens.open_store(str(copy))
  refused(copy, "full", match="dataset_info.json has changed")
  refused(copy, "thorough", match="one of full, sizes, auto")


def test_damage_that_the_sizes_do_not_show_is_found_when_read(copy):
  (name,) = [name for name in files_of(copy) if "train" in name]
  content = bytearray((copy / name).read_bytes())
  content[1000] ^= 0xFF  # later bytes may be padding
  (copy / name).write_bytes(content)
  split = tokens.open_store(str(copy), "sizes").split("train")
  with pytest.raises(UserError, match=name):
    split.read(0, split.n_tokens)


def test_a_tokenizer_of_another_store_is_refused(copy, tmp_path):
  other = a_tokenizer(tmp_path)
  (copy / "tokenizer.model").write_bytes(other.model)
  ledger = json.loads((copy / ledgers.FILE).read_text())
  ledger["files"] = [ledgers.describe_file(str(copy / file["name"])) for file in ledger["files"]]
  ledgers.write(str(copy), ledger)
  refused(copy, match="tokenizer.model did not make these tokens")


def test_edited_and_foreign_ledgers_are_refused(copy):
  path = copy / ledgers.FILE
  ledger = json.loads(path.read_text())
  for edited, match in (({**ledger, "vocab_size": 7}, "edited"),
                        ({**ledger, "version": 99}, "update chinchilla_jax"),
                        ({}, "damaged"), ([], "damaged")):
    path.write_text(json.dumps(edited))
    refused(copy, match=match)
  path.write_text("{")
  refused(copy, match="damaged")


def test_what_is_no_store_is_refused_with_a_hint(copy, tmp_path):
  refused(tmp_path / "cop", match=f"no token store at .*/cop: did you mean {copy}.* prepare")
  refused(copy / "ledger.json", match="is a file")
  refused("nosuch://bucket/store", match="is not understood here")
  (tmp_path / "deep" / "empty").mkdir(parents=True)
  refused(tmp_path / "deep" / "empty", match="make it with `chinchilla prepare --config")
  (tmp_path / "deep" / ".empty.preparing").mkdir()
  refused(tmp_path / "deep" / "empty", match="a prepare is running or was cut off")
  with pytest.raises(UserError, match="no split 'test'"):
    tokens.open_store(str(copy)).split("test")
