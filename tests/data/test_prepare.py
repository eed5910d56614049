"""Preparing is the same on any number of processes, leaves nothing half done, and runs once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tiny_corpora import experiment, make_corpus, make_text

from chinchilla_jax.data import ledger as ledgers
from chinchilla_jax.data import prepare as preparing
from chinchilla_jax.data import progress, staging, survey, tokens, workers
from chinchilla_jax.errors import UserError


def prepare(settings, **kwargs):
  return preparing.prepare(settings, quiet=True, **kwargs)


@pytest.fixture
def corpus(tmp_path):
  make_corpus(tmp_path / "corpus", 30)
  return tmp_path / "corpus"


def refused(settings, match, **kwargs):
  with pytest.raises(UserError, match=match) as caught:
    prepare(settings, **kwargs)
  assert "\n" not in str(caught.value)


def nothing_left(folder, *names):
  assert sorted(os.listdir(folder)) == sorted(names)


def test_the_ledger_tells_what_is_in_the_store(texts_and_store, store):
  texts, _ = texts_and_store
  ledger, splits = store.ledger, store.ledger["splits"]
  assert splits["train"]["documents"] + splits["validation"]["documents"] == len(texts)
  assert splits["train"]["bytes"] + splits["validation"]["bytes"] == sum(
      len(text.encode()) for text in texts.values()) == ledger["corpus"]["bytes"]
  assert ledger["corpus"]["skipped"] == {}
  assert ledger["settings"]["corpus"]["validation_fraction"] == 0.2
  assert {"chinchilla_jax", "python", "numpy", "sentencepiece"} <= set(ledger["versions"])


def test_one_and_two_processes_make_the_same_store(tmp_path, corpus, monkeypatch):
  monkeypatch.setattr(workers, "_JOB_BYTES", 2000)
  one = prepare(experiment(tmp_path / "one", [corpus]), n_workers=1)
  two = prepare(experiment(tmp_path / "two", [corpus]), n_workers=2)
  assert one == two
  for file in ledgers.files(one):
    assert (tmp_path / "one" / file["name"]).read_bytes() == (
        tmp_path / "two" / file["name"]).read_bytes()


def test_workers_import_nothing_heavy():
  heavy = {"jax", "tensorflow", "tensorflow_datasets", "pyarrow", "array_record"}
  assert "numpy" in workers.call(eval, "list(__import__('sys').modules)")
  assert not heavy & set(workers.call(eval, "list(__import__('sys').modules)"))


def test_preparing_imports_neither_tensorflow_nor_jax(tmp_path, corpus):
  code = f"""
