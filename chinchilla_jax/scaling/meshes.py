"""A mesh on which an experiment fits, and an estimate of the memory that a step takes there.

Bytes of the train state are exact: they come from the layout that trains. What a step needs beside
it is estimated from shapes, rounded up by `MARGIN`; `chinchilla compile` asks the compiler itself.
Nothing is compiled here, so a plan takes seconds.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from chinchilla_jax import config as schema
from chinchilla_jax import durations
from chinchilla_jax.errors import UserError
from chinchilla_jax.model import shapes
from chinchilla_jax.parallel import topology

MARGIN = 1.25   # on temporaries: the compiler's, in docs/tpu.md, are 0.9 to 1.25 of their parts
USABLE = 0.92   # of a device's memory; libtpu keeps 2 to 4 % of it, allocators lose some
_MICROBATCHES = (1, 2, 4, 8, 16, 32, 64)
_TENSOR = (1, 2, 4, 8, 16)
_GIB = 2**30


class DoesNotDivide(UserError):
  """The batch cannot be shared out among the devices; another batch might."""


@dataclasses.dataclass(frozen=True)
class Fit:
  """An experiment with its mesh, and what it takes.

  Attributes:
    experiment: with mesh, microbatches, remat and attention_block set.
    axes: size of every mesh axis.
    state_bytes: train state of one device, exact by the layout.
    step_bytes: estimate of what a step needs beside it.
    memory: bytes of one device.
    sent_bytes: estimate of what a device sends in a step, all networks together.
  """

  experiment: schema.Experiment
  axes: Mapping[str, int]
  state_bytes: int
  step_bytes: float
  memory: int
  sent_bytes: float

  @property
  def share(self) -> float:
    """Of a device's memory that state and step take."""
    return (self.state_bytes + self.step_bytes) / self.memory


def choose(experiment: schema.Experiment, where: topology.Slice) -> Fit:
  """The mesh that fits and sends the fewest bytes in a step, with as few microbatches as it takes.

  Strategies tried: fsdp, and fsdp_tensor with tensor 2 to 16; `slice` as the devices lie, and on
  GPUs also one that goes across nodes.

  Args:
    experiment: its batch stays as it is; mesh, microbatches and remat are chosen.
    where: the devices.

  Raises:
    DoesNotDivide: the batch does not divide among so many devices.
    UserError: nothing fits; says what is missing.
  """
  state = _abstract_state(experiment)
  divided, nearest = False, None
  for remat in dict.fromkeys((experiment.model.remat, "full")):
    for parts in _MICROBATCHES:
      found = []
      for mesh in _meshes(experiment, where):
        made = _with(experiment, mesh, parts, remat)
        axes = _axes(mesh, where)
        if not _divides(made, axes):
          continue
        divided = True
        fit = measure(made, axes, where.chip.hbm_bytes_per_device, state)
        if fit.share <= USABLE:
          found.append(fit)
        elif nearest is None or fit.share < nearest.share:
          nearest = fit
      if found:
        return min(found, key=lambda fit: fit.sent_bytes)
  if not divided:
    raise DoesNotDivide(
        f"{where.name} has {where.devices:,} devices, and {experiment.batch.sequences:,} sequences "
        f"a step do not divide among them, whatever is cut over tensor (up to {_TENSOR[-1]}, a "
        f"divisor of {experiment.model.n_heads} heads); take fewer chips")
  raise UserError(
      f"{shapes.count_parameters(experiment.model):,} parameters do not fit {where.name}: the best "
      f"layout needs {(nearest.state_bytes + nearest.step_bytes) / _GIB:,.1f} GiB a device "
      f"({nearest.state_bytes / _GIB:,.1f} of it train state), and "
      f"{USABLE:.0%} of {nearest.memory / _GIB:g} GiB can be used; take more chips")


def measure(experiment: schema.Experiment, axes: Mapping[str, int], memory: int,
            state: Any = None) -> Fit:
  """What an experiment takes on a mesh of these sizes.

  Args:
    experiment: with its mesh section set accordingly.
    axes: size of every mesh axis.
    memory: bytes of one device.
    state: the abstract train state, if it is known.
  """
  from chinchilla_jax.parallel import report
  from chinchilla_jax.parallel.layout import Layout
  state = _abstract_state(experiment) if state is None else state
  mesh = report.abstract_mesh(
      dataclasses.replace(experiment.mesh, slice=axes["slice"], data=axes["data"]),
      math.prod(axes.values()))
  held: dict[str, int] = {}
  for entry in Layout(experiment, mesh).entries(state):
    kind = entry.path.split("/")
    name = kind[1] if kind[0] == "optimizer" else kind[0]
    held[name] = held.get(name, 0) + entry.bytes_per_device(axes)
  return Fit(experiment, axes, sum(held.values()),
             _step_bytes(experiment, axes, held["params"], held["mu"]), memory,
             _sent_bytes(experiment, axes))


