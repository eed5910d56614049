from chinchilla_jax import config as schema
from chinchilla_jax import patterns
from chinchilla_jax.model import transformer


def test_the_first_match_wins_and_the_rest_is_default():
  tree = {"a": {"kernel": 0, "bias": 0}, "norm": 0}
  got = patterns.match_tree(tree, [("bias", 1), ("a/", 2)], 3)
  assert got == {"a": {"kernel": 2, "bias": 1}, "norm": 3}


def test_the_default_patterns_decay_matrices_only():
  params = transformer.abstract(schema.Model(qk_norm=True, activation="swiglu"), "float32")
  factors = patterns.match_tree(params, schema.Optimizer().decay_patterns, None)
  def names(tree, prefix=""):
    for key, value in tree.items():
      yield from names(value, f"{prefix}{key}/") if isinstance(value, dict) else [
          (f"{prefix}{key}", value)]
  decayed = {name.rsplit("/", 1)[-1] for name, factor in names(factors) if factor == 1.0}
  spared = {name for name, factor in names(factors) if factor == 0.0}
  assert decayed == {"w_query", "w_key", "w_value", "w_relative", "w_out", "w_in", "w_gate",
                     "table"}
  assert "blocks/attention/u" in spared and "blocks/attention/query_norm/gain" in spared
  assert "embedding/logit_bias" in spared and "final_norm/gain" in spared
