"""The tables: what a rule cuts, what it leaves whole, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from tiny import tiny_experiment, with_fields

from chinchilla_jax.errors import UserError
from chinchilla_jax.parallel import rules
from chinchilla_jax.parallel.layout import refuse

MESH = {"slice": 1, "data": 4, "context": 2, "tensor": 2}
BOTH = rules.STRATEGIES["fsdp_tensor"].parameters
FSDP = rules.STRATEGIES["fsdp"].parameters


@pytest.mark.parametrize("strategy, shape, names, spec", [
    ("replicated", (32, 64), ("embed", "mlp"), P()),
    ("fsdp", (32, 64), ("embed", "mlp"), P(("data", "context"))),
    ("deepmind", (32, 64), ("embed", "mlp"), P(None, "tensor")),
    ("fsdp_tensor", (32, 64), ("embed", "mlp"), P(("data", "context"), "tensor")),
    ("fsdp_tensor", (3, 32, 4, 8), ("layers", "embed", "heads", "head_dim"),
     P(None, ("data", "context"), "tensor")),
    ("fsdp_tensor", (512, 32), ("vocab", "embed"), P("tensor", ("data", "context"))),
    ("fsdp_tensor", (32,), ("embed",), P(("data", "context"))),
])
def test_what_a_strategy_cuts(strategy, shape, names, spec):
  table = rules.STRATEGIES[strategy].parameters
  assert rules.resolve(shape, names, table, MESH) == rules.Resolved(spec)


def test_the_papers_strategy_cuts_the_optimizer_further():
  paper = rules.STRATEGIES["deepmind"]
  cut = lambda table: rules.resolve((32, 64), ("embed", "mlp"), table, MESH).spec
  assert cut(paper.parameters) == P(None, "tensor")
  assert cut(paper.optimizer) == P(("data", "context"), "tensor")


def test_a_rule_that_does_not_divide_falls_back_and_is_reported():
  # 12 does not divide by data x context = 8; by data = 4 it does.
  assert rules.resolve((12,), ("embed",), FSDP, MESH) == rules.Resolved(
      P("data"), ("embed 12 does not divide by data+context 8",))
  # What no rule can cut stays whole.
  whole = rules.resolve((7, 9), ("embed", "mlp"), FSDP, MESH)
  assert whole.spec == P()
  assert whole.fell_back == ("embed 7 does not divide by data+context 8",
                             "mlp 9 does not divide by data+context 8")
  # Another axis takes over what one could not.
  assert rules.resolve((7, 16), ("embed", "mlp"), FSDP, MESH).spec == P(None, ("data", "context"))


def test_axes_of_size_one_vanish():
  alone = dict(MESH, data=1, context=1)
  assert rules.resolve((32, 64), ("embed", "mlp"), BOTH, alone).spec == P(None, "tensor")
  assert rules.resolve((32, 64), ("embed", "mlp"), BOTH, dict.fromkeys(MESH, 1)) == (
      rules.Resolved(P()))
  assert rules.resolve((32, 64), ("embed", "mlp"), FSDP, dict(MESH, context=1)).spec == P("data")


def test_small_weights_are_cut_over_tensor_alone():
  cut = lambda shape, names, below: rules.resolve(shape, names, BOTH, MESH, below).spec
  assert cut((32, 64), ("embed", "mlp"), 2049) == P(None, "tensor")
  assert cut((32, 64), ("embed", "mlp"), 2048) == P(("data", "context"), "tensor")
  # Many small layers are small.
  layers = ((100, 32, 64), ("layers", "embed", "mlp"))
  assert cut(*layers, 2049) == P(None, None, "tensor")


def test_unknown_axes_stay_whole():
  assert rules.resolve((32, 64), (None, "breadth"), BOTH, MESH) == rules.Resolved(P())


_NAMES = ("embed", "mlp", "vocab", "heads", "head_dim", "layers", "batch", "length", "residual")


@given(data=st.data(), mesh=st.fixed_dictionaries(
    {axis: st.sampled_from((1, 2, 3, 4)) for axis in MESH}),
       names=st.lists(st.sampled_from(_NAMES), unique=True, min_size=1, max_size=4))
def test_every_cut_divides_and_no_mesh_axis_is_used_twice(data, mesh, names):
  shape = [data.draw(st.integers(1, 48)) for _ in names]
  table = data.draw(st.sampled_from([*(s.optimizer for s in rules.STRATEGIES.values()),
                                     rules.ACTIVATIONS]))
  resolved = rules.resolve(shape, names, table, mesh)
  entries = rules.axes_of(resolved.spec)
  used = [axis for axes in entries for axis in axes]
  assert len(used) == len(set(used)) and all(mesh[axis] > 1 for axis in used)
  parts = 1
  for size, axes in zip(shape, entries, strict=False):
    cut = rules.pieces(P(axes), mesh)
    assert size % cut == 0
    parts *= cut
  assert rules.pieces(resolved.spec, mesh) == parts


@pytest.mark.parametrize("text, spec", [
    ("tensor,-", P("tensor")), ("-,tensor", P(None, "tensor")), ("-,-", P()),
    (" data+context , tensor", P(("data", "context"), "tensor")),
    ("slice,tensor", P(None, "tensor")),
    ("slice+data,-", P("data"))])
def test_a_sharding_is_read_from_text(text, spec):
  assert rules.parse_spec(text, (32, 64), MESH, "here") == spec


@pytest.mark.parametrize("text, says", [
    ("tensor", r"here: 'tensor' has 1 entries for an array of shape \[32, 63\]"),
    ("model,-", "names 'model'; mesh axes are slice, data, context, tensor"),
    ("-,tensor", "cuts an axis of 63 into 2"),
    ("data+data,-", "uses a mesh axis twice"),
])
def test_a_sharding_that_cannot_be_is_refused(text, says):
  with pytest.raises(UserError, match=says):
    rules.parse_spec(text, (32, 63), MESH, "here")


def test_axes_and_pieces_of_a_spec():
  spec = P("tensor", None, ("data", "context"))
  assert rules.axes_of(spec) == (("tensor",), (), ("data", "context"))
  assert rules.pieces(spec, MESH) == 16


@pytest.mark.parametrize("fields, mesh, says", [
    (dict(batch__sequences=12), dict(data=8),
     "12 sequences in 1 microbatches do not divide among 8 devices along data; choose a multiple "
     "of 8"),
    (dict(batch__sequences=8, batch__microbatches=4), dict(data=4),
     "8 sequences in 4 microbatches .* 4 devices along data; choose a multiple of 16"),
    (dict(batch__sequences=8), dict(slice=2, data=8), "16 devices along slice x data"),
    (dict(batch__sequences=8, batch__ramp=(("50%", 12),), batch__ramp_by="size"), dict(data=8),
     "12 sequences in 1 microbatches"),
    (dict(data__seq_len=30), dict(context=4), "seq_len: 30 tokens .* config.mesh.context 4"),
    (dict(mesh__strategy="fsdp"), dict(tensor=2), "mesh.tensor is 2, but strategy 'fsdp'"),
    (dict(mesh__strategy="replicated"), dict(tensor=2), "strategy 'replicated' cuts no layer"),
    (dict(mesh__strategy="deepmind"), dict(tensor=4), "2 heads do not divide by 4"),
])
def test_what_cannot_be_trained_is_refused_with_its_numbers(fields, mesh, says):
  experiment = with_fields(tiny_experiment(), **fields)
  with pytest.raises(UserError, match=says):
    refuse(experiment, dict.fromkeys(MESH, 1) | mesh)


def test_what_divides_is_not_refused():
  experiment = with_fields(tiny_experiment(), batch__sequences=8, batch__microbatches=2,
                           batch__ramp=(("50%", 16),), mesh__strategy="fsdp_tensor")
  refuse(experiment, dict(slice=2, data=2, context=4, tensor=2))
  # Microbatches grow with the ramp: 12 sequences in 3 of them.
  ramp = with_fields(experiment, batch__ramp=(("50%", 12),))
  refuse(ramp, dict(slice=1, data=4, context=1, tensor=1))
