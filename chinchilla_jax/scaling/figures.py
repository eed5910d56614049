"""Figures of a fit, after Figures 1 to 4 of Hoffmann et al. 2022. PNG and SVG.

matplotlib is an extra (`pip install "chinchilla_jax[figures]"`) and is imported here only.
"""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib import cm, colors, patheffects
from matplotlib.backends import backend_agg
from matplotlib.figure import Figure

from chinchilla_jax.errors import UserError
from chinchilla_jax.scaling import fit_isoflop
from chinchilla_jax.scaling.fit import Fitted, Report
from chinchilla_jax.scaling.fit_envelope import EnvelopeFit
from chinchilla_jax.scaling.fit_isoflop import IsoflopFit
from chinchilla_jax.scaling.fit_parametric import ParametricFit
from chinchilla_jax.scaling.labels import short
from chinchilla_jax.scaling.laws import PUBLISHED

# Okabe and Ito's colours: told apart by everybody.
APPROACH_COLOURS = {1: "#0072B2", 2: "#009E73", 3: "#D55E00"}
PAPER_LINES = (("approach_1", "Hoffmann et al., approach 1", "#0072B2", (0, (1, 1.5))),
               ("approach_2", "Hoffmann et al., approach 2", "#009E73", (0, (5, 2))),
               ("approach_3_tex", "Hoffmann et al., approach 3", "#D55E00", (0, (5, 2, 1, 2))))
_INK, _GREY = "#222222", "#8a8a8a"
_STYLE = {
    "font.family": "sans-serif", "font.size": 9.5, "axes.titlesize": 10.5, "axes.labelsize": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": _INK,
    "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "legend.frameon": True, "legend.facecolor": "white", "legend.edgecolor": "none",
    "legend.framealpha": 0.85, "legend.borderpad": 0.25, "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5, "svg.hashsalt": "chinchilla_jax", "svg.fonttype": "path",
}
N_LABEL, C_LABEL = "parameters N", "training FLOPs C"
D_LABEL, L_LABEL = "training tokens D", "loss (nats per token)"


def write(report: Report, folder: pathlib.Path) -> list[pathlib.Path]:
  """Writes the figures that the report has something for, whole or not at all each.

  Returns: the PNG files; an SVG of the same name lies beside each.
  """
  makers: dict[str, Callable[[Report], Figure]] = {}
  kinds = {1: ("envelope", envelope), 2: ("isoflop", isoflop), 3: ("parametric", parametric)}
  for one in report.fitted:
    name, maker = kinds[one.approach]
    makers[name] = maker
  makers["extrapolation"] = extrapolation
  paths = []
  with matplotlib.rc_context(_STYLE):
    for name, maker in makers.items():
      figure = maker(report)
      backend_agg.FigureCanvasAgg(figure)
      for suffix, metadata in ((".png", {"Software": "chinchilla_jax"}), (".svg", {"Date": None})):
        path = folder / f"{name}{suffix}"
        partial = folder / f".{name}.partial{suffix}"
        figure.savefig(partial, dpi=150, metadata=metadata)
        os.replace(partial, path)
      paths.append(folder / f"{name}.png")
  return paths


# -------------------------------------------------------------------- Approach 1


