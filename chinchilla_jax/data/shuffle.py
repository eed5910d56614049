"""A permutation of 0 ... n - 1 that is computed where it is asked, in constant memory.

A balanced Feistel network over the smallest even number of bits that holds n, walked along its
cycle until it lands below n (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains",
method 2). Training order rests on it, so what it computes is fixed for ever; a golden test holds
it. Any index up to 2**62 works.
"""

import hashlib

import numpy as np

_ROUNDS = 8
# MurmurHash3's 64-bit finaliser (Appleby, public domain): every input bit reaches every output bit.
_MIX_1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX_2 = np.uint64(0xC4CEB9FE1A85EC53)
_SHIFT = np.uint64(33)


def permute(index_n: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
  """Where each index goes under the permutation of 0 ... n - 1 keyed by (seed, epoch).

  Args:
    index_n: int64, any shape, each in 0 ... n - 1.
    n: size of the domain, at least 1.

  Returns:
    int64, of the same shape.
  """
  half = max(1, ((n - 1).bit_length() + 1) // 2)  # bits in each half
  keys = _keys(seed, epoch)
  shape = np.shape(index_n)
  out = np.asarray(index_n, np.int64).reshape(-1).astype(np.uint64)
  walking = np.arange(out.size)
  while walking.size:
    out[walking] = _feistel(out[walking], half, keys)
    walking = walking[out[walking] >= np.uint64(n)]
  return out.astype(np.int64).reshape(shape)


def _keys(seed: int, epoch: int) -> np.ndarray:
  """uint64 [_ROUNDS], one key a round."""
  digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
  return np.frombuffer(digest, ">u8").astype(np.uint64)


def _feistel(x_n: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
  """One pass over 2 * half bits: a bijection whatever the round function is."""
  bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
  left, right = x_n >> bits, x_n & mask
  for key in keys:
    mixed = right ^ key
    mixed = (mixed ^ (mixed >> _SHIFT)) * _MIX_1
    mixed = (mixed ^ (mixed >> _SHIFT)) * _MIX_2
    mixed ^= mixed >> _SHIFT
    left, right = right, left ^ (mixed & mask)
  return left << bits | right
