"""Text to token store: survey the corpus, train the tokenizer, encode.

Two streaming passes, so the corpus may be larger than memory. The store is the same whatever the
number of processes, and appears whole or not at all.
"""

import contextlib
import os
import time

from chinchilla_jax.data import corpus as corpora
from chinchilla_jax.data import ledger as ledgers
from chinchilla_jax.data import remote_store, staging, token_writer, workers
from chinchilla_jax.data import survey as surveys
from chinchilla_jax.data import tokenizer as tokenizers
from chinchilla_jax.data.progress import Progress
from chinchilla_jax.errors import UserError
from chinchilla_jax.storage import paths

_IN_PROCESS_BYTES = 4 << 20  # a tokenizer for a smaller sample is trained in seconds, right here


def prepare(config, *, overwrite: bool = False, n_workers: int = 0, quiet: bool = False) -> dict:
  """Makes the token store at `config.data.store`, unless it is there already.

  A store in a bucket is made on this machine first, then put there.

  Args:
    config: an Experiment; reads its sections corpus, tokenizer and data.store.
    overwrite: replace a store made with other settings or from other text.
    n_workers: encoding processes; 0: as many as there are cores and the corpus is worth.
    quiet: no progress, no summary.

  Returns:
    The store's ledger.

  Raises:
    UserError: nothing has been written, or replaced, by then.
  """
  start = time.monotonic()
  progress = Progress(quiet)
  store = config.data.store.rstrip("/") if paths.is_remote(config.data.store) else (
      os.path.expanduser(config.data.store))
  _refuse_foreign(store)
  tokenizer = tokenizers.load(config.tokenizer.path) if config.tokenizer.path else None
  settings = _settings(config, tokenizer)
  inventory = surveys.inventory(config.corpus)
  if _exists(store) and not overwrite:
    return _existing(store, config, settings, inventory, progress)
  with contextlib.ExitStack() as stack:
    if paths.is_remote(store):
      folder = str(stack.enter_context(paths.Scratch()))
    else:
      folder = stack.enter_context(staging.staged(store))
    sample_bytes = 0 if tokenizer else config.tokenizer.sample_bytes
    with progress.stage("reading the corpus") as advance:
      survey = surveys.survey(config.corpus, sample_bytes, advance)
    if tokenizer is None:
      tokenizer = _train(survey.sample, config.tokenizer, folder, progress)
    survey.sample.clear()  # up to sample_bytes of memory
    n_workers = n_workers or workers.default_workers(survey.bytes)
    writer = token_writer.StoreWriter(folder, tokenizer)
    try:
      _encode(config.corpus, survey, tokenizer, writer, n_workers, progress)
      ledger = writer.finish({
          "settings": settings,
          "corpus": {"documents": survey.documents, "bytes": survey.bytes,
                     "sha256": survey.digest, "inventory": inventory,
                     "skipped": survey.skipped.counts,
                     "skipped_examples": survey.skipped.examples,
                     "split": {"hash": "blake2b-64 of the document's id",
                               "held_out_below": f"{survey.threshold:#018x}"}}})
    finally:
      writer.close()
    if paths.is_remote(store):
      with progress.stage(f"putting it into {store}"):
        remote_store.put(folder, ledger, store)
  for line in summary(store, ledger, time.monotonic() - start):
    progress.say(line)
  return ledger


def summary(store: str, ledger: dict, seconds: float | None = None) -> list[str]:
  """What a store holds, in lines for people."""
  corpus = ledger["corpus"]
  lines = []
  for name, split in ledger["splits"].items():
    lines.append(f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, "
                 f"{split['bytes']:,} bytes, {split['bytes'] / split['tokens']:.3f} bytes/token")
  lines += corpora.Skipped(corpus["skipped"], corpus["skipped_examples"]).lines()
  asked = ledger["settings"]["tokenizer"].get("vocab_size", ledger["vocab_size"])
  fewer = f" ({asked:,} asked; the corpus yields no more)" if ledger["vocab_size"] < asked else ""
  lines.append(f"tokenizer: {ledger['vocab_size']:,} pieces{fewer}")
  took = (f" in {seconds:.1f} s, {corpus['bytes'] / 1e6 / seconds:.1f} MB/s" if seconds else "")
  lines.append(f"{store}: fingerprint {ledger['fingerprint'][:16]}{took}")
  return lines


