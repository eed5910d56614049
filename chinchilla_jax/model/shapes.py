"""Every published shape this project speaks of, and the paper's parameter count.

Pure Python, no JAX: planning a run needs neither a device nor a model instance.

The count is a rule inferred from the paper's own figures, not printed in it: it reproduces
all 50 rows of Table A9 to the printed million and the model sizes behind Figure 4 to 0.33 ppm
(docs/architecture.md has the evidence). It counts everything, embedding included, as the
paper says (Appendix F).
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any

from chinchilla_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Shape:
  """A published model shape.

  Attributes:
    name: what `find` calls it.
    params_label: size as its paper prints it.
    d_model, d_ff, kv_size, n_heads, n_layers: as in the paper; kv_size is per head and is not
      d_model // n_heads in every row.
    vocab_size: rows of the (tied) embedding.
    position: "relative" (Gopher, Chinchilla), or "learned" (GPT-3, MT-NLG: for planning only,
      this project does not build them).
    context: rows of the learned position table; read when position is "learned".
  """

  name: str
  params_label: str
  d_model: int
  d_ff: int
  kv_size: int
  n_heads: int
  n_layers: int
  vocab_size: int = 32_000
  position: str = "relative"
  context: int = 2048


# Hoffmann et al. 2022, Table A9: printed millions, d_model, kv_size, n_heads, n_layers.
# ffw_size is 4 * d_model in every row.
_TABLE_A9 = (
    (44, 512, 64, 8, 8), (57, 576, 64, 9, 9), (74, 640, 64, 10, 10), (90, 640, 64, 10, 13),
    (106, 640, 64, 10, 16), (117, 768, 64, 12, 12), (140, 768, 64, 12, 15),
    (163, 768, 64, 12, 18), (175, 896, 64, 14, 14), (196, 896, 64, 14, 16),
    (217, 896, 64, 14, 18), (251, 1024, 64, 16, 16), (278, 1024, 64, 16, 18),
    (306, 1024, 64, 16, 20), (425, 1280, 128, 10, 18), (489, 1280, 128, 10, 21),
    (509, 1408, 128, 11, 18), (552, 1280, 128, 10, 24), (587, 1408, 128, 11, 21),
    (632, 1536, 128, 12, 19), (664, 1408, 128, 11, 24), (724, 1536, 128, 12, 22),
    (816, 1536, 128, 12, 25), (893, 1792, 128, 14, 20), (1018, 1792, 128, 14, 23),
    (1143, 1792, 128, 14, 26), (1266, 2048, 128, 16, 22), (1424, 2176, 128, 17, 22),
    (1429, 2048, 128, 16, 25), (1593, 2048, 128, 16, 28), (1609, 2176, 128, 17, 25),
    (1731, 2304, 128, 18, 24), (1794, 2176, 128, 17, 28), (2007, 2304, 128, 18, 28),
    (2283, 2304, 128, 18, 32), (2298, 2560, 128, 20, 26), (2639, 2560, 128, 20, 30),
    (2980, 2560, 128, 20, 34), (3530, 2688, 128, 22, 36), (3802, 2816, 128, 22, 36),
    (4084, 2944, 128, 22, 36), (4516, 3072, 128, 24, 36), (6796, 3584, 128, 28, 40),
    (9293, 4096, 128, 32, 42), (11452, 4352, 128, 32, 47), (12295, 4608, 128, 36, 44),
    (12569, 4608, 128, 32, 47), (13735, 4864, 128, 32, 47), (14940, 4992, 128, 32, 49),
    (16183, 5120, 128, 40, 47),
)
TABLE_A9: tuple[Shape, ...] = tuple(
    Shape(f"{millions}m", f"{millions:,}M", d, 4 * d, k, h, n)
    for millions, d, k, h, n in _TABLE_A9)

# Hoffmann et al. 2022, Table 4.
CHINCHILLA = Shape("chinchilla-70b", "70B", 8192, 32_768, 128, 64, 80)

# Rae et al. 2021, Table 1.
GOPHER: tuple[Shape, ...] = (
    Shape("gopher-44m", "44M", 512, 2048, 32, 16, 8),
    Shape("gopher-117m", "117M", 768, 3072, 64, 12, 12),
    Shape("gopher-417m", "417M", 1536, 6144, 128, 12, 12),
    Shape("gopher-1.4b", "1.4B", 2048, 8192, 128, 16, 24),
    Shape("gopher-7.1b", "7.1B", 4096, 16_384, 128, 32, 32),
    Shape("gopher-280b", "280B", 16_384, 65_536, 128, 128, 80),
)


def _gpt3(label: str, n_layers: int, d: int, n_heads: int, kv_size: int) -> Shape:
  return Shape(f"gpt3-{label.lower()}", label, d, 4 * d, kv_size, n_heads, n_layers,
               vocab_size=50_257, position="learned")


# Brown et al. 2020, Table 2.1. Two oddities of that table: 1.3B is printed with 24 heads of 128,
# which is not d_model and would count 1.5B, so the 16 heads that count to its label stand
# here; 13B is printed with d_model 5140 and 40 heads of 128, which stands as printed.
GPT3: tuple[Shape, ...] = (
    _gpt3("125M", 12, 768, 12, 64),
    _gpt3("350M", 24, 1024, 16, 64),
    _gpt3("760M", 24, 1536, 16, 96),
    _gpt3("1.3B", 24, 2048, 16, 128),
    _gpt3("2.7B", 32, 2560, 32, 80),
    _gpt3("6.7B", 32, 4096, 32, 128),
    _gpt3("13B", 40, 5140, 40, 128),
    _gpt3("175B", 96, 12_288, 96, 128),
)

# Smith et al. 2022. 51,200 is GPT-2's vocabulary as Megatron pads it.
MT_NLG = Shape("mt-nlg-530b", "530B", 20_480, 81_920, 160, 128, 105, vocab_size=51_200,
               position="learned")

SHAPES: Mapping[str, Shape] = {
    shape.name: shape for shape in (*TABLE_A9, CHINCHILLA, *GOPHER, *GPT3, MT_NLG)}


def find(name: str) -> Shape:
  """The shape called `name`.

  Args:
    name: a key of `SHAPES` in any case. A bare size is a row of Table A9 ("74m", "1,018M",
      "16.183b") or Chinchilla itself ("70b"), with or without "chinchilla-" before it; every
      other family needs its name ("gopher-280b", "gpt3-175b"). So "44m" is the row of Table
      A9, with 8 heads, and "gopher-44m" the Gopher model with 16.

  Raises:
    UserError: no such shape; names the nearest ones.
  """
  wanted = re.sub(r"[\s_]+", "-", name.strip().lower()).replace(",", "")
  bare = wanted.removeprefix("chinchilla-")
  if bare == "70b":
    return CHINCHILLA
  billions = re.fullmatch(r"(\d+\.\d{3})b", bare)
  if billions:
    bare = f"{int(billions[1].replace('.', ''))}m"
  shape = SHAPES.get(wanted) or SHAPES.get(bare)
  if shape is None:
    near = ([known for known in SHAPES if known.endswith(f"-{wanted}")]
            or difflib.get_close_matches(wanted, SHAPES, n=4, cutoff=0.4))
    hint = f"nearest: {', '.join(near)}" if near else "try 74m, chinchilla-70b or gopher-280b"
    raise UserError(f"unknown model shape {name!r}; {hint}")
  return shape


def parameter_groups(shape: Any) -> dict[str, int]:
  """Parameters by group, in the order of the rule.

  Args:
    shape: a `Shape` or a `config.Model`; needs n_layers, d_model, n_heads, kv_size, d_ff,
      vocab_size, position, and heeds activation, bias and qk_norm where it has them.

  Returns:
    Group name to number of parameters. With d, f, a = n_heads * kv_size, L, V:

      embedding      V * d          tied: input and output
      logit_bias     V              this and the other biases: unless `bias` is false
      attention      L * 4 * d * a  query, key, value, output
      relative       L * d * a      relative key; position "relative" only
      u_v            L * 2 * a      position "relative" only
      attention_bias L * d          of the output projection
      feed_forward   L * 2 * d * f  3 * d * f with swiglu
      feed_forward_bias L * (f + d) 2 * f + d with swiglu: every matrix has its bias
      norms          L * 2 * d + d  gains
      qk_norm        L * 2 * kv_size  gains shared over heads; qk_norm only

    With learned positions (GPT-2's block: every matrix has a bias, LayerNorm has gain and bias,
    no logit bias): embedding, positions, attention, attention_bias, feed_forward,
    feed_forward_bias, norms.
  """
  d, f, n, v = shape.d_model, shape.d_ff, shape.n_layers, shape.vocab_size
  a = shape.n_heads * shape.kv_size
  if shape.position == "learned":
    return {
        "embedding": v * d,
        "positions": shape.context * d,
        "attention": n * 4 * d * a,
        "attention_bias": n * (3 * a + d),
        "feed_forward": n * 2 * d * f,
        "feed_forward_bias": n * (f + d),
        "norms": n * 4 * d + 2 * d,
    }
  gated = getattr(shape, "activation", "gelu") == "swiglu"
  biased = getattr(shape, "bias", True)
  groups = {"embedding": v * d}
  if biased:
    groups["logit_bias"] = v
  groups["attention"] = n * 4 * d * a
  if shape.position == "relative":
    groups |= {"relative": n * d * a, "u_v": n * 2 * a}
  if biased:
    groups["attention_bias"] = n * d
  groups["feed_forward"] = n * (3 if gated else 2) * d * f
  if biased:
    groups["feed_forward_bias"] = n * ((2 if gated else 1) * f + d)
  groups["norms"] = n * 2 * d + d
  if getattr(shape, "qk_norm", False):
    groups["qk_norm"] = n * 2 * shape.kv_size
  return groups


def count_parameters(shape: Any) -> int:
  """All parameters, embedding included: the paper's N. See `parameter_groups`."""
  return sum(parameter_groups(shape).values())
