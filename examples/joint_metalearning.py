"""Few-shot digits: a context vector that is optimised inside the equilibrium solve, against 20 inner steps of Adam.

Four unseen classes, five digits of each: the learner (joint_fewshot.py) finds the context that explains these, and
names the classes of further digits. Meta-training uses digits 0 to 5, turned and mirrored into 48 classes; digits 6 to
9 are kept for the test. The joint runs solve for state, adjoint and context at once with Type II; one of them
differentiates through the context as well (backward="implicit"), which the nested loop cannot without unrolling; the
others take it as a constant.

    python examples/joint_metalearning.py            # a table, out/joint_metalearning.png and .json
    python examples/joint_metalearning.py --quick    # seconds, to see it run
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import frame
import joint_common as common
import torch
from joint_fewshot import Episodes, Learner, turned
from joint_nested import Clock, Counted, nested_solve
from torch import nn

import deqfast as dq

WAYS, SHOTS, QUERIES, CODES, HIDDEN, BATCH = 4, 5, 10, 64, 64, 16
ADAM_STEP = 0.1  # the best of 0.05, 0.1, 0.2 and 0.3
# The curvature is largest where the solve starts; Anderson's method stands the longer step.
STEP_FACTOR = 4.0
KINDS = {
    "joint": "joint",
    "joint, implicit gradient": "implicit",
    "nested, torchdeq Anderson": "torchdeq",
    "nested, torchdeq plain": "torchdeq plain",
    "nested, deqfast": "deqfast",
}


@dataclass
class Run:
    """One way to adapt, its learner, and what was measured on it."""

    name: str
    seed: int
    model: Learner
    optimiser: torch.optim.Optimizer
    step_size: float = 0.0
    wall: list[float] = field(default_factory=list)  # a group of updates each
    cpu: list[float] = field(default_factory=list)
    evaluations: int = 0
    vjps: int = 0
    accuracy: list[float] = field(default_factory=list)  # of queries on unseen classes, after each group
    cost: float = 0.0
    adapt_wall: list[float] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return KINDS[self.name]


def adapt(kind: str, model: Learner, f, step: float, support, labels, args, backward="none"):
    """Contexts ``.x`` of the episodes."""
    z0, x0 = model.start(support)
    if kind in ("joint", "implicit"):
        options = {"solver": dq.Anderson(type=2, m=10), "returns": "last", "rtol": 1e-3, "backward": backward}
        # The implicit gradient is that of a solution, so that one goes further.
        options["max_iter"] = args.evaluations + (5 if kind == "implicit" else 0)
        return dq.joint_solve(f, model.loss, z0, x0, (support, labels), step_size=step, **options)
    options = {"steps": args.adam_steps, "solver": kind, "rtol": 1e-2, "last_solve": False}
    return nested_solve(f, model.loss, z0, x0, (support, labels), step_size=ADAM_STEP, **options)


def step_size(model: Learner, f, support, labels) -> float:
    z0, x0 = model.start(support[:8])
    few = (support[:8], labels[:8])
    return STEP_FACTOR * dq.joint_step_size(f, model.loss, z0, x0, few, iterations=3, rtol=1e-2)


def ask(model: Learner, f, x, queries, truth):
    """Cross-entropy of the queries at the contexts x, and the share that is right."""
    z0 = queries.new_zeros(*queries.shape[:2], model.hidden)
    z = dq.fixed_point(f, z0, (x, queries), rtol=1e-3).z
    logits = model.logits(z, x)
    return nn.functional.cross_entropy(logits.mT, truth), float((logits.argmax(-1) == truth).double().mean())


def train_group(run: Run, batches: list, args) -> None:
    """Some updates of the weights; appends seconds and counts."""
    model, counted, clock = run.model, Counted(run.model.f), Clock(args.device)
    # The outer gradient is noisy anyway: half of the default's digits, and a limit.
    gradient = dq.Implicit(rtol=5e-2, max_iter=60) if run.kind == "implicit" else "none"
    for i, (support, labels, queries, truth) in enumerate(batches):
        with clock:
            if i == 0 and run.kind in ("joint", "implicit"):
                run.step_size = step_size(model, counted, support, labels)
            found = adapt(run.kind, model, counted, run.step_size, support, labels, args, gradient)
            entropy, _ = ask(model, counted, found.x, queries, truth)
            run.optimiser.zero_grad(set_to_none=True)
            entropy.backward()
            run.optimiser.step()
            model.bound()
    run.wall.append(clock.wall)
    run.cpu.append(clock.cpu)
    run.evaluations += counted.calls
    run.vjps += counted.vjps


def judge(run: Run, episodes: tuple, args) -> None:
    """Query accuracy on unseen classes, adapted in the run's own way."""
    support, labels, queries, truth = episodes
    model, clock = run.model, Clock(args.device)
    with clock:
        step = step_size(model, model.f, support, labels) if run.kind in ("joint", "implicit") else 0.0
        found = adapt(run.kind, model, model.f, step, support, labels, args)
    with torch.no_grad():
        run.accuracy.append(ask(model, model.f, found.x, queries, truth)[1])
    run.cost = float(found.cost.mean())
    run.adapt_wall.append(clock.wall)


