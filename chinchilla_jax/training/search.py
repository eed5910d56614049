"""The layout of a config on a slice: which there are, what they cost at least, which to compile.

Compiling says the truth and takes minutes; there are hundreds of layouts. So each gets lower bounds
from shapes alone, of its memory and of its time, and the compiler is asked for the best-looking
first. A layout is left out only for a reason that holds:

  illegal         the batch, the heads or the devices do not divide
  does not fit    its lower bound on memory is above what a device has
  cannot win      its lower bound on time is not below the roofline time of one that was compiled
  no time         the time given for compiling is over

Lower bounds. Memory: the train state and a batch, exact by the layout; and the larger of what the
forward pass has to leave for the backward pass and of all gradients, or, with microbatches, both,
since the float32 sums are there all the time. Time: matrix products at peak, what remat computes
again included; or what the strategy has to send (`parallel.wire_minimum`) at the data sheet's
figures; whichever is longer, as `parallel.roofline` does for a compiled program.

In which order layouts are compiled also follows a guess of their memory, which leaves nothing out:
those that are likely to fit come first.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from chinchilla_jax import config as schema
from chinchilla_jax import durations
from chinchilla_jax.errors import UserError
from chinchilla_jax.model import flops
from chinchilla_jax.parallel import mesh as mesh_lib
from chinchilla_jax.parallel import roofline, rules, topology, wire_minimum
from chinchilla_jax.parallel.layout import Layout, refuse
from chinchilla_jax.training import optimizer
from chinchilla_jax.training import state as state_lib

REMATS = ("none", "dots", "full")
ILLEGAL, TOO_LARGE, TOO_SLOW, NO_TIME = "illegal", "does not fit", "cannot win", "no time"
_MOST_MICROBATCHES = 64
_MOST_TENSOR = 64
_WIDTH = {"bfloat16": 2, "float32": 4}
_MARGIN = 1.25  # On the guess of what a step needs beside the state, as `scaling.meshes` has it.
_USABLE = 0.92  # Of a device's memory, in the guess.
_ALIKE = 1.01  # Roofline times so near to the least one are no reason to choose.


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One layout, with its lower bounds.

  Attributes:
    experiment: with mesh, microbatches and remat set.
    axes: size of every mesh axis.
    memory: bytes of one device that it needs at least; likely: that it may well need.
    seconds: by resource, "compute", "ici", "dcn": of one step at least.
  """

  experiment: schema.Experiment
  axes: Mapping[str, int]
  memory: float
  likely: float
  seconds: Mapping[str, float]

  @property
  def step_s(self) -> float:
    return max(self.seconds.values())

  @property
  def name(self) -> str:
    axes = " x ".join(f"{name} {n}" for name, n in self.axes.items() if n > 1) or "one device"
    e = self.experiment
    return f"{e.mesh.strategy}, {axes}, {e.batch.microbatches} mb, {e.model.remat}"

  @property
  def flags(self) -> tuple[str, ...]:
    """The words of a command line that choose it."""
    e = self.experiment
    return tuple(f"--config.{name}={value}" for name, value in (
        ("mesh.strategy", e.mesh.strategy), ("mesh.data", 0), ("mesh.context", e.mesh.context),
        ("mesh.tensor", e.mesh.tensor), ("batch.microbatches", e.batch.microbatches),
        ("model.remat", e.model.remat)))


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What the compiler said of a layout.

  Attributes:
    fits: within a device's memory.
    peak: bytes; None where the compiler gave no number.
    step_s, serial_s: roofline seconds if all overlaps, if nothing does; None if it does not fit.
    exposed_s: seconds of the collectives that have no matrix product to hide behind.
    ceiling, serial: MFU of both, attention over visible pairs.
    took: seconds of compiling.
    note: why there is no number.
  """

  fits: bool
  took: float
  peak: float | None = None
  step_s: float | None = None
  serial_s: float | None = None
  ceiling: float | None = None
  serial: float | None = None
  exposed_s: float = 0.0
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Found:
  """The end of a search.

  Attributes:
    compiled: in the order of compiling.
    skipped: (layout, reason, detail) of the legal ones that were not compiled.
    illegal: {why: how many} of the others.
    took: seconds in all.
  """

  compiled: tuple[tuple[Candidate, Outcome], ...]
  skipped: tuple[tuple[Candidate, str, str], ...]
  illegal: Mapping[str, int]
  took: float

  @property
  def ranked(self) -> list[tuple[Candidate, Outcome]]:
    """Those that fit, the fastest first.

    Layouts with the same products differ in the fourth digit of their roofline time. So all within
    1 % of the least count as equal; of these the first has least to send with nothing to hide it
    behind, then least in all, then the smallest peak.
    """
    fit = [(c, o) for c, o in self.compiled if o.fits]
    alike = _ALIKE * min((o.step_s for _, o in fit), default=0.0)
    return sorted(fit, key=lambda row: (max(row[1].step_s, alike), row[1].exposed_s,
                                        row[1].serial_s, row[1].peak))

  @property
  def nearest(self) -> tuple[Candidate, Outcome]:
    """Of those that do not fit, the one that needs least memory."""
    return min(self.compiled, key=lambda row: row[1].peak or max(row[0].likely, row[0].memory))


# -------------------------------------------------------------------- What there is


def candidates(experiment: schema.Experiment, devices: Sequence[Any], sequences: int,
               chip: topology.Chip) -> tuple[list[Candidate], dict[str, int]]:
  """All layouts that are legal, the most promising first, and how many are not, by reason.

  Strategies, tensor in powers of two that divide a slice's devices, microbatches in powers of two,
  and remat are enumerated; context is 1; `mesh.slice`, overrides and all else stay as they are.

  Args:
    experiment: the config.
    devices: of the run, real or described.
    sequences: in the batch.
    chip: what the devices are.
  """
  legal, illegal, link_of = [], {}, {}
  slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
  for made in _layouts(experiment, len(devices) // slices):
    try:
      axes = mesh_lib.sizes(made.mesh, len(devices), slices)
      only = dataclasses.replace(made.batch, sequences=sequences, ramp=(),
                                 microbatches=durations.microbatches(made.batch, sequences))
      for batch in (only, made.batch):
        refuse(dataclasses.replace(made, batch=batch), axes)
    except UserError as error:
      why = str(error).split(":")[0]
      illegal[why] = illegal.get(why, 0) + 1
      continue
    key = tuple(axes.values())
    if key not in link_of:
      link_of[key] = _links(made.mesh, devices, chip)
    legal.append(bounded(made, axes, sequences, chip, link_of[key]))
  capacity = _USABLE * chip.hbm_bytes_per_device
  order = lambda c: (c.likely > capacity, c.step_s, sum(c.seconds.values()), c.memory)
  return sorted(legal, key=order), illegal


def _layouts(experiment: schema.Experiment, per_slice: int) -> Iterator[schema.Experiment]:
  powers = lambda most: [2**n for n in range(most.bit_length()) if 2**n <= most]
  tensors = sorted({n for n in powers(_MOST_TENSOR) if per_slice % n == 0}
                   | {experiment.mesh.tensor})
  parts = sorted({*powers(_MOST_MICROBATCHES), experiment.batch.microbatches})
  for strategy in rules.STRATEGIES:
    for tensor in tensors:
      if tensor > 1 and strategy in ("replicated", "fsdp"):
        continue  # They cut no layer.
      if tensor == 1 and strategy == "fsdp_tensor":
        continue  # That is fsdp.
      for count in parts:
        for remat in REMATS:
          yield dataclasses.replace(
              experiment,
              mesh=dataclasses.replace(experiment.mesh, strategy=strategy, tensor=tensor, data=0,
                                       context=1),
              batch=dataclasses.replace(experiment.batch, microbatches=count),
              model=dataclasses.replace(experiment.model, remat=remat))


def _links(config: schema.Mesh, devices: Sequence[Any], chip: topology.Chip):
  made = mesh_lib.make(config, devices)
  flat = list(made.devices.flat)
  coords = [getattr(device, "coords", None) for device in flat]
  return roofline.links(dict(made.shape), None if coords[0] is None else coords,
                        [getattr(device, "slice_index", None) for device in flat], chip)


# -------------------------------------------------------------------- What it costs at least


def bounded(experiment: schema.Experiment, axes: Mapping[str, int], sequences: int,
            chip: topology.Chip, link_of: Callable[..., roofline.Link]) -> Candidate:
  """A layout with its lower bounds; see the module's docstring."""
  devices = math.prod(axes.values())
  held, beside, likely = _memory(experiment, axes, sequences)
  seconds = {"compute": flops_at_least(experiment, sequences) / devices / chip.peak_per_device,
             "ici": 0.0, "dcn": 0.0}
  for term in wire_minimum.terms(experiment, axes, sequences):
    link = link_of(term.axes)
    seconds["dcn" if link.network == "dcn" else "ici"] += link.seconds(
        roofline.Traffic(term.kind, term.axes, term.group_size, term.wire_bytes))
  return Candidate(experiment, axes, held + beside, held + max(beside, likely), seconds)


