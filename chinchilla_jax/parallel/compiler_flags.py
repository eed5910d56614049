"""Flags for the compiler, by platform. A flag stands here only with what it was measured to do.

They go to the compiler as options of the training step (`jax.jit(compiler_options=...)`), in
`chinchilla compile` and in training alike, so that what was looked at is what runs. None stands
here because others use it: what changed nothing that could be measured is left to the compiler.
"""

import dataclasses

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


# Name of a chip in `topology` -> its flags.
FLAGS: dict[str, tuple[Flag, ...]] = {
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
  return {flag.name: flag.value for flag in FLAGS.get(chip.name, ())} or None if chip else None
