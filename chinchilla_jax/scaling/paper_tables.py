"""Tables of Hoffmann et al. 2022 that the laws are held against, as printed.

Nothing here is mended. Where the paper disagrees with itself both sides are kept, and
`INCONSISTENCIES` lists them (docs/scaling-laws.md has the same table).
"""

import dataclasses
import math
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Projection:
  """One row of Tables 3 (approach 1) and A3 (approaches 2 and 3): FLOPs and tokens for N."""

  params: float
  flops_1: float
  tokens_1: float
  flops_2: float
  tokens_2: float
  flops_3: float
  tokens_3: float


PROJECTIONS: tuple[Projection, ...] = (
    Projection(400e6, 1.92e19, 8.0e9, 1.84e19, 7.7e9, 2.21e19, 9.2e9),
    Projection(1e9, 1.21e20, 20.2e9, 1.20e20, 20.0e9, 1.62e20, 27.1e9),
    Projection(10e9, 1.23e22, 205.1e9, 1.32e22, 219.5e9, 2.46e22, 410.1e9),
    Projection(67e9, 5.76e23, 1.5e12, 6.88e23, 1.7e12, 1.71e24, 4.1e12),
    Projection(175e9, 3.85e24, 3.7e12, 4.54e24, 4.3e12, 1.26e24, 12.0e12),
    Projection(280e9, 9.90e24, 5.9e12, 1.18e25, 7.1e12, 3.52e25, 20.1e12),
    Projection(520e9, 3.43e25, 11.0e12, 4.19e25, 13.4e12, 1.36e26, 43.5e12),
    Projection(1e12, 1.27e26, 21.2e12, 1.59e26, 26.5e12, 5.65e26, 94.1e12),
    Projection(10e12, 1.30e28, 216.2e12, 1.75e28, 292.0e12, 8.55e28, 1425.5e12),
)
ODD_ROW = 67e9  # no power law through the other rows passes it

# Table A3, 175B, approach 3: its FLOPs are ten times too few for its own N and D.
TYPO_175B_PRINTED, TYPO_175B_BY_6ND = 1.26e24, 1.26e25

# Table A3, 280B, approach 3: tokens 4 % short of its own N and C; the FLOPs fit the other rows.
ODD_TOKENS = (280e9, 20.1e12)


@dataclasses.dataclass(frozen=True)
class Exponents:
  """A row of exponents: N_opt ~ C^a, D_opt ~ C^b. Intervals: 10th and 90th percentiles."""

  name: str
  a: float
  b: float
  a_interval: tuple[float, float] | None = None
  b_interval: tuple[float, float] | None = None


TABLE_2: tuple[Exponents, ...] = (
    Exponents("approach 1, minimum over training curves", 0.50, 0.50, (0.488, 0.502),
              (0.501, 0.512)),
    Exponents("approach 2, IsoFLOP profiles", 0.49, 0.51, (0.462, 0.534), (0.483, 0.529)),
    Exponents("approach 3, parametric modelling of the loss", 0.46, 0.54, (0.454, 0.455),
              (0.542, 0.543)),
    Exponents("Kaplan et al. 2020", 0.73, 0.27),
)

# Table A2 (Appendix C): approach 2 on four IsoFLOP profiles of other data.
TABLE_A2: tuple[Exponents, ...] = (
    Exponents("approach 2 on C4", 0.50, 0.50),
    Exponents("approach 2 on GitHub", 0.53, 0.47),
)

# Budgets of the IsoFLOP profiles, from the legend of Figure 3; the text gives count and ends.
ISOFLOP_BUDGETS = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21)

# Section D.4, at 1e21 FLOPs: N that approach 1 and Kaplan's law predict.
D4_FLOPS, D4_APPROACH_1, D4_KAPLAN = 1e21, 2.86e9, 4.68e9


def columns(approach: int, *, mended: bool = True) -> list[tuple[float, float, float]]:
  """(params, flops, tokens) of the rows for one approach.

  Args:
    mended: with the 175B row's FLOPs of approach 3 as 6ND gives them; False: as printed.
  """
  rows = []
  for row in PROJECTIONS:
    flops, tokens = getattr(row, f"flops_{approach}"), getattr(row, f"tokens_{approach}")
    if mended and flops == TYPO_175B_PRINTED:
      flops = TYPO_175B_BY_6ND
    rows.append((row.params, flops, tokens))
  return rows


