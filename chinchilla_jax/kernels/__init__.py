"""Attention kernels, one way of computing per module; `model.attention` is their reference.

Each takes and returns arrays in the order h, b, t, k: the letters are those of `model`, with
q and s in place of t for the rows and keys of one block, and w for the distances that a block
needs.
"""