def envelope(report: Report) -> Figure:
  """Training curves with their envelope; N and D of the envelope (Figure 2)."""
  one, detail = _of(report, EnvelopeFit)
  curves = report.runs.curves
  figure, (left, middle, right) = _panels(3, (13.2, 4.0))
  norm, colour = _by_size([curve.params for curve in curves])
  for curve in curves:
    left.plot(curve.flops, curve.smoothed(report.options.window), lw=0.8,
              alpha=0.75, color=colour(curve.params), rasterized=len(curves) > 60)
  left.plot(detail.flops, detail.loss, color=_INK, lw=1.8, label="envelope")
  _log(left, C_LABEL, "training " + L_LABEL, y_log=True)
  # The first steps, at the loss of a model that knows nothing, would take half of the panel.
  left.set_ylim(0.985 * detail.loss.min(), min(1.6 * detail.loss.max(),
                                              max(curve.loss.max() for curve in curves)))
  left.set_xlim(detail.flops[0] / 5, detail.flops[-1] * 1.3)
  _plain_log(left.yaxis)
  left.set_title(f"{len(curves)} training curves, smoothed", loc="left")
  left.legend(loc="upper right")
  bar = figure.colorbar(cm.ScalarMappable(norm, "viridis"), ax=left, pad=0.02)
  bar.set_label(N_LABEL)
  _plain_log(bar.ax.yaxis)
  for axes, values, name, label in ((middle, detail.params, "params", N_LABEL),
                                    (right, detail.tokens, "tokens", D_LABEL)):
    for which, colour_, alpha, label_ in ((detail.kept, _GREY, 0.7, "envelope"),
                                          (~detail.kept, "#cfcfcf", 0.7, "at an end: left out")):
      if which.any():
        axes.scatter(detail.flops[which], values[which], s=7, color=colour_, lw=0, alpha=alpha,
                     label=f"{label_}, {which.sum():,} FLOP values", rasterized=True)
    _fitted_line(axes, one, detail.flops, name)
    _log(axes, C_LABEL, label, y_log=True)
    _plain_log(axes.yaxis)
    axes.legend(loc="upper left")
  middle.set_title(f"{100 * detail.share_in_last:.0f} % of the envelope lies in the last 15 % of "
                   "its run", loc="left")
  return figure


# -------------------------------------------------------------------- Approach 2


def isoflop(report: Report) -> Figure:
  """IsoFLOP profiles; N and D of their minima (Figure 3)."""
  one, detail = _of(report, IsoflopFit)
  runs = report.runs
  figure, (left, middle, right) = _panels(3, (13.2, 4.0))
  flops = [profile.flops for profile in detail.profiles]
  norm, colour = _by_size(flops)
  for profile in detail.profiles:
    rows = list(profile.runs)
    left.scatter(runs.params[rows], runs.loss[rows], s=17, color=colour(profile.flops), lw=0,
                 zorder=3)
    grid = np.geomspace(runs.params[rows].min(), runs.params[rows].max(), 200)
    left.plot(grid, profile.curve(grid), color=colour(profile.flops), lw=1.3)
    if np.isfinite(profile.n_opt) and not profile.outside:
      left.plot([profile.n_opt], [profile.loss], marker="D", ms=5.5, mfc="white", mec=_INK, mew=1,
                ls="", zorder=4)
  left.plot([], [], marker="D", ms=5.5, mfc="white", mec=_INK, ls="", label="minimum")
  _log(left, N_LABEL, L_LABEL)
  _plain_log(left.xaxis)
  left.set_title(f"{len(detail.profiles)} budgets, {detail.profile} in log N", loc="left")
  left.legend(loc="upper right")
  bar = figure.colorbar(cm.ScalarMappable(norm, "viridis"), ax=left, pad=0.02)
  bar.set_label("budget (FLOPs)")
  for axes, name, key, label in ((middle, "params", "n_opt", N_LABEL),
                                 (right, "tokens", "d_opt", D_LABEL)):
    values = np.array([getattr(profile, key) for profile in detail.profiles])
    good = np.isfinite(values)
    axes.scatter(np.array(flops)[good], values[good], marker="D", s=30, color="white",
                 edgecolor=_INK, lw=1, zorder=4, label="minima")
    _fitted_line(axes, one, np.geomspace(min(flops), max(flops), 60), name)
    _log(axes, C_LABEL, label, y_log=True)
    _plain_log(axes.yaxis)
    axes.legend(loc="upper left")
  return figure


# -------------------------------------------------------------------- Approach 3


