"""The picture of masks.py, from its record alone."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from frame import INK, OURS, RIVALS
from masks_report import AXES, COLOURS, LABELS, chosen, interval, series, sweep_table

SETS = ("digits", "photographs")
MARKERS = {"fixed": "o", "magnitude": "^", "scores": "s"}
SHADES = ("#9ECAE1", "#3182BD", "#08306B")


def draw(path: Path, record: dict[str, Any]) -> None:
    """Accuracy along each swept axis, then accuracy by work, memory by depth, and what sparse storage gains."""
    from matplotlib import pyplot

    axes = [axis for axis in AXES if sweep_table(record, SETS[0], axis)[1]]
    panels: list[Callable[[Any], None]] = [
        *(functools.partial(_sweep, record=record, data=data, axis=axis) for data in SETS for axis in axes),
        *(functools.partial(_work, record=record, data=data) for data in SETS),
        functools.partial(_memory, record=record),
        functools.partial(_storage, record=record),
    ]
    across = 4 if len(panels) > 6 else 3
    down = -(-len(panels) // across)
    figure, grid = pyplot.subplots(down, across, figsize=(4.1 * across, 3.5 * down), squeeze=False)
    for ax in grid.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, panel in zip(grid.flat, panels, strict=False):
        panel(ax)
    figure.set_layout_engine("constrained", h_pad=0.1)
    handles, labels = grid.flat[len(SETS) * len(axes)].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=130)


def _sweep(ax: Any, record: dict[str, Any], data: str, axis: str) -> None:
    for way in LABELS:
        line = series(record, data, axis, way)
        if len(line) > 1:
            values, means, halves = (list(column) for column in zip(*line, strict=True))
            low = [mean - half for mean, half in zip(means, halves, strict=True)]
            high = [mean + half for mean, half in zip(means, halves, strict=True)]
            ax.fill_between(values, low, high, color=COLOURS[way], alpha=0.15, linewidth=0)
            ax.plot(values, means, "o-", color=COLOURS[way], markersize=4, linewidth=1.6)
        elif line and axis in ("density", "depth"):
            ax.axhline(line[0][1], color=COLOURS[way], linewidth=1.2, linestyle="--")
    if axis == "depth":
        mean = interval([100 * run["accuracy"] for run in _main(record, data, "implicit")])[0]
        ax.axhline(mean, color=COLOURS["implicit"], linewidth=1.2, linestyle="--")
    ax.set_xscale("log", base=10 if axis == "samples" else 2)
    values = sorted({value for way in LABELS for value, *_ in series(record, data, axis, way)})
    apart = 1.4 if axis == "samples" else 1.3  # or else one label runs into the next
    roomy = [v for v in values if v == values[-1] or min(w for w in values if w > v) > apart * v]
    ax.set_xticks(roomy, [f"{value:g}" for value in roomy])
    ax.minorticks_off()
    ax.set(title=f"{data}: {AXES[axis]}", ylabel="test accuracy, %" if axis == "density" else "")


def _work(ax: Any, record: dict[str, Any], data: str) -> None:
    runs = [run for run in chosen(record["runs"], data=data, axis="main") if run["solver"] == "deqfast"]
    for name in dict.fromkeys(run["name"] for run in runs):
        mine = chosen(runs, name=name)
        mean, half = interval([100 * run["accuracy"] for run in mine])
        marker, way = MARKERS[mine[0]["learn"]], mine[0]["way"]
        # Masks of all kinds take the same work, and so do both bounded DEQs; they stand side by side.
        aside = (
            1 + 0.08 * list(MARKERS).index(mine[0]["learn"]) - 0.08 * (way == "one mask") + 0.12 * (way == "phantom")
        )
        work = aside * statistics.mean(run["block"] for run in mine)
        ax.errorbar(work, mean, half, fmt=marker, color=COLOURS[way], markersize=7, capsize=3, label=name)
    ax.set(title=f"{data}: accuracy by work", xlabel="multiply-adds of f, a sample", ylabel="test accuracy, %")
    ax.set_xscale("log")
    _few_ticks(ax.xaxis)


def _few_ticks(axis: Any) -> None:
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.EngFormatter(sep=""))
    axis.set_minor_locator(ticker.NullLocator())


def _memory(ax: Any, record: dict[str, Any]) -> None:
    found = record["memory"]
    colours = {"every step": INK, "checkpoint": RIVALS[2], "reversible": OURS}
    for name, sizes in found["bytes"].items():
        ax.plot(found["depths"], sizes, "o-", color=colours[name], markersize=4, label=name)
    for way in ("implicit", "phantom"):
        peak = statistics.mean(run["peak"] for run in _main(record, "digits", way))
        ax.axhline(peak, color=COLOURS[way], linestyle="--", linewidth=1.2, label=f"DEQ, {way}")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(found["depths"], map(str, found["depths"]))
    _few_ticks(ax.yaxis)
    ax.set(title="Peak memory of a training step", xlabel="steps K", ylabel="bytes")
    ax.legend(frameon=False, fontsize=8)


def _storage(ax: Any, record: dict[str, Any]) -> None:
    densities, cells = record["storage"]["densities"], record["storage"]["cells"]
    sizes = sorted({cell["size"] for cell in cells})
    few = sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]})
    for rows, style in ((16, "-"), (512, "--")):
        for size, shade in zip(few, SHADES, strict=False):
            (cell,) = [cell for cell in cells if (cell["size"], cell["rows"]) == (size, rows)]
            ax.plot(
                densities, cell["ratios"], style, marker="o", markersize=3.5, color=shade, label=f"{size}, {rows} rows"
            )
    ax.axhline(1, color=INK, linewidth=1)
    ax.set(title="Sparse over dense time", xlabel="density", xscale="log", yscale="log")
    ax.set_xticks(densities, [f"{d:g}" for d in densities])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter("{x:g}")
    ax.legend(frameon=False, fontsize=7.5, ncols=2)


def _main(record: dict[str, Any], data: str, way: str) -> list[dict[str, Any]]:
    return chosen(record["runs"], data=data, axis="main", way=way, solver="deqfast")
