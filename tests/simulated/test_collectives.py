"""What devices say to each other in a step, read from the optimised HLO.

Two nets. `test_collectives_are_those_of_the_golden_file` compares kinds, axes, counts and bytes
with collectives.json, for versions of JAX that it holds. `check` holds for every version: no
collective moves more than one layer needs, and weights travel no more often than they must.

After a change that is meant, or for a new version of JAX, write the golden file anew with

  REGENERATE=1 JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 \\
    python -m pytest tests/simulated/test_collectives.py

and read its diff: every line is traffic of a run. On the CPU a reduce-scatter is an all-reduce
and a slice, and bfloat16 travels as float32; so bytes are not those of a TPU or GPU.
"""

import functools
import json
import math
import os
import pathlib

import eight
import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from chinchilla_jax.model import transformer
from chinchilla_jax.parallel import hlo, layout, rules
from chinchilla_jax.training import step

GOLDEN = pathlib.Path(__file__).parent / "collectives.json"
VERSION = ".".join(jax.__version__.split(".")[:2])
# So many layers that what moves all of them at once stands out.
BASE = eight.experiment(model__n_layers=16, precision__parameters="bfloat16",
                        precision__activations="bfloat16")
NUMBER = 4  # Bytes of a number on the wire.


def compiled(name):
  """(layout, program) of the step as the loop jits it."""
  placed, adamw = eight.on(name, BASE), eight.adamw_of(BASE)
  where = eight.layout_of(name, BASE)
  state = eight.state_lib.abstract(BASE.model, adamw)
  train_step = jax.jit(step.make_train_step(placed, adamw, where), donate_argnums=0,
                       out_shardings=(where.state(state), where.replicated))
  text = train_step.lower(where.placed(state), where.batch(
      (BASE.batch.sequences, BASE.data.seq_len))).compile(eight.QUICK).as_text()
  return where, hlo.analyse(text, where.mesh.shape)


program = functools.cache(compiled)


def summary(found):
  by_axes = {f"{kind} {'+'.join(axes)}": count for (kind, axes), (count, _, _) in
             sorted(found.by_axes().items())}
  return by_axes | {"wire_bytes": round(sum(c.wire_bytes for c in found.collectives))}


@pytest.mark.parametrize("name", eight.LAYOUTS)
def test_collectives_are_those_of_the_golden_file(name):
  golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
  found = summary(program(name)[1])
  if os.environ.get("REGENERATE"):
    golden.setdefault(VERSION, {})[name] = found
    GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
  if VERSION not in golden:
    pytest.skip(f"collectives.json has no JAX {VERSION}; see this file's first lines")
  assert found == golden[VERSION][name]


# -------------------------------------------------------------------- What holds for any version


def sizes_at_use(where):
  """Bytes of {path: one layer's weight, or the embedding}, as a layer multiplies with them."""
  shape, sizes = where.mesh.shape, {}
  for entry in where.entries({"params": transformer.abstract(BASE.model, "bfloat16")}):
    dims, names = entry.shape, entry.names
    if names[0] == "layers":
      dims, names = dims[1:], names[1:]
    table = rules.STRATEGIES[where._config.strategy].parameters
    over_tensor = tuple(rule for rule in table if rule[1] == ("tensor",))
    cut = rules.pieces(rules.resolve(dims, names, over_tensor, shape).spec, shape)
    sizes[entry.path] = math.prod(dims) * NUMBER // cut
  return sizes


def check(where, found):
  """Asserts the bounds that every layout of `BASE` keeps."""
  shape, model = where.mesh.shape, BASE.model
  sizes = sizes_at_use(where)
  layers = lambda path: model.n_layers if path.startswith("params/blocks") else 1
  weights = sum(size * layers(path) for path, size in sizes.items())

  # Weights are gathered going forward and, a layer at a time, again going backward; never over
  # slices. Activations are not gathered over data at all.
  n = shape["data"] * shape["context"]
  gathered = sum(c.wire_bytes for c in found.collectives
                 if c.kind == "all-gather" and {"data", "slice"} & set(c.axes))
  assert gathered <= 2 * weights * (n - 1) / n, (gathered, weights)
  assert not any("slice" in c.axes for c in found.collectives if c.kind == "all-gather")

  # No gather, exchange or permutation is larger than a layer's largest weight or activation. The
  # paper's strategy gathers a weight of all layers at once: once a step.
  once = where._config.strategy == "deepmind"
  weight = max(size * (layers(path) if once else 1) for path, size in sizes.items())
  tokens = BASE.batch.sequences * BASE.data.seq_len // (shape["slice"] * shape["data"])
  activation = tokens * NUMBER * max(model.d_model // shape["context"],
                                     model.n_heads * model.kv_size // shape["tensor"])
  for c in found.collectives:
    if c.kind != "all-reduce":
      assert c.payload_bytes <= max(weight, activation), c

  # Gradients are summed over the batch once, and norms with them.
  summed = sum(c.wire_bytes for c in found.collectives
               if c.kind in ("all-reduce", "reduce-scatter") and {"data", "slice"} & set(c.axes))
  assert summed <= 2 * weights * 1.3, (summed, weights)


@pytest.mark.parametrize("name", eight.LAYOUTS)
def test_no_more_is_moved_than_a_layer_needs(name):
  check(*program(name))


def _whole(where, tree):
  return jax.lax.with_sharding_constraint(tree, NamedSharding(where.mesh, PartitionSpec()))


def all_layers_at_once(patch):
  """Weights of all layers are gathered before the first."""
  hidden = transformer.hidden

  def gathers(config, params, tokens_bt, segments_bt, dtype, placement):
    where = placement.weights.__self__
    params = params | {"blocks": _whole(where, params["blocks"])}
    return hidden(config, params, tokens_bt, segments_bt, dtype, placement)

  patch.setattr(transformer, "hidden", gathers)


def over_tensor_too(patch):
  """A layer's weights are gathered over tensor as well."""
  patch.setattr(layout, "_over_tensor", lambda table: ())


def activations_everywhere(patch):
  """Activations lie whole on every device."""
  patch.setattr(layout.Layout, "_constrain", lambda self, x, names: _whole(self, x))


@pytest.mark.parametrize("name, mistake", [
    ("fsdp data 8", all_layers_at_once),
    ("fsdp_tensor data 2 x tensor 4", over_tensor_too),
    ("fsdp_tensor data 2 x tensor 4", activations_everywhere),
])
def test_an_accidental_gather_is_caught(name, mistake, monkeypatch):
  with monkeypatch.context() as patch:
    mistake(patch)
    where, found = compiled(name)
  assert summary(found) != summary(program(name)[1])
  with pytest.raises(AssertionError):
    check(where, found)
