"""Budgets that buy nothing, and results that no law can be fitted to."""

from cases import Room, case

COLUMNS = "--params-column n --tokens-column d --loss-column l"


def table(*rows: str):
  """Writes runs.csv with these rows."""
  def make(room: Room) -> None:
    room.write("runs.csv", "\n".join(("n,d,l", *rows)) + "\n")
  return make


case("plan: no budget", "plan", r"no budget given", r"give exactly one of --flops")
case("plan: two budgets", "plan --flops 1e20 --tokens 1e9", r"two budgets at once",
     r"give exactly one of")
case("plan: negative FLOPs", "plan --flops -1", r"--flops: got '-1'", r"give a number above 0")
case("plan: FLOPs that are no number", "plan --flops nan", r"--flops: got 'nan'",
     r"give a number above 0")
case("plan: fewer FLOPs than a model takes", "plan --flops 1e5", r"no model of \d+ parameters",
     r"take a larger budget")
case("plan: unknown accelerator", "plan --chips v9:2 --days 3", r"unknown generation 'v9'",
     r"one of: v2")
case("plan: more than the peak", "plan --chips v4:8x8x16 --days 3 --mfu 1.5", r"--mfu: got 1\.5",
     r"at most 1")
case("plan: unknown law", "plan --flops 1e22 --law nothing", r"no published law .* 'nothing'",
     r"one of: approach_1")
case("plan: --out is there", "plan --flops 1e18 --out tiny.py", r"--out: .*tiny\.py",
     r"--force", lambda room: room.write("tiny.py", "mine = True\n"))

case("fit: no such file", "fit nowhere.csv", r"no results at nowhere\.csv",
     r"give the results\.jsonl")
case("fit: loss is NaN", f"fit runs.csv {COLUMNS}", r"line 3: l is nan", r"--drop 'line 3'",
     table("1e6,1e8,3.0", "2e6,1e8,nan"))
case("fit: negative tokens", f"fit runs.csv {COLUMNS}", r"line 2: d is -1", r"mend it|--drop",
     table("1e6,-1e8,3.0"))
case("fit: one run", f"fit runs.csv {COLUMNS}", r"no approach can be fitted", r"give at least 6",
     table("1e6,1e8,3.0"))
case("fit: a row twice", f"fit runs.csv {COLUMNS}", r"line 3 says the same as line 2",
     r"take one of them out", table("1e6,1e8,3.0", "1e6,1e8,3.0"))
case("fit: no such column", f"fit runs.csv {COLUMNS.replace('-column n', '-column z')}",
     r"no column 'z'", r"its columns are n, d, l", table("1e6,1e8,3.0"))
