#!/usr/bin/env python3
"""What the presets cost in chip-hours: FLOPs / (peak of a chip x MFU), as a Markdown table.

  launch/chip_hours.py                          the presets, on every generation
  launch/chip_hours.py configs/chinchilla.py:1424m --mfu=0.3

FLOPs are 6 N D, with N by the rule of Table A9 and D the tokens of the config's run length; the
peak is dense bfloat16, of the data sheets in chinchilla_jax.parallel.topology. MFU is an
assumption: `chinchilla compile` gives the bounds between which it can lie for a config and slice.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

_ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

from chinchilla_jax import config_io, durations  # noqa: E402
from chinchilla_jax.errors import UserError  # noqa: E402
from chinchilla_jax.model import flops, shapes  # noqa: E402
from chinchilla_jax.parallel import topology  # noqa: E402

PRESETS = ("chinchilla.py:74m", "chinchilla.py:425m", "chinchilla.py:1424m", "chinchilla.py:9293m",
           "chinchilla.py:70b", "gopher.py:280b")
CHIPS = ("v3", "v4", "v5e", "v5p", "v6e", "tpu7x", "a100-80gb", "h100", "b200")
MFU = 0.4


def chip_hours(total_flops: float, chip: topology.Chip, mfu: float) -> float:
  """Hours of one chip; so many chips do it in so much less, at the same MFU."""
  return total_flops / (chip.peak_bf16 * mfu) / 3600


def cost(config: str) -> tuple[float, float, float]:
  """(parameters, tokens, FLOPs) of the run of a config.

  Raises:
    UserError: its run length depends on a store.
  """
  experiment = config_io.load(config, ())
  n = shapes.count_parameters(experiment.model)
  length = durations.parse(experiment.run_length, "config.run_length")
  if length.unit == "steps":
    tokens = length.value * experiment.batch.sequences * experiment.data.seq_len
  elif length.unit == "epochs":
    raise UserError(f"config.run_length: {length} depends on the store; give tokens or "
                    "tokens/param")
  else:
    tokens = durations.to_tokens(length, n, 0)
  return n, tokens, flops.training(experiment.model, tokens)


def table(configs: Sequence[str], mfu: float) -> str:
  lines = ["| config | parameters | tokens | FLOPs (6ND) | " + " | ".join(CHIPS) + " |",
           "| --- |" + " ---: |" * (3 + len(CHIPS))]
  for config in configs:
    n, tokens, total = cost(config)
    hours = [_short(chip_hours(total, topology.CHIPS[name], mfu)) for name in CHIPS]
    cells = [f"`{config.rpartition('/')[2]}`", _amount(n), _amount(tokens), f"{total:.2e}", *hours]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def _short(hours: float) -> str:
  return f"{float(f'{hours:.2g}'):,.1f}" if hours < 10 else f"{float(f'{hours:.3g}'):,.0f}"


def _amount(number: float) -> str:
  for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
    if number >= size:
      return f"{float(f'{number / size:.3g}'):g}{unit}"
  return f"{number:g}"


def main(argv: Sequence[str]) -> int:
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("configs", nargs="*", metavar="CONFIG", help="the presets by default")
  parser.add_argument("--mfu", type=float, default=MFU, help=f"assumed, from 0 to 1 ({MFU})")
  args = parser.parse_args(argv)
  try:
    if not 0 < args.mfu <= 1:
      raise UserError(f"--mfu: got {args.mfu:g}; give a share such as 0.4")
    print(table(args.configs or [str(_ROOT / "configs" / name) for name in PRESETS], args.mfu))
  except UserError as error:
    print(f"launch/chip_hours.py: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
