"""Stores that are damaged or lie, and runs that do not fit theirs."""

import functools
import json
import pathlib
import pickle
from collections.abc import Callable

from cases import TEXT, Room, case
from cases_text import sentencepiece_model, two_documents

from chinchilla_jax.data import ledger as ledgers

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
store_case("of an unknown scheme", r"nosuch:// is not understood here", r"use gs://, s3://",
           lambda room: None, "--config.data.store=nosuch://bucket/s")
store_case("without a bucket", r"'gs:///s' names no bucket", r"write gs://BUCKET/FOLDER",
           lambda room: None, "--config.data.store=gs:///s")
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
                         _damage(room, "tokenizer.model", lambda _: sentencepiece_model(pad_id=3))))
store_case("tokenizer of another store, in the ledger too",
           r"store: tokenizer\.model did not make these tokens", r"copy the store again",
           lambda room: (room.store(),
                         _damage(room, "tokenizer.model", lambda _: sentencepiece_model(pad_id=3)),
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
     lambda room: (two_documents(room), _ledger(room, lambda ledger: ledger.pop("settings"))))

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