import sys
sys.path.insert(0, "tests/data")
from tiny_corpora import experiment
from chinchilla_jax.data import prepare
prepare.prepare(experiment({str(tmp_path / "store")!r}, [{str(corpus)!r}]), quiet=True)
print({{"tensorflow", "jax"}} & set(sys.modules))
"""
  done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
  assert done.stdout.strip() == "set()" and done.stderr == ""


def test_errors_cross_from_workers(tmp_path):
  with pytest.raises(UserError, match="no tokenizer at"):
    workers.call(preparing.tokenizers.load, str(tmp_path / "none"))
  with pytest.raises(UserError, match="killed"):
    workers.call(os._exit, 1)


def test_a_second_prepare_does_nothing(tmp_path, corpus, capsys):
  settings = experiment(tmp_path / "store", [corpus])
  first = prepare(settings)
  written = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "store").iterdir()}
  assert preparing.prepare(settings) == first
  assert "up to date" in capsys.readouterr().err
  for path in corpus.rglob("*.txt"):  # copied or touched: read again, found equal
    os.utime(path, (1, 1))
  assert prepare(settings) == first
  assert written == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "store").iterdir()}


def test_other_settings_or_sources_are_refused(tmp_path, corpus):
  store = tmp_path / "store"
  prepare(experiment(store, [corpus]))
  refused(experiment(store, [corpus], vocab_size=350), r"tokenizer.vocab_size = 400, now it")
  refused(experiment(store, [corpus], validation_fraction=0.3), "validation_fraction = 0.2")
  refused(experiment(store, [corpus / "part0"]), "corpus.sources")
  path = next(corpus.rglob("*.txt"))
  content = path.read_bytes()
  path.write_bytes(b"X" + content[1:])  # same size
  refused(experiment(store, [corpus]), "sources have changed since.*--overwrite")
  changed = prepare(experiment(store, [corpus]), overwrite=True)
  assert tokens.open_store(str(store), "full").fingerprint == changed["fingerprint"]
  nothing_left(tmp_path, "corpus", "store")


def test_a_damaged_store_is_refused_and_can_be_replaced(tmp_path, corpus):
  settings = experiment(tmp_path / "store", [corpus])
  first = prepare(settings)
  (tmp_path / "store" / "features.json").unlink()
  refused(settings, "features.json is missing")
  assert prepare(settings, overwrite=True) == first


def test_nothing_but_a_store_is_replaced(tmp_path, corpus):
  (tmp_path / "home").mkdir()
  (tmp_path / "home" / "thesis.txt").write_text("x")
  for overwrite in (False, True):
    refused(experiment(tmp_path / "home", [corpus]), "no token store", overwrite=overwrite)
    refused(experiment(tmp_path / "home" / "thesis.txt", [corpus]), "is a file",
            overwrite=overwrite)
  (tmp_path / "empty").mkdir()
  prepare(experiment(tmp_path / "empty", [corpus]))
  tokens.open_store(str(tmp_path / "empty"))


def test_a_tokenizer_is_reused(tmp_path, corpus, texts_and_store, store):
  ledger = prepare(experiment(tmp_path / "a", [corpus], path=texts_and_store[1]))
  assert ledger["tokenizer"] == store.tokenizer.fingerprint
  model = tmp_path / "moved.model"
  shutil.copy(os.path.join(texts_and_store[1], "tokenizer.model"), model)
  # The same tokenizer from another place: the same settings.
  assert prepare(experiment(tmp_path / "a", [corpus], path=str(model))) == ledger
  refused(experiment(tmp_path / "b", [corpus], path=str(tmp_path / "none")), "no tokenizer at")


def test_tiny_corpora(tmp_path):
  (tmp_path / "c").mkdir()
  refused(experiment(tmp_path / "s", [tmp_path / "c"]), "holds no files")
  (tmp_path / "c" / "a.txt").write_text("")
  refused(experiment(tmp_path / "s", [tmp_path / "c"]), "no documents in .*1 skipped, empty: a.txt")
  (tmp_path / "c" / "a.txt").write_text("one")
  refused(experiment(tmp_path / "s", [tmp_path / "c"]), "holds one document.*JSON lines")
  (tmp_path / "c" / "b.txt").write_text("two")
  for fraction in (1e-9, 0.5):  # the hash alone would leave one of the splits empty
    ledger = prepare(experiment(tmp_path / f"s{fraction}", [tmp_path / "c"],
                                validation_fraction=fraction))
    assert {split["documents"] for split in ledger["splits"].values()} == {1}
  nothing_left(tmp_path, "c", "s1e-09", "s0.5")


def test_the_sample_is_bounded_and_not_held_out(tmp_path, corpus):
  settings = experiment(tmp_path / "s", [corpus]).corpus
  found = survey.survey(settings, 3000, lambda n_bytes: None)
  everything = survey.survey(settings, 10**9, lambda n_bytes: None)
  assert 1000 < sum(map(len, found.sample)) <= 3000
  assert set(found.sample) < set(everything.sample)
  assert len(everything.sample) == 30 - sum(
      survey.corpora.is_validation(d.id, 0.2) for d in survey.corpora.documents(settings))
  tiny = survey.survey(settings, 10, lambda n_bytes: None)
  assert sum(map(len, tiny.sample)) <= 10 and b"".join(tiny.sample).decode()


def test_sources_that_change_meanwhile_are_noticed(tmp_path, corpus, monkeypatch):
  train = preparing._train

  def train_and_change(*args):
    (corpus / "new.txt").write_text("new")
    return train(*args)

  monkeypatch.setattr(preparing, "_train", train_and_change)
  refused(experiment(tmp_path / "store", [corpus]), "changed while it was being read")
  nothing_left(tmp_path, "corpus")


def test_an_exception_leaves_nothing(tmp_path, corpus, monkeypatch):
  settings = experiment(tmp_path / "store", [corpus])
  first = prepare(settings)
  for error in (KeyboardInterrupt, MemoryError):
    def fail(*args, error=error):
      raise error
    monkeypatch.setattr(preparing, "_encode", fail)
    with pytest.raises(error):
      prepare(settings, overwrite=True)
    nothing_left(tmp_path, "corpus", "store")
    assert tokens.open_store(str(tmp_path / "store"), "full").fingerprint == first["fingerprint"]


SLOW = """
import sys, time
sys.path.insert(0, "tests/data")
from tiny_corpora import experiment
from chinchilla_jax.data import prepare, token_writer
add = token_writer.StoreWriter.add
def slow_add(self, *args):
  print("adding", flush=True)
  time.sleep(0.2)
  add(self, *args)
