"""FLOPs of one matrix product of an optimised HLO program, by the convention of `hlo`."""

import functools
import math
import re

import numpy as np

from chinchilla_jax.parallel import hlo_text
from chinchilla_jax.parallel.hlo_text import Computation, Instruction


def matmul(i: Instruction, computation: Computation) -> float:
  """FLOPs of one dot, convolution or matrix-product custom call."""
  left = computation.operands(i)[0].arrays[0]
  result = i.arrays[0]
  if i.opcode == "convolution":
    return _convolution(i, left, computation.operands(i)[1].arrays[0], result)
  found = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d",]*)', i.attributes)
  if not found and i.opcode == "custom-call":
    raise ValueError(f"HLO: the custom call %{i.name} does not say what it contracts")
  contracted = re.findall(r"\d+", found[1]) if found else []
  return 2.0 * result.size * math.prod(left.dims[int(d)] for d in contracted)


def _convolution(i: Instruction, left: hlo_text.Array, kernel: hlo_text.Array,
                       result: hlo_text.Array) -> float:
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes).groups()
  inputs, weights, outputs = (dict(zip(label, array.dims, strict=True)) for label, array in
                              zip(labels, (left, kernel, result), strict=True))
  window = (re.search(r"window=\{([^}]*)\}", i.attributes) or ["", ""])[1]
  options = dict(re.findall(r"(\w+)=(\S+)", window))
  flops = 2.0 * outputs["b"] * outputs["f"] * weights["i"]
  for n, label in enumerate(sorted(filter(str.isdigit, outputs))):
    # `pad` is low_high; what is high changes nothing beyond the size of the output.
    stride, pad, dilation, window_dilation = (
        int(options[key].split("x")[n].split("_")[0]) if key in options else default
        for key, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1)))
    flops *= _meetings(inputs[label], weights[label], outputs[label], stride, pad, dilation,
                       window_dilation)
  return flops


@functools.lru_cache(maxsize=4096)
def _meetings(size: int, window: int, outputs: int, stride: int, pad: int, dilation: int,
              window_dilation: int) -> int:
  """The pairs (output position, window position) of one dimension that meet an input."""
  if dilation == 1 and pad == 0 and (outputs - 1) * stride + (
      window - 1) * window_dilation < size:
    return outputs * window
  at = np.arange(outputs) * stride - pad
  inside = lambda p: (p >= 0) & (p <= (size - 1) * dilation) & (p % dilation == 0)
  return sum(int(inside(at + w * window_dilation).sum()) for w in range(window))
