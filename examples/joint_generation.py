"""Train a generative equilibrium model on digits while optimising its latent codes: joint solve against nested loops.

For every batch the codes are optimised from zero, then the weights take one step of Adam on the same cost (the
envelope gradient). The joint run does the first in one solve; the nested runs do it with Adam, a forward solve and an
adjoint solve a step, warm-started, at the looser tolerance that suits them. The runs take turns, a pass over the data
each.

    python examples/joint_generation.py             # a table, out/joint_generation.png and .json
    python examples/joint_generation.py --quick     # seconds, to see it run
"""

from __future__ import annotations

import math
from pathlib import Path

import frame
import joint_common as common
import torch
from joint_model import Run, infer, long_inference, make_run, train_round

CODES, HIDDEN, BATCH = 16, 128, 128
# What solves, and the share of --adam-steps that it makes: half of them are faster, and not as good.
KINDS = {
    "joint": ("joint", 1.0),
    "nested, torchdeq Anderson": ("torchdeq", 1.0),
    "nested, torchdeq plain": ("torchdeq plain", 1.0),
    "nested, torchdeq plain, half the steps": ("torchdeq plain", 0.5),
    "nested, deqfast": ("deqfast", 1.0),
}


def adam_schedule(steps: int):
    """The best of constant and cosine steps from 0.05 to 0.4, by the cost after 20 to 40 steps."""
    return lambda k: 0.2 * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * k / steps)))


def fit(runs: list[Run], pixels, test, args) -> None:
    """Every run, a pass each in turn, judged after each pass by one and the same long inference."""
    generator = torch.Generator().manual_seed(args.seed)
    orders = [torch.randperm(len(pixels), generator=generator).to(args.device) for _ in range(args.epochs)]
    steps = common.turns(args.epochs, runs)
    for epoch, run in frame.progress(steps, lambda t: f"pass {t[0] + 1}, {t[1].name}", "pass"):
        train_round(run, pixels, orders[epoch], BATCH, adam_schedule(run.budget))
        run.test_objective.append(float(long_inference(run.model, test, args.judge_steps)[0].mean()))


def main() -> None:
    args = common.parse(
        __doc__,
        epochs=(8, 2, "passes over the training set, for each run"),
        evaluations=(20, 20, "of the joint solve, at most"),
        adam_steps=(40, 4, "steps of the nested loops"),
        judge_steps=(120, 10, "of the Adam that judges every model alike"),
    )
    pixels, _, test, _ = frame.digits(args.seed, args.device, 256 if args.quick else None)
    test = test[:200]
    runs = []
    for name, (kind, share) in KINDS.items():
        budget = args.evaluations if kind == "joint" else max(1, round(share * args.adam_steps))
        runs.append(make_run(name, kind, budget, args, pixels, CODES, HIDDEN))
    warm_up(runs, pixels, args)
    fit(runs, pixels, test, args)
    publish(runs, pixels, test, args)


def warm_up(runs: list[Run], pixels, args) -> None:
    """The first calls load code and fill caches; they are timed for nobody."""
    for run in runs:
        infer(run.kind, run.model, run.model.f, 3, 0.1, pixels[:BATCH])