def _step_bytes(experiment: schema.Experiment, axes: Mapping[str, int], params: int,
                moment: int) -> float:
  """Gradients, saved activations, the working set of a layer, logits; bytes of one device."""
  model, precision = experiment.model, experiment.precision
  width = 2 if precision.activations == "bfloat16" else 4
  held = 2 if precision.parameters == "bfloat16" else 4
  tensor, context = axes["tensor"], axes["context"]
  sequences = max(experiment.batch.sequences, *(n for _, n in experiment.batch.ramp), 0)
  parts = durations.microbatches(experiment.batch, sequences)
  over_batch = axes["slice"] * axes["data"]
  t = experiment.data.seq_len
  tokens = sequences / parts / over_batch * t / context
  d, a, f, v = model.d_model, model.n_heads * model.kv_size, model.d_ff, model.vocab_size
  layer = (shapes.count_parameters(model) - v * d) / model.n_layers
  per_token = {"full": d, "dots": 4 * a + 3 * d + f, "none": 12 * a + 8 * d + 3 * f}[model.remat]
  saved = tokens * model.n_layers * per_token * width / tensor
  rows = min(model.attention_block or t, t)
  scores = model.n_heads / tensor * tokens / t * context * rows * t * 4 * 2
  inside = tokens * (4 * a + 2 * f + 4 * d) * width / tensor
  gathered = layer / tensor * (2 * held + 4)  # Two layers' weights, one layer's gradient.
  gradients = moment * held / 4 + (moment if parts > 1 else 0)
  updated = params if experiment.mesh.strategy == "deepmind" else 0
  table = v * d / tensor * (held + 4)
  chunk = min(experiment.loss.chunk or tokens, tokens)
  logits = chunk * v / tensor * 4 * 3
  return MARGIN * (saved + scores + inside + gathered + gradients + updated + table + logits)


def _sent_bytes(experiment: schema.Experiment, axes: Mapping[str, int]) -> float:
  """Bytes that a device sends in a step by ring algorithms, parameters in bfloat16.

  fsdp gathers weights forward and backward and scatters gradients, for every microbatch. tensor
  moves a layer's tokens 12 times with remat full (gather and scatter, for attention and
  feed-forward, in three passes), which is what docs/tpu.md shows, and 8 times else.
  """
  model = experiment.model
  sequences = experiment.batch.sequences
  parts = durations.microbatches(experiment.batch, sequences)
  data, tensor = axes["data"] * axes["context"], axes["tensor"]
  n = shapes.count_parameters(model)
  over_data = 3 * parts * 2 * n / tensor * (data - 1) / data
  tokens = sequences * experiment.data.seq_len / (axes["slice"] * data)
  passes = 12 if model.remat == "full" else 8
  over_tensor = passes * model.n_layers * tokens * model.d_model * 2 * (tensor - 1) / tensor
  return over_data + over_tensor


def _meshes(experiment: schema.Experiment, where: topology.Slice) -> Iterator[schema.Mesh]:
  across = (0, 1) if where.networks > 1 and not where.chip.ici_dims else (0,)
  for slices, tensor in itertools.product(across, _TENSOR):
    # Within a node or slice, where the network is fast.
    inside = where.devices // where.networks
    if experiment.model.n_heads % tensor or inside % tensor:
      continue
    yield dataclasses.replace(
        experiment.mesh, strategy="fsdp" if tensor == 1 else "fsdp_tensor", slice=slices, data=0,
        context=1, tensor=tensor)


def _axes(mesh: schema.Mesh, where: topology.Slice) -> dict[str, int]:
  from chinchilla_jax.parallel import mesh as mesh_lib
  return mesh_lib.sizes(mesh, where.devices, where.networks)


def _divides(experiment: schema.Experiment, axes: Mapping[str, int]) -> bool:
  from chinchilla_jax.parallel.layout import refuse
  try:
    refuse(experiment, axes)
  except UserError:
    return False
  return True


def _with(experiment: schema.Experiment, mesh: schema.Mesh, parts: int,
          remat: str) -> schema.Experiment:
  return dataclasses.replace(
      experiment, mesh=mesh, batch=dataclasses.replace(experiment.batch, microbatches=parts),
      model=dataclasses.replace(experiment.model, remat=remat))


def _abstract_state(experiment: schema.Experiment) -> Any:
  from chinchilla_jax.training import optimizer, state
  adamw = optimizer.AdamW(experiment.optimizer, experiment.precision, lambda step: 0.0)
  return state.abstract(experiment.model, adamw)
