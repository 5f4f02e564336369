"""Pictures of the benchmark results (matplotlib, no display)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import summary

COLOURS = ("#0b6e4f", "#74b49b", "#c1121f", "#f4a261", "#457b9d", "#9a9a9a", "#6d597a", "#b5838d")
GREENS = ("#08402e", "#0b6e4f", "#3fa37c", "#a9d6c0", "#d8ede4")  # deqfast's own rows


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 10}
    )
    return plt


def performance_profiles(record: Mapping[str, Any], methods: Sequence[str], path: Path) -> None:
    """One panel a tolerance; higher and further left is better, the right end shows who solves at all."""
    plt = _pyplot()
    tolerances = record["tolerances"]
    factors = np.geomspace(1, 10, 200)
    figure, axes = plt.subplots(1, len(tolerances), figsize=(4.2 * len(tolerances), 4.1), sharey=True, squeeze=False)
    for axis, tolerance in zip(axes[0], tolerances, strict=True):
        profiles = summary.performance_profile(record, methods, tolerance, factors)
        for colour, method in zip(COLOURS, methods, strict=False):
            axis.plot(
                factors, 100 * profiles[method], color=colour, lw=2.2 if method == methods[0] else 1.5, label=method
            )
        axis.set(xscale="log", xlim=(1, 10), ylim=(0, 101), title=f"tolerance {tolerance:g}")
        axis.set_xticks([1, 2, 3, 5, 10], ["1", "2", "3", "5", "10"])
        axis.set_xlabel("evaluations / best method's evaluations")
    axes[0][0].set_ylabel("samples solved, %")
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    _save(figure, path)


def speed_bars(rows: Mapping[str, Mapping[str, float]], path: Path, title: str) -> None:
    """Ratios to torchdeq by size (log axis); rows[method][size] = torchdeq's time / this method's time."""
    plt = _pyplot()
    methods = list(rows)
    sizes = list(dict.fromkeys(size for row in rows.values() for size in row))
    figure, axis = plt.subplots(figsize=(10, 4.4))
    width = 0.8 / max(len(methods), 1)
    own = iter(GREENS)
    others = iter(COLOURS[2:])
    for index, method in enumerate(methods):
        colour = next(own) if method.startswith("deqfast") else next(others)
        at = [i + (index - (len(methods) - 1) / 2) * width for i, size in enumerate(sizes) if size in rows[method]]
        axis.bar(at, [rows[method][size] for size in sizes if size in rows[method]], width, color=colour, label=method)
    axis.axhline(1, color="black", lw=0.8)
    axis.set_yscale("log")
    axis.set_xticks(range(len(sizes)), sizes)
    axis.set(xlabel="B x N", ylabel="times faster than torchdeq", title=title)
    axis.grid(axis="x", visible=False)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=4, frameon=False)
    figure.tight_layout()
    _save(figure, path)


def training_bars(rows: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Milliseconds a training step, a panel a net, fastest at the top; deqfast's rows are green."""
    plt = _pyplot()
    nets = list(dict.fromkeys(net for row in rows.values() for net in row))
    figure, axes = plt.subplots(1, len(nets), figsize=(4.6 * len(nets), 4.6), squeeze=False)
    for axis, net in zip(axes[0], nets, strict=True):
        found = sorted((row[net], name) for name, row in rows.items() if net in row)[::-1]
        colours = [_family(name) for _, name in found]
        names = [name.split(" of f and")[0] for _, name in found]
        bars = axis.barh(names, [ms for ms, _ in found], color=colours)
        axis.bar_label(bars, fmt="%.2g", fontsize=7, padding=2)
        axis.set(xscale="log", title=net, xlabel="ms a step")
        axis.tick_params(axis="y", labelsize=7)
        axis.grid(axis="y", visible=False)
    figure.tight_layout()
    _save(figure, path)


def memory_lines(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Peak memory of a training step: bytes over the state's size, and sizes of the state over m."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4))
    most = max(row["numbers"] for row in rows)
    greens, others = iter(GREENS), iter(COLOURS[2:])
    for name in dict.fromkeys(row["row"] for row in rows):
        own = [row for row in rows if row["row"] == name]
        colour = next(greens) if name.startswith("deqfast") else next(others)
        over_n = sorted((4e-6 * row["numbers"], 1e-6 * row["bytes"]) for row in own if row["m"] == 6)
        left.plot(*zip(*over_n, strict=True), "o-", color=colour, label=name)
        over_m = sorted((row["m"], row["states"]) for row in own if row["numbers"] == most)
        right.plot(*zip(*over_m, strict=True), "o-", color=colour)
    left.set(xlim=(0, None), ylim=(0, None), xlabel="MB of the state, m = 6", ylabel="MB at a training step's peak")
    right.set(xlabel="m", ylabel="sizes of the state", ylim=(0, None))
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    _save(figure, path)


def scaling(
    points: Sequence[Mapping[str, Any]], clusters: Mapping[str, Sequence[tuple[int, float, float]]], path: Path
) -> None:
    """Measured against predicted on this machine; predictions alone, dashed, for GPUs that nobody measured."""
    figure, (left, right) = _pyplot().subplots(1, 2, figsize=(10, 4.2))
    for i, name in enumerate(dict.fromkeys(row["row"] for row in points)):
        own, colour = [row for row in points if row["row"] == name], COLOURS[i]
        for key, style in (("us", "o-"), ("predicted", "s--")):
            told = "measured" if key == "us" else key
            xy = [(row["processes"], 1e-3 * row[key]) for row in own]
            left.plot(*zip(*xy, strict=True), style, color=colour, label=f"{name}, {told}")
    for i, (name, found) in enumerate(clusters.items()):
        right.plot(*zip(*((g, 1e6 * whole) for g, whole, _ in found), strict=True), "--", color=COLOURS[i], label=name)
    left.set(xscale="log", yscale="log", xlabel="gloo processes on one machine", ylabel="ms an evaluation")
    right.set(xscale="log", yscale="log", xlabel="H100, assumed, not measured", ylabel="us an evaluation")
    for axes in (left, right):
        axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    _save(figure, path)


def _family(row: str) -> str:
    for prefix, colour in (("deqfast", COLOURS[0]), ("torchdeq", COLOURS[2]), ("bare", COLOURS[5])):
        if row.startswith(prefix):
            return colour
    return COLOURS[4]


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": ""})
    _pyplot().close(figure)
