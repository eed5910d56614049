"""chinchilla prepare: text -> tokenizer and token store."""

import argparse
import dataclasses

from chinchilla_jax import config_io

TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("sources", nargs="*", metavar="SOURCE",
                      help="short for --config.corpus.sources: files, folders, globs "
                      "(text, .jsonl[.gz|.zst], .parquet), tfds:NAME, or stdlib")
  parser.add_argument("--store", help="short for --config.data.store: the folder to write")
  parser.add_argument("--overwrite", action="store_true",
                      help="replace a store that was made with other settings")


def run(args: argparse.Namespace) -> int:
  from chinchilla_jax.data import prepare
  experiment = config_io.load(args.config, args.overrides)
  if args.sources:
    corpus = dataclasses.replace(experiment.corpus, sources=tuple(args.sources))
    experiment = dataclasses.replace(experiment, corpus=corpus)
  if args.store:
    data = dataclasses.replace(experiment.data, store=args.store)
    experiment = dataclasses.replace(experiment, data=data)
  prepare.prepare(experiment, overwrite=args.overwrite)
  return 0
