"""Laws: frontiers against numerical minima, published check values, and how they hang together."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from chinchilla_jax.errors import UserError
from chinchilla_jax.scaling import laws
from chinchilla_jax.scaling.laws import PUBLISHED, FrontierLaw, ParametricLaw

PARAMETRIC = [law for law in PUBLISHED.values() if isinstance(law, ParametricLaw)]

some_laws = st.builds(
    lambda e, a, b, alpha, beta: ParametricLaw("drawn", e, math.exp(a), math.exp(b), alpha, beta),
    st.floats(0.2, 3), st.floats(2, 10), st.floats(2, 10), st.floats(0.1, 0.9),
    st.floats(0.1, 0.9))
budgets = st.floats(15, 26).map(lambda x: 10.0**x)


@pytest.mark.parametrize("law", PARAMETRIC, ids=lambda law: law.name)
@pytest.mark.parametrize("flops", [1e15, 1e21, 5.76e23, 1e27])
def test_the_frontier_is_the_numerical_minimum(law, flops):
  """Closed form against a minimiser that knows only the loss and C = 6ND."""
  best = optimize.minimize_scalar(
      lambda x: law.loss(math.exp(x), flops / 6 / math.exp(x)),
      bracket=(math.log(flops) / 2 - 3, math.log(flops) / 2), method="brent",
      options={"xtol": 1e-10})
  n, d = law.optimum(flops)
  assert law.loss(n, d) <= best.fun * (1 + 1e-14)
  assert math.log(n) == pytest.approx(best.x, abs=2e-6)
  assert 6 * n * d == pytest.approx(flops, rel=1e-12)


@given(law=some_laws, flops=budgets, away=st.floats(0.01, 3))
def test_no_other_model_of_the_budget_is_better(law, flops, away):
  n, d = law.optimum(flops)
  for factor in (math.exp(away), math.exp(-away)):
    assert law.loss(n * factor, d / factor) > law.loss(n, d) * (1 - 1e-15)


@given(law=some_laws, flops=budgets)
def test_inverses_and_power_law_form(law, flops):
  n, d = law.optimum(flops)
  assert law.flops_for(n=n) == pytest.approx(flops, rel=1e-9)
  assert law.flops_for(d=d) == pytest.approx(flops, rel=1e-9)
  assert law.a + law.b == pytest.approx(1, abs=1e-15)
  assert law.k_n * flops**law.a == pytest.approx(n, rel=1e-11)
  assert law.k_d * flops**law.b == pytest.approx(d, rel=1e-11)
  at = law.at(flops)
  assert (at.params, at.tokens, at.loss) == (n, d, law.loss(n, d))
  assert at.tokens_per_param == d / n


@pytest.mark.parametrize("law", PUBLISHED.values(), ids=lambda law: law.name)
def test_every_published_law_spends_its_budget_and_names_its_source(law):
  for flops in (1e18, 5.76e23):
    n, d = law.optimum(flops)
    assert 6 * n * d == pytest.approx(flops, rel=1e-12)
    assert law.flops_for(n=n) == pytest.approx(flops, rel=1e-10)
    assert law.flops_for(d=d) == pytest.approx(flops, rel=1e-10)
  assert law.source and law.params
  assert law is laws.find(law.name)
  for name, (low, high) in law.intervals.items():
    # Table 2's own estimates may lie outside (docs/scaling-laws.md); they are not these.
    assert low < high and getattr(law, name) == pytest.approx((low + high) / 2, rel=0.7)


def test_arrays_go_through():
  flops = np.geomspace(1e18, 1e24, 5)
  for law in (PUBLISHED["approach_3"], PUBLISHED["approach_1"]):
    n, d = law.optimum(flops)
    assert n.shape == d.shape == (5,)
    assert n[2] == pytest.approx(law.optimum(float(flops[2]))[0])


@pytest.mark.parametrize("law", [PUBLISHED["approach_1"], PUBLISHED["approach_3"]])
def test_an_inverse_wants_one_of_the_two(law):
  for wrong in ({}, {"n": 1e9, "d": 1e9}):
    with pytest.raises(TypeError, match="exactly one of n and d"):
      law.flops_for(**wrong)


# What the constants of approach 3 predict: (G, a, N and D/N at 1e21, the same at Gopher's budget,
# loss of Gopher's and of Chinchilla's N and D).
PREDICTIONS = {
    "approach_3": (1.345, 0.4516, 1.82e9, 50, 32.2e9, 93, 1.993, 1.937),
    "approach_3_tex": (1.300, 0.4565, 2.22e9, 34, 40.4e9, 59, 1.967, 1.921),
    "besiroglu_2024": (0.1196, 0.5126, 2.78e9, 21.5, 72.4e9, 18.3, 1.999, 1.973),
    "muennighoff_2023": (0.2258, 0.5000, 2.92e9, 19.6, 70.0e9, 19.6, 2.050, 2.025),
}


@pytest.mark.parametrize("name", PREDICTIONS)
def test_what_the_parametric_laws_predict(name):
  law, expected = PUBLISHED[name], PREDICTIONS[name]
  small, gopher = law.at(1e21), law.at(5.76e23)
  found = (law.G, law.a, small.params, small.tokens_per_param, gopher.params,
           gopher.tokens_per_param, law.loss(280e9, 300e9), law.loss(70e9, 1.4e12))
  assert found == pytest.approx(expected, rel=8e-3)


def test_only_the_unrounded_constants_give_the_papers_40b():
  """Section 3.4 speaks of 40B parameters at Gopher's budget; the printed constants say 32B."""
  assert PUBLISHED["approach_3_tex"].optimum(5.76e23)[0] == pytest.approx(40e9, rel=0.02)
  assert PUBLISHED["approach_3"].optimum(5.76e23)[0] == pytest.approx(32.2e9, rel=0.01)


