"""Text that cannot be prepared, places where no store can go, tokenizers that are none."""

import functools
import gzip
import hashlib
import json
import os
from collections.abc import Callable

from cases import READING, TEXT, Room, case

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


def two_documents(room: Room) -> None:
  for name in ("a", "b"):
    room.write(f"text/{name}.txt", TEXT * 20)


def place_case(name: str, flag: str, cause: str, cure: str,
               make: Callable[[Room], object] = lambda room: None) -> None:
  case(name, f"prepare text {flag}", cause, cure, lambda room: (two_documents(room), make(room)))


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
place_case("a store of an unknown scheme", "--store=nosuch://bucket/s",
           r"nosuch:// is not understood here", r"use gs://, s3://")
place_case("a store in /proc", "--store=/proc/x/s", r"cannot write /proc/x/s",
           r"choose another place")
place_case("a store below a device", "--store=/dev/null/s", r"cannot write /dev/null/s",
           r"choose another place")
place_case("a store of an endless name", f"--store={'s' * 300}", r"cannot write .*sss",
           r"choose another place")
place_case("a store made with other settings", "--store=store", r"store was made with corpus\.",
           r"choose another .*, or pass --overwrite", lambda room: room.store())

# -------------------------------------------------------------------- Tokenizers


def sentencepiece_model(**settings) -> bytes:
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
       lambda room: (two_documents(room), make(room)))


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
               lambda room: room.write("x.model", sentencepiece_model()[:-100]))
tokenizer_case("tokenizer without BOS", "x.model", r"x\.model has no BOS piece", r"train one with",
               lambda room: room.write("x.model", sentencepiece_model(bos_id=-1)))
tokenizer_case("tokenizer without PAD", "x.model", r"x\.model has no PAD piece", r"train one with",
               lambda room: room.write("x.model", sentencepiece_model()))
tokenizer_case("tokenizer without bytes", "x.model", r"x\.model has no byte fallback",
               r"train one with", lambda room: room.write(
                   "x.model", sentencepiece_model(byte_fallback=False, vocab_size=40, pad_id=3)))
case("vocabulary beyond all bounds",
     "prepare text --store=s --config.tokenizer.vocab_size=2147483647",
     r"SentencePiece makes no tokenizer of 2,147,483,647 pieces", r"lower config\.tokenizer\.vocab",
     two_documents, READING + "training a tokenizer of up to 2,147,483,647 pieces on 0.0 MB ...\n")
tokenizer_case("tokenizer that normalises", "x.model", r"x\.model does not give text back unchan",
               r"train one with", lambda room: room.write(
                   "x.model", sentencepiece_model(normalization_rule_name="nmt_nfkc", pad_id=3)))
