import pytest

from chinchilla_jax import durations
from chinchilla_jax.errors import UserError


def clock(run_length, sequences=128, ramp=(), seq_len=2048, n_params=1_000_000,
          epoch_tokens=10**9):
  return durations.clock(run_length, sequences, ramp, seq_len=seq_len, n_params=n_params,
                         epoch_tokens=epoch_tokens)


@pytest.mark.parametrize("text, value, unit", [
    ("20 tokens/param", 20, "tokens/param"), ("1.4e12 tokens", 1.4e12, "tokens"),
    ("700000 steps", 700_000, "steps"), ("700_000 steps", 700_000, "steps"),
    ("5.76e23 flops", 5.76e23, "flops"), ("1%", 1, "%"), ("1 step", 1, "steps"),
    ("0.5 epochs", 0.5, "epochs"), (".5%", 0.5, "%"), ("0 steps", 0, "steps")])
def test_parse(text, value, unit):
  assert durations.parse(text) == durations.Duration(value, unit)
  assert durations.parse(str(durations.parse(text))) == durations.parse(text)


@pytest.mark.parametrize("text", ["20", "tokens", "-1 steps", "1 parsec", "", "1e steps", "nan %"])
def test_parse_refuses(text):
  with pytest.raises(UserError, match="run_length.*a number and a unit"):
    durations.parse(text, "run_length")


def test_run_lengths_in_every_unit_agree():
  by_tokens = clock("20e6 tokens")
  assert by_tokens.total_steps == round(20e6 / (128 * 2048))
  assert clock("20 tokens/param") == by_tokens
  assert clock(f"{6 * 1e6 * 20e6} flops") == by_tokens
  assert clock("0.02 epochs") == by_tokens
  assert clock(f"{by_tokens.total_steps} steps") == by_tokens


def test_chinchilla_takes_700000_steps_when_the_batch_doubles_at_half_the_tokens():
  # 1.5M then 3M tokens a batch, as Table 4 rounds them; 1.4T tokens.
  made = clock("1.4e12 tokens", 1500, (("50%", 3000),), seq_len=1000)
  assert made.batches.stages == ((0, 1500), (466_667, 3000))
  assert made.total_steps == 700_000
  assert abs(made.tokens(made.total_steps) - 1.4e12) < 3e6


def test_a_length_in_steps_places_percentages_by_tokens():
  by_tokens = clock("1.4e12 tokens", 1500, (("50%", 3000),), seq_len=1000)
  by_steps = clock("700000 steps", 1500, (("50%", 3000),), seq_len=1000)
  assert by_steps.batches == by_tokens.batches


def test_cursor_is_the_sum_of_the_batches():
  made = clock("100 steps", 2, (("10 steps", 4), ("30 steps", 8)))
  total = 0
  for step in range(100):
    assert made.batches.cursor(step) == total
    total += made.batches.sequences(step)
  assert made.tokens(100) == total * 2048
  assert made.flops(100) == 6 * 1e6 * total * 2048


def test_steps_rounds_to_the_nearest_and_never_to_nothing():
  made = clock("1000 steps")
  assert made.steps("1%") == 10
  assert made.steps("0.001%") == 1
  assert made.steps("0 steps") == 0
  assert made.steps("300000 tokens") == 1
  assert made.steps("500000 tokens") == 2


@pytest.mark.parametrize("length, ramp, message", [
    ("50%", (), "run_length"), ("0 steps", (), "run_length"),
    ("100 steps", (("50 steps", 4), ("20 steps", 8)), "batch.ramp.*order")])
def test_clock_refuses(length, ramp, message):
  with pytest.raises(UserError, match=message):
    clock(length, ramp=ramp)
