"""The picture of digits.py: convergence, time, and what the model says about digits it has not seen."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, median

import torch
from digits_measure import backward_curve, forward_curve, solve_recorded
from digits_report import fastest_torchdeq, ratio
from frame import INK, OURS, RIVALS, TIMES, paint
from torch import Tensor

FAINT = "#8A8A8A"


def draw(runs: list, data, args: argparse.Namespace, path: Path) -> bool:
    """Write the picture to `path`; without matplotlib, say so and return False."""
    return paint(lambda path: draw_panels(runs, data, args, path), path, title_pad=22)


def draw_panels(runs: list, data, args: argparse.Namespace, path: Path) -> None:
    from matplotlib import pyplot

    shown = [runs[0], *(run for run in runs if run.library == "torchdeq")]
    colours = dict(zip((run.name for run in shown), [OURS, *RIVALS], strict=False))
    figure = pyplot.figure(figsize=(15, 10.2), facecolor="white")
    top = figure.add_gridspec(1, 3, left=0.055, right=0.985, top=0.80, bottom=0.525, wspace=0.24)
    low = figure.add_gridspec(
        1, 2, left=0.055, right=0.985, top=0.405, bottom=0.06, wspace=0.12, width_ratios=[1, 1.12]
    )
    forward, backward, accuracy = (figure.add_subplot(top[i]) for i in range(3))
    draw_convergence(forward, backward, shown, runs[0].model, data, args, colours)
    draw_accuracy(accuracy, shown, colours)
    bars = figure.add_subplot(low[0])
    draw_seconds(bars, shown, colours)
    draw_digits(figure, low[1], runs[0], data)
    draw_title(figure, runs, args)
    draw_legend(figure, shown, colours)
    figure.savefig(path, dpi=150)


def draw_title(figure, runs: list, args: argparse.Namespace) -> None:
    ours, rival = runs[0], fastest_torchdeq(runs)
    title = "Training an equilibrium model on handwritten digits"
    if rival is not None:
        title += f": {ratio(rival, ours):.1f}{TIMES} faster than torchdeq at its fastest"
    figure.text(0.055, 0.955, title, fontsize=17, fontweight="bold", va="center")
    detail = f"f(z, x) = tanh(Wz + x) with {args.hidden} numbers a sample; batches of {args.batch}; relative tolerance "
    detail += f"{power_of_ten(ours.rtol)} forward and backward; {args.epochs} epochs; {hardware(args)}; "
    detail += f"{100 * ours.accuracy[-1]:.1f} % of unseen digits right"
    figure.text(0.055, 0.919, detail, fontsize=10.5, color="#555555", va="center")


def draw_legend(figure, shown: list, colours: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colours[run.name], linewidth=3, label=run.name) for run in shown]
    figure.legend(
        handles=handles, loc="center left", bbox_to_anchor=(0.048, 0.881), ncols=len(shown), frameon=False, fontsize=10,
        handlelength=1.4, columnspacing=1.8,
    )  # fmt: skip


def draw_convergence(forward, backward, shown: list, weights, data, args: argparse.Namespace, colours: dict) -> None:
    """Residuals of one test batch against evaluations, each solver on deqfast's weights so that f is the same."""
    pixels, labels = data.test_pixels[: args.batch], data.test_labels[: args.batch]
    for order, run in enumerate(shown):
        run.model.copy_weights(weights)  # training is over and its results are taken
        solved = solve_recorded(run.model, pixels, labels)
        draw_band(forward, forward_curve(solved), colours[run.name], order)
        draw_band(backward, backward_curve(solved, run.model.cell.linear.weight), colours[run.name], order)
    for axes, title, unit in (
        (forward, "Forward: finding the state", "evaluations of f"),
        (backward, "Backward: finding the gradient", "vector-Jacobian products"),
    ):
        axes.set_yscale("log")
        axes.set_xlim(1, None)
        axes.axhline(shown[0].rtol, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axes.set_title(title)
        subtitle(axes, f"relative residual of {len(pixels)} test digits, median and 10th to 90th percentile")
        axes.set_xlabel(unit)
    forward.annotate(
        "tolerance", (1, shown[0].rtol), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
        ha="right", fontsize=8.8, color=INK,
    )  # fmt: skip


def draw_band(axes, curve: Tensor, colour: str, order: int) -> None:
    low, middle, high = curve.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=curve.dtype), dim=1).clamp_min(1e-9)
    steps = range(1, len(curve) + 1)
    ours = order == 0
    axes.fill_between(steps, low, high, color=colour, alpha=0.2 if ours else 0.1, linewidth=0, zorder=3 if ours else 2)
    axes.plot(steps, middle, color=colour, linewidth=2.4 if ours else 1.6, zorder=5 if ours else 4)
    axes.plot(steps[-1], middle[-1], "o", color=colour, markersize=6 if ours else 4.5, zorder=6)


def draw_accuracy(axes, shown: list, colours: dict[str, str]) -> None:
    for order, run in enumerate(shown):
        # The median, so that a pause of the machine in one epoch does not shift the rest of a curve.
        seconds = [median(run.epoch_s) * (epoch + 1) for epoch in range(len(run.accuracy))]
        right = [100 * value for value in run.accuracy]
        ours = order == 0
        axes.plot(seconds, right, color=colours[run.name], linewidth=2.4 if ours else 1.4, zorder=10 - order)
        axes.plot(seconds[-1], right[-1], "o", color=colours[run.name], markersize=7 if ours else 5, zorder=11 - order)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(80, 100)
    axes.set_yticks(range(80, 101, 5))
    axes.set_title("Accuracy against training time")
    subtitle(axes, "unseen digits read correctly, %, after every epoch")
    axes.set_xlabel("seconds of training, logarithmic (epochs times the median epoch)")


