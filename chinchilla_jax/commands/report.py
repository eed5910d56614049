"""chinchilla report: one page with the curves and figures of runs."""

import argparse
import datetime
import os
import pathlib

from chinchilla_jax import __version__
from chinchilla_jax.config_io import shown
from chinchilla_jax.errors import UserError

TAKES_CONFIG = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a sweep's")
  parser.add_argument("--out", default="report.html", metavar="FILE",
                      help="report.html by default")
  parser.add_argument("--names", metavar="A,B",
                      help="to call the runs by; their folders by default")


def run(args: argparse.Namespace) -> int:
  out = _out(args.out)
  from chinchilla_jax.experiments import page, report
  from chinchilla_jax.training import durable, quiet
  quiet.libraries()
  runs = report.read(args.runs, [] if args.names is None else args.names.split(","))
  now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
  text = page.render(runs, f"written {now} by chinchilla_jax {__version__}")
  try:
    durable.write(out, text, suffix=f".{os.getpid()}.partial")
  except OSError as error:
    raise UserError(f"--out: {out} cannot be written ({error.strerror or error}); make room, or "
                    "choose another place") from None
  empty = [one.name for one in runs if one.summary["step"] is None]
  note = f"; no metrics yet in {', '.join(empty)}" if empty else ""
  print(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}, {len(text) / 1e6:.1f} MB, opens in any "
        f"browser{note}")
  return 0


def _out(name: str) -> pathlib.Path:
  """Where the page goes. Only an earlier report is written over."""
  from chinchilla_jax.experiments import page
  out = pathlib.Path(name)
  try:
    if out.is_dir():
      raise UserError(f"--out: {shown(name)} is a folder; give a file in it, such as "
                      f"{out / 'report.html'}")
    if not out.parent.is_dir():
      raise UserError(f"--out: there is no folder {shown(str(out.parent))}; make it, or choose "
                      "another place")
    if out.exists() and not out.is_file():
      raise UserError(f"--out: {shown(name)} is no file; choose another name")
    if out.exists():
      with open(out, "rb") as file:
        if file.read(len(page.MARK)) != page.MARK.encode():
          raise UserError(f"--out: {shown(name)} is there already and is no report; choose another "
                          "name")
    if not os.access(out.parent, os.W_OK):
      raise UserError(f"--out: {shown(str(out.parent))} cannot be written; choose another place")
  except (OSError, ValueError) as error:
    raise UserError(f"--out: {shown(name)} cannot be written "
                    f"({getattr(error, 'strerror', None) or error}); choose another place"
                    ) from None
  return out
