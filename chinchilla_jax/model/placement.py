"""What the model asks of the outside about many devices, in logical names only.

The model says which axes its activations have and hands over its weights before it uses them;
`parallel.layout` answers with shardings. Without a mesh the answers change nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Names = tuple[str | None, ...]

# Logical axes of activations. `length` is the sequence inside a layer, `residual` the same axis
# between layers, where it can be cut finer; `keys` is the sequence of keys and values, which
# every query needs whole.
ACTIVATION_AXES = ("batch", "length", "residual", "keys", "heads", "mlp", "vocab")


@dataclasses.dataclass(frozen=True)
class Placement:
  """How activations and weights lie over devices.

  Attributes:
    constrain: (x, names) -> x, the same numbers laid out as `names` say; one name or None
      per axis of x.
    shards: into how many pieces an activation axis is cut.
    weights: (path, tree) -> tree; the weights at `path` ("blocks", without the layers axis, or
      "embedding", "final_norm") as a layer needs them.
    first: (x, weights) -> (x, weights), the same numbers; what is made of the weights waits for x.
      Going backward, the gradient of x waits until that of the weights has been handed on.
    attend: causal attention by a kernel, (q_hbtk, k_hbtk, v_hbtk, (r_hnk, u_hk, v_hk) or None,
      segments_bt or None, divisor, name for remat policies) -> out_hbtk; None: the model's own.
  """

  constrain: Callable[[jax.Array, Names], jax.Array] = lambda x, names: x
  shards: Callable[[str], int] = lambda name: 1
  weights: Callable[[str, Any], Any] = lambda path, tree: tree
  first: Callable[[jax.Array, Any], tuple[jax.Array, Any]] = lambda x, tree: (x, tree)
  attend: Callable[..., jax.Array] | None = None


WHOLE = Placement()


@dataclasses.dataclass(frozen=True)
class Rows:
  """Order of the tokens of a sequence that is cut among n devices.

  A device that held one stretch of the sequence would have rows that see few keys (at the
  start) or many (at the end). So the sequence is dealt out in blocks, like cards: block j * n + g
  goes to device g ("striped attention", Brandon et al. 2023, by blocks). All devices' j-th
  blocks together are one stretch of n * block rows.

  Attributes:
    groups: n.
    block: rows a block.
    rounds: blocks each device has.
  """

  groups: int
  block: int
  rounds: int

  @classmethod
  def of(cls, length: int, groups: int, block: int) -> "Rows":
    """Blocks of at most `block` rows (0: as many as there are), equal ones if groups > 1."""
    share = length // groups
    size = min(block or share, share)
    if groups > 1:
      assert length % groups == 0, (length, groups)
      size = max(n for n in range(1, size + 1) if share % n == 0)
    return cls(groups, size, -(-share // size))

  def positions(self, length: int) -> np.ndarray:
    """Position in the text of each token, in the order of the devices: int32 [length]."""
    return self._swap(np.arange(length, dtype=np.int32), 0, self.rounds, self.groups)

  def span(self, turn: int, length: int) -> tuple[int, int]:
    """(start, stop) of round `turn` in the order of the text."""
    size = self.groups * self.block
    return turn * size, min((turn + 1) * size, length)

  def take(self, x: jax.Array, axis: int, turn: int) -> jax.Array:
    """The rows of round `turn`, in the order of the text, of x in the order of the devices."""
    if self.groups == 1:
      return jax.lax.slice_in_dim(x, *self.span(turn, x.shape[axis]), axis=axis)
    split = x.reshape(*x.shape[:axis], self.groups, self.rounds, self.block, *x.shape[axis + 1:])
    one = jax.lax.index_in_dim(split, turn, axis + 1, keepdims=False)
    return one.reshape(*x.shape[:axis], -1, *x.shape[axis + 1:])

  def join(self, turns: list[jax.Array], axis: int) -> jax.Array:
    """What `take` took, put together again in the order of the devices."""
    if self.groups == 1:
      return jnp.concatenate(turns, axis=axis)
    shape = turns[0].shape
    turns = [x.reshape(*shape[:axis], self.groups, self.block, *shape[axis + 1:]) for x in turns]
    return jnp.stack(turns, axis=axis + 1).reshape(*shape[:axis], -1, *shape[axis + 1:])

  def deal(self, x: jax.Array, axis: int) -> jax.Array:
    """From the order of the text to the order of the devices."""
    return self._swap(x, axis, self.rounds, self.groups)

  def collect(self, x: jax.Array, axis: int) -> jax.Array:
    """From the order of the devices to the order of the text."""
    return self._swap(x, axis, self.groups, self.rounds)

  def _swap(self, x, axis: int, first: int, second: int):
    if self.groups == 1:
      return x
    axis %= x.ndim
    split = x.reshape(*x.shape[:axis], first, second, self.block, *x.shape[axis + 1:])
    return split.swapaxes(axis, axis + 1).reshape(x.shape)
