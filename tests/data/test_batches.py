"""Law 1: a batch is a function of (seed, first, count). Law 2: documents are told apart."""

import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinchilla_jax.data import batches as batching
from chinchilla_jax.data import shuffle
from chinchilla_jax.errors import UserError

KEYS = {"inputs_bt": np.int32, "targets_bt": np.int32, "segments_bt": np.int32,
        "weights_bt": np.float32}


@pytest.fixture(scope="module")
def split(store):
  return store.split("train")


@pytest.fixture(scope="module")
def stream(split):
  return split.read(0, split.n_tokens).astype(np.int32)


def equal(a, b):
  return a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)


@settings(deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 2**31))
def test_the_permutation_is_a_bijection(n, seed, epoch):
  assert (np.sort(shuffle.permute(np.arange(n), n, seed, epoch)) == np.arange(n)).all()


@settings(deadline=None)
@given(n=st.integers(2**31, 2**61), start=st.integers(0, 2**61), seed=st.integers(0, 9))
def test_the_permutation_of_huge_domains(n, start, seed):
  index = (start + np.arange(50)) % n
  out = shuffle.permute(index, n, seed, 0)
  assert len(set(out.tolist())) == len(set(index.tolist())) and 0 <= out.min() and out.max() < n


def test_the_permutation_is_fixed_for_ever():
  """Golden. If this fails, resumed runs would see other data: do not change the numbers."""
  assert shuffle.permute(np.arange(10), 10, 0, 0).tolist() == [2, 4, 0, 3, 1, 8, 9, 7, 5, 6]
  assert shuffle.permute(np.array([0, 1, 2**40]), 2**41, 7, 3).tolist() == [
      862117587169, 1581397699715, 987502781575]


def test_the_permutation_looks_random():
  n = 10_000
  orders = [shuffle.permute(np.arange(n), n, seed, epoch)
            for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
  for k, order in enumerate(orders):
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.05
    assert (np.diff(order) == 1).mean() < 0.01  # neighbours do not stay neighbours
    for other in orders[:k]:
      assert abs(np.corrcoef(order, other)[0, 1]) < 0.05 and (order == other).mean() < 0.01


def test_every_target_once_an_epoch(split, stream):
  seq_len = 37
  data = batching.Batches(split, seq_len=seq_len, seed=3)
  n = data.n_windows
  assert n == (len(stream) - 1) // seq_len
  for epoch in range(2):
    batch = data.batch(epoch * n, n)
    order = data.windows(np.arange(epoch * n, (epoch + 1) * n))
    assert (np.sort(order) == np.arange(n)).all() and not (order == np.arange(n)).all()
    targets = batch["targets_bt"][np.argsort(order)].reshape(-1)
    assert (targets == stream[1:n * seq_len + 1]).all()
    inputs = batch["inputs_bt"][np.argsort(order)].reshape(-1)
    assert (inputs == stream[:n * seq_len]).all()
    assert (batch["weights_bt"] == 1).all()
  assert data.epoch(n - 1) == 0 and data.epoch(n) == 1
  assert data.epoch(np.array([0, 2 * n])).tolist() == [0, 2]


def test_the_last_token_of_a_document_predicts_bos(split, stream):
  """Law 2: that target is there, and it counts."""
  batch = batching.Batches(split, seq_len=64, seed=0, shuffle=False).batch(0, 4)
  at_end = batch["targets_bt"] == split.bos_id
  assert at_end.any() and (batch["weights_bt"][at_end] == 1).all()


def test_segments_change_at_bos_and_only_there(split):
  data = batching.Batches(split, seq_len=64, seed=0)
  batch = data.batch(0, 50)
  inputs, segments = batch["inputs_bt"], batch["segments_bt"]
  assert ((np.diff(segments, axis=1) == 1) == (inputs[:, 1:] == split.bos_id)).all()
  assert (segments[:, 0] == (inputs[:, 0] == split.bos_id)).all()
  assert segments.max() >= 1
  unmasked = batching.Batches(split, seq_len=64, seed=0, document_mask=False).batch(0, 50)
  assert (unmasked["segments_bt"] == 0).all() and (unmasked["inputs_bt"] == inputs).all()


@settings(max_examples=40, deadline=None)
@given(first=st.integers(0, 2**40), count=st.integers(1, 5), parts=st.sampled_from([1, 2, 4]),
       seed=st.integers(0, 3))
def test_batches_do_not_depend_on_how_they_are_cut(split, first, count, parts, seed):
  """Across processes, across calls, across epochs, beyond 2**31."""
  count *= parts
  data = batching.Batches(split, seq_len=100, seed=seed)
  whole = data.batch(first, count)
  assert {key: value.dtype for key, value in whole.items()} == KEYS
  assert all(value.shape == (count, 100) for value in whole.values())
  share = count // parts
  for pieces in ([data.batch(first + p * share, share) for p in range(parts)],
                 [data.batch(first + i, 1) for i in range(count)]):
    assert equal(whole, {key: np.concatenate([piece[key] for piece in pieces]) for key in whole})


RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=8)


