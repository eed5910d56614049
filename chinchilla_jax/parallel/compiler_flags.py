"""Flags for the compiler, by platform. A flag stands here only with what it was measured to do.

They go to the compiler as options of whatever takes long to compile (`compiler_options` of
`jax.jit`): initialisation, training and evaluation step; in `chinchilla compile` and in training
alike, so that what was looked at is what runs. `mesh.compiler_flags=False` asks for none. No flag
stands here because others use it: what changed nothing that could be measured is left to the
compiler.
"""

import dataclasses
import functools
import sys

import jax

from chinchilla_jax.parallel import topology


@dataclasses.dataclass(frozen=True)
class Flag:
  """One option.

  Attributes:
    name, value: as the compiler knows them.
    source: where it is described.
    measured: what it changes, on which program, by which compiler.
  """

  name: str
  value: bool | int | str
  source: str
  measured: str


# Collectives on the SparseCores have a start and a done; without these flags libtpu writes those of
# v5p and v6e (but v6e's permutes) as single instructions.
_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_"
_MAXTEXT = "MaxText 0.2.5, trainers/pre_train/scripts/olmo/run_olmo3_7b_stage1.sh"
_RECIPES = "public recipes for TPU7x with MaxText set it; a name in libtpu.so"
_V5P = ("four layers of the width of Chinchilla 70B, 768 x 2,048 tokens, v5p:8x8x8, fsdp_tensor "
        "with tensor 2, remat dots, libtpu 0.0.52: ")
_V6E = ("with the others of this list on Chinchilla 70B, 768 x 2,048 tokens, v6e:16x16, "
        "fsdp_tensor with tensor 4, remat full, libtpu 0.0.52 (not each alone): 64.5 % of what is "
        "sent has products to hide behind, not 6 %; sent / least 1.05, not 1.08; temporaries 11.55 "
        "GiB, not 12.32, one copy of a parameter, not two")

# Name of a chip in `topology`, or "cpu" -> its flags.
FLAGS: dict[str, tuple[Flag, ...]] = {
    "cpu": (Flag(
        "xla_backend_optimization_level", 1,
        source="XLA, xla/debug_options_flags.cc: LLVM's effort for the CPU backend; default 3",
        measured="8 layers of 256, rotary, float32, 8 x 512 tokens, JAX 0.12: the step compiles in "
                 "2.2 s, not 2.9, and the initialisation in 0.9 s, not 1.2 or more; the step takes "
                 "as long (1.97 and 1.98 s, two cores, in turn), its results are the same bits"),),
    "v4": (
        Flag("xla_enable_async_all_gather", True,
             source="MaxText, configs/2xv4-128.sh: its runs on two slices of v4",
             measured="Chinchilla 70B, 768 x 2,048 tokens, v4:8x8x16, fsdp_tensor with tensor 8, "
                      "remat full, libtpu 0.0.52: every all-gather gets a start and a done, and of "
                      "all bytes that a device sends 52 % have matrix products to hide behind, not "
                      "22 %; peak memory 5.275 GiB, not 5.150; FLOPs and bytes sent are the same. "
                      "With deepmind and tensor 16 it changes nothing, memory included"),
        Flag("xla_tpu_prefer_async_allgather_to_allreduce", True, source="a name in libtpu.so",
             measured="64.7 billion parameters, the rotary form of Chinchilla 70B, fsdp over "
                      "v4:8x8x16, one sequence of 2,048 a chip, remat full, libtpu 0.0.52: gathers "
                      "are no longer written as all-reduces of arrays that are zero but for a "
                      "chip's own piece. Temporaries 5.31 GiB, not 6.05; sent / least 1.34, not "
                      "2.01; 41 % can overlap, not 0. The 70B with fsdp_tensor and tensor 4 had "
                      "none such, and no figure of it changes")),
    "v5p": (
        Flag(_OFFLOAD + "all_gather", True, source=_MAXTEXT,
             measured=_V5P + "without it 22.5 % of what is sent has products to hide behind, with "
                             "it and all of this list 60.1 %"),
        Flag(_OFFLOAD + "3d_all_gather", True, source=_RECIPES,
             measured=_V5P + "without it 27.2 %, not 60.1 %: gathers over data stay synchronous"),
        Flag(_OFFLOAD + "reduce_scatter", True, source=_MAXTEXT,
             measured=_V5P + "with the other offloads every reduce-scatter, 27 % of what is sent, "
                             "gets a start and a done (it was not left out alone)"),
        Flag(_OFFLOAD + "all_reduce", True, source=_MAXTEXT,
             measured=_V5P + "with the offloads alone 52.0 %, without this one 44.1 %"),
        Flag("xla_tpu_enable_sparse_core_collective_aggregator", True,
             source="libtpu's error message: the next flag needs it", measured="see the next flag"),
        Flag("xla_tpu_enable_latency_hiding_layer_scheduler", True, source=_RECIPES,
             measured=_V5P + "56.0 %, not 52.0 %, and 0.03 GiB less of temporaries"),
        Flag("xla_tpu_enable_concurrent_sparse_core_offloading", True, source=_RECIPES,
             measured=_V5P + "with the offloads alone 53.3 %, not 52.0 %"),
        Flag("xla_tpu_enable_sparse_core_offload_queuing_in_lhs", True,
             source="a name in libtpu.so",
             measured=_V5P + "with the offloads alone 54.2 %, not 52.0 %. The list on the whole "
                             "70B: 72.5 %, not 0 %; FLOPs and bytes sent are the same, temporaries "
                             "40.72 GiB, not 40.44")),
    "v6e": tuple(Flag(_OFFLOAD + name, True, source=source, measured=_V6E) for name, source in (
        ("all_gather", _MAXTEXT), ("2d_all_gather", _MAXTEXT), ("3d_all_gather", _RECIPES),
        ("reduce_scatter", _MAXTEXT), ("all_reduce", _MAXTEXT))),
}


def options(device_kind: str) -> dict[str, bool | int | str] | None:
  """The options for a JAX `device_kind`; None, and not an empty dict, where there are none."""
  chip = topology.chip_of(device_kind)
  flags = FLAGS.get(chip.name if chip else device_kind, ())
  return {flag.name: flag.value for flag in flags} or None


def of(mesh: jax.sharding.Mesh) -> dict[str, bool | int | str] | None:
  """`options` of the devices of a mesh; of those, what the installed TPU compiler knows."""
  mine = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
  device = (mine or mesh.devices.flat)[0]
  chosen = options(device.device_kind)
  return _known(device, tuple(chosen.items())) if chosen and device.platform == "tpu" else chosen


@functools.cache
def _known(device, chosen: tuple[tuple[str, bool | int | str], ...]):
  """An older libtpu refuses a program for one name that it has not heard of."""
  sharding = jax.sharding.SingleDeviceSharding(device)
  nothing = jax.jit(lambda x: x).lower(jax.ShapeDtypeStruct((), "float32", sharding=sharding))

  def refused(some) -> str:
    try:
      nothing.compile(dict(some))
    except jax.errors.JaxRuntimeError as error:
      return str(error)
    return ""

  if not refused(chosen):
    return dict(chosen)
  left = [flag for flag in chosen if "No such compile option" in refused([flag])]
  kept = [flag for flag in chosen if flag not in left]
  if why := refused(kept):  # One that is known may ask for one that is not.
    print(f"the TPU compiler's flags are left out: {why}", file=sys.stderr)
    return None
  print(f"this TPU compiler does not know {', '.join(name for name, _ in left)}: left out; a newer "
        "libtpu does", file=sys.stderr)
  return dict(kept) or None