def draw_seconds(axes, shown: list, colours: dict[str, str]) -> None:
    """Bars of the median seconds an epoch, split into forward, backward and the rest."""
    ours, rival = shown[0], fastest_torchdeq(shown)
    longest = max(sum(parts(run)) for run in shown)
    for row, run in enumerate(shown):
        start = 0.0
        for length, alpha in zip(parts(run), (1.0, 0.62, 0.28), strict=True):
            axes.barh(row, length, left=start, height=0.62, color=colours[run.name], alpha=alpha, linewidth=0)
            start += length
        factor = f"{1000 * start:.0f} ms"
        if run is not ours:
            factor += f"   {ratio(run, ours):.1f}{TIMES}" + ("  fastest torchdeq" if run is rival else "")
        axes.text(start + 0.012 * longest, row, factor, va="center", fontweight="bold", fontsize=10.5)
        axes.text(
            0, row - 0.43, f"{run.name}  ·  {mean(run.calls):.0f} evaluations, {mean(run.vjps):.0f} products a batch",
            va="center", fontsize=8.8, color="#555555",
        )  # fmt: skip
    axes.set_ylim(len(shown) - 0.5, -0.75)
    axes.set_xlim(0, 1.25 * longest)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    axes.set_title("Seconds an epoch")
    subtitle(
        axes, f"median over the epochs: dark forward, middle backward, light optimiser and data; {TIMES} deqfast's"
    )
    axes.set_xlabel("seconds")


def parts(run) -> list[float]:
    """Forward, backward and rest; medians, scaled to add up to the median epoch that the table shows."""
    medians = [median(run.forward_s), median(run.backward_s), median(run.rest_s)]
    return [part * median(run.epoch_s) / sum(medians) for part in medians]


def draw_digits(figure, cell, run, data) -> None:
    """A test digit of every class in three rows, from those that took the fewest steps to those that took the most."""
    steps, predictions = steps_and_predictions(run.model, data, run.rtol)
    labels = data.test_labels.cpu()
    wrong = predictions != labels
    grid = cell.subgridspec(33, 10, wspace=0.12, hspace=0)
    for digit in range(10):
        rows = torch.nonzero(labels == digit).squeeze(1)
        by_steps = rows[steps[rows].argsort(stable=True)]
        right = by_steps[~wrong[by_steps]]
        for line, index in enumerate((right[0], right[len(right) // 2], right[-1])):
            axes = figure.add_subplot(digit_place(grid, line, digit))
            draw_digit(axes, data.test_pixels[index], f"{steps[index]} steps", INK)
            if line == 0:
                axes.set_title(f"{digit}", loc="center", fontsize=11, pad=4, color=OURS)
    for column, index in enumerate(torch.nonzero(wrong).squeeze(1)[:10]):
        caption = f"{labels[index]} → {predictions[index]}"
        draw_digit(figure.add_subplot(digit_place(grid, 3, column)), data.test_pixels[index], caption, "#B23A00")
    names = ("fewest\nsteps", "median", "most\nsteps", f"misread\n{int(wrong.sum())} of\n{len(labels)}")
    box = cell.get_position(figure)
    for line, name in enumerate(names):
        row = digit_place(grid, line, 0).get_position(figure)
        figure.text(row.x0 - 0.006, (row.y0 + row.y1) / 2, name, ha="right", va="center", fontsize=8.8, color="#555555")
    figure.text(box.x0, box.y1 + 0.0305, "Each digit takes the steps it needs", fontsize=11, fontweight="bold")
    spread = f"{int(steps.min())} to {int(steps.max())}"
    figure.text(
        box.x0, box.y1 + 0.0115,
        f"unseen digits by the class read, with the evaluations of f until deqfast froze them ({spread})",
        fontsize=8.8, color="#555555",
    )  # fmt: skip


def digit_place(grid, line: int, column: int):
    """The cell of one digit, under the row that the class labels take."""
    top = 2 + 8 * line
    return grid[top : top + 6, column]


def draw_digit(axes, pixels: Tensor, caption: str, colour: str) -> None:
    axes.imshow(pixels.cpu().reshape(8, 8), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour if colour != INK else "#D8D8D8", linewidth=1.0)
    axes.set_xlabel(caption, fontsize=8.5, color=colour, labelpad=2.5)


@torch.no_grad()
def steps_and_predictions(model, data, rtol: float) -> tuple[Tensor, Tensor]:
    """Evaluations each test digit took, and the class it was read as."""
    import deqfast as dq

    x = model.inject(data.test_pixels)
    solution = dq.fixed_point(model.cell, torch.zeros_like(x), args=(x,), solver=dq.Anderson(), rtol=rtol, max_iter=60)
    return solution.steps.cpu(), model.head(solution.z).argmax(1).cpu()


def subtitle(axes, text: str) -> None:
    axes.text(0, 1.035, text, transform=axes.transAxes, fontsize=8.8, color="#555555")


def hardware(args: argparse.Namespace) -> str:
    return f"{torch.get_num_threads()} CPU threads" if args.device == "cpu" else args.device


def power_of_ten(value: float) -> str:
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa + '·' if mantissa != '1' else ''}10$^{{{int(exponent)}}}$"