def _refuse_foreign(store: str):
  """Never replaces anything but a store."""
  ledgers.refuse_impossible(store)
  if paths.is_remote(store):
    paths.at(store)  # Says what is wrong with it.
    remote_store.refuse_foreign(store)
    return
  staging.recover(store)
  if os.path.isfile(store):
    raise UserError(f"{store} is a file: choose another --config.data.store")
  if (os.path.isdir(store) and os.listdir(store)
      and not os.path.exists(os.path.join(store, ledgers.FILE))):
    raise UserError(f"{store} holds files but no token store: choose another --config.data.store, "
                    f"or empty it yourself")


def _exists(store: str) -> bool:
  if paths.is_remote(store):
    return remote_store.exists(store)
  return os.path.exists(os.path.join(store, ledgers.FILE))


def _settings(config, tokenizer: tokenizers.Tokenizer | None) -> dict:
  """What a store is made from, as its ledger keeps it."""
  corpus, pieces = config.corpus, config.tokenizer
  return {
      "corpus": {"sources": list(corpus.sources), "text_field": corpus.text_field,
                 "validation_fraction": corpus.validation_fraction},
      "tokenizer": {"fingerprint": tokenizer.fingerprint} if tokenizer else {
          "vocab_size": pieces.vocab_size, "model_type": pieces.model_type,
          "sample_bytes": pieces.sample_bytes}}


def _existing(store: str, config, settings: dict, inventory: str, progress: Progress) -> dict:
  """The ledger of a store that is what would be made now; a UserError where it is not."""
  ledger = ledgers.read(store)
  cure = "choose another --config.data.store, or pass --overwrite"
  ledgers.check_notes(store, ledger)
  for section, now in settings.items():
    was = ledger["settings"][section]
    for key in sorted({*now, *was}):
      if now.get(key) != was.get(key):
        raise UserError(f"{store} was made with {section}.{key} = {was.get(key)!r}, now it is "
                        f"{now.get(key)!r}: {cure}")
  if paths.is_remote(store):
    remote_store.check_sizes(store, ledger)
  else:
    ledgers.verify(store, ledger, config.data.verify)
  if inventory != ledger["corpus"]["inventory"]:
    # Touched, copied or changed: only the text itself can tell.
    with progress.stage("reading the corpus, whose files look changed") as advance:
      survey = surveys.survey(config.corpus, 0, advance)
    if survey.digest != ledger["corpus"]["sha256"]:
      raise UserError(f"{store} was made from {ledger['corpus']['documents']:,} documents of "
                      f"{ledger['corpus']['bytes']:,} bytes; the sources have changed since, now "
                      f"{survey.documents:,} of {survey.bytes:,}: {cure}")
  progress.say(f"{store} is up to date")
  for line in summary(store, ledger):
    progress.say(line)
  return ledger


def _train(sample: list[bytes], config, folder: str, progress: Progress) -> tokenizers.Tokenizer:
  n_bytes = sum(map(len, sample))
  progress.say(f"training a tokenizer of up to {config.vocab_size:,} pieces on "
               f"{n_bytes / 1e6:,.1f} MB ...")
  path = os.path.join(folder, "tokenizer.model")
  if n_bytes < _IN_PROCESS_BYTES:
    return tokenizers.train(sample, config, path)
  workers.call(_train_apart, sample, config, path)
  return tokenizers.load(path)


def _train_apart(sample: list[bytes], config, path: str):
  tokenizers.train(sample, config, path)


def _encode(config, survey: surveys.Survey, tokenizer: tokenizers.Tokenizer,
            writer: token_writer.StoreWriter, n_workers: int, progress: Progress):
  digest = surveys.Digest()

  def items():
    for document in corpora.documents(config):
      digest.add(document)
      split = ("validation" if corpora.split_hash(document.id) < survey.threshold else "train")
      yield document.utf8, (split, len(document.utf8), document.first)

  with progress.stage(f"encoding with {n_workers} process{'es'[:2 * (n_workers > 1)]}",
                      survey.bytes) as advance:
    for ids, (split, n_bytes, first) in workers.encode(tokenizer, items(), n_workers):
      writer.add(split, ids, n_bytes, first)
      advance(n_bytes)
  if digest.hex() != survey.digest:
    raise UserError(f"{', '.join(config.sources)} changed while it was being read: run again when "
                    f"it is complete")