def parametric(report: Report) -> Figure:
  """Contours of the loss over compute and size; slices at the budgets of the runs (Figure 4)."""
  one, detail = _of(report, ParametricFit)
  runs, law = report.runs, one.law
  figure, (left, right) = _panels(2, (11.2, 4.4))
  c = np.geomspace(runs.flops.min() / 2, runs.flops.max() * 8, 160)
  n = np.geomspace(runs.params.min() / 2, runs.params.max() * 3, 160)
  surface = law.loss(n[:, None], c[None] / (6 * n[:, None]))
  # Levels even in the reducible loss's logarithm, over what the runs span and a little beyond.
  low, high = law.at(c[-1]).loss - law.E, runs.loss.max() - law.E
  levels = law.E + np.geomspace(low * 1.02, high * 1.1, 13)
  lines = left.contour(c, n, surface, levels=levels, cmap="viridis_r", linewidths=0.9,
                       norm=colors.Normalize(levels[0], levels[-1]))
  # Below the frontier, where the contours are far apart.
  at = {level: c[np.abs(law.at(c).loss - level).argmin()] for level in levels[1::2]}
  where = [(3 * flops, law.optimum(flops)[0] / 6) for flops in at.values()]
  for text in left.clabel(lines, levels[1::2], fmt="%.2f", fontsize=7.5, colors=_INK,
                          inline=False, manual=where):
    text.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])
    text.set_rotation(0)
  norm = colors.Normalize(levels[0], levels[-1])
  left.scatter(runs.flops, runs.params, c=runs.loss, cmap="viridis_r", norm=norm, s=18,
               edgecolor=_INK, lw=0.4, zorder=3, label=f"{len(runs.ids)} runs")
  _fitted_line(left, one, c, "params", label="efficient frontier")
  _log(left, C_LABEL, N_LABEL, y_log=True)
  _plain_log(left.yaxis)
  left.set_xlim(c[0], c[-1])
  left.set_ylim(n[0], n[-1])
  left.set_title(f"L = {law.E:.3f} + {law.A:.4g}/N^{law.alpha:.3f} + "
                 f"{law.B:.4g}/D^{law.beta:.3f}", loc="left")
  left.legend(loc="upper left")
  _slices(figure, right, report, one)
  return figure


def _slices(figure: Figure, axes: Any, report: Report, one: Fitted) -> None:
  """Loss over N at the budgets of the runs, or predicted against measured if there are none."""
  runs, law = report.runs, one.law
  try:
    labels = fit_isoflop.budgets(runs.flops, report.options.budget_tolerance)
    groups = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    groups = [rows for rows in groups if len(np.unique(runs.params[rows])) >= 3]
  except UserError:
    groups = []
  if groups:
    flops = [np.exp(np.log(runs.flops[rows]).mean()) for rows in groups]
    norm, colour = _by_size(flops)
    for budget, rows in zip(flops, groups, strict=True):
      axes.scatter(runs.params[rows], runs.loss[rows], s=17, color=colour(budget), lw=0, zorder=3)
      grid = np.geomspace(runs.params[rows].min() / 1.3, runs.params[rows].max() * 1.3, 200)
      axes.plot(grid, law.loss(grid, budget / (6 * grid)), color=colour(budget), lw=1.3)
    frontier = np.geomspace(min(flops), max(flops), 60)
    best = law.at(frontier)
    axes.plot(best.params, best.loss, color=APPROACH_COLOURS[3], lw=1.8,
              label="efficient frontier")
    _log(axes, N_LABEL, L_LABEL)
    _plain_log(axes.xaxis)
    axes.legend(loc="upper right")
    bar = figure.colorbar(cm.ScalarMappable(norm, "viridis"), ax=axes, pad=0.02)
    bar.set_label("budget (FLOPs)")
    axes.set_title("slices at the budgets of the runs", loc="left")
    return
  predicted = law.loss(runs.params, runs.tokens)
  axes.scatter(runs.loss, predicted, s=18, color=APPROACH_COLOURS[3], lw=0, alpha=0.8)
  ends = [min(runs.loss.min(), predicted.min()), max(runs.loss.max(), predicted.max())]
  axes.plot(ends, ends, color=_INK, lw=1)
  axes.set_xlabel("measured " + L_LABEL)
  axes.set_ylabel("fitted " + L_LABEL)
  axes.set_title(f"rms residual of log L: {one.detail.rms:.4f}", loc="left")


# -------------------------------------------------------------------- All of them


