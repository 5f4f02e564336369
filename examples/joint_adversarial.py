"""Adversarial training of an equilibrium classifier of digits: joint attacks against nested projected gradient descent.

Every batch is attacked within a Euclidean ball of its pixels, and the weights take a step of Adam on what the attack
found. The joint attack moves state, adjoint and pixels at once; the nested ones (PGD) solve for the first two at
every step of the third, warm-started. All models then face the same PGD-20. The runs take turns, a pass each.

    python examples/joint_adversarial.py            # a table, out/joint_adversarial.png and .json
    python examples/joint_adversarial.py --quick    # seconds, to see it run
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import frame
import joint_common as common
import torch
from joint_classifier import TRAINING_RTOL, Classifier, joint_attack, nested_attack
from joint_nested import Clock, Counted

import deqfast as dq

HIDDEN, BATCH, RADIUS = 96, 128, 0.6


def kinds(args) -> dict[str, tuple[str, int]]:
    """Ways to train: what solves, and the attack's steps. Half of the steps may do, and show what they cost."""
    n = args.pgd_steps
    return {
        "joint": ("joint", args.evaluations),
        f"PGD-{n}, torchdeq Anderson": ("torchdeq", n),
        f"PGD-{n}, torchdeq plain": ("torchdeq plain", n),
        f"PGD-{max(1, n // 2)}, torchdeq plain": ("torchdeq plain", max(1, n // 2)),
        f"PGD-{n}, deqfast": ("deqfast", n),
        "no attack": ("clean", 0),
    }


@dataclass
class Run:
    """One way to train, of one seed."""

    name: str
    kind: str
    steps: int  # of an attack in training
    seed: int
    model: Classifier
    optimiser: torch.optim.Optimizer
    wall: list[float] = field(default_factory=list)  # a pass each
    cpu: list[float] = field(default_factory=list)
    evaluations: int = 0
    vjps: int = 0
    result: dict[str, float] = field(default_factory=dict)


def train_pass(run: Run, pixels, labels, order, args) -> None:
    """One pass over the data; appends seconds and counts."""
    model, counted, clock = run.model, Counted(run.model.f), Clock(args.device)
    for rows in order.split(BATCH):
        with clock:
            x, y = pixels[rows], labels[rows]
            if run.kind == "joint":
                # Training descends on what the attack climbed: its adjoint starts the backward solve.
                envelope = dq.Envelope(rtol=TRAINING_RTOL, max_iter=60)
                found = joint_attack(model, counted, x, y, RADIUS, run.steps, backward=envelope)
                x, z = found.x, found.z
            else:
                x, z = nested_or_clean(run, counted, x, y)
            run.optimiser.zero_grad(set_to_none=True)
            (-model.cost(z, x, y).mean()).backward()
            run.optimiser.step()
            model.bound()
    run.wall.append(clock.wall)
    run.cpu.append(clock.cpu)
    run.evaluations += counted.calls
    run.vjps += counted.vjps


def nested_or_clean(run: Run, f, x, y):
    """Pixels that PGD moved, or as they are, and their state with its gradient."""
    z, start = run.model.start(x), None
    if run.kind != "clean":
        options = {"rtol": TRAINING_RTOL, "last_solve": False}
        found = nested_attack(run.model, f, x, y, RADIUS, run.steps, run.kind, **options)
        # The adjoint of the attack's cost, -CE, is that of the training loss but for the sign and the mean.
        x, z, start = found.x, found.z, -found.mu / len(x)
    backward = dq.Implicit(rtol=TRAINING_RTOL, u0=None if start is None else (lambda g, u=start: u))
    return x, dq.fixed_point(f, z, (x,), rtol=TRAINING_RTOL, backward=backward).z


def judge(run: Run, pixels, labels, args) -> None:
    """Accuracy on clean pixels, under PGD-20 and under a joint attack."""
    model = run.model
    strong = nested_attack(model, model.f, pixels, labels, RADIUS, args.judge_steps, "deqfast")
    joint = joint_attack(model, model.f, pixels, labels, RADIUS, args.attack, backward="none")
    for name, x in (("clean", pixels), ("pgd", strong.x), ("joint", joint.x)):
        run.result[name] = model.accuracy(x, labels)


def main() -> None:
    args = common.parse(
        __doc__,
        epochs=(10, 2, "passes over the training set"),
        seeds=(3, 1, "models of each kind"),
        evaluations=(11, 6, "of the joint attack in training"),
        attack=(30, 10, "evaluations of the joint attack that is compared with PGD-20"),
        pgd_steps=(10, 2, "of the nested attack in training"),
        judge_steps=(20, 4, "of the PGD that judges every model"),
    )
    runs: list[Run] = []
    data = {}
    for seed in range(args.seed, args.seed + args.seeds):
        data[seed] = frame.digits(seed, args.device, 256 if args.quick else None)
        for name, (kind, count) in kinds(args).items():
            torch.manual_seed(seed)
            model = Classifier(HIDDEN).to(args.device)
            runs.append(Run(name, kind, count, seed, model, torch.optim.Adam(model.parameters(), lr=3e-3)))
    warm_up(runs, data, args)
    steps = [
        (seed, epoch, run)
        for seed in data
        for epoch, run in common.turns(args.epochs, [run for run in runs if run.seed == seed])
    ]
    for seed, epoch, run in frame.progress(steps, lambda t: f"seed {t[0]}, {t[2].name}", "pass"):
        for group in run.optimiser.param_groups:
            group["lr"] = 3e-3 * (1 - 0.9 * epoch / args.epochs)
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(data[seed][0]), generator=generator).to(args.device)
        train_pass(run, *data[seed][:2], order, args)
        if epoch == args.epochs - 1:
            judge(run, *data[seed][2:], args)
    publish(runs, data[args.seed], args)


def warm_up(runs: list[Run], data, args) -> None:
    """The first calls load code and fill caches; they are timed for nobody."""
    pixels, labels = (t[:BATCH] for t in data[args.seed][:2])
    for run in runs[: len(kinds(args))]:
        if run.kind == "joint":
            joint_attack(run.model, run.model.f, pixels, labels, RADIUS, 3, backward="none")
        elif run.kind != "clean":
            nested_attack(run.model, run.model.f, pixels, labels, RADIUS, 2, run.kind)


def publish(runs: list[Run], data, args) -> None:
    groups = {name: [run for run in runs if run.name == name] for name in kinds(args)}
    joint = groups["joint"]

    def seconds(group: list[Run], clock: str) -> list[float]:
        return [s for run in group for s in getattr(run, clock)]

    def percent(group: list[Run], key: str) -> float:
        return 100 * mean(run.result[key] for run in group)

    def work(group: list[Run]) -> float:
        return mean((run.evaluations + run.vjps) / args.epochs for run in group)

    rows = []
    for name, group in groups.items():
        rows.append(
            [
                name,
                f"{percent(group, 'clean'):.1f} %",
                f"{percent(group, 'pgd'):.1f} %",
                f"{percent(group, 'joint'):.1f} %",
                f"{mean(run.evaluations for run in group) / args.epochs:.0f}",
                f"{mean(run.vjps for run in group) / args.epochs:.0f}",
                f"{work(group) / work(joint):.2f}{frame.TIMES}",
                f"{mean(seconds(group, 'wall')):.2f}",
                f"{common.ratio(seconds(group, 'wall'), seconds(joint, 'wall')):.2f}{frame.TIMES}",
                f"{common.ratio(seconds(group, 'cpu'), seconds(joint, 'cpu')):.2f}{frame.TIMES}",
            ]
        )
    header = [
        "trained with",
        "clean",
        f"PGD-{args.judge_steps}",
        f"joint-{args.attack}",
        "f a pass",
        "VJPs a pass",
        "work",
        "s a pass",
        "wall",
        "processor",
    ]
    whole = f"PGD-{args.pgd_steps},"
    rivals = [groups[name] for name in groups if name.startswith(whole) and "torchdeq" in name]
    wall, rival = min((common.ratio(seconds(g, "wall"), seconds(joint, "wall")), g[0].name) for g in rivals)
    loss = max(percent(g, "pgd") for name, g in groups.items() if "PGD" in name) - percent(joint, "pgd")
    targets = [
        common.target(f"wall time of {rival} over the joint solve's", "4x", f"{wall:.1f}x", wall >= 4),
        common.target(
            "robust accuracy against the best PGD training", "at most 3 points less", f"{-loss:+.1f}", loss <= 3
        ),
    ]
    for name in ("no attack", "joint", f"{whole} torchdeq Anderson"):
        gap = percent(groups[name], "joint") - percent(groups[name], "pgd")
        what = f"accuracy left by the joint attack over PGD-{args.judge_steps}'s, trained with {name}"
        targets.append(common.target(what, "at most 2 points more", f"{gap:+.1f}", gap <= 2))
    spread = ", ".join(
        f"{name} {min(r):.1f} to {max(r):.1f} %"
        for name, group in groups.items()
        for r in [[100 * run.result["pgd"] for run in group]]
    )
    few = groups[f"PGD-{max(1, args.pgd_steps // 2)}, torchdeq plain"]
    less, robust = common.ratio(seconds(few, "wall"), seconds(joint, "wall")), percent(few, "pgd")
    notes = [
        f"{few[0].name}, torchdeq's cheapest: {robust:.1f} % robust, {less:.1f}{frame.TIMES} the wall time",
        f"means of {args.seeds} seeds; Euclidean balls of radius {RADIUS}, pixels in [0, 1]",
        f"joint: {args.evaluations} evaluations an attack; solves of training: relative tolerance {TRAINING_RTOL:g}",
        f"under PGD-{args.judge_steps}, from the worst seed to the best: {spread}",
        "work, wall, processor: over the joint run's; ratios of seconds are medians over passes that ran side by side",
    ]
    keys = ("name", "seed", "wall", "cpu", "evaluations", "vjps", "result")
    raw = [{key: getattr(run, key) for key in keys} for run in runs]
    title = "Adversarial training of an equilibrium classifier of digits"
    common.report(
        args, "joint_adversarial", title, header, rows, targets, notes, raw,
        lambda path: draw(path, runs[: len(groups)], data, args, wall),
    )  # fmt: skip


def draw(path: Path, runs: list[Run], data, args, wall: float) -> None:
    from matplotlib import pyplot

    pixels, labels = data[2][:150], data[3][:150]
    figure = pyplot.figure(figsize=(13, 6.6), facecolor="white")
    left = figure.add_gridspec(1, 1, left=0.06, right=0.42, top=0.84, bottom=0.1)
    axis = figure.add_subplot(left[0])
    palette = common.palette()
    radii = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
    for run in runs:
        left_over = []
        for r in radii:
            attack = (run.model, run.model.f, pixels, labels, r, args.judge_steps, "deqfast")
            left_over.append(100 * run.model.accuracy(nested_attack(*attack).x if r else pixels, labels))
        style = "o:" if run.kind == "torchdeq plain" and run.steps < args.pgd_steps else "o-"
        colour = palette.get(run.kind, palette["other"])
        axis.plot(radii, left_over, style, color=colour, lw=2, ms=4, label=f"trained with {run.name}")
    axis.axvline(RADIUS, color="#BBBBBB", lw=1, ls="--")
    axis.set(xlabel="radius of the attack", ylabel=f"accuracy under PGD-{args.judge_steps}, %")
    axis.legend(frameon=False, fontsize=8.5)
    grid = figure.add_gridspec(4, 8, left=0.53, right=0.985, top=0.84, bottom=0.03, hspace=0.32, wspace=0.08)
    for row, name in enumerate(("no attack", "joint")):
        model = next(run.model for run in runs if run.name == name)
        x = joint_attack(model, model.f, pixels[:8], labels[:8], RADIUS, args.attack, backward="none").x
        for shift, shown in ((0, pixels[:8]), (1, x)):
            with torch.no_grad():
                z = dq.fixed_point(model.f, model.start(shown), (shown,), backward="none").z
            said = model.head(z).argmax(1)
            for j in range(8):
                axis = figure.add_subplot(grid[2 * row + shift, j])
                common.show_image(axis, shown[j].view(8, 8))
                right = bool(said[j] == labels[j])
                axis.set_title(f"{int(said[j])}", color="#222222" if right else "#D55E00", fontsize=11, loc="center")
                if j == 0:
                    text = f"trained with\n{name}:\n" + ("attacked" if shift else "as scanned")
                    axis.text(-0.2, 0.5, text, transform=axis.transAxes, ha="right", va="center", fontsize=8.5)
    faster = f"{wall:.1f}{frame.TIMES} faster than PGD-{args.pgd_steps} on torchdeq"
    title = f"The attack in one joint solve: training {faster}"
    figure.text(0.06, 0.93, title, fontsize=15, fontweight="bold")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
