import jax.numpy as jnp
import numpy as np
import pytest

from chinchilla_jax import cli
from chinchilla_jax.errors import UserError
from chinchilla_jax.inference.generate import generate
from chinchilla_jax.model import transformer
from chinchilla_jax.training import trained


@pytest.fixture(scope="module")
def model(tiny_run):
  return trained.load(tiny_run[1])


def test_greedy_is_what_the_whole_model_says_token_by_token(model):
  """Without a cache, from scratch at every position."""
  prompt = "def f(x):\n"
  got = list(generate(model, prompt, max_tokens=8, temperature=0))
  ids = [model.store.tokenizer.bos_id, *model.store.tokenizer.encode(prompt).tolist()]
  for token in got:
    logits_btv = transformer.apply(model.experiment.model, model.params, jnp.asarray([ids]), None,
                                   jnp.bfloat16)
    row = np.asarray(logits_btv[0, -1, :model.store.tokenizer.vocab_size])
    # In bfloat16 two pieces may be a rounding apart: the one taken is as good as the best.
    assert row[token] >= row.max() - 0.05
    ids.append(token)


def test_a_seed_gives_one_text_and_another_seed_another(model):
  texts = [tuple(generate(model, "import", max_tokens=24, temperature=1.0, top_p=1.0, seed=seed))
           for seed in (1, 1, 2)]
  assert texts[0] == texts[1] != texts[2]


def test_goes_on_beyond_the_training_length(model):
  length = 2 * model.experiment.data.seq_len
  ids = list(generate(model, "", max_tokens=length, temperature=1.0, top_p=1.0, seed=3))
  assert max(ids) < model.store.tokenizer.vocab_size
  assert model.store.tokenizer.bos_id not in ids


@pytest.mark.parametrize("bad", [dict(temperature=-1), dict(top_p=0), dict(top_p=1.1),
                                 dict(top_k=-1), dict(max_tokens=0)])
def test_settings_out_of_range(model, bad):
  with pytest.raises(UserError):
    list(generate(model, "", **{"max_tokens": 4, **bad}))


def test_the_command_prints_prompt_and_text(tiny_run, capsys):
  words = ["generate", "--workdir", str(tiny_run[1]), "--prompt", "import ", "--max-tokens", "8"]
  assert cli.main(words) == 0
  first = capsys.readouterr().out
  assert first.startswith("import ")
  assert cli.main(words) == 0
  assert capsys.readouterr().out == first
