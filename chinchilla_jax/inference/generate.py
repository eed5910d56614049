"""Text from a trained model, token by token with a KV cache."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from chinchilla_jax.errors import UserError
from chinchilla_jax.inference import sampling
from chinchilla_jax.model import transformer
from chinchilla_jax.training.trained import Trained


def generate(model: Trained, prompt: str, *, max_tokens: int, temperature: float = 0.8,
             top_k: int = 0, top_p: float = 0.95, seed: int = 0) -> Iterator[int]:
  """Yields the ids of the pieces that follow a prompt at the start of a document.

  Ends after `max_tokens`, or where the model ends the document (predicts the next one's
  beginning). Text may be longer than the training sequences: attention looks back as far as
  one of them.

  Args:
    model: parameters, config and tokenizer.
    prompt: text; may be empty.
    max_tokens: pieces at most.
    temperature: 0 takes the likeliest piece each time.
    top_k: sample among the k likeliest; 0 for all.
    top_p: sample among the likeliest that reach this probability; 1 for all.
    seed: of the sampling; the same seed gives the same text.

  Raises:
    UserError: a setting is out of range.
  """
  if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or max_tokens < 1:
    raise UserError(f"temperature {temperature} must be at least 0, top_p {top_p} above 0 and at "
                    f"most 1, top_k {top_k} at least 0, max_tokens {max_tokens} at least 1")
  tokenizer, config = model.store.tokenizer, model.experiment.model
  dtype = jnp.dtype(model.experiment.precision.activations)
  ids = np.array([tokenizer.bos_id, *tokenizer.encode(prompt)], np.int32)
  cache = transformer.init_cache(config, 1, len(ids) + max_tokens, dtype)

  @functools.partial(jax.jit, donate_argnums=1)
  def advance(tokens_bt, cache, params, key):
    logits_btv, cache = transformer.decode(config, params, tokens_bt, cache, dtype,
                                           context=model.experiment.data.seq_len)
    # Rows of the embedding that stand for no piece are never chosen.
    logits_bv = logits_btv[:, -1, :tokenizer.vocab_size]
    return sampling.sample(logits_bv, key, temperature, top_k, top_p), cache

  root = jax.random.key(seed)
  tokens_bt = jnp.asarray(ids)[None, :]
  for index in range(max_tokens):
    token_b, cache = advance(tokens_bt, cache, model.params, jax.random.fold_in(root, index))
    token = int(token_b[0])
    if token == tokenizer.bos_id:
      return
    yield token
    tokens_bt = token_b[:, None]
