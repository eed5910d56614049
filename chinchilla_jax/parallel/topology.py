"""What the hardware can do: the only place that knows peaks.

A device that is not in the table has no peak, and no MFU is printed for it.
"""

# Dense bfloat16 FLOP/s per JAX device, by the prefix of `device.device_kind`. Public data
# sheets. On v2 and v3 a JAX device is a core, half a chip.
_PEAK_FLOPS = {
    "TPU v2": 23e12,
    "TPU v3": 61.5e12,
    "TPU v4 lite": 138e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device_kind: str) -> float | None:
  """Peak dense bfloat16 FLOP/s of one JAX device, or None if the kind is unknown."""
  matches = [kind for kind in _PEAK_FLOPS if device_kind.startswith(kind)]
  return _PEAK_FLOPS[max(matches, key=len)] if matches else None
