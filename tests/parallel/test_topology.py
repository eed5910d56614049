import pytest

from chinchilla_jax.parallel import topology


@pytest.mark.parametrize("kind, peak", [
    ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12),
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA A100-SXM4-80GB", 312e12)])
def test_known_devices(kind, peak):
  assert topology.peak_flops(kind) == peak


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA GeForce RTX 9090", "TPU v99", "", "AMD MI350X"])
def test_an_unknown_device_has_no_peak_rather_than_a_wrong_one(kind):
  assert topology.peak_flops(kind) is None