@settings(deadline=None)
@given(skipped=RANGES, offset=st.sampled_from([0, 2**40]), first=st.integers(0, 60))
def test_what_is_skipped_is_as_if_it_were_not_there(split, skipped, offset, first):
  """Ranges come in any order, touch, overlap, and hold nothing."""
  skipped = [(offset + start, count) for start, count in skipped]
  out = {index for start, count in skipped for index in range(start, start + count)}
  data = batching.Batches(split, seq_len=16, seed=1, skipped=skipped)
  # Before the first range nothing is shifted: a plain list may begin right there.
  kept = [index for index in range(offset, offset + 250) if index not in out]
  assert data.actual(np.arange(offset, offset + 100)).tolist() == kept[:100]
  assert data.actual(np.arange(20)).tolist() == (kept[:20] if offset == 0 else list(range(20)))
  plain = batching.Batches(split, seq_len=16, seed=1)
  whole = data.batch(offset + first, 6)
  rows = [plain.batch(index, 1) for index in kept[first:first + 6]]
  assert equal(whole, {key: np.concatenate([row[key] for row in rows]) for key in whole})
  parts = [data.batch(offset + first + start, 2) for start in (0, 2, 4)]
  assert equal(whole, {key: np.concatenate([part[key] for part in parts]) for key in whole})
  merged = data.skipped
  assert out == {index for start, count in merged for index in range(start, start + count)}
  assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(merged))


def test_skipping_leaves_the_original_as_it_was(split):
  data = batching.Batches(split, seq_len=16, seed=1)
  before = data.batch(0, 8)
  other = data.skipping([[2, 3], (0, 1)])
  assert (data.skipped, other.skipped) == ((), ((0, 1), (2, 3)))
  assert other.actual(np.arange(3)).tolist() == [1, 5, 6]
  assert equal(data.batch(0, 8), before) and equal(other.skipping(()).batch(0, 8), before)
  assert other.skipping(((1, 1),)).skipped == ((1, 1),)
  for wrong in ((-1, 2), (3, -1)):
    with pytest.raises(ValueError, match="cannot leave out"):
      data.skipping([wrong])


def test_shapes_that_do_not_fit_are_refused(split):
  with pytest.raises(UserError, match=f"{split.n_tokens:,} tokens, one sequence takes 1,000,001"):
    batching.Batches(split, seq_len=1_000_000, seed=0)
  data = batching.Batches(split, seq_len=split.n_tokens - 1, seed=0)
  assert data.n_windows == 1 and data.batch(7, 1)["inputs_bt"].shape == (1, split.n_tokens - 1)


@settings(max_examples=30, deadline=None)
@given(seq_len=st.integers(1, 500), batch_size=st.integers(1, 9), max_tokens=st.integers(0, 3000))
def test_validation_covers_every_target_once(split, stream, seq_len, batch_size, max_tokens):
  seen = []
  batches = batching.ValidationBatches(split, seq_len=seq_len, batch_size=batch_size,
                                       max_tokens=max_tokens)
  for index in range(len(batches)):
    batch = batches.rows(index, 0, batch_size)
    parts = [batches.rows(index, row, row + 1) for row in range(batch_size)]
    counted = batch["weights_bt"] > 0
    for key in ("inputs_bt", "targets_bt"):
      joined = np.concatenate([part[key] for part in parts])
      assert (joined[counted] == batch[key][counted]).all()
    assert (np.concatenate([part["weights_bt"] for part in parts]) == batch["weights_bt"]).all()
    assert {key: value.dtype for key, value in batch.items()} == KEYS
    assert batch["inputs_bt"].shape == (batch_size, seq_len)
    counted = batch["weights_bt"] > 0
    seen.append(np.stack([batch["inputs_bt"][counted], batch["targets_bt"][counted]]))
    if len(seen) > 200:
      return
  n = min(len(stream) - 1, max_tokens or len(stream))
  inputs, targets = np.concatenate(seen, axis=1)
  assert (inputs == stream[:n]).all() and (targets == stream[1:n + 1]).all()


def test_prefetch_gives_the_same_batches_in_order(split):
  data = batching.Batches(split, seq_len=32, seed=0)
  requests = [(0, 4), (4, 4), (8, 2), (10, 6)]
  got = list(batching.prefetch(lambda r: data.batch(*r), iter(requests), depth=2))
  assert [request for request, _ in got] == requests
  for request, batch in got:
    assert equal(batch, data.batch(*request))


def no_thread_left(name="prefetch", seconds=5.0) -> bool:
  end = time.monotonic() + seconds
  while any(thread.name == name for thread in threading.enumerate()):
    if time.monotonic() > end:
      return False
    time.sleep(0.01)
  return True


def test_prefetch_is_bounded_and_ends_when_closed(split):
  data = batching.Batches(split, seq_len=32, seed=0)
  taken = []

  def requests():
    for i in range(10**9):
      taken.append(i)
      yield i, 1

  stream = batching.prefetch(lambda r: data.batch(*r), requests(), depth=2)
  next(stream)
  time.sleep(0.3)
  assert len(taken) <= 1 + 2 + 1
  stream.close()
  assert no_thread_left()


def test_prefetch_hands_exceptions_over(split):
  data = batching.Batches(split, seq_len=32, seed=0)

  def broken():
    yield 0, 1
    raise OSError("the disk is gone")

  stream = batching.prefetch(lambda r: data.batch(*r), broken(), depth=4)
  next(stream)
  with pytest.raises(OSError, match="the disk is gone"):
    next(stream)
  with pytest.raises(ZeroDivisionError):
    list(batching.prefetch(lambda request: 1 // 0, iter([(0, 1)]), 1))
  assert no_thread_left()
