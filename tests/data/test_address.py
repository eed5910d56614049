"""Where a batch comes from: a test reads the whole stream and compares."""

import itertools
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinchilla_jax.data import address as addresses
from chinchilla_jax.data import batches as batching
from chinchilla_jax.data import ledger as ledgers
from chinchilla_jax.data import staging, token_writer, tokens

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=8)


@pytest.fixture(scope="module")
def many_documents(store, tmp_path_factory):
  """(path, ids of the stream): 12 shards whose documents are counted every two chunks."""
  path, rng = tmp_path_factory.mktemp("documents") / "store", np.random.default_rng(0)
  with staging.staged(str(path)) as folder, pytest.MonkeyPatch.context() as patch:
    patch.setattr(token_writer, "COUNTED_CHUNKS", 2)
    writer = token_writer.StoreWriter(folder, store.tokenizer, shard_bytes=5 * 2 * tokens.CHUNK)
    # Long ones, that begin in no chunk for a while, and short ones, that fill a chunk.
    for n in (*rng.integers(0, 200, 300), 50_000, *rng.integers(0, 20, 900), 90_000, 0, 0, 60_000):
      writer.add("train", rng.integers(3, 300, n), int(n))
    writer.add("validation", np.array([5]), 1)
    writer.finish({})
  split = tokens.open_store(str(path)).split("train")
  return path, split.read(0, split.n_tokens)


def test_the_ledger_counts_the_documents_of_every_stretch(many_documents, store):
  path, stream = many_documents
  files = ledgers.read(str(path))["splits"]["train"]["files"]
  assert len(files) >= 10
  chunks = np.array_split(stream, np.arange(tokens.CHUNK, len(stream), tokens.CHUNK))
  for file in files:
    here, chunks = chunks[:file["chunks"]], chunks[file["chunks"]:]
    counts = [sum(int((chunk == store.tokenizer.bos_id).sum()) for chunk in here[k:k + 2])
              for k in range(0, len(here), 2)]
    assert file["documents"] == {"per_chunks": 2, "begun": counts}
  assert not chunks


@settings(max_examples=60, deadline=None)
@given(seq_len=st.integers(1, 9000), first=st.integers(0, 3000), count=st.integers(1, 6),
       limit=st.sampled_from([2, 64]), shuffled=st.booleans(), skipped=RANGES)
def test_the_address_of_a_batch(many_documents, seq_len, first, count, limit, shuffled, skipped):
  path, stream = many_documents
  split = tokens.open_store(str(path), "sizes").split("train")
  data = batching.Batches(split, seq_len=seq_len, seed=5, shuffle=shuffled, skipped=skipped)
  address = json.loads(json.dumps(addresses.of(data, first, count, limit)))
  index = data.actual(np.arange(first, first + count))
  starts = (data.windows(index) * seq_len).tolist()
  assert [i for a, b in address["sequences"] for i in range(a, b + 1)] == index.tolist()
  assert all(b + 1 < a for (_, b), (a, _) in itertools.pairwise(address["sequences"]))
  assert address["seed"] == 5 and address["tokens"] == starts[:limit]
  assert address["epochs"] == sorted(set((index // data.n_windows).tolist()))
  number = np.cumsum(stream == split.bos_id) - 1  # of the document of every token
  touched = [set(number[start:start + seq_len + 1].tolist()) for start in starts]
  assert address["documents"] == sorted(set().union(*touched[:limit]))[:limit]
  exact = len(set().union(*touched))
  assert address["n_documents"] == exact if count <= limit else address["n_documents"] >= exact


def test_an_old_or_odd_ledger_gives_the_place_in_the_stream(many_documents, tmp_path):
  """The counts are for logs only: none is needed, and wrong ones stop nothing."""
  path = tmp_path / "old"
  shutil.copytree(many_documents[0], path)
  ledger = ledgers.read(str(path))
  files = ledger["splits"]["train"]["files"]

  def address():
    ledgers.write(str(path), ledger)
    split = tokens.open_store(str(path), "sizes").split("train")
    return addresses.of(batching.Batches(split, seq_len=100, seed=0), 7, 3)

  whole = address()
  assert whole["documents"]
  bare = {key: whole[key] for key in ("seed", "sequences", "epochs", "tokens")}
  for odd in (None, [], {"per_chunks": 2, "begun": [1]}, {"per_chunks": 0, "begun": [1]},
              {"per_chunks": 2, "begun": 3}, {"per_chunks": 2, "begun": [2**80] * 3}):
    files[0]["documents"] = odd
    assert address() == bare
  for file in files:
    file.pop("documents")
  assert address() == bare
  assert addresses.text(bare) == "sequences 7 to 9 of seed 0"


@pytest.mark.parametrize("change, text", [
    ({}, "sequences 128 to 255 of seed 0 (documents 17, 18, 40)"),
    ({"sequences": [[3, 3]], "documents": [8], "n_documents": 1},
     "sequence 3 of seed 0 (document 8)"),
    ({"sequences": [[0, 0], [4, 4], [6, 131]]},
     "sequences 0, 4 and 6 to 131 of seed 0 (documents 17, 18, 40)"),
    ({"documents": list(range(64)), "n_documents": 70},
     "sequences 128 to 255 of seed 0 (documents 0, 1, 2, 3, 4, 5, 6, 7 and 62 more)"),
    ({"documents": [1, 2], "n_documents": 70, "tokens": [0] * 64},
     "sequences 128 to 255 of seed 0 (documents 1, 2 and up to 68 more)")])
def test_an_address_in_one_line(change, text):
  assert addresses.text({
      "seed": 0, "sequences": [[128, 255]], "epochs": [0], "tokens": [0] * 128,
      "documents": [17, 18, 40], "n_documents": 3, **change}) == text