def publish(runs: list[Run], pixels, test, args) -> None:
    joint, nested = runs[0], runs[1:]
    rows = []
    for run in runs:
        work = sum(run.work) / len(run.work)
        rows.append(
            [
                run.name,
                f"{run.test_objective[-1]:.3f}",
                f"{sum(run.evaluations) / len(run.work):.0f}",
                f"{sum(run.vjps) / len(run.work):.0f}",
                f"{work / (sum(joint.work) / len(joint.work)):.1f}{frame.TIMES}",
                f"{sum(run.wall) / len(run.wall):.2f}",
                f"{common.ratio(run.wall, joint.wall):.1f}{frame.TIMES}",
                f"{common.ratio(run.cpu, joint.cpu):.1f}{frame.TIMES}",
            ]
        )
    header = ["", "test objective", "f a pass", "VJPs a pass", "work", "s a pass", "wall", "processor"]
    whole = [run for run in nested if KINDS[run.name][1] == 1]
    fastest = min(whole[:-1], key=lambda run: common.ratio(run.cpu, joint.cpu))  # of torchdeq's
    least = min(whole, key=lambda run: sum(run.work))
    best = min(run.test_objective[-1] for run in nested)
    gap = joint.test_objective[-1] / best - 1
    wall, work = common.ratio(fastest.wall, joint.wall), sum(least.work) / sum(joint.work)
    targets = [
        common.target(
            "test objective against the best nested run", "at most 5 % worse", f"{100 * gap:+.1f} %", gap <= 0.05
        ),
        common.target(f"wall time of {fastest.name} over the joint solve's", "6x", f"{wall:.1f}x", wall >= 6),
        common.target(f"evaluations and VJPs of {least.name} over the joint solve's", "3x", f"{work:.1f}x", work >= 3),
    ]
    notes = [
        f"test objective: mean cost of {len(test)} unseen digits, codes by {args.judge_steps} steps of Adam for all",
        f"nested: {args.adam_steps} steps of Adam at relative tolerance 1e-2, solves start at the last one's answer",
        "work, wall, processor: over the joint run's; ratios of seconds are medians over passes that ran side by side",
    ]
    raw = [
        {
            key: getattr(run, key)
            for key in ("name", "wall", "cpu", "evaluations", "vjps", "objective", "test_objective")
        }
        for run in runs
    ]
    title = "Training a generative equilibrium model on digits, its latent codes optimised with it"
    common.report(
        args,
        "joint_generation",
        title,
        header,
        rows,
        targets,
        notes,
        raw,
        lambda path: draw(path, runs, pixels, test, args, wall),
    )


def draw(path: Path, runs: list[Run], pixels, test, args, wall: float) -> None:
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(13, 8.2), facecolor="white")
    top = figure.add_gridspec(1, 2, left=0.06, right=0.98, top=0.86, bottom=0.53, wspace=0.18)
    colours = common.palette()
    for cell, label, quantity in (
        (top[0], "seconds of training", lambda run: run.cpu if args.device == "cpu" else run.wall),
        (top[1], "evaluations of f and VJPs", lambda run: run.work),
    ):
        axis = figure.add_subplot(cell)
        for run in runs:
            spent = torch.tensor(quantity(run), dtype=torch.float64).cumsum(0)
            colour = colours[run.kind]
            style = "o-" if KINDS[run.name][1] == 1 else "o:"
            axis.plot(spent.tolist(), run.test_objective, style, color=colour, label=run.name, lw=2, ms=4)
        axis.set(xscale="log", xlabel=label, ylabel="test objective")
        axis.legend(frameon=False, fontsize=8.5, loc="lower left")
    low = figure.add_gridspec(4, 14, left=0.13, right=0.98, top=0.44, bottom=0.02, wspace=0.08, hspace=0.12)
    model, count = runs[0].model, 14
    pictures = [("unseen", test[:count]), ("joint", long_inference(model, test[:count], args.judge_steps)[1])]
    pictures.append(("nested, deqfast", long_inference(runs[-1].model, test[:count], args.judge_steps)[1]))
    pictures.append(("joint, invented", invent(runs[0], pixels, count, args)))
    for i, (label, row) in enumerate(pictures):
        for j in range(count):
            axis = figure.add_subplot(low[i, j])
            common.show_image(axis, row[j].view(8, 8))
            if j == 0:
                axis.text(-0.15, 0.5, label, transform=axis.transAxes, ha="right", va="center", fontsize=10)
    faster = f"{wall:.1f}{frame.TIMES} faster than {args.adam_steps} steps of Adam on torchdeq"
    title = f"One joint solve a batch in place of two loops: {faster}"
    figure.text(0.06, 0.93, title, fontsize=15, fontweight="bold")
    figure.savefig(path, dpi=130)


@torch.no_grad()
def invent(run: Run, pixels, count: int, args):
    """New digits: codes drawn between those of real digits of the same neighbourhood."""
    import deqfast as dq

    codes = infer("joint", run.model, run.model.f, 80, run.step_size, pixels[:500]).x
    generator = torch.Generator().manual_seed(args.seed)
    first = torch.randperm(len(codes), generator=generator)[:count].to(codes.device)
    near = torch.cdist(codes[first], codes).topk(4, largest=False).indices[:, 1:]
    mixed = 0.5 * codes[first] + 0.5 * codes[near].mean(1)
    z = dq.fixed_point(run.model.f, codes.new_zeros(count, HIDDEN), (mixed,), backward="none").z
    return run.model.decode(z)


if __name__ == "__main__":
    main()