def flops_at_least(experiment: schema.Experiment, sequences: int) -> float:
  """Matrix products of a step: attention over visible pairs; with remat full, each block again.

  Of the second forward pass, the last product of a block is nobody's input and is left out.
  """
  model, t = experiment.model, experiment.data.seq_len
  once = flops.matmul_causal(model, t)
  if model.remat == "full":
    forward = once / flops.BACKWARD - 2 * model.d_model * model.vocab_size
    once += forward - 2 * model.n_layers * model.d_ff * model.d_model
  return once * sequences * t


def _memory(experiment: schema.Experiment, axes: Mapping[str, int],
            sequences: int) -> tuple[float, float, float]:
  """(state and batch, least beside them, a guess of what is beside them), bytes of one device."""
  model, precision, t = experiment.model, experiment.precision, experiment.data.seq_len
  width, tensor = _WIDTH[precision.activations], axes["tensor"]
  layout = Layout(experiment, wire_minimum.abstract_mesh(axes))
  held, weights, moments = 0, 0, 0
  for entry in layout.entries(_state(model, experiment.optimizer, precision)):
    size = entry.bytes_per_device(axes)
    held += size
    weights += size if entry.path.startswith("params/") else 0
    moments += size if entry.path.startswith("optimizer/mu/") else 0
  over_batch = axes["slice"] * axes["data"]
  held += sequences // over_batch * t * 16  # Four arrays of four bytes.
  parts = durations.microbatches(experiment.batch, sequences)
  tokens = sequences / parts / over_batch * t
  d, a, f = model.d_model, model.n_heads * model.kv_size, model.d_ff
  gates = 2 if model.activation == "swiglu" else 1
  cut = tensor if t % tensor == 0 else 1
  # The residual; and of a block, what its matrices made and what attention mixed.
  per_token = d / cut
  if model.remat != "full":
    per_token += d / cut + (4 * a + gates * f) / tensor
  saved = tokens * model.n_layers * per_token * width
  handed = 4 if precision.gradients == "float32" else _WIDTH[precision.parameters]
  gradients = moments * handed / 4
  beside = moments + saved if parts > 1 else max(saved, gradients)
  # The guess: also what is saved without need, and the working set of a layer.
  spare = {"none": 8 * a + 6 * d + 2 * f, "dots": d, "full": 0}[model.remat] / tensor
  kept = tokens * model.n_layers * (per_token + spare) * width + (moments if parts > 1 else 0)
  rows = min(model.attention_block or t, t)
  scores = tokens / t * model.n_heads / tensor * rows * t * 4 * 2
  inside = tokens * (4 * a + 2 * f + 4 * d) / tensor * width
  gathered = weights * axes["data"] if experiment.mesh.strategy in ("fsdp", "fsdp_tensor") else 0
  layer = 2 * gathered / model.n_layers + gradients
  updated = weights if experiment.mesh.strategy == "deepmind" else 0
  logits = min(experiment.loss.chunk or tokens, tokens) * model.vocab_size / tensor * 4 * 3
  return held, beside, _MARGIN * (kept + scores + inside + layer + updated + logits)


