"""The picture of run.py: what was learnt and sent, who took part, and what solving costs."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from frame import INK, OURS, RIVALS, TIMES

COLOURS = {"equilibrium": OURS, "explicit": RIVALS[0], "shallow": RIVALS[2]}
NAMES = {"equilibrium": "equilibrium", "explicit": "explicit, 8 layers", "shallow": "no layers"}
GREY = "#6E6E6E"


def draw(
    path: Path, rows: list[dict[str, Any]], timed: list[dict[str, Any]], shares: list[list[int]], budgets: list[int]
) -> None:
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(14, 9.2))
    grid = figure.add_gridspec(
        2, 3, left=0.055, right=0.985, top=0.845, bottom=0.07, hspace=0.45, wspace=0.24, width_ratios=(1.15, 1, 1)
    )
    axes = [figure.add_subplot(grid[k // 3, k % 3]) for k in range(6)]
    by_data = [row for row in rows if row["weighting"] == "data"]
    draw_rounds(axes[0], by_data)
    draw_bytes(axes[1], by_data)
    draw_times(axes[2], timed)
    draw_clients(axes[3], shares, budgets)
    draw_weights(axes[4], rows, budgets)
    draw_spread(axes[5], rows)
    explicit = next(row for row in rows if row["model"] == "explicit")
    saved = explicit["bytes"] / rows[0]["bytes"]
    title = f"Federated learning of an equilibrium network: {saved:.1f}{TIMES} fewer bytes than eight explicit layers"
    figure.text(0.055, 0.955, title, fontsize=17, fontweight="bold", va="center")
    seeds, rounds = len(rows[0]["final"]), len(rows[0]["curves"][0])
    detail = f"{len(budgets)} clients, digits shared out by Dirichlet(0.5), iteration budgets {min(budgets)} to "
    detail += f"{max(budgets)}; {rounds} rounds in Flower's simulation; {seeds} seed{'s' if seeds != 1 else ''}"
    figure.text(0.055, 0.92, detail, fontsize=10.5, color="#555555", va="center")
    figure.savefig(path, dpi=150)


def headed(axes: Any, title: str, under: str) -> None:
    axes.set_title(title)
    axes.text(0, 1.025, under, transform=axes.transAxes, fontsize=8.8, color="#555555")


def draw_rounds(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Accuracy over rounds: the mean, and from the worst to the best seed."""
    for row in sorted(rows, key=lambda row: row["model"] == "equilibrium"):
        curves = [[100 * value for value in curve] for curve in row["curves"]]
        columns = list(zip(*curves, strict=True))
        x = range(1, len(columns) + 1)
        colour = COLOURS[row["model"]]
        axes.fill_between(x, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.13, linewidth=0)
        width = 2.6 if row["model"] == "equilibrium" else 1.6
        axes.plot(x, list(map(statistics.mean, columns)), color=colour, linewidth=width, label=NAMES[row["model"]])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="round", xlim=(1, max(2, len(columns))), ylim=(60, 100))
    axes.legend(frameon=False, loc="lower right")
    headed(axes, "Accuracy over rounds", "unseen digits read correctly, %: mean and range of the seeds")


def bars(axes: Any, values: list[float], colours: list[str], names: list[str], texts: list[str]) -> None:
    """Horizontal bars with a name over each and a text behind it."""
    longest = max(values)
    for k, (value, colour) in enumerate(zip(values, colours, strict=True)):
        axes.barh(k, value, height=0.5, color=colour, linewidth=0)
        axes.text(value + 0.015 * longest, k, texts[k], va="center", fontweight="bold", fontsize=10)
        axes.text(0, k - 0.37, names[k], va="center", fontsize=8.8, color="#555555")
    axes.set_yticks([])
    axes.set_ylim(len(values) - 0.55, -0.7)
    axes.set_xlim(0, 1.42 * longest)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)


def draw_bytes(axes: Any, rows: list[dict[str, Any]]) -> None:
    sent = [row["bytes"] / 1e6 for row in rows]
    names = [f"{NAMES[row['model']]}  ·  {row['parameters']:,} parameters" for row in rows]
    texts = [f"{v:.2f} MB" if k == 0 else f"{v:.2f} MB  {v / sent[0]:.1f}{TIMES}" for k, v in enumerate(sent)]
    bars(axes, sent, [COLOURS[row["model"]] for row in rows], names, texts)
    axes.set_xlabel("MB")
    headed(axes, "Sent in a round", "to all clients and back, as Flower counts it")


