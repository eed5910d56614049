"""chinchilla generate: text from a checkpoint, printed as it comes."""

import argparse
import codecs
import sys

TAKES_CONFIG = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--workdir", required=True, help="a run's folder")
  parser.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
  parser.add_argument("--prompt", default="", help="how the document begins")
  parser.add_argument("--max-tokens", type=int, default=128, help="pieces at most (128)")
  parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest (0.8)")
  parser.add_argument("--top-k", type=int, default=0, help="among the k likeliest; 0: all (0)")
  parser.add_argument("--top-p", type=float, default=0.95,
                      help="among the likeliest that reach this probability (0.95)")
  parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")


def run(args: argparse.Namespace) -> int:
  from chinchilla_jax.storage import compiled
  compiled.keep()
  from chinchilla_jax.inference.generate import check, generate
  from chinchilla_jax.training import quiet, trained

  settings = dict(max_tokens=args.max_tokens, temperature=args.temperature, top_k=args.top_k,
                  top_p=args.top_p, seed=args.seed)
  check(args.prompt, **settings)  # Before a model is loaded, which may take minutes.
  quiet.libraries()
  model = trained.load(args.workdir, args.step)
  ids = generate(model, args.prompt, **settings)
  # A character may be spread over several byte pieces: it is printed when it is complete.
  decoder = codecs.getincrementaldecoder("utf-8")("replace")
  sys.stdout.write(args.prompt)
  for token in ids:
    sys.stdout.write(decoder.decode(model.store.tokenizer.decode_bytes([token])))
    sys.stdout.flush()
  sys.stdout.write(decoder.decode(b"", final=True) + "\n")
  return 0