def extrapolation(report: Report) -> Figure:
  """N and D against compute: the fits with their intervals, and the paper's three (Figure 1)."""
  runs = report.runs
  figure, (left, right) = _panels(2, (11.2, 4.6))
  c = np.geomspace(runs.flops.min() / 2, max(runs.flops.max() * 1e3, 1e21), 120)
  for axes, name, label in ((left, "params", N_LABEL), (right, "tokens", D_LABEL)):
    axes.axvspan(runs.flops.min(), runs.flops.max(), color="#f3f0e6", lw=0, zorder=0)
    for key, title, colour, dashes in PAPER_LINES:
      values = PUBLISHED[key].optimum(c)[0 if name == "params" else 1]
      axes.plot(c, values, color=colour, ls=dashes, lw=1.1, alpha=0.75, label=title)
    for one in report.fitted:
      _fitted_line(axes, one, c, name, label=f"these runs, approach {one.approach}")
    axes.scatter(runs.flops, runs.params if name == "params" else runs.tokens, s=7, color=_GREY,
                 lw=0, alpha=0.7, zorder=1, label=f"{len(runs.ids)} runs")
    _log(axes, C_LABEL, label, y_log=True)
    _plain_log(axes.yaxis)
    axes.set_xlim(c[0], c[-1])
  left.legend(loc="upper left")
  band = 100 * report.options.resampling.confidence
  note = f"bands: {band:g} % intervals; " if report.options.resampling.count else ""
  left.set_title(f"{note}shaded: budgets of the runs", loc="left")
  right.set_title("N: " + report.runs.conventions["params"], loc="left", fontsize=9)
  return figure


# -------------------------------------------------------------------- Parts


def _of(report: Report, kind: type) -> tuple[Fitted, Any]:
  one = next(one for one in report.fitted if isinstance(one.detail, kind))
  return one, one.detail


def _panels(count: int, size: tuple[float, float]) -> tuple[Figure, Any]:
  figure = Figure(figsize=size, layout="constrained")
  return figure, figure.subplots(1, count)


def _by_size(values: Any) -> tuple[Any, Callable[[float], Any]]:
  """A logarithmic norm over values, and value -> colour."""
  low, high = min(values), max(values)
  norm = colors.LogNorm(low, high if high > low else 1.1 * low)
  return norm, lambda value: cm.ScalarMappable(norm, "viridis").to_rgba(value)


def _fitted_line(axes: Any, one: Fitted, flops: np.ndarray, name: str,
                 label: str | None = None) -> None:
  colour, exponent = APPROACH_COLOURS[one.approach], "a" if name == "params" else "b"
  value, low, high = one.predict(np.asarray(flops))[name]
  if low is not None:
    axes.fill_between(flops, low, high, color=colour, alpha=0.18, lw=0, zorder=2)
  band = one.interval(exponent)
  text = f"{exponent} = {getattr(one.law, exponent):.3f}"
  if band:
    text += f" ({band[0]:.3f}, {band[1]:.3f})"
  axes.plot(flops, value, color=colour, lw=1.8, zorder=3,
            label=text if label is None else f"{label}, {text}")


def _log(axes: Any, x_label: str, y_label: str, y_log: bool = False) -> None:
  axes.set_xscale("log")
  axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 3.0), numticks=12))
  axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(
      lambda value, _: _power(value, axes.get_xlim())))
  axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
  axes.set_xlabel(x_label)
  axes.set_ylabel(y_label)
  if y_log:
    axes.set_yscale("log")


def _power(value: float, limits: tuple[float, float]) -> str:
  """10 to some power; three times that too, where the axis spans little."""
  exponent = int(np.floor(np.log10(value) + 1e-9))
  if value < 2 * 10.0**exponent:
    return f"$10^{{{exponent}}}$"
  return f"$3\\cdot 10^{{{exponent}}}$" if limits[1] < 200 * limits[0] else ""


def _plain_log(axis: Any) -> None:
  """Ticks of a logarithmic axis as 100M, 1B; more of them where it spans less."""
  low, high = sorted(axis.get_view_interval())
  decades = np.log10(high / low) if low > 0 else 9
  subs = ((1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1.3 else
          (1.0, 2.0, 5.0) if decades > 0.6 else tuple(np.arange(1, 10, 0.5)))
  axis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs, numticks=12))
  axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: short(value)))
  axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
