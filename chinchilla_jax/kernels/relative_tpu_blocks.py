"""What the forward and the backward kernel of `relative_tpu` share: tiles, the shift, scores.

A tile is block_q queries against block_k keys. The position term of its scores,

  position[a, c] = (q_a + v) . r(distance from query a to key c),

needs the distances of a window: all of the tile's queries to all of its keys. (q + v) times the
window gives a row of distances for every query, the same distances for all; row a must then move
by a, so that its column c holds the distance to key c. That is the relative shift of Dai et al.
2019, appendix B, inside a tile. It is done for `rows` queries at a time, since a window is
rows + block_k long: 128 rows against 512 keys multiply 1.25 times what content multiplies,
512 rows twice.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from chinchilla_jax.errors import UserError

LANES = 128
SUBLANES = 8
MASKED = -1e30  # finite, as in model.attention
# Of a kernel. The default is far below what most chips have (16 MiB v4, 64 MiB v5p and tpu7x, 128
# MiB v5e and v6e); what a kernel does not need it does not take, and no chip is overdrawn.
VMEM_LIMIT = 128 * 2**20


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How a sequence is cut into tiles.

  Attributes:
    length: tokens, a multiple of both blocks.
    block_q, block_k: queries and keys of a tile; one divides the other.
    strided: rotate rows by their number in one instruction, see `shift`.
  """

  length: int
  block_q: int
  block_k: int
  strided: bool

  def __post_init__(self):
    big, small = max(self.block_q, self.block_k), min(self.block_q, self.block_k)
    if small < 1 or big % small or self.length % big or self.block_q % self.rows:
      raise UserError(f"relative attention: blocks of {self.block_q} queries and {self.block_k} "
                      f"keys do not tile {self.length} tokens; take powers of two")

  @property
  def rows(self) -> int:
    """Queries that are shifted together."""
    return min(self.block_q, LANES)

  @property
  def parts(self) -> list[tuple[int, slice]]:
    """Number and queries of each of a tile's parts of `rows` queries."""
    return [(part, slice(part * self.rows, (part + 1) * self.rows))
            for part in range(self.block_q // self.rows)]

  @property
  def window(self) -> int:
    """Distances that `rows` queries need, and one that is there for alignment."""
    return self.rows + self.block_k

  @property
  def distances(self) -> int:
    """Relative keys that a kernel is given: for `length` down to the longest look ahead.

    A tile on the diagonal has keys after its queries. They are masked, but their (negative)
    distances are multiplied like any other.
    """
    return self.length + max(self.block_q, self.block_k)

  def tiles(self) -> np.ndarray:
    """Tiles that hold a query and a key not after it, a block of queries at a time.

    Returns:
      int32 [4, tiles]: block i of the queries, j of the keys, and whether the tile is the first
      and the last of block i.
    """
    rows = [(i, j, j == 0, j == self._last_key(i)) for i in range(self.length // self.block_q)
            for j in range(self._last_key(i) + 1)]
    return np.array(rows, np.int32).T

  def tiles_by_key(self) -> np.ndarray:
    """The same tiles, a block of keys at a time.

    Returns:
      int32 [6, tiles]: i, j, whether the tile is the first and the last of block j, whether it
      is the last of block i, and the block of queries whose last tile was met last (0 before).
      The latter never falls: a buffer that follows it goes out once per block, complete.
    """
    blocks, whole, rows = self.length // self.block_q, 0, []
    for j in range(self.length // self.block_k):
      first = j * self.block_k // self.block_q
      for i in range(first, blocks):
        whole = i if j == self._last_key(i) else whole
        rows.append((i, j, i == first, i == blocks - 1, j == self._last_key(i), whole))
    return np.array(rows, np.int32).T

  def _last_key(self, i: int) -> int:
    return ((i + 1) * self.block_q - 1) // self.block_k

  def window_of(self, i, j, part: int):
    """The relative keys that a part of tile (i, j) needs."""
    start = self.length + j * self.block_k - i * self.block_q - (part + 1) * self.rows
    return pl.ds(pl.multiple_of(start, min(self.rows, self.block_k)), self.window)


def meetings(tiles: np.ndarray, segments_b1t, b: int, tiling: Tiling) -> jax.Array:
  """Which tiles may hold a query and a key of one document: int32 [b * tiles], 1 or 0.

  By the lowest and the highest number in a block. So a tile that could be left out may be
  computed, and masked, where documents are not numbered in their order.
  """
  if segments_b1t is None:
    return jnp.ones((b * tiles.shape[1],), jnp.int32)
  of_q, of_s = (segments_b1t.reshape(b, -1, size)[:, index] for size, index in (
      (tiling.block_q, tiles[0]), (tiling.block_k, tiles[1])))
  apart = (jnp.max(of_q, 2) < jnp.min(of_s, 2)) | (jnp.max(of_s, 2) < jnp.min(of_q, 2))
  return (1 - apart.astype(jnp.int32)).reshape(-1)


def dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
  """The float32 product of two matrices over the named axes.

  float32 operands are multiplied as such, in several passes; bfloat16 ones in one.
  """
  exact = x.dtype == jnp.float32
  precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
  return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), precision=precision,
                             preferred_element_type=jnp.float32)


def shift(x_qw: jax.Array, tiling: Tiling) -> jax.Array:
  """Column c of row a of the result is column rows - a + c of x: [rows, window] to [rows, keys].

  Row a is rotated right by a. The vector unit can do so in one go on v5e, v5p, v6e and tpu7x
  (`strided`), not on v4 and before.
  """
  if tiling.strided:
    turned_qw = pltpu.roll(x_qw, 0, 1, stride=1, stride_axis=0)
  else:
    turned_qw = _ladder(x_qw, lambda a: a)
  return turned_qw[:, tiling.rows:]


def unshift(x_qs: jax.Array, tiling: Tiling) -> jax.Array:
  """The transpose of `shift`: [rows, keys] to [rows, window], zeros where nothing comes from.

  Row a is rotated left by a, for which no generation has an instruction.
  """
  x_qw = jnp.concatenate([jnp.zeros((tiling.rows, tiling.rows), x_qs.dtype), x_qs], axis=1)
  return _ladder(x_qw, lambda a: -a % tiling.window)


def _ladder(x_qw: jax.Array, turn) -> jax.Array:
  """Rotates row a right by turn(a), a linear function mod window, with plain rotations.

  Rows 8g ... 8g + 7 lie in registers of their own, so these are rotated by turn(8g) together;
  what is left of a, below 8, is made up of 1, 2 and 4, each of which half of the rows take.
  """
  q = x_qw.shape[0]
  size = min(SUBLANES, q)
  x_qw = jnp.concatenate(
      [_roll(x_qw[start:start + size], turn(start)) for start in range(0, q, size)], axis=0)
  row_q1 = jax.lax.broadcasted_iota(jnp.int32, (q, 1), 0)
  step = 1
  while step < size:
    x_qw = jnp.where(row_q1 & step != 0, _roll(x_qw, turn(step)), x_qw)
    step *= 2
  return x_qw


def _roll(x_qw, by: int):
  return pltpu.roll(x_qw, by, 1) if by else x_qw


def position_scores(q_position_qk, r_wk, tiling: Tiling) -> jax.Array:
  """The position term of one part of a tile, float32 [rows, keys]."""
  return shift(dot(q_position_qk, r_wk, 1, 1), tiling)


def mask(scores_qs, ahead, segments_ql, segments_1s) -> jax.Array:
  """Scores where the key is not after the query and in its document, else a very low number.

  Args:
    scores_qs: of some queries and keys.
    ahead: position of the first key less that of the first query.
    segments_ql, segments_1s: their documents, or None.
  """
  axis = lambda n: jax.lax.broadcasted_iota(jnp.int32, scores_qs.shape, n)
  seen_qs = axis(0) - axis(1) >= ahead
  if segments_ql is not None:
    seen_qs &= spread(segments_ql, scores_qs.shape[1]) == segments_1s
  return jnp.where(seen_qs, scores_qs, MASKED)


def biased(q_qk, bias_1k, divisor: float) -> jax.Array:
  """(q + bias) / divisor, rounded once, to the dtype of q."""
  return ((q_qk.astype(jnp.float32) + bias_1k) * (1 / divisor)).astype(q_qk.dtype)


def column(x_1q: jax.Array) -> jax.Array:
  """A row of 32-bit numbers as a column, x_ql: the same number in every lane.

  A column of one lane would have to be sent to all of them at each use.
  """
  return jnp.broadcast_to(x_1q, (LANES, x_1q.shape[1])).T


def spread(x_ql: jax.Array, n: int) -> jax.Array:
  """A column, as wide as n lanes."""
  return jnp.concatenate([x_ql] * -(-n // LANES), axis=1)[:, :n]


def row(x_ql: jax.Array) -> jax.Array:
  """The opposite of `column`."""
  return x_ql.T[:1]
