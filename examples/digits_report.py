"""The table, the sentences under it and the JSON of digits.py."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, median

import torch
from frame import provenance

NAMES = 36
HEADER = (
    f"{'':{NAMES}} {'test':>6}  {'a batch':^13}  {'seconds an epoch':^20}  {'':>6}  {'residual, median (worst)':^38}\n"
    f"{'':{NAMES}} {'right':>6}  {'f':>6} {'VJPs':>6}  {'median (quartiles)':^20}  {'ratio':>6}"
    f"  {'state':^17}    {'gradient':^17}"
)


def fastest_torchdeq(runs: list):
    """The torchdeq run with the shortest median epoch, or None."""
    rivals = [run for run in runs if run.library == "torchdeq"]
    return min(rivals, key=lambda run: median(run.epoch_s), default=None)


def ratio(slow, fast) -> float:
    """How many times longer an epoch of `slow` takes; the median over the epochs, each compared with its own turn."""
    return median(s / f for s, f in zip(slow.epoch_s, fast.epoch_s, strict=True))


def print_report(runs: list) -> None:
    print(f"\n{HEADER}")
    for run in runs:
        print(table_row(run, runs[0]))
    print()
    for sentence in remarks(runs):
        print(sentence)


def table_row(run, ours) -> str:
    low, high = quartiles(run.epoch_s)
    return (
        f"{run.name:{NAMES}} {100 * run.accuracy[-1]:5.1f}%  {mean(run.calls):6.1f} {mean(run.vjps):6.1f}  "
        f"{median(run.epoch_s):6.3f} ({low:.3f}-{high:.3f})  {ratio(run, ours):5.2f}x  "
        f"{spread(run.forward_residual)}    {spread(run.backward_residual)}"
    )


def quartiles(values: list[float]) -> tuple[float, float]:
    low, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.75], dtype=torch.float64))
    return low.item(), high.item()


def spread(residual: torch.Tensor) -> str:
    return f"{residual.median():.1e} ({residual.max():.1e})"


def remarks(runs: list) -> list[str]:
    """What a reader must know before believing the ratio."""
    ours, rival = runs[0], fastest_torchdeq(runs)
    sentences = [
        "f, VJPs   calls of the cell and vector-Jacobian products a batch, the ones that attach the gradient included",
        "ratio     seconds an epoch over deqfast's, the median over epochs: above 1, deqfast is faster",
        "residual  relative, on the test set, of exactly the state returned and the gradient delivered, in float64",
        "",
    ]
    sentences += [miss for run in runs if (miss := tolerance_missed(run))]
    if rival is not None:
        sentences.append(
            f"Against the fastest torchdeq ({rival.name}): {ratio(rival, ours):.1f}x. "
            f"{evaluations_sentence(ours, rival)} {accuracy_sentence(ours, rival)}"
        )
        sentences.append(residual_sentence(runs[1], rival))
    low, high = quartiles(ours.epoch_s)
    if high > 1.5 * low:
        sentences.append(
            "The same epoch took very different times: other work is on this machine, and seconds mean little."
        )
    return sentences


def tolerance_missed(run) -> str | None:
    """A sentence when a returned state or gradient is clearly worse than what was asked for."""
    worst = max(run.forward_residual.max().item(), run.backward_residual.max().item())
    if worst <= 2 * run.rtol:
        return None
    return f"{run.name} misses the tolerance: worst residual {worst:.0e} where {run.rtol:.0e} was asked for."


def residual_sentence(tight, rival) -> str:
    """Whether deqfast wins on residual as well, and at what speed."""
    pairs = [
        (tight.forward_residual, rival.forward_residual, "state"),
        (tight.backward_residual, rival.backward_residual, "gradient"),
    ]
    worst = ", ".join(f"{a.max():.0e} against {b.max():.0e} ({name})" for a, b, name in pairs)
    return (
        "deqfast stops every sample at the tolerance; torchdeq goes on with all until the slowest is done, so its "
        f"medians are lower. {tight.name}: {ratio(rival, tight):.1f}x, worst residual {worst}."
    )


def accuracy_sentence(ours, rival) -> str:
    gap = 100 * (ours.accuracy[-1] - rival.accuracy[-1])
    if abs(gap) <= 1:
        return f"Test accuracy is equal within one point ({gap:+.1f})."
    return f"Test accuracy is NOT equal within one point ({gap:+.1f}), so the ratio does not compare like with like."


def evaluations_sentence(ours, rival) -> str:
    """Splits the ratio into fewer evaluations and cheaper ones, or says that the counts agree."""
    mine, theirs = (mean(run.calls) + mean(run.vjps) for run in (ours, rival))
    if abs(mine / theirs - 1) < 0.02:
        return f"Both use {mine:.0f} evaluations and products a batch: all of it is the cost of each."
    per_step = ratio(rival, ours) * mine / theirs
    return (
        f"Evaluations differ, {mine:.1f} against {theirs:.1f} a batch: {theirs / mine:.2f}x of it is their number, "
        f"{per_step:.2f}x the cost of each."
    )


def save_json(runs: list, args: argparse.Namespace, path: Path) -> None:
    """Every number of the run, with what produced it."""
    packages = ("deqfast", "torch", "torchdeq", "scikit-learn", "numpy")
    document = {
        **provenance(args, packages),
        "runs": [as_record(run, runs[0]) for run in runs],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def as_record(run, ours) -> dict:
    lists = ("forward_s", "backward_s", "rest_s", "calls", "vjps", "accuracy")
    return {
        "name": run.name,
        "rtol": run.rtol,
        "ratio_to_deqfast": ratio(run, ours),
        "forward_residual": summary(run.forward_residual),
        "backward_residual": summary(run.backward_residual),
        **{name: getattr(run, name) for name in lists},
    }


def summary(residual: torch.Tensor) -> dict[str, float]:
    return {"median": residual.median().item(), "worst": residual.max().item()}
