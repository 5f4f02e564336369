"""The picture of dynamics.py: states under attack, entropy by round, what an attacker who knows leaves, and time."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from frame import INK, OURS, RIVALS, TIMES

COLOURS = {False: RIVALS[0], True: OURS}
NAMES = {False: "last state", True: "random states"}
GREY = "#555555"


def draw(path: Path, rows: list[dict[str, Any]], timed: list[dict[str, Any]]) -> None:
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(14, 8.6))
    grid = figure.add_gridspec(2, 2, left=0.05, right=0.65, top=0.835, bottom=0.07, hspace=0.48, wspace=0.2)
    axes = [figure.add_subplot(grid[k // 2, k % 2]) for k in range(4)]
    draw_states(axes[0], rows)
    draw_entropy(axes[1], rows)
    draw_attackers(axes[2], rows)
    draw_times(axes[3], timed)
    draw_digits(figure, rows)
    title = "Regulating the dynamics of an equilibrium classifier: random states, and pixels of less entropy"
    figure.text(0.05, 0.955, title, fontsize=16.5, fontweight="bold", va="center")
    seeds = len({row["seed"] for row in rows})
    detail = (
        f"handwritten digits, TRADES training; attacks in the maximum norm; {seeds} seed{'s' if seeds != 1 else ''}"
    )
    figure.text(0.05, 0.918, detail, fontsize=10.5, color=GREY, va="center")
    figure.savefig(path, dpi=140)


def headed(axes: Any, title: str, under: str) -> None:
    axes.set_title(title)
    axes.text(0, 1.03, under, transform=axes.transAxes, fontsize=8.8, color=GREY)


def draw_states(axes: Any, rows: list[dict[str, Any]]) -> None:
    for random in (False, True):
        group = [row["states"] for row in rows if row["random"] == random]
        x = [state["state"] for state in group[0]]
        for key, style in (("clean", "--"), ("pgd", "-")):
            curves = list(zip(*([100 * state[key] for state in states] for states in group), strict=True))
            axes.fill_between(
                x, list(map(min, curves)), list(map(max, curves)), color=COLOURS[random], alpha=0.12, lw=0
            )
            label = f"trained at {'the ' if not random else ''}{NAMES[random]}" if key == "pgd" else None
            axes.plot(x, list(map(statistics.mean, curves)), style, color=COLOURS[random], lw=2, label=label)
    axes.set(xlabel="state read: evaluations made", ylim=(0, 103), xlim=(min(x), max(x)), xticks=x)
    axes.legend(frameon=False, loc="lower right")
    headed(axes, "States under attack", "read rightly, %: solid under PGD-20 on this state, dashed clean")


def draw_entropy(axes: Any, rows: list[dict[str, Any]]) -> None:
    for random in (False, True):
        for name, style in (("clean", "--"), ("pgd", "-")):
            curves = [row["entropy"][name] for row in rows if row["random"] == random]
            x = range(1, len(curves[0]) + 1)
            means = [statistics.mean(values) for values in zip(*curves, strict=True)]
            label = f"{NAMES[random]}, {'attacked' if name == 'pgd' else 'clean'}"
            axes.plot(x, means, style, color=COLOURS[random], lw=2, label=label)
            axes.plot(x, means, "o", color=COLOURS[random], ms=5)
    axes.set(xlabel="round: two evaluations, then ten steps of the pixels", xticks=list(x))
    axes.margins(y=0.3)
    axes.legend(frameon=False, ncols=2, fontsize=8.5, loc="upper right", handlelength=2.6, columnspacing=1.2)
    headed(axes, "Entropy reduction", "of the prediction at the end of a round, nats; means")


def draw_attackers(axes: Any, rows: list[dict[str, Any]]) -> None:
    """What is left under attack: alone, reduced against attacks that do not know it, and that do."""
    kinds = (("alone", "worst"), ("reduced", "worst"), ("reduced", "adaptive"))
    for random, shift in ((False, -0.16), (True, 0.16)):
        group = [row for row in rows if row["random"] == random]
        lines = [[100 * row[a][b] for a, b in kinds] for row in group]
        for line in lines:
            axes.plot([k + shift for k in range(3)], line, "o-", color=COLOURS[random], lw=0.9, ms=5.5, alpha=0.5)
        for k, values in enumerate(zip(*lines, strict=True)):
            mean = statistics.mean(values)
            axes.plot([k + shift - 0.11, k + shift + 0.11], [mean, mean], color=INK, lw=2.2, zorder=3)
            side = -1 if shift < 0 else 1
            axes.text(
                k + shift + 0.14 * side, mean, f"{mean:.1f}", color=COLOURS[random], fontweight="bold", zorder=4,
                ha="right" if side < 0 else "left", va="center", bbox={"fc": "white", "ec": "none", "pad": 1},
            )  # fmt: skip
    names = ["no reduction,\nworst of three", "reduction, attacks\ndo not know it", "reduction,\nadaptive attacks"]
    axes.set_xticks(range(3), names)
    axes.set_xlim(-0.65, 2.65)
    axes.margins(y=0.1)
    axes.grid(axis="x", visible=False)
    headed(axes, "What attackers leave", "read rightly at the last state, %: lines are seeds, bars means")


def draw_times(axes: Any, timed: list[dict[str, Any]]) -> None:
    longest = max(1000 * row["seconds"] for row in timed)
    for k, row in enumerate(timed):
        value = 1000 * row["seconds"]
        axes.barh(k, value, height=0.46, color=OURS if row["name"].startswith("deqfast") else RIVALS[1], lw=0)
        text = f"{value:.0f} ms" + ("" if k == 0 else f"  {row['ratio']:.2f}{TIMES}")
        axes.text(value + 0.015 * longest, k, text, va="center", fontweight="bold")
        axes.text(0, k - 0.38, row["name"], va="center", fontsize=8.8, color=GREY)
    axes.set(xlabel="milliseconds", xlim=(0, 1.38 * longest), ylim=(len(timed) - 0.55, -0.7), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    headed(axes, "A training step", f"the attack included; {TIMES}: over {timed[0]['name']}, median of turns")


def draw_digits(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Of the first model that was trained at random states: digits that PGD turns."""
    shown = next(row for row in rows if row["random"])["shown"]
    if not shown:
        return
    grid = figure.add_gridspec(len(shown), 3, left=0.71, right=0.975, top=0.8, bottom=0.045, hspace=0.28, wspace=0.05)
    for row, digit in enumerate(shown):
        for column, (said, image) in enumerate(zip(digit["said"], digit["images"], strict=True)):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow([image[8 * k : 8 * k + 8] for k in range(8)], cmap="gray_r", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
            for spine in axes.spines.values():
                spine.set_visible(True)
            right = said == digit["label"]
            axes.text(
                1.08, 0.5, str(said), transform=axes.transAxes, fontsize=15, fontweight="bold", va="center",
                color=INK if right else RIVALS[0],
            )  # fmt: skip
            if row == 0:
                name = ("scanned", "attacked", "entropy reduced")[column]
                axes.text(0.5, 1.12, name, transform=axes.transAxes, ha="center", fontsize=9.2, color=GREY)
    figure.text(0.715, 0.872, "Digits that the attack turns", fontsize=11, fontweight="bold", va="center")
    under = "what is read beside each, mistakes in orange"
    figure.text(0.715, 0.848, under, fontsize=8.8, color=GREY, va="center")
