"""HBM that attention of one layer asks for, forward and backward, with and without a kernel:

  python benchmarks/attention_memory.py [--topology v5p:1x1x1] [--lengths 2048 8192 32768]

Compiled for a TPU that is not here (needs libtpu), bfloat16, 16 heads of 128, one sequence. Traffic
is what instructions read and write, kernels by their arguments and results: an upper figure, since
what stays on the chip between two instructions is in it.
"""

import argparse
import functools
import importlib.util

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from chinchilla_jax.errors import UserError, as_script, positive
from chinchilla_jax.kernels import relative_tpu
from chinchilla_jax.model import blockwise
from chinchilla_jax.model.placement import WHOLE, Rows
from chinchilla_jax.parallel import hlo, topology
from chinchilla_jax.training import ahead

HEADS, KV_SIZE = 16, 128
MIB = 2**20


def without(q, k, v, r, u, v_bias):
  """The model's own attention: in blocks of 128 rows, beyond 2,048 tokens in one.

  Many blocks of many keys take the compiler longer than anybody waits.
  """
  t = q.shape[2]
  rows = Rows.of(t, 1, 128 if t <= 2048 else t)
  how = blockwise.How(KV_SIZE**0.5, rows, WHOLE, "mixed")
  return blockwise.attend(how, q, k, v, (r, u, v_bias), None)


def kernel(strided, q, k, v, r, u, v_bias):
  return relative_tpu.relative_attention(q, k, v, r, u, v_bias, None, divisor=KV_SIZE**0.5,
                                         strided=strided)


def measure(attend, length: int, device) -> tuple[float, float]:
  """(MiB of temporaries, MiB of traffic) of one layer and sequence."""
  place = SingleDeviceSharding(device)
  of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
  rows = of(HEADS, 1, length, KV_SIZE)
  bias = of(HEADS, KV_SIZE)
  arrays = (rows, rows, rows, of(HEADS, length + 1, KV_SIZE), bias, bias)

  def both_ways(grad, *arrays):
    out, back = jax.vjp(attend, *arrays)
    return out, back(grad)

  compiled = jax.jit(both_ways).lower(rows, *arrays).compile()
  program = hlo.analyse(compiled.as_text(), {})
  return compiled.memory_analysis().temp_size_in_bytes / MIB, program.hbm_bytes / MIB


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--topology", default="v5p:2x2x1")
  parser.add_argument("--only", choices=["blockwise", "kernel"])
  parser.add_argument("--lengths", type=positive, nargs="+", default=[2048, 8192, 32768])
  args = parser.parse_args()
  where = topology.parse(args.topology, 1)
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("needs the TPU compiler: pip install libtpu")
  jax.config.update("jax_platforms", "cpu")
  device = ahead.devices(where)[0]
  print(f"{args.topology}, jax {jax.__version__}, {HEADS} heads of {KV_SIZE}, bfloat16, one "
        "sequence, forward and backward")
  for length in args.lengths:
    scores = HEADS * length * length * 4 / MIB
    strided = where.chip.name in relative_tpu.STRIDED
    for name, attend in (("blockwise", without), ("kernel", functools.partial(kernel, strided))):
      if args.only not in (None, name):
        continue
      try:
        temporaries, traffic = measure(attend, length, device)
        print(f"{length:6} {name:10} temporaries {temporaries:10,.0f} MiB   traffic "
              f"{traffic:12,.0f} MiB   (all scores once: {scores:,.0f} MiB)", flush=True)
      except jax.errors.JaxRuntimeError as error:
        print(f"{length:6} {name:10} {str(error).splitlines()[0][:120]}", flush=True)


if __name__ == "__main__":
  as_script(main)