def draw_times(axes: Any, timed: list[dict[str, Any]]) -> None:
    """deqfast and the fastest torchdeq, at each budget."""
    values, colours, names, texts = [], [], [], []
    for budget in sorted({row["budget"] for row in timed}):
        here = [row for row in timed if row["budget"] == budget]
        rivals = [row for row in here if row["name"].startswith("torchdeq")]
        fastest = min(rivals, key=lambda row: row["ratio"], default=None)
        for row in filter(None, (here[0], fastest)):
            values.append(1000 * row["seconds"])
            colours.append(OURS if row is here[0] else RIVALS[1])
            names.append(f"{row['name']}, budget {budget}")
            texts.append(f"{values[-1]:.0f} ms" + ("" if row is here[0] else f"  {row['ratio']:.1f}{TIMES}"))
    bars(axes, values, colours, names, texts)
    axes.set_xlabel("milliseconds")
    headed(axes, "A client's epoch", f"with deqfast and the fastest torchdeq; {TIMES}: median of turns")


def draw_clients(axes: Any, shares: list[list[int]], budgets: list[int]) -> None:
    """Digits of each client by label, stacked; its budget in a second line."""
    from matplotlib import colormaps

    colours = [colormaps["viridis"](0.04 + 0.92 * label / 9) for label in range(10)]
    names = [f"{k}\n{budget}" for k, budget in enumerate(budgets)]
    for k, counts in enumerate(shares):
        start = 0
        for label, count in enumerate(counts):
            axes.bar(k, count, bottom=start, width=0.78, color=colours[label], edgecolor="white", linewidth=0.6)
            if count >= 14:
                ink = "white" if label < 6 else INK
                axes.text(k, start + count / 2, str(label), ha="center", va="center", fontsize=7.6, color=ink)
            start += count
    axes.set_xticks(range(len(shares)), names)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("client, and under it the iterations that its device affords")
    headed(axes, "Who has what", "digits to train on, by label; the split of seed 0")


def draw_weights(axes: Any, rows: list[dict[str, Any]], budgets: list[int]) -> None:
    """The weight of every client under each weighting, in the last round of the first seed."""
    weighted = [row for row in rows if row["model"] == "equilibrium"]
    table = [[100 * row["weights"][0].get(str(k), 0.0) for k in range(len(budgets))] for row in weighted]
    top = max(map(max, table))
    axes.imshow(table, cmap="Blues", aspect="auto", vmin=0, vmax=1.15 * top)
    for i, line in enumerate(table):
        for k, value in enumerate(line):
            ink = "white" if value > 0.6 * top else INK
            axes.text(k, i, f"{value:.0f}", ha="center", va="center", fontsize=9, color=ink)
    axes.set_yticks(range(len(weighted)), [row["weighting"] for row in weighted])
    axes.set_xticks(range(len(budgets)), [f"{k}\n{budget}" for k, budget in enumerate(budgets)])
    axes.set_xlabel("client, and its iteration budget")
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    headed(axes, "How much each client counts", "weight in the last round of seed 0, %, under each weighting")


def draw_spread(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Accuracy of every seed after the last round; a line joins a seed."""
    weighted = [row for row in rows if row["model"] == "equilibrium"]
    for seed in range(len(weighted[0]["final"])):
        axes.plot([row["final"][seed] for row in weighted], color="#C8C8C8", linewidth=1, zorder=1)
    for k, row in enumerate(weighted):
        axes.plot([k] * len(row["final"]), row["final"], "o", color=OURS, markersize=6, alpha=0.75, zorder=2)
        axes.plot([k - 0.22, k + 0.22], [statistics.mean(row["final"])] * 2, color=INK, linewidth=2.2, zorder=3)
    axes.set_xticks(range(len(weighted)), [row["weighting"] for row in weighted])
    axes.set_xlim(-0.5, len(weighted) - 0.5)
    axes.grid(axis="x", visible=False)
    means = [statistics.mean(row["final"]) for row in weighted]
    noise = max(max(row["final"]) - min(row["final"]) for row in weighted)
    headed(
        axes,
        "Which weighting? " + ("Seeds differ more" if noise > max(means) - min(means) else "By seed"),
        f"final accuracy of each seed, %; means lie within {max(means) - min(means):.1f} points",
    )
