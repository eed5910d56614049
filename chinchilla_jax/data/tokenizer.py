"""SentencePiece with byte fallback and no normalisation: every text comes back byte for byte.

Chinchilla used SentencePiece without NFKC (Hoffmann et al. 2022, section 4.1); Gopher's falls back
to bytes (Rae et al. 2021, section 2.1). Pieces never span two words, as in SentencePiece's default;
unlike its default, letters, digits, punctuation and line breaks may share a piece, which saves
about a tenth of the tokens of source code.

SentencePiece spells a space as U+2581. A real U+2581 in the text would come back as a space, so it
is encoded as its three bytes here, and decoding goes by this module's table of pieces.
"""

import collections
import hashlib
import io
import os
import re
from collections.abc import Iterable

import numpy as np

from chinchilla_jax.errors import UserError
from chinchilla_jax.storage import objects, paths

PAD, UNK, BOS = 0, 1, 2  # control pieces; UNK never occurs, since every byte has a piece
_N_RESERVED = 3 + 256
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # how SentencePiece spells a space
# Kept out of training: SentencePiece would drop the sentence (U+2047), or spells spaces and
# boundaries with them. They are encoded as bytes.
_NOT_TRAINED = "\u2047\u2581\0"
_SENTENCE_CHARS = 2000  # training text is cut into lines of about this length
_CHARACTER_COVERAGE = 0.9995  # of the sample; rarer characters are spelled in bytes
# The result depends on the number of threads (they sum in groups), so it is not the machine's.
_THREADS = 16


class Tokenizer:
  """A trained SentencePiece model.

  Attributes:
    vocab_size: pieces, control and byte pieces included.
    bos_id, pad_id: control pieces. BOS starts a document; predicting it means that one has ended.
    piece_bytes_v: int32 [vocab_size], bytes of UTF-8 that each piece stands for; 0 for control
      pieces.
    fingerprint: SHA-256 of the model file, in hex.
    model: the model file's bytes.
  """

  def __init__(self, model: bytes, where: str = "tokenizer"):
    import sentencepiece
    try:
      if not model:  # SentencePiece would take it for "load none".
        raise RuntimeError
      self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
      raise UserError(f"{where} is no SentencePiece model, or a damaged one: name a whole .model "
                      "file or a token store") from error
    self.model = model
    self.fingerprint = hashlib.sha256(model).hexdigest()
    self.vocab_size = self._pieces.vocab_size()
    self.bos_id = self._pieces.bos_id()
    self.pad_id = self._pieces.pad_id()
    self._bytes = [self._piece_bytes(id) for id in range(self.vocab_size)]
    self.piece_bytes_v = np.array([len(piece) for piece in self._bytes], np.int32)
    self._byte_ids = {piece[0]: id for id, piece in enumerate(self._bytes)
                      if piece and self._pieces.is_byte(id)}
    self._check(where)

  def _piece_bytes(self, id: int) -> bytes:
    if self._pieces.is_control(id) or self._pieces.is_unknown(id):
      return b""
    piece = self._pieces.id_to_piece(id)
    if self._pieces.is_byte(id):
      byte = _BYTE.fullmatch(piece)
      return bytes((int(byte[1], 16),)) if byte else b""  # `_check` finds the one that lacks
    return piece.replace(_SPACE, " ").encode("utf-8")

  def _check(self, where: str):
    cure = "train one with `chinchilla prepare`"
    if self.bos_id < 0:
      raise UserError(f"{where} has no BOS piece, which marks where documents start: {cure}")
    if len(self._byte_ids) < 256:
      raise UserError(f"{where} has no byte fallback, so it would lose characters: {cure}")
    probe = "  Ａ\ufb01 \n\t x "  # runs of spaces, a full-width A, a ligature
    if self.decode(self.encode(probe)) != probe:
      raise UserError(f"{where} does not give text back unchanged (it normalises): {cure}")
    if self.pad_id < 0 or self.pad_id == self.bos_id:
      raise UserError(f"{where} has no PAD piece, which fills up the end of a store: {cure}")

  def encode(self, text: str | bytes) -> np.ndarray:
    """Ids of a text (str, or bytes of valid UTF-8), int32 [n]; no BOS is added."""
    if isinstance(text, str):
      text = text.encode("utf-8")
    space = _SPACE.encode()
    if space not in text:
      return np.array(self._pieces.encode(text), np.int32)
    in_bytes = np.array([self._byte_ids[byte] for byte in space], np.int32)
    parts = []
    for part in text.split(space):
      parts += [in_bytes, np.array(self._pieces.encode(part), np.int32)]
    return np.concatenate(parts[1:])

  def encode_batch(self, texts: Iterable[str | bytes]) -> list[np.ndarray]:
    """`encode` of each text."""
    return [self.encode(text) for text in texts]

  def decode_bytes(self, ids) -> bytes:
    """The exact bytes that ids stand for; ids cut anywhere may end inside a character."""
    return b"".join([self._bytes[id] for id in np.asarray(ids).reshape(-1).tolist()])

  def decode(self, ids) -> str:
    """The text that ids stand for; bytes that are not valid UTF-8 become U+FFFD."""
    return self.decode_bytes(ids).decode("utf-8", errors="replace")


