"""Whatever goes into the tokenizer comes back, byte for byte."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_corpora import make_text

from chinchilla_jax import config
from chinchilla_jax.data import tokenizer as tokenizers
from chinchilla_jax.errors import UserError

TEXTS = [make_text(i) for i in range(60)]
AWKWARD = [
    "", " ", "\u2581", "\u2581\u2581 \u2581a", "\0", "a\0b", "\n", "\n\n\n", "\r\n", "\t\t x",
    " " * 1000, "  a  b ", "\ufeffx", "🙂", "\U0001f469\u200d\U0001f467", "e\u0301", "Ａﬁ",
    "\u00a0\u3000\u200b", "\ufffd", "\ufffe\uffff", "\U0010ffff", "\u2047", " \u2047 ",
    "<s>", "</s>", "<unk>", "<pad>", "<0x0A>", "<0xE2>", "x" * 10_000, "no break " * 2_000,
    "def f():\n    return 1\n"]
PIECES = st.sampled_from([*AWKWARD, *TEXTS[0].splitlines(keepends=True)])


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request, tmp_path_factory):
  path = str(tmp_path_factory.mktemp("tokenizer") / "x.model")
  return tokenizers.train(
      TEXTS, config.Tokenizer(vocab_size=500, model_type=request.param), path)


def check_lossless(tokenizer, text: str):
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32 and ids.ndim == 1
  assert tokenizer.decode(ids) == text
  assert tokenizer.decode_bytes(ids) == text.encode()
  assert tokenizer.piece_bytes_v[ids].sum() == len(text.encode())
  assert not np.isin(ids, (tokenizers.PAD, tokenizers.UNK, tokenizers.BOS)).any()
  assert (tokenizer.encode(text.encode()) == ids).all()


@pytest.mark.parametrize("text", AWKWARD, ids=lambda text: ascii(text[:12]))
def test_awkward_text_is_lossless(tokenizer, text):
  check_lossless(tokenizer, text)


@settings(max_examples=150, deadline=None)
@given(text=st.one_of(st.text(), st.lists(PIECES, max_size=8).map("".join)))
def test_any_text_is_lossless(tokenizer, text):
  check_lossless(tokenizer, text)


def test_attributes(tokenizer, tmp_path):
  assert 300 < tokenizer.vocab_size <= 500
  assert tokenizer.vocab_size == len(tokenizer.piece_bytes_v)
  assert tokenizer.bos_id == tokenizers.BOS and tokenizer.pad_id == tokenizers.PAD
  assert tokenizer.piece_bytes_v[:3].tolist() == [0, 0, 0]
  assert tokenizer.piece_bytes_v[3:259].tolist() == [1] * 256
  assert tokenizer.piece_bytes_v.dtype == np.int32
  copy = tmp_path / "copy.model"
  copy.write_bytes(tokenizer.model)
  assert tokenizers.load(str(copy)).fingerprint == tokenizer.fingerprint


def test_decode_of_broken_characters(tokenizer):
  ids = tokenizer.encode("🦉")  # not in the corpus: four byte pieces
  assert len(ids) == 4 and tokenizer.decode_bytes(ids[:2]) == "🦉".encode()[:2]
  assert "\ufffd" in tokenizer.decode(ids[:2])


def test_encode_batch(tokenizer):
  for ids, text in zip(tokenizer.encode_batch(TEXTS[:3]), TEXTS[:3], strict=True):
    assert (ids == tokenizer.encode(text)).all()


def test_whitespace_of_code_becomes_few_pieces(tokenizer):
  assert len(tokenizer.encode(" " * 8)) <= 2
  assert len(tokenizer.encode("\n        ")) <= 3


def test_training_is_deterministic_in_any_process(tokenizer, tmp_path):
  """Other thread counts of the machine, another hash seed: the same model."""
  code = ("import os, sys; sys.path.insert(0, 'tests/data')\n"
          "if hasattr(os, 'sched_setaffinity'):\n"
          "  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
          "from tiny_corpora import make_text\nfrom chinchilla_jax import config\n"
          "from chinchilla_jax.data import tokenizer\n"
          "texts = [make_text(i) for i in range(60)]\n"
          "for kind in ('unigram', 'bpe'):\n"
          "  settings = config.Tokenizer(vocab_size=500, model_type=kind)\n"
          f"  print(tokenizer.train(texts, settings, {str(tmp_path / 'x.model')!r}).fingerprint)")
  done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
  assert tokenizer.fingerprint in done.stdout.split()
  assert done.stderr == ""  # SentencePiece's log is quiet


@pytest.mark.parametrize(
    "text", ["a", "é", "\n", " ", "\t", "\0", "\u2581", "\u2047", "<s>", "x" * 50_000,
             "中文字符" * 50, "hello world"], ids=lambda text: ascii(text[:6]))
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_the_smallest_corpora_work(tmp_path, text, kind):
  trained = tokenizers.train([text], config.Tokenizer(vocab_size=32_000, model_type=kind),
                             str(tmp_path / "x.model"))
  assert 259 < trained.vocab_size < 32_000
  check_lossless(trained, text)


def test_many_characters_and_few_pieces(tmp_path):
  """More characters than pieces: the rare ones are spelled in bytes."""
  text = "".join(chr(0x4E00 + i) for i in range(3000)) + "the common words " * 200
  trained = tokenizers.train([text], config.Tokenizer(vocab_size=300), str(tmp_path / "x.model"))
  assert trained.vocab_size <= 300
  check_lossless(trained, text)


def train_plain(path, **settings):
  """A model by SentencePiece's own defaults, as people have them."""
  import sentencepiece
  with open(path, "wb") as file:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=file, minloglevel=2, vocab_size=500,
        hard_vocab_limit=False, **settings)
  return str(path)


def test_lossy_tokenizers_are_refused(tmp_path):
  for settings_, match in (({}, "no byte fallback"), (dict(byte_fallback=True), "unchanged"),
                           (dict(byte_fallback=True, bos_id=-1), "no BOS")):
    path = train_plain(tmp_path / "x.model", **settings_)
    with pytest.raises(UserError, match=match):
      tokenizers.load(path)
  (tmp_path / "y.model").write_bytes(b"no model")
  with pytest.raises(UserError, match="no SentencePiece model"):
    tokenizers.load(str(tmp_path / "y.model"))
  with pytest.raises(UserError, match="no tokenizer at"):
    tokenizers.load(str(tmp_path))
