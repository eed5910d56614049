"""Small real corpora for the tests of the data room."""

import dataclasses
import random

from chinchilla_jax import config

WORDS = ("alpha beta gamma delta self return value None def class import if else for in range "
         "print the of and to a is that it was naïve 東京 🙂").split()


def make_text(seed: int, n_lines: int = 40) -> str:
  """Something like source code, with indents, accents, CJK and emoji."""
  rng = random.Random(seed)
  lines = [" " * 4 * rng.randrange(4) + " ".join(rng.choices(WORDS, k=rng.randrange(1, 9)))
           for _ in range(n_lines)]
  return "\n".join(lines) + "\n" * rng.randrange(2)


def make_corpus(folder, n_documents: int = 60) -> dict[str, str]:
  """Writes text files in folders; returns {id: text}."""
  texts = {f"part{i % 3}/doc{i:03d}.txt": make_text(i) for i in range(n_documents)}
  for id, text in texts.items():
    path = folder / id
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
  return texts


def experiment(store, sources, *, vocab_size=400, validation_fraction=0.2, verify="auto",
               text_field="text", tfds_data_dir="", **tokenizer) -> config.Experiment:
  """An Experiment with the sections that `prepare` reads."""
  return dataclasses.replace(
      config.Experiment(),
      corpus=config.Corpus(sources=tuple(map(str, sources)), text_field=text_field,
                           validation_fraction=validation_fraction, tfds_data_dir=tfds_data_dir),
      tokenizer=config.Tokenizer(vocab_size=vocab_size, **tokenizer),
      data=config.Data(store=str(store), verify=verify))
