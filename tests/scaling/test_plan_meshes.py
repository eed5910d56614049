"""The mesh of a plan: it divides, it fits, and the estimate is what a compiler found."""

import pytest
from tiny import ROOT, with_fields

from chinchilla_jax import config_io
from chinchilla_jax.errors import UserError
from chinchilla_jax.parallel import layout, report, topology
from chinchilla_jax.parallel import mesh as mesh_lib
from chinchilla_jax.scaling import laws, meshes, plan

GIB = 2**30
LAW = laws.find(plan.DEFAULT_LAW)


@pytest.mark.parametrize("flops, name, slices", [
    (5.76e23, "v4:8x8x16", 1), (5.76e23, "v5e:16x16", 1), (5.76e23, "v6e:16x16", 1),
    (5.76e23, "v5p:8x8x8", 1), (5e24, "v3:32x32", 4), (5.76e23, "v4:8x8x16", 2),
    (1e23, "tpu7x:4x4x8", 1), (1e19, "v2:4x4", 1), (1e22, "a100-40gb:64", 1),
    (5.76e23, "h100:512", 1), (1e21, "h100:8", 1), (1e20, "h100:1", 1), (1e25, "b200:1024", 1),
    (1e22, "a100-80gb:16", 1), (3e22, "h200:32", 1)])
def test_it_divides_and_fits(flops, name, slices):
  where = topology.parse(name, slices)
  made = plan.make(plan.Ask(LAW, flops=flops, where=where))
  fit = made.fit
  axes = mesh_lib.sizes(made.experiment.mesh, where.devices, where.networks)
  assert dict(fit.axes) == axes
  layout.refuse(made.experiment, axes)  # Says nothing where it can be trained.
  assert fit.share <= meshes.USABLE and fit.memory == where.chip.hbm_bytes_per_device
  # The bytes of the train state are those of the report that `chinchilla inspect` prints.
  facts = report.facts(
      made.experiment, report.abstract_mesh(made.experiment.mesh, where.devices, where.networks),
      meshes._abstract_state(made.experiment))
  assert facts["does_not_train"] is None
  assert facts["totals"]["state"]["bytes_per_device"] == fit.state_bytes
  # Keeping the batch near the rule's matters more than the mesh.
  assert made.experiment.batch.sequences * 2048 == pytest.approx(made.recipe.batch_tokens, rel=0.3)


# Config, changes, mesh axes, peak GiB of one device as libtpu compiled it; rematerialisation is
# full and attention in one block, but for the config's own in the last row (docs/tpu.md).
PAPER = {"mesh__strategy": "deepmind", "mesh__tensor": 16}
COMPILED = [
    ("chinchilla.py:70b", PAPER, 768, (1, 64, 1, 16), 21.33),
    ("chinchilla.py:70b", {"mesh__strategy": "fsdp_tensor", "mesh__tensor": 8}, 768,
     (1, 128, 1, 8), 5.15),
    ("chinchilla.py:70b", PAPER, 1536, (2, 64, 1, 16), 22.45),
    ("gopher.py:280b", {}, 1536, (4, 128, 1, 16), 4.80),
    ("chinchilla.py:70b", {"mesh__strategy": "fsdp_tensor", "mesh__tensor": 8,
                           "batch__microbatches": 4}, 768, (1, 32, 1, 8), 9.56),
    ("chinchilla.py:70b", {"mesh__strategy": "fsdp_tensor", "mesh__tensor": 8,
                           "batch__microbatches": 2}, 768, (1, 32, 1, 8), 13.43),
    ("chinchilla.py:70b", {"mesh__strategy": "fsdp_tensor", "mesh__tensor": 8}, 768,
     (1, 64, 1, 8), 9.94),
    ("chinchilla.py:70b", {"mesh__strategy": "fsdp_tensor", "mesh__tensor": 8,
                           "batch__microbatches": 2}, 1536, (1, 128, 1, 8), 5.50),
    ("chinchilla.py:70b", {"model__remat": "dots", "model__attention_block": 128}, 768,
     (1, 256, 1, 4), 21.53),
]


@pytest.mark.parametrize("config, changes, sequences, sizes, peak", COMPILED)
def test_the_estimate_is_at_least_what_the_compiler_found(config, changes, sequences, sizes, peak):
  fields = {"model__remat": "full", "model__attention_block": 0, **changes}
  experiment = with_fields(config_io.load(str(ROOT / "configs" / config)),
                           batch__sequences=sequences, batch__ramp=(), **fields)
  axes = dict(zip(mesh_lib.AXES, sizes, strict=True))
  fit = meshes.measure(experiment, axes, 32 * GIB)
  estimate = (fit.state_bytes + fit.step_bytes) / GIB
  assert 0.95 * peak <= estimate <= 1.5 * peak


def test_more_devices_hold_less_and_take_less_time():
  one, two = (plan.make(plan.Ask(LAW, flops=1e22, where=topology.parse(name)))
              for name in ("v5p:4x4x4", "v5p:4x4x8"))
  assert two.fit.state_bytes < one.fit.state_bytes
  assert two.days == pytest.approx(one.days / 2, rel=0.01)


def test_what_cannot_be():
  with pytest.raises(UserError, match="do not fit v5e:2x2.*train state.*take more chips"):
    plan.make(plan.Ask(LAW, flops=1e24, where=topology.parse("v5e:2x2")))
  with pytest.raises(meshes.DoesNotDivide, match="1,024 devices, and 128 sequences"):
    plan.make(plan.Ask(LAW, flops=1e18, where=topology.parse("v4:8x8x16")))
