"""The three approaches on one set of runs, with intervals, as one result.

Hoffmann et al. 2022, section 3. Each approach lives in its own file; here they meet what they have
in common: resamples, predictions with their intervals, and the record that is written.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from chinchilla_jax.errors import UserError
from chinchilla_jax.scaling import (
  bootstrap,
  fit_envelope,
  fit_isoflop,
  fit_parametric,
  fit_varpro,
  paper_tables,
)
from chinchilla_jax.scaling.bootstrap import Resampling
from chinchilla_jax.scaling.fit_envelope import EnvelopeFit
from chinchilla_jax.scaling.fit_isoflop import IsoflopFit
from chinchilla_jax.scaling.fit_parametric import ParametricFit
from chinchilla_jax.scaling.fit_varpro import Agreement
from chinchilla_jax.scaling.laws import FLOPS_PER_PARAM_TOKEN, PUBLISHED, Law
from chinchilla_jax.scaling.results_table import Runs

APPROACHES = (1, 2, 3)
TITLES = {1: "envelope of training curves", 2: "IsoFLOP profiles", 3: "parametric loss"}
_PARAMETRIC = ("E", "A", "B", "alpha", "beta")
_FRONTIER = ("a", "b", "k_n", "k_d")


@dataclasses.dataclass(frozen=True)
class Options:
  """What may be chosen.

  Attributes:
    approaches: of APPROACHES.
    profile, budget_tolerance: of approach 2 (fit_isoflop).
    window, points: of approach 1 (fit_envelope).
    delta: of approach 3 (fit_parametric); math.inf is least squares of log losses.
    resampling: how intervals are made.
  """

  approaches: tuple[int, ...] = APPROACHES
  profile: str = "parabola"
  budget_tolerance: float = fit_isoflop.TOLERANCE
  window: float = fit_envelope.WINDOW
  points: int = fit_envelope.POINTS
  delta: float = fit_parametric.DELTA
  resampling: Resampling = Resampling()


@dataclasses.dataclass(frozen=True)
class Fitted:
  """One approach.

  Attributes:
    approach: 1, 2 or 3.
    law: what it found.
    detail: EnvelopeFit, IsoflopFit or ParametricFit.
    samples: (resamples,) by name: a, b, log_k_n, log_k_d, and E, A, B, alpha, beta of approach 3;
      NaN where a resample could not be fitted.
    confidence: of the intervals.
    agreement: of approach 3 with variable projection.
  """

  approach: int
  law: Law
  detail: EnvelopeFit | IsoflopFit | ParametricFit
  samples: dict[str, np.ndarray]
  confidence: float
  warnings: tuple[str, ...]
  agreement: Agreement | None = None

  def interval(self, name: str) -> tuple[float, float] | None:
    """Of "a", "b", "k_n", "k_d", "E", ...; None without (enough) resamples."""
    if f"log_{name}" in self.samples:
      # Constants go with the exponential of the exponent's error, and could overflow.
      band = bootstrap.interval(self.samples[f"log_{name}"], self.confidence)
      return None if band is None else tuple(np.exp(np.clip(band, -700, 700)).tolist())
    if name not in self.samples:
      return None
    return bootstrap.interval(self.samples[name], self.confidence)

  def predict(self, flops: Any) -> dict[str, tuple[Any, Any, Any]]:
    """(estimate, low, high) of the optimal params, tokens and tokens_per_param at budgets.

    low and high are None without (enough) resamples. flops: a number or an array.
    """
    n, d = self.law.optimum(flops)
    estimates = {"params": n, "tokens": d, "tokens_per_param": d / n}
    out = {name: (value, None, None) for name, value in estimates.items()}
    if self.interval("a") is None or self.interval("b") is None:
      return out
    grid = np.atleast_1d(np.asarray(flops, np.float64))
    log_c = np.log(grid)[None]
    column = lambda name: self.samples[name][:, None]
    log_n = column("log_k_n") + column("a") * log_c
    log_d = column("log_k_d") + column("b") * log_c
    tail = 50 * (1 - self.confidence)
    for name, values in (("params", log_n), ("tokens", log_d), ("tokens_per_param",
                                                                log_d - log_n)):
      band = np.nanpercentile(values, [tail, 100 - tail], axis=0)
      low, high = np.exp(np.clip(band, -700, 700))
      out[name] = ((estimates[name], low, high) if np.ndim(flops)
                   else (estimates[name], float(low[0]), float(high[0])))
    return out


@dataclasses.dataclass(frozen=True)
class Report:
  """All that was fitted, and (approach, why not) for what was not."""

  runs: Runs
  options: Options
  fitted: tuple[Fitted, ...]
  skipped: tuple[tuple[int, str], ...]


def run(runs: Runs, options: Options) -> Report:
  """Fits the approaches that were asked for.

  One that the runs do not allow is passed over with its reason if another can be fitted.

  Raises:
    UserError: none can; the reason of the only one, or of the first.
  """
  fits = {1: _envelope, 2: _isoflop, 3: _parametric}
  fitted, skipped = [], []
  for approach in options.approaches:
    try:
      fitted.append(fits[approach](runs, options))
    except UserError as error:
      skipped.append((approach, str(error)))
  if not fitted:
    raise UserError(f"{runs.source}: {skipped[0][1]}" if len(skipped) == 1 else
                    f"{runs.source}: no approach can be fitted; "
                    + "; ".join(why for _, why in skipped))
  return Report(runs, options, tuple(fitted), tuple(skipped))


def _envelope(runs: Runs, options: Options) -> Fitted:
  if not runs.curves:
    raise UserError(f"approach 1: it needs training curves: {runs.curve_note}; give a sweep's "
                    "folder, or a table with --run-column")
  found = fit_envelope.fit(runs.curves, points=options.points, window=options.window,
                           name="approach 1", params=runs.params_convention)
  samples = {}
  if options.resampling.count:
    weights = bootstrap.weights(np.zeros(len(runs.curves)), options.resampling)
    samples = fit_envelope.resampled(found, runs.curves, weights, options.window)
  return _with_samples(1, found, samples, options, found.warnings)


def _isoflop(runs: Runs, options: Options) -> Fitted:
  found = fit_isoflop.fit(runs.params, runs.tokens, runs.flops, runs.loss,
                          profile=options.profile, tolerance=options.budget_tolerance,
                          name="approach 2", params=runs.params_convention)
  samples = {}
  if options.resampling.count:
    labels = fit_isoflop.budgets(runs.flops, options.budget_tolerance)
    weights = bootstrap.weights(labels, options.resampling)
    samples = fit_isoflop.resampled(found, runs.params, runs.tokens, runs.loss, weights)
  return _with_samples(2, found, samples, options, found.warnings)


def _parametric(runs: Runs, options: Options) -> Fitted:
  found = fit_parametric.fit(runs.params, runs.tokens, runs.loss, delta=options.delta,
                             name="approach 3", params=runs.params_convention)
  agreement = fit_varpro.compare(found, runs.params, runs.tokens, runs.loss)
  warnings = []
  if agreement.largest_difference > 1e-5:
    warnings.append(f"variable projection ends {agreement.largest_difference:.2g} away (largest of "
                    "the five parameters): the optimum is not well determined by these runs")
  if not found.at_best:
    warnings.append("the lowest objective is where the gradient does not vanish "
                    f"({found.gradient:.1e}): these runs do not determine the law")
  ratio = runs.flops / (FLOPS_PER_PARAM_TOKEN * runs.params * runs.tokens)
  if abs(ratio - 1).max() > 0.01:
    warnings.append(f"FLOPs are {ratio.min():.3g} to {ratio.max():.3g} x 6ND; the optimum of "
                    "approach 3 is under C = 6ND all the same")
  samples = {}
  if options.resampling.count:
    weights = bootstrap.weights(np.zeros(len(runs.loss)), options.resampling)
    theta = fit_parametric.resampled(found, runs.params, runs.tokens, runs.loss, weights)
    samples = _parametric_samples(theta)
  return _with_samples(3, found, samples, options, warnings, agreement)


def _parametric_samples(theta: np.ndarray) -> dict[str, np.ndarray]:
  """(resamples, 5) in the order of fit_parametric.NAMES -> constants and frontier by name."""
  a, b, e, alpha, beta = theta.T
  log_g = (np.log(alpha / beta) + a - b) / (alpha + beta)
  n_exponent, d_exponent = beta / (alpha + beta), alpha / (alpha + beta)
  six = math.log(FLOPS_PER_PARAM_TOKEN)
  return {"E": np.exp(e), "A": np.exp(a), "B": np.exp(b), "alpha": alpha, "beta": beta,
          "a": n_exponent, "b": d_exponent, "log_k_n": log_g - n_exponent * six,
          "log_k_d": -log_g - d_exponent * six}


def _with_samples(approach: int, found: Any, samples: dict[str, np.ndarray], options: Options,
                  warnings: Sequence[str], agreement: Agreement | None = None) -> Fitted:
  warnings = list(warnings)
  if samples:
    lost = int((~np.isfinite(samples["a"])).sum())
    count = len(samples["a"])
    if bootstrap.interval(samples["a"], options.resampling.confidence) is None:
      warnings.append(f"{lost} of {count} resamples could not be fitted: no intervals; there are "
                      "too few runs")
    elif lost:
      warnings.append(f"{lost} of {count} resamples could not be fitted and are left out of the "
                      "intervals")
  return Fitted(approach, found.law, found, samples, options.resampling.confidence,
                tuple(warnings), agreement)


# -------------------------------------------------------------------- The record


def record(report: Report, budgets: Sequence[float]) -> dict[str, Any]:
  """All of a report, for fit.json: plain values, no NaN."""
  runs, options = report.runs, report.options
  return {
      "source": runs.source,
      "runs": len(runs.ids),
      "conventions": runs.conventions,
      "params_convention": runs.params_convention,
      "ranges": {name: [float(values.min()), float(values.max())] for name, values in (
          ("params", runs.params), ("tokens", runs.tokens), ("flops", runs.flops),
          ("loss", runs.loss), ("tokens_per_param", runs.tokens / runs.params))},
      "notes": list(runs.notes),
      "dropped": [{"run": name, "why": why} for name, why in runs.dropped],
      "options": {
          "profile": options.profile, "budget_tolerance": options.budget_tolerance,
          "smoothing_window": options.window, "envelope_points": options.points,
          "huber_delta": options.delta if math.isfinite(options.delta) else "inf",
          "resampling": dataclasses.asdict(options.resampling)},
      "approaches": {str(one.approach): _one(one, budgets) for one in report.fitted},
      "not_fitted": {str(approach): why for approach, why in report.skipped},
      "published": {name: _published(law, budgets) for name, law in PUBLISHED.items()},
      "published_exponents": [dataclasses.asdict(row) for row in
                              (*paper_tables.TABLE_2, *paper_tables.TABLE_A2)],
  }


def _one(one: Fitted, budgets: Sequence[float]) -> dict[str, Any]:
  names = (_PARAMETRIC if one.approach == 3 else ()) + _FRONTIER
  constants = {}
  for name in names:
    band = one.interval(name)
    constants[name] = {"value": float(getattr(one.law, name)),
                       "interval": None if band is None else list(band)}
  out = {"title": TITLES[one.approach], "law": one.law.source, "constants": constants,
         "predictions": [_prediction(one, flops) for flops in budgets],
         "warnings": list(one.warnings)}
  detail = one.detail
  if isinstance(detail, EnvelopeFit):
    out |= {"share_in_last_15_percent": detail.share_in_last, "runs_on_envelope": detail.runs_used}
  elif isinstance(detail, IsoflopFit):
    out |= {"loss_power_law": {"k": detail.loss_constant, "exponent": -detail.loss_exponent},
            "profiles": [{"flops": p.flops, "runs": len(p.runs), "n_opt": _finite(p.n_opt),
                          "d_opt": _finite(p.d_opt), "loss": _finite(p.loss),
                          "outside_sampled_sizes": p.outside} for p in detail.profiles]}
  else:
    out |= {name: getattr(detail, name) for name in (
        "objective", "gradient", "condition", "condition_centred", "starts", "converged",
        "at_best", "rms")}
    out["variable_projection"] = dataclasses.asdict(one.agreement)
  return out


def _prediction(one: Fitted, flops: float) -> dict[str, Any]:
  out: dict[str, Any] = {"flops": flops}
  for name, (value, low, high) in one.predict(flops).items():
    out[name] = {"value": float(value), "interval": None if low is None else [low, high]}
  loss = one.law.at(flops).loss
  if loss is not None:
    out["loss"] = float(loss)
  return out


def _published(law: Law, budgets: Sequence[float]) -> dict[str, Any]:
  names = (_PARAMETRIC if hasattr(law, "E") else ()) + _FRONTIER
  return {"source": law.source, "params": law.params,
          "constants": {name: getattr(law, name) for name in names},
          "intervals": {name: list(band) for name, band in law.intervals.items()},
          "interval_kind": law.interval_kind,
          "predictions": [{"flops": flops, "params": law.optimum(flops)[0],
                           "tokens": law.optimum(flops)[1]} for flops in budgets]}


def _finite(value: float) -> float | None:
  return value if math.isfinite(value) else None
