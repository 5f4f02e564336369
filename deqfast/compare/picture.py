"""The picture of a comparison."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from .turns import quartiles

if TYPE_CHECKING:
    from .measure import Row

# Okabe and Ito's palette: distinguishable with any colour vision.
_OLD = "#D55E00"
_OURS = ["#0072B2", "#009E73", "#56B4E9", "#CC79A7", "#E69F00", "#8C6D46"]
_INK, _GREY = "#222222", "#555555"
_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#B5B5B5",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#EBEBEB",
    "xtick.color": "#6E6E6E",
    "ytick.color": "#6E6E6E",
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
}


def draw(rows: list[Row], target: float, setting: str, verdict: str) -> Figure:
    """Two panels under the verdict."""
    with rc_context(_STYLE):
        rows = [row for row in rows if row.seconds]
        ours = iter(_OURS * len(rows))
        colours = [_OLD if row.old else next(ours) for row in rows]
        figure = Figure(figsize=(11.5, 4.8 + 0.28 * max(0, len(rows) - 4)), facecolor="white")
        left, right = figure.subplots(
            1, 2, gridspec_kw={"left": 0.065, "right": 0.985, "top": 0.72, "bottom": 0.115, "wspace": 0.1}
        )
        _residuals(left, target, rows, colours)
        _times(right, rows, colours)
        words = textwrap.fill(verdict, 118, max_lines=3)
        figure.text(0.012, 0.965, words, fontsize=10.5, fontweight="bold", va="top", color=_INK)
        figure.text(0.012, 0.80, setting, fontsize=8.8, color=_GREY, va="center")
    return figure


def _residuals(axes: Any, target: float, rows: list[Row], colours: list[str]) -> None:
    for row, colour in zip(rows, colours, strict=True):
        steps = range(1, len(row.trace) + 1)
        finite = [value if 0 < value < math.inf else math.nan for value in row.trace]
        axes.plot(steps, finite, color=colour, linewidth=1.8 if row.old else 2.2, linestyle="--" if row.old else "-")
        axes.plot(steps[-1], finite[-1], "o", color=colour, markersize=5)
    axes.axhline(target, color=_INK, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    axes.set_yscale("log")
    axes.set_title("Residual of the worst sample")
    axes.set_xlabel("evaluations of f; dotted: the target")


def _times(axes: Any, rows: list[Row], colours: list[str]) -> None:
    longest = max(quartiles(row.step_seconds or row.seconds)[2] for row in rows)
    for place, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        low, middle, high = quartiles(row.step_seconds or row.seconds)
        forward = min(middle, quartiles(row.seconds)[1])
        axes.barh(place, 1e3 * middle, height=0.5, color=colour, alpha=0.55, linewidth=0)
        axes.barh(place, 1e3 * forward, height=0.5, color=colour, linewidth=0)
        axes.plot([1e3 * low, 1e3 * high], [place, place], color=_INK, linewidth=1.1)
        axes.text(1e3 * (high + 0.015 * longest), place, f"{1e3 * middle:.3g} ms", va="center", fontweight="bold")
        products = "" if row.products is None else f", {row.products} vjps"
        reached = "" if row.reached else ", target not reached"
        words = f"{row.name}  ·  {row.evaluations} evaluations{products}; residual {row.residual:.0e}{reached}"
        axes.text(0, place - 0.31, words, va="bottom", fontsize=8.8, color=_GREY)
    axes.set_ylim(len(rows) - 0.6, -0.75)
    axes.set_xlim(0, 1.2e3 * longest)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    axes.set_title("Time")
    axes.set_xlabel("ms: dark forward, light with the backward pass; line: quartiles")
