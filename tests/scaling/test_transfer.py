import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ROOT

from chinchilla_jax import config_io
from chinchilla_jax.errors import UserError
from chinchilla_jax.model import shapes
from chinchilla_jax.scaling import transfer

sizes = st.floats(1e4, 1e12)


@pytest.mark.parametrize("n, lr, tokens", [
    (44e6, 2e-4, 262_144),            # Chinchilla section 3.1; Gopher Table 1
    (2.8e9, 1.5e-4, 524_288),         # Appendix D.4
    (16.2e9, 1.25e-4, None),          # Chinchilla section 3.1
    (70e9, 1e-4, 1_572_864),          # Table 4
    (280e9, 4e-5, 3_145_728)])        # Gopher Table 1
def test_paper_rule_passes_through_what_is_printed(n, lr, tokens):
  found = transfer.paper(n, 1e20)
  assert found.peak_lr == pytest.approx(lr, rel=0.02)
  if tokens is not None:
    assert found.batch_tokens == pytest.approx(tokens, rel=0.02)
    assert transfer.sequences(found.batch_tokens, 2048) * 2048 == tokens


def test_paper_rule_is_that_of_the_presets():
  for shape in shapes.TABLE_A9:
    preset = config_io.load(f"{ROOT / 'configs' / 'chinchilla.py'}:{shape.name}")
    found = transfer.paper(shapes.count_parameters(shape), 1e20)
    assert found.peak_lr == pytest.approx(preset.optimizer.peak_lr, rel=1e-3)
  preset = config_io.load(f"{ROOT / 'configs' / 'chinchilla.py'}:70b")
  found = transfer.paper(shapes.count_parameters(shapes.CHINCHILLA), 5.76e23)
  assert found.peak_lr == pytest.approx(preset.optimizer.peak_lr, rel=1e-3)
  assert transfer.sequences(found.batch_tokens, 2048) == preset.batch.sequences
  assert preset.batch.ramp == ((f"{found.doubles_at:.0%}", 2 * preset.batch.sequences),)


@pytest.mark.parametrize("rule, n, flops, lr, tokens", [
    ("porian", 108e6, 1e18, 0.0047, 160 * 2048),
    ("porian", 864e6, 1e18, 0.00235, 640 * 2048),
    ("gpt3", 125e6, 1e20, 6e-4, 0.5e6),
    ("gpt3", 175e9, 1e23, 0.6e-4, 3.2e6),
    ("deepseek", 1e9, 1e20, 0.3118 * 10**-2.5, 0.2920 * 10**6.542)])
def test_other_rules_have_their_printed_values(rule, n, flops, lr, tokens):
  found = transfer.recipe(rule, n, flops)
  assert found.peak_lr == pytest.approx(lr, rel=1e-6)
  assert found.batch_tokens == pytest.approx(tokens, rel=1e-6)


@settings(deadline=None)
@given(sizes, st.floats(1.001, 3))
def test_rates_fall_and_batches_grow_with_size(n, factor):
  for rule in ("paper", "porian", "gpt3"):
    small, large = (transfer.recipe(rule, size, 1e20) for size in (n, factor * n))
    assert large.peak_lr <= small.peak_lr * (1 + 1e-9), rule
    assert large.batch_tokens >= small.batch_tokens * (1 - 1e-9), rule


@settings(deadline=None)
@given(sizes)
def test_paper_rule_has_no_jumps(n):
  here, there = transfer.paper(n, 1e20), transfer.paper(n * 1.0001, 1e20)
  assert abs(math.log(there.peak_lr / here.peak_lr)) < 1e-3
  assert abs(math.log(there.batch_tokens / here.batch_tokens)) < 1e-3


@settings(deadline=None)
@given(st.floats(1, 1e8), st.sampled_from([64, 256, 2048, 3000]), st.integers(1, 64))
def test_batches_are_near_what_was_asked_and_divide(tokens, seq_len, multiple):
  found = transfer.sequences(tokens, seq_len, multiple)
  assert found >= multiple and found % multiple == 0
  if tokens >= transfer.UNIT and transfer.UNIT % seq_len == 0:
    assert found * seq_len % transfer.UNIT == 0
    unit = math.lcm(multiple * seq_len, transfer.UNIT)
  else:
    unit = multiple * seq_len
  assert abs(found * seq_len - tokens) <= unit / 2 or found * seq_len == unit


def test_carrying_a_measured_rate():
  assert transfer.carried(6e-3, 250e3, 250e3 * 8) == pytest.approx(3e-3)
  assert transfer.carried_batch(2048, 1e6, 8e6) == pytest.approx(4 * 2048)


def test_unknown_rule():
  with pytest.raises(UserError, match="unknown rule 'chinchila'.*one of: paper, gpt3"):
    transfer.recipe("chinchila", 1e9, 1e20)