def test_besiroglu_a_and_its_logs():
  law = PUBLISHED["besiroglu_2024"]
  assert round(law.a, 3) == 0.513
  assert [round(math.log(x), 3) for x in (law.A, law.B, law.E)] == [6.178, 7.643, 0.597]
  assert all(low < getattr(law, name) < high for name, (low, high) in law.intervals.items())


PORIAN_AT_CHINCHILLA = {"porian_2024_kaplan": 3.0e12, "porian_2024_last_layer": 787e9,
                        "porian_2024_warmup": 292e9, "porian_2024_cosine": 183e9,
                        "porian_2024": 76.9e9}


@pytest.mark.parametrize("name", PORIAN_AT_CHINCHILLA)
def test_porians_optimum_at_chinchillas_compute(name):
  """Their coefficients and exponents are rounded, and 5.88e23 is far away: 3 %."""
  assert PUBLISHED[name].optimum(5.88e23)[0] == pytest.approx(PORIAN_AT_CHINCHILLA[name], rel=0.03)


def test_kaplan_and_the_rule_of_thumb():
  kaplan = PUBLISHED["kaplan_2020"]
  assert kaplan.optimum(laws.PF_DAY)[0] == pytest.approx(1.3e9, rel=1e-12)
  n, d = kaplan.optimum(1e21)[0] / kaplan.optimum(1e20)[0], kaplan.optimum(1e21)[1]
  # Hoffmann et al., introduction, have 5.5 and 1.8 for ten times the compute.
  assert round(n, 1) == 5.4 and round(d / kaplan.optimum(1e20)[1], 1) == 1.9
  rule = PUBLISHED["twenty_tokens_per_param"].at(5.88e23)
  assert (rule.params, rule.tokens) == pytest.approx((70e9, 1.4e12), rel=1e-12)


def test_an_unknown_law():
  with pytest.raises(UserError, match=r"'aproach_3'; did you mean approach_3\?"):
    laws.find("aproach_3")
  assert isinstance(laws.find("approach_1"), FrontierLaw)


# -------------------------------------------------------------------- Limited data


def test_data_constrained_check_values():
  """The two losses that the authors' code gives, to the last digits."""
  law = laws.DATA_CONSTRAINED
  assert law.loss(6.34e9, 242e9, 25e9) == pytest.approx(2.2256440889984477, abs=1e-12, rel=0)
  assert law.loss(8.67e9, 178e9, 25e9) == pytest.approx(2.2269634075087867, abs=1e-12, rel=0)


def test_what_repeated_data_are_worth():
  law = laws.DATA_CONSTRAINED
  assert law.effective_tokens(4e9, 1e9) / 4e9 == pytest.approx(0.93, abs=0.005)
  assert law.effective_tokens(1e9, 1e9) == law.effective_tokens(1e9, 5e9) == 1e9
  # After R_D* repetitions, one more is worth 1/e of a fresh one.
  many, step = (1 + law.r_d_star) * 1e9, 1e3
  gain = law.effective_tokens(many + step, 1e9) - law.effective_tokens(many, 1e9)
  assert gain / step == pytest.approx(1 / math.e, rel=1e-3)
  # Never worth more than 1 + R_D* passes.
  assert law.effective_tokens(1e15, 1e9) == pytest.approx((1 + law.r_d_star) * 1e9)


