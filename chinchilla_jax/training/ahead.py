"""Compiles the training step for devices that are not here, and reads what came out.

The compiler of TPUs needs no TPU, only libtpu. All numbers are of one JAX device and one step.
"""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import re
import resource
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from chinchilla_jax import config as schema
from chinchilla_jax import durations
from chinchilla_jax.errors import UserError
from chinchilla_jax.model import flops
from chinchilla_jax.parallel import (
    hlo,
    hlo_checks,
    hlo_text,
    mesh,
    roofline,
    topology,
)
from chinchilla_jax.parallel.layout import Layout, refuse
from chinchilla_jax.training import optimizer
from chinchilla_jax.training import state as state_lib
from chinchilla_jax.training import step as step_lib

GIB = 2**30


class OutOfMemory(UserError):
  """The step needs more memory than a device has; the message says by how much."""


@dataclasses.dataclass(frozen=True)
class Report:
  """What the compiler made of one training step.

  Attributes:
    devices: JAX devices of the mesh, and their kind.
    mesh_shape: size of each mesh axis.
    sequences, seq_len, microbatches: of the batch; at_a_time: sequences of a microbatch on one
      device.
    memory: bytes per device. `parameters`, `master`, `moments` and `other` are the train state by
      its layout, `batch` a batch; `arguments` is what the compiler counts for all of these,
      padding included; `temporaries` what the step needs beside them; `peak` the most that is
      used at one moment; `capacity` the device's memory (None: unknown).
    attention: the kernel that attends (`kernels.choice`).
    program: FLOPs, bytes and collectives of the optimised program.
    checks: whether it is as lean as its layout allows.
    model_flops: FLOPs of the step per device by convention: "6ND", "full" and "causal" attention;
      nothing that is done twice counts twice.
    bounds: the roofline; None for a device that `topology` does not know.
    links: (mesh axes, collective) -> seconds a step; None like bounds.
    lower_s, compile_s: seconds that it took.
    compiler_bytes: the most memory that this process has held.
  """

  devices: int
  device_kind: str
  mesh_shape: dict[str, int]
  sequences: int
  seq_len: int
  microbatches: int
  at_a_time: int
  memory: dict[str, int | None]
  attention: str
  program: hlo.Program
  checks: hlo_checks.Checks
  model_flops: dict[str, float]
  bounds: roofline.Roofline | None
  seconds: dict[tuple[str, tuple[str, ...]], float]
  lower_s: float
  compile_s: float
  compiler_bytes: int


def devices(where: topology.Slice) -> Sequence[Any]:
  """Descriptions of the devices of a TPU slice that is not here.

  Raises:
    UserError: it is a GPU, libtpu is not installed, or it does not know this topology.
  """
  options = where.libtpu_options()
  if options is None:
    raise UserError(f"--topology: {where.name} cannot be compiled for without one; leave "
                    "--topology out on such a machine, or use `chinchilla inspect` for its "
                    "memory")
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("--topology: the TPU compiler is not installed; pip install "
                    "libtpu (Linux, x86-64)")
  from jax.experimental import topologies
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")          # Do not look for a cloud machine.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # No chip is taken from anybody.
  try:
    with _quiet():
      return topologies.get_topology_desc(platform="tpu", **options).devices
  except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
    reason = str(error).splitlines()[0]
    raise UserError(f"--topology: libtpu does not make {where.name} ({reason})") from None


