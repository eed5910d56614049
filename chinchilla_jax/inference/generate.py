"""Text from a trained model, token by token with a KV cache."""

import functools
import math
import os
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from chinchilla_jax import config as schema
from chinchilla_jax.errors import UserError
from chinchilla_jax.inference import sampling
from chinchilla_jax.model import transformer
from chinchilla_jax.training.trained import Trained


def check(prompt: str, *, max_tokens: int, temperature: float, top_k: int, top_p: float,
          seed: int) -> None:
  """Checks what needs no model.

  Raises:
    UserError: a setting is out of range, or the prompt is not UTF-8.
  """
  for flag, value, good, allowed in (
      ("--max-tokens", max_tokens, max_tokens >= 1, "at least 1"),
      ("--temperature", temperature, 0 <= temperature < math.inf, "at least 0, and finite"),
      ("--top-k", top_k, top_k >= 0, "at least 0"),
      ("--top-p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
      ("--seed", seed, 0 <= seed < 2**31, f"at least 0 and at most {2**31 - 1:,}")):
    if not good:  # NaN is not good either.
      raise UserError(f"{flag}: got {value}, allowed is {allowed}")
  try:
    prompt.encode()
  except UnicodeEncodeError:
    raise UserError("--prompt: the text is not UTF-8; give text in UTF-8") from None


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
    UserError: a setting is out of range, or text of this length does not fit into memory. That is
      said at once, not when the first piece is asked for.
  """
  check(prompt, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        seed=seed)
  ids = np.array([model.store.tokenizer.bos_id, *model.store.tokenizer.encode(prompt)], np.int32)
  _refuse_endless(model, len(ids), max_tokens)
  return _pieces(model, ids, max_tokens, temperature, top_k, top_p, seed)


def _refuse_endless(model: Trained, prompt_tokens: int, max_tokens: int) -> None:
  """Memory that is not there would be an error of the allocator, or the end of the process."""
  config, length = model.experiment.model, prompt_tokens + max_tokens
  arrays = 3 if config.position == "relative" else 2  # As transformer.init_cache has them.
  numbers = arrays * config.n_layers * config.n_heads * config.kv_size
  needed = numbers * length * jnp.dtype(model.experiment.precision.activations).itemsize
  limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
  if limit is None and hasattr(os, "sysconf"):  # A CPU: what the machine has.
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if limit and needed > limit:
    raise UserError(f"--max-tokens: a prompt of {prompt_tokens:,} tokens and {max_tokens:,} more "
                    f"need {needed / 2**30:,.1f} GiB of memory, there are {limit / 2**30:,.1f}; "
                    "lower it, or shorten --prompt")


def _pieces(model: Trained, ids: np.ndarray, max_tokens: int, temperature: float, top_k: int,
            top_p: float, seed: int) -> Iterator[int]:
  tokenizer, config = model.store.tokenizer, model.experiment.model
  dtype = jnp.dtype(model.experiment.precision.activations)
  cache = transformer.init_cache(config, 1, len(ids) + max_tokens, dtype)
  advance = _advance(config, dtype, model.experiment.data.seq_len, tokenizer.vocab_size,
                     temperature, top_k, top_p)
  root = jax.random.key(seed)
  tokens_bt = jnp.asarray(ids)[None, :]
  for index in range(max_tokens):
    token_b, cache = advance(tokens_bt, cache, model.params, jax.random.fold_in(root, index))
    token = int(token_b[0])
    if token == tokenizer.bos_id:
      return
    yield token
    tokens_bt = token_b[:, None]


@functools.lru_cache(maxsize=4)  # Compiled once for all texts that a run samples.
def _advance(config: schema.Model, dtype: jnp.dtype, context: int, pieces: int, temperature: float,
             top_k: int, top_p: float) -> Callable[..., tuple[jax.Array, dict]]:
  """(tokens_bt, cache, params, key) -> (the next piece of each text, cache)."""

  @functools.partial(jax.jit, donate_argnums=1)
  def advance(tokens_bt, cache, params, key):
    logits_btv, cache = transformer.decode(config, params, tokens_bt, cache, dtype,
                                           context=context)
    # Rows of the embedding that stand for no piece are never chosen.
    return sampling.sample(logits_btv[:, -1, :pieces], key, temperature, top_k, top_p), cache

  return advance