token_writer.StoreWriter.add = slow_add
if __name__ == "__main__":
  prepare.prepare(experiment(sys.argv[1], [sys.argv[2]]), quiet=True, n_workers=int(sys.argv[3]))
"""


def children(pid: int) -> list[int]:
  done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
  return [int(line) for line in done.stdout.split()]


@pytest.mark.parametrize("sent, n_workers", [
    (signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGKILL, 2)])
def test_killed_while_writing(tmp_path, corpus, sent, n_workers):
  script, store = tmp_path / "slow.py", tmp_path / "store"
  script.write_text(SLOW)
  process = subprocess.Popen(
      [sys.executable, str(script), str(store), str(corpus), str(n_workers)],
      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
      env={**os.environ, "PYTHONPATH": os.getcwd()})
  assert process.stdout.readline() == b"adding\n"
  workers_left = children(process.pid)
  with pytest.raises(UserError, match="no token store at .*a prepare is running or was cut off"):
    tokens.open_store(str(store))
  refused(experiment(store, [corpus]), "another process is preparing")
  process.send_signal(sent)
  assert process.wait(20) != 0
  process.stdout.close()
  if sent == signal.SIGINT:
    nothing_left(tmp_path, "corpus", "slow.py")
  else:
    assert not store.exists()
  prepare(experiment(store, [corpus]))  # also clears what was left
  nothing_left(tmp_path, "corpus", "slow.py", "store")
  tokens.open_store(str(store), "full")
  end = time.monotonic() + 10
  while any(os.path.exists(f"/proc/{pid}") for pid in workers_left):
    assert time.monotonic() < end, "worker processes outlived their parent"
    time.sleep(0.05)


def test_a_replacement_cut_off_between_its_renames_is_undone(tmp_path, corpus):
  settings = experiment(tmp_path / "store", [corpus])
  first = prepare(settings)
  os.rename(tmp_path / "store", tmp_path / ".store.old")
  staging.recover(str(tmp_path / "store"))
  assert prepare(settings) == first
  (tmp_path / ".store.old").mkdir()
  staging.recover(str(tmp_path / "store"))
  nothing_left(tmp_path, "corpus", "store")


def test_an_unwritable_place_is_refused(tmp_path, corpus):
  (tmp_path / "file").write_text("")
  refused(experiment(tmp_path / "file" / "store", [corpus]), "cannot write")


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, corpus):
  """A limit on the size of files stands for the full disk."""
  script = tmp_path / "limited.py"
  script.write_text("""
import resource, signal, sys
sys.path.insert(0, "tests/data")
from tiny_corpora import experiment
from chinchilla_jax.data import prepare
from chinchilla_jax.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
  prepare.prepare(experiment(sys.argv[1], [sys.argv[2]]), quiet=True)
except UserError as error:
  print(error)
""")
  for limit in (100, 20_000):  # not even the tokenizer fits; the tokenizer fits, the tokens do not
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "store"), str(corpus), str(limit)], check=True,
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert "another place with --config.data.store" in done.stdout
    nothing_left(tmp_path, "corpus", "limited.py")


def test_skipped_documents_reach_summary_and_ledger(tmp_path, corpus, capsys):
  (corpus / "bad.txt").write_bytes(b"\xff")
  ledger = preparing.prepare(experiment(tmp_path / "store", [corpus], vocab_size=32_000))
  assert ledger["corpus"]["skipped"] == {"not_utf8": 1}
  assert json.loads((tmp_path / "store" / ledgers.FILE).read_text()) == ledger
  shown = capsys.readouterr().err
  assert "1 skipped, not valid UTF-8: bad.txt" in shown
  assert "32,000 asked; the corpus yields no more" in shown


def test_plain_progress_lines(capsys, monkeypatch):
  monkeypatch.setattr(progress, "_LINE_EVERY", 0)
  with progress.Progress().stage("encoding", total=4_000_000) as advance:
    advance(1_000_000)
  assert "encoding: 1 of 4 MB" in capsys.readouterr().err
  with progress.Progress(quiet=True).stage("encoding") as advance:
    advance(1)
  assert capsys.readouterr().err == ""


def test_live_progress_on_a_terminal(monkeypatch):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
  with progress.Progress().stage("encoding", total=len(make_text(0))) as advance:
    advance(10)
