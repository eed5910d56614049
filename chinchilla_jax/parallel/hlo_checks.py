"""What is asked of every compiled step, beside its costs: is it as lean as its layout allows?"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from chinchilla_jax import config as schema
from chinchilla_jax.parallel import hlo, hlo_copies, hlo_scores, wire_minimum
from chinchilla_jax.parallel.hlo_text import Module
from chinchilla_jax.parallel.layout import Layout

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Checks:
  """The answers.

  Attributes:
    least: what the strategy cannot do without sending (`wire_minimum`).
    sent: bytes that a device sends in a step.
    overlap: share of them that has matrix work to hide behind (`hlo_overlap`).
    copies: of the train state (`hlo_copies`).
    scores: (shape, bytes) of the largest array of attention scores in memory (`hlo_scores`), None
      for none; unknown: why that cannot be told, or "".
  """

  least: tuple[wire_minimum.Term, ...]
  sent: float
  overlap: float
  copies: hlo_copies.Copies
  scores: tuple[str, int] | None
  unknown: str

  @property
  def least_bytes(self) -> float:
    return sum(term.wire_bytes for term in self.least)

  @property
  def sent_over_least(self) -> float | None:
    """1: the program sends what its strategy needs. None where that is nothing."""
    return self.sent / self.least_bytes if self.least_bytes else None


def check(module: Module, program: hlo.Program, experiment: schema.Experiment, layout: Layout,
          sequences: int, at_a_time: int) -> Checks:
  """Answers for one program.

  Args:
    module: the optimised program of `training.step.make_train_step`, its state donated.
    program: what `hlo.analyse` made of it.
    experiment, layout: of the step.
    sequences: in the batch; at_a_time: of a microbatch on one device.
  """
  scores, unknown = None, ""
  try:
    scores = hlo_scores.largest(module, hlo_scores.Scores.of(experiment, layout, at_a_time))
  except ValueError as error:
    unknown = str(error)
  return Checks(
      least=tuple(wire_minimum.terms(experiment, dict(layout.mesh.shape), sequences)),
      sent=sum(c.wire_bytes for c in program.collectives), overlap=program.overlap(),
      copies=hlo_copies.find(module), scores=scores, unknown=unknown)


def facts(checks: Checks) -> dict[str, Any]:
  """The answers as plain data."""
  return {
      "sent_bytes": checks.sent, "least_bytes": checks.least_bytes,
      "sent_over_least": checks.sent_over_least,
      "least": [dataclasses.asdict(term) for term in checks.least],
      "overlap": checks.overlap,
      "state": hlo_copies.facts(checks.copies),
      "scores": None if checks.scores is None else dict(zip(("shape", "bytes"), checks.scores,
                                                            strict=True)),
      "scores_unknown": checks.unknown or None}


def lines(checks: Checks) -> Iterator[str]:
  """The answers as text."""
  if checks.least_bytes:
    yield (f"  sent {checks.sent / 1e9:.3f} GB, least by this layout "
           f"{checks.least_bytes / 1e9:.3f} GB: sent / least {checks.sent_over_least:.2f}")
    by_name: dict[str, float] = {}
    for term in checks.least:
      by_name[term.name] = by_name.get(term.name, 0.0) + term.wire_bytes
    for name, sent in by_name.items():
      yield f"    {name:30} {sent / 1e9:10.3f}"
  if checks.sent:
    yield f"  can overlap with matrix products: {checks.overlap:.0%} of what is sent"
  missing, copies = checks.copies.not_donated, checks.copies
  yield "  state donated: " + (
      f"yes, all {copies.leaves} arrays" if not missing else
      f"no, {len(missing)} of {copies.leaves} arrays are not: {_some(missing)}")
  yield "  copies of parameters: " + (
      "none" if not copies.found else
      f"{sum(row[3] for row in copies.found)}, {copies.bytes / _GIB:.3f} GiB a step: "
      f"{_some([row[0] for row in sorted(copies.found, key=lambda row: -row[-1])])}")
  yield "  scores in memory: " + (
      f"not known, {checks.unknown}" if checks.unknown else "none" if checks.scores is None else
      f"{checks.scores[0]}, {checks.scores[1] / _GIB:.3f} GiB")


def _some(names: list[str] | tuple[str, ...], most: int = 3) -> str:
  short = [name.replace("state['", "").replace("']['", "/").rstrip("]'") for name in names]
  return ", ".join(short[:most]) + (f" and {len(short) - most} more" if len(short) > most else "")