def power_law(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
  """(k, p) of y = k x^p by least squares in logarithms, through (x, y) points."""
  logs = [(math.log(x), math.log(y)) for x, y in points]
  x_mean = math.fsum(x for x, _ in logs) / len(logs)
  y_mean = math.fsum(y for _, y in logs) / len(logs)
  p = (math.fsum((x - x_mean) * (y - y_mean) for x, y in logs)
       / math.fsum((x - x_mean) ** 2 for x, _ in logs))
  return math.exp(y_mean - p * x_mean), p


@dataclasses.dataclass(frozen=True)
class Inconsistency:
  """Two places of the paper that disagree. `computed`: what this project finds, if it can."""

  where: str
  says: str
  elsewhere: str
  computed: str = ""


INCONSISTENCIES: tuple[Inconsistency, ...] = (
    Inconsistency("Table A3, 175B, approach 3", "1.26e24 FLOPs",
                  "12.0T tokens in the same row",
                  "6ND of that row is 1.26e25: a power of ten is missing"),
    Inconsistency("Table A3, 280B, approach 3", "3.52e25 FLOPs and 20.1T tokens",
                  "every other row has C = 6ND to rounding",
                  "6ND is 3.38e25; the power law of the other rows has 20.9T tokens"),
    Inconsistency("Tables 3 and A3, 67B, approaches 1 and 3",
                  "67B parameters, 5.76e23 FLOPs, 1.5T tokens; 1.71e24 FLOPs, 4.1T tokens",
                  "every other row has C = 6ND to rounding",
                  "6ND is 6.03e23 and 1.65e24; the row lies on no power law of the others"),
    Inconsistency("Section 3.4", "175B: 4.41e24 FLOPs and 4.2T tokens; 280B: 6.8T tokens",
                  "Table 3: 3.85e24 and 3.7T; 5.9T"),
    Inconsistency("Table 2, approach 3", "a = 0.46 with interval (0.454, 0.455)",
                  "the estimate lies outside its interval",
                  "b/(alpha+beta) of the printed constants is 0.452, of the unrounded ones 0.4565"),
    Inconsistency("Table 2, approach 1", "b = 0.50 with interval (0.501, 0.512)",
                  "the estimate lies outside its interval",
                  "Table 3's rows have b = 0.502"),
    Inconsistency("Section 3.3 and D.3, approach 3", "E 1.69, A 406.4, B 410.7, alpha 0.34, "
                  "beta 0.28", "40B parameters at Gopher's budget",
                  "the printed constants give 32.2B, the unrounded ones of the TeX source 40.4B"),
    Inconsistency("Table A3, approach 3", "400M: 2.21e19 FLOPs, 9.2B tokens",
                  "the fit of the same approach",
                  "unrounded constants: 2.35e19, 9.8B; printed ones: 3.47e19, 14.5B"),
    Inconsistency("Introduction, of Kaplan's law", "10 x compute: 5.5 x the size, 1.8 x the tokens",
                  "Table 2: exponents 0.73 and 0.27", "those give 5.4 and 1.9"),
    Inconsistency("Section D.4", "Kaplan's law gives 4.68B at 1e21 FLOPs",
                  "Kaplan et al. 2020: 1.3e9 (C / PF-day)^0.73", "that is 7.77B"),
    Inconsistency("Appendix F", "embedding and logits count as FLOPs",
                  "the ratios of Table A4", "the ratios leave both out: 1.03, not 1.58, for 73M"),
    Inconsistency("Table A4", "73M and 305M parameters", "Table A9: 74M and 306M",
                  "73.8M and 305.6M by the counting rule"),
    Inconsistency("Appendix F, Gopher's training FLOPs", "6.3e23 FLOPs by the formula",
                  "5.76e23 used throughout", "the formula gives 4.75e23, 6ND 5.03e23"),
    Inconsistency("Introduction", "models of 70M to 16B, 5B to 500B tokens",
                  "Table A9 has 44M and 57M",
                  "runs read off Figure 4 span 0.245B to 318B tokens"),
    Inconsistency("Section 5", "all analysis runs saw less than one epoch",
                  "Table A1: MassiveWeb 1.24 and Wikipedia 3.40 epochs",
                  "those are Chinchilla's own 1.4T tokens"),
    Inconsistency("Abstract", "MMLU 67.5 %", "Table 6: 67.6 %", "mean of Table A6: 67.6"),
    Inconsistency("Tables 6 and A6", "Gopher's MMLU average 60.0", "Table A6's column",
                  "its mean is 60.6"),
    Inconsistency("Section 4.2.4", "Chinchilla's BIG-bench average 65.1", "Table A7's column",
                  "its mean is 64.5 (Gopher's 54.4 agrees)"),
    Inconsistency("Section 4.2.5", "better than Gopher on all common-sense tasks",
                  "Table 8: PIQA 81.8 and 81.8"),
    Inconsistency("Section 4.2.6", "Gopher's Natural Questions 21 % and 28 %",
                  "Table 9: 24.5 and 28.2"),
    Inconsistency("Table A5", "Jurassic-1 170B", "178B elsewhere"),
)
