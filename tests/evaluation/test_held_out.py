import gzip
import json
import math

import jax
import numpy as np
from tiny import with_fields

from chinchilla_jax import cli
from chinchilla_jax.data import tokens
from chinchilla_jax.evaluation import held_out
from chinchilla_jax.model import transformer
from chinchilla_jax.training import trained


def test_bits_per_byte_by_hand(tiny_run):
  """Window by window with plain softmax, over the bytes of the text itself."""
  experiment, workdir = tiny_run
  experiment = with_fields(experiment, evaluation__max_tokens=0, precision__activations="float32")
  model = trained.load(workdir)
  result = held_out.HeldOut(experiment, model.store, model.layout)(model.params)

  split, t = model.store.split("validation"), experiment.data.seq_len
  ids = split.read(0, split.n_tokens).astype(np.int32)
  apply = jax.jit(lambda tokens, segments: jax.nn.log_softmax(transformer.apply(
      experiment.model, model.params, tokens, segments, "float32")))
  nll = 0.0
  for start in range(0, split.n_tokens - 1, t):
    window = ids[start:start + t + 1]
    n = len(window) - 1
    inputs = np.zeros(t, np.int32)
    inputs[:n] = window[:-1]
    segments = np.cumsum(inputs == model.store.tokenizer.bos_id)
    logp_tv = np.asarray(apply(inputs[None], segments[None])[0])
    nll -= logp_tv[np.arange(n), window[1:]].sum(dtype=np.float64)

  text = tokens.held_out_bytes(model.store)
  assert result.targets == split.n_tokens - 1  # The first token of all is no target.
  assert result.bytes == len(text)
  np.testing.assert_allclose(result.bits_per_byte, nll / math.log(2) / len(text), rtol=1e-5)


def test_the_batch_size_of_evaluation_changes_nothing(tiny_run):
  experiment, workdir = tiny_run
  model = trained.load(workdir)
  results = [held_out.HeldOut(with_fields(experiment, evaluation__batch=b), model.store,
                              model.layout)(model.params) for b in (1, 3, 16)]
  for result in results[1:]:
    assert (result.targets, result.bytes) == (results[0].targets, results[0].bytes)
    np.testing.assert_allclose(result.nll, results[0].nll, rtol=1e-4)


def test_compressors_are_the_standard_ones():
  text = b"import os\n" * 1000
  bits = held_out.compressors(text)
  assert bits["gzip -9"] == 8 * len(gzip.compress(text, 9)) / len(text)
  assert set(bits) == {"gzip -9", "bzip2 -9", "xz -9"}


def test_the_command_compares_on_the_same_bytes(tiny_run, capsys):
  _, workdir = tiny_run
  assert cli.main(["evaluate", "--workdir", str(workdir), "--compressors", "--json"]) == 0
  report = json.loads(capsys.readouterr().out)
  store = trained.load(workdir).store
  assert report["bytes"] == len(tokens.held_out_bytes(store))
  assert report["compressors"] == held_out.compressors(tokens.held_out_bytes(store))
  assert cli.main(["evaluate", "--workdir", str(workdir), "--compressors"]) == 0
  printed = capsys.readouterr().out
  for words in ("this model", "gzip -9", "xz -9", "tokens/s", "checkpoints/12", "metrics.jsonl",
                "chinchilla generate"):
    assert words in printed


def test_another_tokenizer_is_refused(tiny_run, tmp_path, capsys):
  experiment, workdir = tiny_run
  other = str(tmp_path / "other")
  source = str(experiment.data.store)
  files = str(trained.__file__.rsplit("/", 2)[0])
  assert cli.main(["prepare", files, "--store", other, "--config.tokenizer.vocab_size=400",
                   "--config.corpus.validation_fraction=0.25"]) == 0
  assert cli.main(["evaluate", "--workdir", str(workdir), "--store", other]) == 2
  assert f"--config.tokenizer.path={source}" in capsys.readouterr().err