def train(texts: Iterable[str | bytes], config, model_path: str) -> Tokenizer:
  """Trains a tokenizer and writes it to `model_path`.

  Deterministic: the same texts in the same order give the same model on any number of cores.

  Args:
    texts: the sample; SentencePiece holds it in memory, several times over.
    config: the `tokenizer` section; `vocab_size` is an upper limit.
    model_path: the .model file to write.

  Raises:
    UserError: SentencePiece cannot make such a tokenizer from these texts.
  """
  texts = [text if isinstance(text, str) else text.decode("utf-8") for text in texts]
  sentences = _sentences(texts, max_characters=max(1, (config.vocab_size - _N_RESERVED) // 2))
  try:
    model = _train(sentences, config)
  except (RuntimeError, OSError, ValueError, OverflowError) as error:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(f"SentencePiece makes no tokenizer of {config.vocab_size:,} pieces from this "
                    f"corpus ({reason}): lower config.tokenizer.vocab_size, or prepare more text"
                    ) from error
  with open(model_path, "wb") as file:
    file.write(model)
  return Tokenizer(model, model_path)


def load(path: str) -> Tokenizer:
  """Loads a .model file, or the tokenizer of a token store.

  Raises:
    UserError: no such file, not a SentencePiece model, or one that would lose text.
  """
  file = os.path.join(path, "tokenizer.model") if os.path.isdir(path) else path
  if paths.is_remote(path) and not path.endswith(".model"):
    file = f"{path.rstrip('/')}/tokenizer.model"
  try:
    return Tokenizer(paths.at(file).read_bytes(), file)
  except objects.Unreachable:
    raise
  except OSError as error:
    raise UserError(f"no tokenizer at {path} ({error.strerror}): name a .model file or a token "
                    f"store in config.tokenizer.path") from error


def _sentences(texts: list[str], max_characters: int) -> list[str]:
  """Training sentences: pieces of text that keep their line breaks.

  Characters beyond the coverage are replaced by a tab, which SentencePiece takes for a boundary:
  each kept character costs one piece, and a small vocabulary must not be spent on them.
  """
  counts = collections.Counter()
  for text in texts:
    counts.update(text)
  for character in _NOT_TRAINED:
    counts.pop(character, None)
  wanted = _CHARACTER_COVERAGE * counts.total()
  kept, covered = set(), 0
  for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
    if covered >= wanted or len(kept) == max_characters:
      break
    kept.add(character)
    covered += count
  rare = {ord(c): "\t" for c in (*counts, *_NOT_TRAINED) if c not in kept}
  sentences = []
  for text in texts:
    if rare:
      text = text.translate(rare)
    sentences += _cut(text)
  # So that even the smallest corpus has a sentence, and a piece for the space: without one,
  # SentencePiece would spell a space with the three bytes of U+2581.
  return [*sentences, " \n "]


def _cut(text: str) -> list[str]:
  """Cuts a text after line breaks into pieces of about `_SENTENCE_CHARS`."""
  pieces, start = [], 0
  while start < len(text):
    end = text.find("\n", start + _SENTENCE_CHARS) + 1
    # A line without end is cut anyway: training time grows with the square of the longest word.
    if not end or end > start + 4 * _SENTENCE_CHARS:
      end = start + 2 * _SENTENCE_CHARS
    pieces.append(text[start:end])
    start = end
  return pieces


def _train(sentences: list[str], config) -> bytes:
  import sentencepiece
  model = io.BytesIO()
  settings = dict(
      model_type=config.model_type,
      vocab_size=config.vocab_size,
      hard_vocab_limit=False,  # a small corpus gets fewer pieces
      num_threads=_THREADS,
      # Lossless: text goes in as it is, and every byte has a piece.
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      byte_fallback=True,
      character_coverage=1.0,  # `_sentences` has replaced the rare ones
      max_sentence_length=1 << 30,
      # Compression (docs/data.md has the measurements): ":\n", "x[0]" and deep indents in a piece.
      split_by_unicode_script=False,
      max_sentencepiece_length=32,
      # Speed: fewer seeds of the unigram model, larger steps in pruning, one round of EM a step.
      seed_sentencepiece_size=4 * config.vocab_size,
      shrinking_factor=0.5,
      num_sub_iterations=1,
      pad_id=PAD, unk_id=UNK, bos_id=BOS, eos_id=-1,
      minloglevel=2)
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(sentences), model_writer=model, **settings)
  return model.getvalue()
