"""Flags for the compiler, by platform. A flag stands here only with what it was measured to do.

They go to the compiler as options of whatever takes long to compile (`compiler_options` of
`jax.jit`): initialisation, training and evaluation step; in `chinchilla compile` and in training
alike, so that what was looked at is what runs. None stands here because others use it: what changed
nothing that could be measured is left to the compiler.
"""

import dataclasses

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


# Name of a chip in `topology`, or "cpu" -> its flags.
FLAGS: dict[str, tuple[Flag, ...]] = {
    "cpu": (Flag(
        "xla_backend_optimization_level", 1,
        source="XLA, xla/debug_options_flags.cc: LLVM's effort for the CPU backend; default 3",
        measured="8 layers of 256, rotary, float32, 8 x 512 tokens, JAX 0.12: the step compiles in "
                 "2.2 s, not 2.9, and the initialisation in 0.9 s, not 1.2 or more; the step takes "
                 "as long (1.97 and 1.98 s, two cores, in turn), its results are the same bits"),),
    "v4": (Flag(
        "xla_enable_async_all_gather", True,
        source="MaxText, configs/2xv4-128.sh: its runs on two slices of v4",
        measured="Chinchilla 70B, 768 x 2,048 tokens, v4:8x8x16, fsdp_tensor with tensor 8, remat "
                 "full, compiled by libtpu 0.0.52: every all-gather gets a start and a done, and "
                 "of all bytes that a device sends 52 % have matrix products to hide behind, not "
                 "22 %; peak memory 5.275 GiB, not 5.150; FLOPs and bytes sent are the same. With "
                 "deepmind and tensor 16 it changes nothing, memory included"),),
}


def options(device_kind: str) -> dict[str, bool | int | str] | None:
  """The options for a JAX `device_kind`; None, and not an empty dict, where there are none."""
  chip = topology.chip_of(device_kind)
  flags = FLAGS.get(chip.name if chip else device_kind, ())
  return {flag.name: flag.value for flag in flags} or None


def of(mesh: jax.sharding.Mesh) -> dict[str, bool | int | str] | None:
  """`options` of the devices of a mesh."""
  return options(mesh.devices.flat[0].device_kind)