def main() -> None:
    args = common.parse(
        __doc__,
        groups=(8, 2, "groups of updates, after each of which the runs are tested"),
        updates=(15, 2, "updates of the weights in a group"),
        seeds=(3, 1, "learners of each kind"),
        evaluations=(20, 10, "of the joint solve, at most"),
        adam_steps=(20, 3, "inner steps of the nested loops"),
        test_episodes=(100, 8, "episodes of unseen classes"),
    )
    pixels, labels, more, more_labels = frame.digits(args.seed, args.device)
    pixels, labels = torch.cat([pixels, more]), torch.cat([labels, more_labels])
    pools = [pixels[labels == c] for c in range(10)]
    unseen = Episodes(pools[6:], WAYS, 99).draw(args.test_episodes, SHOTS, QUERIES)
    runs, steps = [], []
    for seed in range(args.seed, args.seed + args.seeds):
        episodes = Episodes(turned(pools[:6]), WAYS, seed)
        group = []
        for name in KINDS:
            torch.manual_seed(seed)
            model = Learner(WAYS, CODES, HIDDEN).to(args.device)
            group.append(Run(name, seed, model, torch.optim.Adam(model.parameters(), lr=2e-3)))
        runs += group
        groups = [[episodes.draw(BATCH, SHOTS, QUERIES) for _ in range(args.updates)] for _ in range(args.groups)]
        steps += [(groups[i], run) for i, run in common.turns(args.groups, group)]
    for run in runs[: len(KINDS)]:  # the first calls load code and fill caches; they are timed for nobody
        few, few_labels = (t[:BATCH] for t in unseen[:2])
        adapt(run.kind, run.model, run.model.f, 1e-3, few, few_labels, args)
    # Now and then a sample of a batch falls short of the outer gradient's tolerance, which is below the noise.
    warnings.simplefilter("ignore", dq.GradientWarning)
    for batches, run in frame.progress(steps, lambda t: f"seed {t[1].seed}, {t[1].name}", "group"):
        train_group(run, batches, args)
        judge(run, unseen, args)
    publish(runs, unseen, args)


def publish(runs: list[Run], unseen, args) -> None:
    groups = {name: [run for run in runs if run.name == name] for name in KINDS}
    joint, updates = groups["joint"], args.groups * args.updates

    def seconds(group: list[Run], clock: str) -> list[float]:
        return [s for run in group for s in getattr(run, clock)]

    def work(group: list[Run]) -> float:
        return mean(run.evaluations + run.vjps for run in group)

    def right(group: list[Run]) -> float:
        return 100 * mean(run.accuracy[-1] for run in group)

    rows = [
        [
            name,
            f"{right(group):.1f} %",
            f"{mean(run.cost for run in group):.2f}",
            f"{mean(run.evaluations for run in group) / updates:.0f}",
            f"{mean(run.vjps for run in group) / updates:.0f}",
            f"{work(group) / work(joint):.2f}{frame.TIMES}",
            f"{mean(seconds(group, 'wall')) / args.updates:.3f}",
            f"{common.ratio(seconds(group, 'wall'), seconds(joint, 'wall')):.2f}{frame.TIMES}",
            f"{common.ratio(seconds(group, 'cpu'), seconds(joint, 'cpu')):.2f}{frame.TIMES}",
        ]
        for name, group in groups.items()
    ]
    header = ["", "queries right", "cost", "f", "VJPs", "work", "s an update", "wall", "processor"]
    nested = {name: group for name, group in groups.items() if "nested" in name}
    gap = right(joint) - max(map(right, nested.values()))
    rivals = [(common.ratio(seconds(g, "wall"), seconds(joint, "wall")), name) for name, g in nested.items()]
    wall, rival = min(fact for fact in rivals if "torchdeq" in fact[1])
    targets = [
        common.target("query accuracy against the best nested run", "at most 3 points less", f"{gap:+.1f}", gap >= -3),
        common.target(f"wall time of {rival} over the joint solve's", "3x", f"{wall:.1f}x", wall >= 3),
    ]
    notes = [
        f"{WAYS} unseen classes, {SHOTS} digits of each, {args.test_episodes} episodes; means of {args.seeds} seeds",
        f"after {updates} updates on {BATCH} episodes each; cost: of the support at the contexts found, in the test",
        f"joint: {args.evaluations} evaluations at most, with implicit gradient {args.evaluations + 5}",
        f"nested: {args.adam_steps} steps of Adam, tolerance 1e-2, warm",
        "implicit gradient: a product with second derivatives of f counts as one VJP",
        "f, VJPs: an update; work, wall, processor: over the joint run's; medians over groups that ran side by side",
    ]
    keys = ("name", "seed", "wall", "cpu", "evaluations", "vjps", "accuracy", "cost", "adapt_wall")
    raw = [{key: getattr(run, key) for key in keys} for run in runs]
    title = "Few-shot learning with a context optimised in the equilibrium solve"
    common.report(
        args, "joint_metalearning", title, header, rows, targets, notes, raw,
        lambda path: draw(path, groups, unseen, args, wall),
    )  # fmt: skip