def compile_step(experiment: schema.Experiment, found: Sequence[Any],
                 sequences: int | None = None, hlo_file: str | None = None) -> Report:
  """Compiles one training step for devices, real ones or described ones; allocates nothing.

  Args:
    experiment: the config; its store is not read.
    found: all devices of the run.
    sequences: in the batch; None for the largest of the batch-size schedule.
    hlo_file: where to write the text of the optimised program; None for nowhere.

  Raises:
    OutOfMemory: the compiler says that it does not fit.
    UserError: batch, heads or sequence do not divide among the devices.
  """
  batch, seq_len = experiment.batch, experiment.data.seq_len
  sequences = sequences or max(batch.sequences, *(n for _, n in batch.ramp), 0)
  made = mesh.make(experiment.mesh, found)
  only = dataclasses.replace(batch, sequences=sequences, ramp=(),
                             microbatches=durations.microbatches(batch, sequences))
  refuse(dataclasses.replace(experiment, batch=only), made.shape)
  layout = Layout(experiment, made)
  # A learning rate is a number to the compiler, whatever its schedule.
  adamw = optimizer.AdamW(experiment.optimizer, experiment.precision, lambda step: jnp.float32(1))
  state = layout.placed(state_lib.abstract(experiment.model, adamw))
  arrays = layout.batch((sequences, seq_len))
  microbatches = durations.microbatches(batch, sequences)
  at_a_time = sequences // microbatches // layout.placement.shards("batch")
  train_step = jax.jit(step_lib.make_train_step(experiment, adamw, layout), donate_argnums=0,
                       out_shardings=(layout.state(state), layout.replicated))
  started = time.perf_counter()
  lowered = train_step.lower(state, arrays)
  lower_s = time.perf_counter() - started
  try:
    compiled = lowered.compile(layout.compiler_options)
  except jax.errors.JaxRuntimeError as error:
    raise explained(error, layout, experiment, sequences) from None
  compile_s = time.perf_counter() - started - lower_s

  chip = topology.chip_of(found[0].device_kind)
  text = compiled.as_text()
  if hlo_file:
    try:
      pathlib.Path(hlo_file).write_text(text)
    except OSError as error:  # A full disk, say.
      raise UserError(f"--hlo: {hlo_file} cannot be written ({error.strerror}); choose another "
                      "place") from error
  module = hlo_text.parse(text)
  program = hlo.analyse(module, dict(made.shape))
  tokens = sequences * seq_len
  per_device = lambda convention: flops.training(
      experiment.model, tokens, seq_len, convention) / len(found)
  model_flops = {"6ND": per_device("six_n_d"), "full": per_device("matmul"),
                 "causal": per_device("matmul_causal")}
  bounds, seconds = _bounds(program, made, chip, model_flops)
  return Report(
      devices=len(found), device_kind=found[0].device_kind, mesh_shape=dict(made.shape),
      sequences=sequences, seq_len=seq_len,
      microbatches=microbatches, at_a_time=at_a_time,
      memory=_memory(compiled, layout, state, arrays, chip),
      attention=layout.attention, program=program,
      checks=hlo_checks.check(module, program, experiment, layout, sequences, at_a_time),
      model_flops=model_flops, bounds=bounds, seconds=seconds, lower_s=lower_s,
      compile_s=compile_s,
      compiler_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _memory(compiled, layout: Layout, state, batch, chip) -> dict[str, int | None]:
  groups = {"parameters": 0, "master": 0, "moments": 0, "other": 0}
  names = {"params": "parameters", "optimizer/master": "master", "optimizer/mu": "moments",
           "optimizer/nu": "moments"}
  for entry in layout.entries(state):
    group = next((name for start, name in names.items() if entry.path.startswith(start + "/")),
                 "other")
    groups[group] += entry.bytes_per_device(layout.mesh.shape)
  held = compiled.memory_analysis()
  share = layout.placement.shards("batch")
  arguments, temporaries = held.argument_size_in_bytes, held.temp_size_in_bytes
  peak = held.peak_memory_in_bytes
  if peak < max(arguments, temporaries):  # Not known, or a CPU's, which leaves temporaries out.
    peak = arguments + temporaries
  return groups | {
      "batch": sum(a.size * a.dtype.itemsize for a in batch.values()) // share,
      "arguments": arguments, "temporaries": temporaries,
      "program": held.generated_code_size_in_bytes, "peak": peak,
      "capacity": chip and chip.hbm_bytes_per_device}


def _bounds(program: hlo.Program, made: jax.sharding.Mesh, chip: topology.Chip | None,
            model_flops: dict[str, float]):
  if chip is None:
    return None, {}
  flat = list(made.devices.flat)
  coords = [getattr(device, "coords", None) for device in flat]
  link_of = roofline.links(dict(made.shape), None if coords[0] is None else coords,
                           [getattr(device, "slice_index", None) for device in flat], chip)
  traffic = [roofline.Traffic(c.kind, c.axes, c.group_size, c.wire_bytes)
             for c in program.collectives if c.kind in roofline.KINDS and "?" not in c.axes]
  seconds: dict[tuple[str, tuple[str, ...]], float] = {}
  for item in traffic:
    key = item.kind, item.axes
    seconds[key] = seconds.get(key, 0.0) + link_of(item.axes).seconds(item)
  return roofline.roofline(program.matmul_flops, program.hbm_bytes, traffic, link_of, chip,
                           model_flops), seconds


def explained(error: Exception, layout: Layout, experiment: schema.Experiment,
              sequences: int) -> Exception:
  """The compiler's complaint as one that says what to do; the error itself if it is another."""
  text = str(error)
  if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
    return error
  size = r"([\d.]+[KMGT]?)"
  match = (re.search(rf"Used {size} of {size} hbm", text)
           or re.search(rf"required for [^(]*\({size}\) exceeds available HBM \({size}\)", text))
  amount = text.splitlines()[0]
  if match:
    used, room = _gib(match[1]), _gib(match[2])
    amount = (f"needs {used:.2f} GiB of the {room:.2f} GiB that a program can use, "
              f"{used - room:.2f} GiB too many")
  at_a_time = (sequences // durations.microbatches(experiment.batch, sequences)
               // layout.placement.shards("batch"))
  kind = layout.mesh.devices.flat[0].device_kind
  return OutOfMemory(f"out of memory: a device ({kind}) {amount}; what helps: "
                     f"{', or '.join(levers(experiment, at_a_time))}")


def _gib(text: str) -> float:
  """"13.5G" and "900.0M", which XLA means in powers of 1,024, in GiB."""
  powers = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  return float(text.rstrip("KMGT")) * powers.get(text[-1], 1) / GIB


def levers(experiment: schema.Experiment, at_a_time: int) -> list[str]:
  """Settings that would take less memory, the cheapest first.

  Args:
    experiment: the config as it is.
    at_a_time: sequences of a microbatch on one device.
  """
  config, found = experiment, []
  if config.model.remat != "full":
    found.append("config.model.remat=full (recomputes each block)")
  if at_a_time > 1:
    found.append(f"config.batch.microbatches above {config.batch.microbatches} (a device now has "
                 f"{at_a_time} sequences at a time)")
  if config.mesh.strategy == "replicated":
    found.append("config.mesh.strategy=fsdp (cuts parameters and optimizer state)")
  elif config.mesh.strategy == "deepmind":
    found.append("config.mesh.strategy=fsdp_tensor (cuts parameters over data too)")
  if config.mesh.strategy in ("deepmind", "fsdp_tensor"):
    found.append(f"config.mesh.tensor above {config.mesh.tensor}")
  if config.data.seq_len >= 8192:
    found.append(f"config.mesh.context above {config.mesh.context} (cuts each sequence)")
  if config.precision.gradients == "float32":
    found.append("config.precision.gradients=parameters")
  found.append("more devices")
  return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """libtpu complains of the missing TPU on file descriptor 2, whatever Python's stderr is."""
  saved, void = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(void, 2)
    yield
  finally:
    os.dup2(saved, 2)
    os.close(saved)
    os.close(void)

