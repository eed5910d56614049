"""Training FLOPs by convention, from a shape alone.

Pure Python. A multiply-accumulate is 2 FLOPs, a backward pass is twice its forward pass, and
recomputed activations (remat) count nothing. A number of FLOPs means nothing without its
convention, so every function here is one convention and its docstring says what it counts.

`shape` is a `Shape` or a `config.Model`: anything with n_layers, d_model, n_heads, kv_size,
d_ff, vocab_size, position. With a = n_heads * kv_size, T = seq_len.
"""

from collections.abc import Callable, Mapping
from typing import Any

from chinchilla_jax.errors import UserError
from chinchilla_jax.model.shapes import count_parameters

BACKWARD = 3  # forward + backward, in forward passes


def six_n_d(shape: Any, seq_len: int = 2048) -> float:
  """6 * N per token, N with embeddings: the "training FLOP" axis of the paper's Figure 4.

  Holds exactly for the published runs (docs/architecture.md); the scaling analyses use it.
  Knows nothing of attention, so seq_len is not read.
  """
  del seq_len
  return float(6 * count_parameters(shape))


def appendix_f_terms(shape: Any, seq_len: int = 2048) -> dict[str, int]:
  """Forward FLOPs of one sequence, term by term, as Appendix F of the paper prints them.

  Returns:
    FLOPs by name. The terms between "embeddings" and "logits" are for one layer. There is no
    term for the relative-key projection, and the embedding counts as a matrix product.
  """
  t, d, h, f, v = seq_len, shape.d_model, shape.n_heads, shape.d_ff, shape.vocab_size
  a = h * shape.kv_size
  return {
      "embeddings": 2 * t * v * d,
      "qkv": 2 * 3 * t * d * a,
      "scores": 2 * t * t * a,
      "softmax": 3 * h * t * t,
      "reduction": 2 * t * t * a,
      "output": 2 * t * a * d,
      "dense": 2 * t * (d * f + d * f),
      "logits": 2 * t * d * v,
  }


def appendix_f(shape: Any, seq_len: int = 2048) -> float:
  """Appendix F to the letter, forward and backward, per token: embeddings and logits count.

  Not what the paper's own Table A4 shows (that is `layers_only`), nor what gives its 6.3e23
  for Gopher. Feed-forward is two matrices whatever the activation.
  """
  terms = appendix_f_terms(shape, seq_len)
  ends = terms.pop("embeddings") + terms.pop("logits")
  return BACKWARD * (ends + shape.n_layers * sum(terms.values())) / seq_len


def layers_only(shape: Any, seq_len: int = 2048, *, causal: bool = False,
                relative: bool = False) -> float:
  """Appendix F without embeddings and logits, per token: what Table A4's ratios are made of.

  Args:
    causal: count only keys that a query may see, (T + 1) / 2 of T on average.
    relative: also count the relative keys, 2 * d * a per token, and the position scores.
  """
  terms = appendix_f_terms(shape, seq_len)
  if relative:
    terms["relative"] = 2 * seq_len * shape.d_model * shape.n_heads * shape.kv_size
    terms["position_scores"] = terms["scores"]
  visible = (seq_len + 1) / (2 * seq_len) if causal else 1.0
  over_pairs = ("scores", "position_scores", "softmax", "reduction")
  layer = sum(n * visible if name in over_pairs else n for name, n in terms.items()
              if name not in ("embeddings", "logits"))
  return BACKWARD * shape.n_layers * layer / seq_len


def matmul(shape: Any, seq_len: int = 2048, *, causal: bool = False) -> float:
  """Matrix products a training step needs, per token: the numerator of MFU.

  Layers and logits; attention over all T x T pairs (not halved: the convention of PaLM's
  appendix B); position scores where position is "relative"; the gate where activation is
  "swiglu". Not counted: the embedding look-up, softmax, norms, and the relative-key projection,
  which is done once a step for the T distances and not once a sequence.

  Args:
    causal: count only keys that a query may see.
  """
  d, a = shape.d_model, shape.n_heads * shape.kv_size
  visible = (seq_len + 1) / 2 if causal else seq_len
  products_over_pairs = 3 if shape.position == "relative" else 2
  dense = 3 if getattr(shape, "activation", "gelu") == "swiglu" else 2
  layer = 4 * d * a + products_over_pairs * visible * a + dense * d * shape.d_ff
  return BACKWARD * 2 * (shape.n_layers * layer + d * shape.vocab_size)


def matmul_causal(shape: Any, seq_len: int = 2048) -> float:
  """`matmul` with attention over visible pairs only: what an ideal causal kernel does."""
  return matmul(shape, seq_len, causal=True)


CONVENTIONS: Mapping[str, Callable[..., float]] = {
    "six_n_d": six_n_d,
    "appendix_f": appendix_f,
    "layers_only": layers_only,
    "matmul": matmul,
    "matmul_causal": matmul_causal,
}


def per_token(shape: Any, seq_len: int = 2048, convention: str = "six_n_d") -> float:
  """Training FLOPs per token by a named convention.

  Raises:
    UserError: no such convention.
  """
  if convention not in CONVENTIONS:
    raise UserError(f"unknown FLOP convention {convention!r}; one of: {', '.join(CONVENTIONS)}")
  return CONVENTIONS[convention](shape, seq_len)


def forward_per_token(shape: Any, seq_len: int = 2048, convention: str = "six_n_d") -> float:
  """FLOPs of the forward pass alone, per token: a third of training by every convention here.

  By six_n_d that is 2 N, what Sardana et al. 2024 count for a token of inference.
  """
  return per_token(shape, seq_len, convention) / BACKWARD


def training(shape: Any, tokens: float, seq_len: int = 2048,
             convention: str = "six_n_d") -> float:
  """Training FLOPs of a run over `tokens` tokens by a named convention."""
  return per_token(shape, seq_len, convention) * tokens
