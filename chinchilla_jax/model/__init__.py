"""The model: published shapes, FLOP conventions, and the transformer itself.

`shapes` and `flops` are pure Python. `transformer` is the door to the rest: pure functions
over plain nested dicts of arrays. Flax NNX stays behind it.

Letters in names give an array's axes, in order (`x_btd` has batch, time and model axes):

  b  sequences in a batch
  t  tokens of a sequence, as queries
  s  tokens of a sequence, as keys
  c  query rows of one attention block
  n  distances from a query back to a key
  d  d_model            logical axis `embed`
  h  attention heads    logical axis `heads`
  k  kv_size            logical axis `head_dim`
  f  d_ff               logical axis `mlp`
  v  vocabulary         logical axis `vocab`
  l  layers             logical axis `layers`

Logical axes are written on the parameters once, here, and mean nothing here: what they map to
is for the sharding tables to say.
"""