@functools.lru_cache(maxsize=8)
def _abstract_state(model, config, precision):
  return state_lib.abstract(model, optimizer.AdamW(config, precision, lambda step: 0.0))


def _state(model: schema.Model, config: schema.Optimizer, precision: schema.Precision) -> Any:
  """The abstract train state, which does not depend on how a model is laid out."""
  return _abstract_state(dataclasses.replace(model, remat="none"), config, precision)


# -------------------------------------------------------------------- The search


def search(found: Sequence[Candidate], illegal: Mapping[str, int], capacity: int, limit: float,
           compile_one: Callable[[Candidate, float | None], Outcome | None],
           clock: Callable[[], float] = time.monotonic) -> Found:
  """Compiles layouts, the most promising first, until none is left that could win.

  The first is compiled however long it takes, so that there is an answer. After that none is begun
  in less time than the quickest so far took, and none goes on when the time is over.

  Args:
    found: in the order in which they are to be tried.
    illegal: passed on.
    capacity: bytes of one device.
    limit: seconds in all.
    compile_one: (layout, seconds it may take or None) -> what came out, None if it took too long.
    clock: seconds.
  """
  begun = clock()
  could = [c for c in found if c.memory <= capacity]
  skipped = [(c, TOO_LARGE, f"at least {c.memory / 2**30:.1f} GiB") for c in found
             if c.memory > capacity]
  if not could and found:  # The compiler has the last word.
    last = min(found, key=lambda c: c.memory)
    could, skipped = [last], [row for row in skipped if row[0] is not last]
  compiled: list[tuple[Candidate, Outcome]] = []
  for candidate in could:
    best = min((o.step_s for _, o in compiled if o.fits), default=math.inf)
    if candidate.step_s >= best:
      skipped.append((candidate, TOO_SLOW, f"at least {candidate.step_s:.3f} s"))
      continue
    left = limit - (clock() - begun)
    quickest = min((o.took for _, o in compiled), default=0.0)
    if compiled and left < max(quickest, 1e-3):
      skipped.append((candidate, NO_TIME, f"{max(left, 0):.0f} s left"))
      continue
    outcome = compile_one(candidate, left if compiled else None)
    if outcome is None:
      skipped.append((candidate, NO_TIME, f"stopped after {left:.0f} s"))
      continue
    compiled.append((candidate, outcome))
  return Found(tuple(compiled), tuple(skipped), dict(illegal), clock() - begun)