def draw(path: Path, groups: dict[str, list[Run]], unseen, args, wall: float) -> None:
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(13, 5.4), facecolor="white")
    left = figure.add_gridspec(1, 1, left=0.06, right=0.46, top=0.84, bottom=0.1)
    axis = figure.add_subplot(left[0])
    palette = common.palette()
    for name, group in groups.items():
        colour = KINDS[name] if KINDS[name] in palette else "other"
        clocks = [run.cpu if args.device == "cpu" else run.wall for run in group]
        spent = torch.tensor(clocks, dtype=torch.float64).mean(0).cumsum(0)
        right = 100 * torch.tensor([run.accuracy for run in group], dtype=torch.float64).mean(0)
        axis.plot(spent.tolist(), right.tolist(), "o-", color=palette[colour], lw=2, ms=4, label=name)
    axis.axhline(100 / WAYS, color="#BBBBBB", lw=1, ls="--")
    axis.set(xscale="log", xlabel="seconds of meta-training", ylabel="queries of unseen classes right, %")
    axis.legend(frameon=False, fontsize=8.5)
    support, labels, queries = (t[:1] for t in unseen[:3])
    model = groups["joint"][0].model
    step = step_size(model, model.f, support, labels)
    x = adapt("joint", model, model.f, step, support, labels, args).x
    with torch.no_grad():
        z = dq.fixed_point(model.f, queries.new_zeros(1, WAYS * QUERIES, HIDDEN), (x, queries), backward="none").z
        said = model.logits(z, x).argmax(-1)[0]
    grid = figure.add_gridspec(WAYS, SHOTS + 9, left=0.52, right=0.985, top=0.8, bottom=0.04, wspace=0.08, hspace=0.35)
    for way in range(WAYS):
        shown = [*support[0, way * SHOTS : (way + 1) * SHOTS], *queries[0, way * QUERIES : way * QUERIES + 8]]
        for j, image in enumerate(shown):
            axis = figure.add_subplot(grid[way, j if j < SHOTS else j + 1])
            common.show_image(axis, image.view(8, 8))
            if j >= SHOTS:
                answer = int(said[way * QUERIES + j - SHOTS])
                colour = "#222222" if answer == way else "#D55E00"
                axis.set_title("ABCD"[answer], color=colour, fontsize=10, loc="center", pad=2)
            if j == 0:
                axis.text(-0.2, 0.5, "ABCD"[way], transform=axis.transAxes, ha="right", va="center", fontsize=12)
    figure.text(0.52, 0.855, f"shown: {SHOTS} of each of four new classes", fontsize=9.5)
    figure.text(0.72, 0.855, "asked, with the answers of the joint solve", fontsize=9.5)
    title = f"Adapting in one joint solve: meta-training {wall:.1f}{frame.TIMES} faster than Adam on torchdeq"
    figure.text(0.06, 0.93, title, fontsize=15, fontweight="bold")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