@given(n=st.floats(1e6, 1e12), d=st.floats(1e7, 1e13), unique=st.floats(1e7, 1e13))
def test_repetition_never_beats_fresh_data(n, d, unique):
  law = laws.DATA_CONSTRAINED
  assert law.effective_tokens(d, unique) <= d * (1 + 1e-12)
  assert law.effective_params(n, unique) <= n * (1 + 1e-12)
  if d <= unique:
    # Where no token is seen twice, surplus parameters are still discounted: never better.
    assert law.loss(n, d, unique) >= law.fresh.loss(n, d) * (1 - 1e-12)


def test_the_optimum_with_limited_data():
  law = laws.DATA_CONSTRAINED
  # Data enough: the fresh optimum.
  assert law.optimum(1e20, 1e12) == law.fresh.optimum(1e20)
  for flops, unique in ((1e22, 25e9), (1e21, 2.5e9), (3e20, 9e9)):
    n, d = law.optimum(flops, unique)
    assert 6 * n * d == pytest.approx(flops, rel=1e-12)
    others = np.geomspace(n / 30, n * 30, 4001)
    losses = [law.loss(x, flops / 6 / x, unique) for x in others]
    assert law.loss(n, d, unique) <= min(losses) * (1 + 1e-12)
  # Repetition is worth more than surplus parameters: more epochs, fewer parameters.
  n, d = law.optimum(1e22, 25e9)
  n_fresh, d_fresh = law.fresh.optimum(1e22)
  assert n < n_fresh and d > d_fresh


# -------------------------------------------------------------------- Inference


@settings(deadline=None)
@given(law=some_laws, flops=st.floats(17, 25).map(lambda x: 10.0**x),
       share=st.floats(0, 30))
def test_the_inference_optimum_is_the_cheapest_model_of_its_loss(law, flops, share):
  best = law.at(flops)
  served = share * best.tokens
  found = laws.inference_optimum(law, best.loss, served)
  assert law.loss(found.params, found.tokens) == pytest.approx(best.loss, rel=1e-9)
  cost = lambda n, d: 6 * n * d + 2 * n * served
  assert found.flops == pytest.approx(cost(found.params, found.tokens), rel=1e-12)
  assert found.flops <= cost(best.params, best.tokens) * (1 + 1e-9)
  # No smaller and no larger model of the same loss is cheaper.
  for factor in (0.9, 0.99, 1.01, 1.1):
    n = found.params * factor
    rest = best.loss - law.E - law.A / n**law.alpha
    if rest > 0:
      assert cost(n, (law.B / rest) ** (1 / law.beta)) >= found.flops * (1 - 1e-9)


def test_without_inference_it_is_the_training_optimum():
  law = PUBLISHED["approach_3_tex"]
  best = law.at(1e22)
  found = laws.inference_optimum(law, best.loss, 0)
  assert (found.params, found.tokens) == pytest.approx((best.params, best.tokens), rel=1e-9)


def test_sardanas_example():
  """13B quality and 2T inference tokens: train a 7B for longer, saving 1.7e22 FLOPs, 17 %."""
  law = PUBLISHED["approach_3_tex"]
  best = law.at(law.flops_for(n=13e9))
  found = laws.inference_optimum(law, best.loss, 2e12)
  whole = best.flops + 2 * best.params * 2e12
  assert found.params == pytest.approx(7e9, rel=0.03)
  assert whole - found.flops == pytest.approx(1.7e22, rel=0.05)
  assert 1 - found.flops / whole == pytest.approx(0.17, abs=0.01)
  more = laws.inference_optimum(law, best.loss, 2e13)
  assert more.params < found.params and more.tokens > found.tokens


@pytest.mark.parametrize("loss, served, says", [
    (1.5, 1e12, "out of reach under approach_3: its least"),
    (float("nan"), 1e12, "out of reach"),
    (2.0, -1.0, "inference tokens: got -1; give a number of at least 0")])
def test_inference_of_what_cannot_be(loss, served, says):
  with pytest.raises(UserError, match=says):
    laws.inference_optimum(PUBLISHED["approach_3"], loss, served)
