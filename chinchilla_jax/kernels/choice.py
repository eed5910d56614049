"""Which kernel attends: what a config asks for, held against what the devices can do.

  blockwise     `model.attention`: plain JAX, everywhere, the reference of the others
  relative_tpu  relative positions on TPU
  splash        rotary positions on TPU
  cudnn         rotary positions on GPU, where each sequence is one document

`auto` takes the first that can do all that is asked, `blockwise` being able to do everything.
What was asked for by name and cannot be done is refused: nothing else takes its place.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from chinchilla_jax import config as schema
from chinchilla_jax.errors import UserError
from chinchilla_jax.parallel import rules, topology

# (q_hbtk, k_hbtk, v_hbtk, (r_hnk, u_hk, v_hk) or None, segments_bt or None, divisor, name of what
# remat policies save) -> out_hbtk.
Attend = Callable[..., jax.Array]

# Tokens that `relative_tpu` takes in bfloat16 with kv_size up to 128: see its docstring.
_LONGEST = {"v4": 8_192, "v5p": 32_768, "tpu7x": 32_768, "v5e": 65_536, "v6e": 65_536}
_SHORT_BLOCKS_ABOVE = {"v4": 4_096}  # Beyond it, tiles of 256: 512 do not leave room for the rest.


@dataclasses.dataclass(frozen=True)
class Task:
  """What attention has to do, and where.

  Attributes:
    position: "relative" or "rotary".
    kv_size: of a head.
    dtype: of activations.
    length: tokens of a sequence.
    segmented: whether sequences hold several documents that must not see each other.
    context: parts that each sequence is cut into.
    platform, kind: of the devices, as JAX names them.
  """

  position: str
  kv_size: int
  dtype: str
  length: int
  segmented: bool
  context: int
  platform: str
  kind: str

  @classmethod
  def of(cls, experiment: schema.Experiment, mesh: jax.sharding.Mesh) -> "Task":
    """That of an experiment on the devices of a mesh, which may not be here."""
    model, device = experiment.model, mesh.devices.flat[0]
    return cls(model.position, model.kv_size, experiment.precision.activations,
               experiment.data.seq_len, experiment.data.document_mask, mesh.shape["context"],
               device.platform, device.device_kind)

  @property
  def chip(self) -> str:
    """Name of the chip in `topology`; empty if it is not known."""
    found = topology.chip_of(self.kind)
    return found.name if found else ""


def choose(wanted: str, task: Task) -> str:
  """The kernel's name.

  Args:
    wanted: `config.model.attention_kernel`.
    task: what it has to do.

  Raises:
    UserError: the one that is asked for by name cannot do it; says why.
  """
  if wanted == "auto":
    return next(name for name in (*_PROBLEMS, "blockwise") if not problem(name, task))
  if why := problem(wanted, task):
    raise UserError(f"config.model.attention_kernel: {wanted} cannot be used here: {why}; set it "
                    "to auto or blockwise")
  return wanted


def problem(name: str, task: Task) -> str:
  """Why a kernel cannot do this; empty if it can."""
  if name == "blockwise":
    return ""
  if task.context > 1:
    return f"it needs whole sequences, and config.mesh.context is {task.context}"
  return _PROBLEMS[name](task)


def _relative_tpu(task: Task) -> str:
  if why := _not_tpu(task):
    return why
  if task.position != "relative":
    return f"it is for relative positions, and config.model.position is {task.position}"
  longest = _LONGEST[task.chip] // (jnp.dtype(task.dtype).itemsize // 2)
  longest //= -(-task.kv_size // 128)
  if task.length > longest:
    return f"{task.length:,} tokens of this head size are more than the {longest:,} that fit"
  return ""


def _splash(task: Task) -> str:
  if why := _not_tpu(task):
    return why
  if task.position != "rotary":
    return f"it is for rotary positions, and config.model.position is {task.position}"
  return ""


def _cudnn(task: Task) -> str:
  if task.platform not in ("gpu", "cuda"):
    return f"it is for NVIDIA GPUs, and this is {task.platform}"
  if task.position != "rotary":
    return f"it is for rotary positions, and config.model.position is {task.position}"
  from chinchilla_jax.kernels import cudnn
  try:
    cudnn.refuse(task.dtype, task.kv_size, segmented=task.segmented)
  except UserError as error:
    return str(error)
  return ""


def _not_tpu(task: Task) -> str:
  if task.platform != "tpu":
    return f"it is for TPUs, and this is {task.platform}"
  if task.chip not in _LONGEST:
    return f"it is for {', '.join(_LONGEST)}, and this is {task.kind}"
  return ""


_PROBLEMS = {"relative_tpu": _relative_tpu, "splash": _splash, "cudnn": _cudnn}


def attend(name: str, mesh: jax.sharding.Mesh, task: Task,
           interpret: bool = False) -> Attend | None:
  """The function that `model.placement` hands to the model; None for blockwise.

  Args:
    name: from `choose`.
    mesh: a kernel is of one device, so each device runs it on its own heads and sequences.
    task: what it was chosen for.
    interpret: run TPU kernels in plain JAX, which is for tests.
  """
  if name == "blockwise":
    return None
  run = functools.partial(_RUN[name], task, interpret)

  def attention(q_hbtk, k_hbtk, v_hbtk, relative, segments_bt, divisor, saved_as):
    kernel = functools.partial(run, divisor, saved_as)
    if math.prod(mesh.shape.values()) == 1:
      return kernel(q_hbtk, k_hbtk, v_hbtk, relative, segments_bt)
    of = lambda x, *names: rules.resolve(x.shape, names, rules.ACTIVATIONS, mesh.shape).spec
    rows = of(q_hbtk, "heads", "batch", None, None)
    of_heads = None if relative is None else tuple(
        of(x, "heads", *(None,) * (x.ndim - 1)) for x in relative)
    of_segments = None if segments_bt is None else of(segments_bt, "batch", None)
    return jax.shard_map(kernel, mesh=mesh, in_specs=(rows, rows, rows, of_heads, of_segments),
                         out_specs=rows, check_vma=False)(
                             q_hbtk, k_hbtk, v_hbtk, relative, segments_bt)

  return attention


def _run_relative_tpu(task, interpret, divisor, saved_as, q, k, v, relative, segments_bt):
  from chinchilla_jax.kernels import relative_tpu
  short = task.length > _SHORT_BLOCKS_ABOVE.get(task.chip, task.length)
  block = relative_tpu.BLOCK // 2 if short else relative_tpu.BLOCK
  return relative_tpu.relative_attention(
      q, k, v, *relative, segments_bt, divisor=divisor, block_q=block, block_k=block,
      strided=task.chip in relative_tpu.STRIDED, name=saved_as, interpret=interpret)


def _run_splash(task, interpret, divisor, saved_as, q, k, v, relative, segments_bt):
  from chinchilla_jax.kernels import splash
  return splash.attend(q, k, v, segments_bt, divisor=divisor, name=saved_as, interpret=interpret)


def _run_cudnn(task, interpret, divisor, saved_as, q, k, v, relative, segments_bt):
  from jax.ad_checkpoint import checkpoint_name

  from chinchilla_jax.kernels import cudnn
  return checkpoint_name(cudnn.attend(q, k, v, segments_bt, divisor=divisor), saved_as)


_RUN = {"relative_tpu": _run_relative_tpu, "splash": _run_splash, "cudnn": _run_cudnn}
