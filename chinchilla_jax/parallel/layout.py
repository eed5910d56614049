"""Where everything of a run lies: train state, batch, and what the model asks of a mesh."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from chinchilla_jax import config as schema
from chinchilla_jax import durations, patterns
from chinchilla_jax.errors import UserError
from chinchilla_jax.kernels import choice
from chinchilla_jax.model import transformer
from chinchilla_jax.model.placement import Placement
from chinchilla_jax.parallel import compiler_flags, rules, scatter

Tree = Any
BATCH = ("inputs_bt", "targets_bt", "segments_bt", "weights_bt")


@dataclasses.dataclass(frozen=True)
class Entry:
  """How one array of the train state is cut."""

  path: str                      # "params/blocks/attention/w_query"
  names: tuple[str | None, ...]  # Logical axes.
  shape: tuple[int, ...]
  dtype: Any
  resolved: rules.Resolved
  override: str = ""             # The config's own sharding, if it has one for this path.

  @property
  def bytes(self) -> int:
    return math.prod(self.shape) * np.dtype(self.dtype).itemsize

  def bytes_per_device(self, mesh_shape: Mapping[str, int]) -> int:
    return self.bytes // rules.pieces(self.resolved.spec, mesh_shape)


class Layout:
  """The layout of one experiment on one mesh.

  Attributes:
    mesh: with the axes of `mesh.AXES`, of real devices or of a topology description.
    placement: what the model needs to know.
    replicated: the sharding of what every device holds.
    rows: the sharding of a batch's arrays: sequences cut over slice and data.
    attention: the kernel that attends (`kernels.choice`).
    compiler_options: for `jax.jit` (`compiler_flags`).

  Raises:
    UserError: the config asks for a kernel that these devices cannot run.
  """

  def __init__(self, experiment: schema.Experiment, mesh: jax.sharding.Mesh):
    self.mesh = mesh
    self._shape = dict(mesh.shape)
    self._config = experiment.mesh
    self._strategy = rules.STRATEGIES[experiment.mesh.strategy]
    self._model = experiment.model
    self._dtype = experiment.precision.parameters
    self.replicated = NamedSharding(mesh, PartitionSpec())
    self.rows = NamedSharding(mesh, rules.resolve((0, 1), ("batch", None), rules.ACTIVATIONS,
                                                  self._shape).spec)
    self.attention, attend, self.compiler_options = "blockwise", None, None
    if isinstance(mesh, jax.sharding.Mesh):  # An abstract one does not say what its devices are.
      task = choice.Task.of(experiment, mesh)
      self.attention = choice.choose(experiment.model.attention_kernel, task)
      attend = choice.attend(self.attention, mesh, task)
      if experiment.mesh.compiler_flags:
        self.compiler_options = compiler_flags.of(mesh)
    self.placement = Placement(self._constrain, self._shards, self._weights, attend=attend,
                               **({"first": _first} if mesh.size > 1 else {}))

  # ------------------------------------------------------------------ State

  def entries(self, state: Tree) -> list[Entry]:
    """How every array of an abstract train state, or of a part of it, is cut."""
    return [self._entry(path, leaf) for path, leaf in _paths(state)]

  def state(self, state: Tree) -> Tree:
    """The NamedSharding of every array of an abstract train state, or of a part of it."""
    shardings = iter([self._named(entry.resolved.spec) for entry in self.entries(state)])
    return jax.tree.map(lambda _: next(shardings), state)

  def placed(self, state: Tree) -> Tree:
    """The same tree of ShapeDtypeStructs with their shardings."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
                        state, self.state(state))

  def batch(self, shape: tuple[int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """Abstract arrays of a batch [sequences, tokens]."""
    dtype = lambda name: "float32" if name == "weights_bt" else "int32"
    return {name: jax.ShapeDtypeStruct(shape, dtype(name), sharding=self.rows) for name in BATCH}

  def like_optimizer(self, params: Tree) -> Tree:
    """Lays a tree like the parameters, inside a jitted function, as the optimizer's moments lie.

    That is where gradients belong: what one device adds up is what it updates.
    """
    return jax.tree.map(jax.lax.with_sharding_constraint, params, self._gradients)

  # ------------------------------------------------------------------ What the model asks

  def _constrain(self, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    spec = rules.resolve(x.shape, names, rules.ACTIVATIONS, self._shape).spec
    return jax.lax.with_sharding_constraint(x, self._named(spec))

  def _shards(self, name: str) -> int:
    axes = dict(rules.ACTIVATIONS[::-1])[name]
    size = 1
    for axis in axes:
      size *= self._shape[axis]
    return size

  def _weights(self, path: str, tree: Tree) -> Tree:
    """Weights as a layer multiplies with them: cut over tensor at most.

    Going forward, that gathers what lies over data; going backward, it scatters each layer's
    gradient at once, so that no device ever holds the gradient of all layers.
    """
    return jax.tree.map(lambda w, place: place(w), tree, self._at_use[path])

  @functools.cached_property
  def _at_use(self) -> Mapping[str, Tree]:
    names = transformer.logical_axes(self._model)
    abstract = transformer.abstract(self._model, self._dtype)
    in_layer = lambda path: path == "blocks"

    def place(path, leaf, names, gradient):
      shape, spec = leaf.shape, gradient.spec
      if in_layer(path):  # One layer's: the leading axis is gone.
        shape, names, spec = shape[1:], names[1:], PartitionSpec(*spec[1:])
      kept = rules.resolve(shape, names, _over_tensor(self._strategy.parameters), self._shape)
      at_use, gradient = self._named(kept.spec), self._named(spec)
      lines = scatter.by_lines(gradient) if len(shape) > 1 else None  # Vectors are soon sent.
      return _use(at_use, gradient, self._dtype, lines)

    return {path: jax.tree.map(functools.partial(place, path), abstract[path], names[path],
                               self._gradients[path]) for path in abstract}

  @functools.cached_property
  def _gradients(self) -> Tree:
    params = transformer.abstract(self._model, "float32")
    return self.state({"optimizer": {"mu": params}})["optimizer"]["mu"]

  # ------------------------------------------------------------------ Rules

  @functools.cached_property
  def _names(self) -> Mapping[str, tuple[str, ...]]:
    axes = transformer.logical_axes(self._model)
    return dict(_paths(axes, is_leaf=lambda x: isinstance(x, tuple)))

  def _entry(self, path: str, leaf: Any) -> Entry:
    kind, _, rest = path.partition("/")
    if kind == "optimizer":
      _, _, rest = rest.partition("/")
    names = self._names.get(rest, (None,) * len(leaf.shape))
    table = self._strategy.parameters if kind == "params" else self._strategy.optimizer
    text = patterns.match(path, self._config.overrides, None)
    if text is not None and leaf.shape:  # There is nothing to cut in a number.
      spec = rules.parse_spec(text, leaf.shape, self._shape, f"config.mesh.overrides, {path}")
      return Entry(path, names, leaf.shape, leaf.dtype, rules.Resolved(spec), text)
    resolved = rules.resolve(leaf.shape, names, table, self._shape, self._config.whole_below)
    return Entry(path, names, leaf.shape, leaf.dtype, resolved)

  def _named(self, spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(self.mesh, spec)


def _over_tensor(table: rules.Rules) -> rules.Rules:
  return tuple(rule for rule in table if rule[1] == ("tensor",))


def _use(at_use: NamedSharding, gradient: NamedSharding, dtype: str,
         lines: scatter.Lines | None) -> Callable:
  """w -> w laid out for use, whose gradient is laid out like the optimizer's state."""

  @jax.custom_vjp
  def place(w):
    # Whatever dtype the gradient is to have, what travels has the dtype of the parameters.
    return jax.lax.with_sharding_constraint(w.astype(dtype), at_use).astype(w.dtype)

  def settle(_, g):
    if lines is not None:
      return (jax.lax.with_sharding_constraint(lines(g), gradient),)
    # First as the product makes it, then cut. Asked for the cut at once, the partitioner gathers
    # the batch instead where context and tensor are both cut.
    g = jax.lax.with_sharding_constraint(g, at_use)
    return (jax.lax.with_sharding_constraint(g, gradient),)

  place.defvjp(lambda w: (place(w), None), settle)
  return place


@jax.custom_vjp
def _first(x: jax.Array, tree: Tree) -> tuple[jax.Array, Tree]:
  """`Placement.first`: a barrier each way, so that no scheduler puts the second off."""
  return jax.lax.optimization_barrier((x, tree))


_first.defvjp(lambda x, tree: (jax.lax.optimization_barrier((x, tree)), None),
              lambda _, grads: jax.lax.optimization_barrier(grads))


def _paths(tree: Tree, is_leaf=None) -> list[tuple[str, Any]]:
  leaves, _ = jax.tree.flatten_with_path(tree, is_leaf=is_leaf)
  return [("/".join(key.key for key in path), leaf) for path, leaf in leaves]


def refuse(experiment: schema.Experiment, shape: Mapping[str, int]) -> None:
  """Checks that an experiment can be trained on a mesh of this shape.

  Raises:
    UserError: batch, sequence or heads do not divide among the devices; gives the numbers.
  """
  model, data = experiment.model, experiment.data
  over_batch = shape["slice"] * shape["data"]
  name = "slice x data" if shape["slice"] > 1 else "data"
  batch = experiment.batch
  for count in (batch.sequences, *(count for _, count in batch.ramp)):
    parts = durations.microbatches(batch, count)
    if count % (parts * over_batch):
      raise UserError(
          f"config.batch: {count:,} sequences in {parts} microbatches do not divide among "
          f"{over_batch} devices along {name}; choose a multiple of {parts * over_batch}, fewer "
          "microbatches, or a smaller config.mesh.data")
  if data.seq_len % shape["context"]:
    raise UserError(f"config.data.seq_len: {data.seq_len:,} tokens do not divide by "
                    f"config.mesh.context {shape['context']}")
  if experiment.mesh.strategy in ("replicated", "fsdp") and shape["tensor"] > 1:
    raise UserError(f"config.mesh.tensor is {shape['tensor']}, but strategy "
                    f"{experiment.mesh.strategy!r} cuts no layer; set config.mesh.strategy to "
                    "deepmind or fsdp_tensor, or tensor to 1")
  if model.n_heads % shape["tensor"]:
    raise UserError(f"config.mesh.tensor: {model.n_heads} heads do not divide by "
                    f"{shape['tensor']}; choose a divisor of config.model.n_heads")
