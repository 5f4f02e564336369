"""Denoise and inpaint digits and photographs: latent codes of an equilibrium model, joint solve against nested loops.

A generative model (joint_model.py) learns 8 x 8 digits, another one 8 x 8 patches of photographs. A damaged picture is
then explained by the codes that reproduce what was observed of it, and the model's picture is the answer. A photograph
is taken apart into overlapping patches, one sample each, and averaged back. The photograph that is restored was not
trained on.

    python examples/joint_inverse.py            # a table, out/joint_inverse.png and .json
    python examples/joint_inverse.py --quick    # seconds, to see it run
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import frame
import joint_common as common
import torch
from joint_generation import adam_schedule
from joint_model import Generator, infer, make_run, train_round
from joint_nested import Clock, Counted
from torch import Tensor

import deqfast as dq

PATCH, STRIDE, SIDE = 8, 4, 128
SEEN = ("astronaut", "chelsea", "coffee", "coins", "rocket")
UNSEEN = "camera"
METHODS = {
    "joint": "joint",
    "nested, torchdeq Anderson": "torchdeq",
    "nested, torchdeq plain": "torchdeq plain",
    "nested, deqfast": "deqfast",
}
CODES = {"digits": 16, "photograph": 20}
HIDDEN = 128


@dataclass
class Task:
    """Damaged pictures (B, 64), which pixels of them are known, and the truth."""

    name: str
    data: str  # "digits" or "photograph"
    model: Generator
    truth: Tensor
    damaged: Tensor
    known: Tensor | None
    restored: dict[str, Tensor] = field(default_factory=dict)
    raw: dict[str, dict] = field(default_factory=dict)


def photograph(name: str) -> Tensor:
    """A grey photograph (H, W) in [0, 1], from those that ship in scikit-image's wheel."""
    from skimage import color, data, util

    image = getattr(data, name)()
    return torch.tensor(color.rgb2gray(image) if image.ndim == 3 else util.img_as_float(image), dtype=torch.float32)


def training_patches(count: int, seed: int) -> Tensor:
    """Patches (count, 64), half of them those with the most contrast."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for name in SEEN:
        image = photograph(name)
        patches = image.unfold(0, PATCH, 3).unfold(1, PATCH, 3).reshape(-1, PATCH * PATCH)
        pool = patches[torch.randperm(len(patches), generator=generator)[: 4 * count]]
        each = count // (2 * len(SEEN))
        found += [pool[:each], pool[pool.std(1).argsort(descending=True)][: 4 * each : 4]]
    return torch.cat(found)


def take_apart(image: Tensor) -> Tensor:
    """Overlapping patches (B, 64) of an image (H, W)."""
    return torch.nn.functional.unfold(image[None, None], PATCH, stride=STRIDE)[0].T.contiguous()


def put_together(patches: Tensor, side: int) -> Tensor:
    """The image (side, side) whose pixels are the means over the patches that hold them."""

    def fold(columns: Tensor) -> Tensor:
        return torch.nn.functional.fold(columns.T[None], (side, side), PATCH, stride=STRIDE)[0, 0]

    return fold(patches) / fold(torch.ones_like(patches))


def psnr(pictures: Tensor, truth: Tensor) -> float:
    """Peak signal to noise ratio in decibels, for a peak of 1, over all pixels."""
    return float(-10 * (pictures.clamp(0, 1) - truth).square().mean().log10())


def train(args) -> dict[str, Generator]:
    """A model of digits and one of patches, trained with the joint solve."""
    digits = frame.digits(args.seed, args.device)[0][: args.samples]
    patches = training_patches(args.samples, args.seed).to(args.device)
    pools = {"digits": digits, "photograph": patches}
    runs = {data: make_run(data, "joint", 30, args, pool, CODES[data], HIDDEN) for data, pool in pools.items()}
    generator = torch.Generator().manual_seed(args.seed)
    steps = [(epoch, data) for epoch in range(args.epochs) for data in runs]
    for epoch, data in frame.progress(steps, lambda t: f"training on {t[1]}, pass {t[0] + 1}", "pass"):
        order = torch.randperm(len(pools[data]), generator=generator).to(args.device)
        for group in runs[data].optimiser.param_groups:
            group["lr"] = 4e-3 * (1 - 0.9 * epoch / args.epochs)
        train_round(runs[data], pools[data], order, 64, None)
    return {data: run.model for data, run in runs.items()}


def make_tasks(models: dict[str, Generator], args) -> list[Task]:
    generator = torch.Generator().manual_seed(args.seed)
    digits = frame.digits(args.seed, "cpu")[2][: 100 if args.quick else 300]
    image = photograph(UNSEEN)[40 : 40 + args.side, 170 : 170 + args.side]
    tasks = []
    for data, truth, sigma in (("digits", digits, 0.25), ("photograph", image, 0.1)):
        noisy = truth + sigma * torch.randn(truth.shape, generator=generator)
        half = (torch.rand(truth.shape, generator=generator) < 0.5).float()
        cut = take_apart if data == "photograph" else (lambda t: t)
        for name, damaged, mask in (("denoising", noisy, None), ("inpainting", truth * half, half)):
            known = None if mask is None else cut(mask).to(args.device)
            tasks.append(Task(name, data, models[data], truth.to(args.device), cut(damaged).to(args.device), known))
    return tasks


def restore(task: Task, method: str, args) -> None:
    """One timed restoration; the first one of a method warms up."""
    model, kind = task.model, METHODS[method]
    counted, clock = Counted(model.f), Clock(args.device)
    observed = (task.damaged,) if task.known is None else (task.damaged, task.known)
    with clock:
        if kind == "joint":
            few = tuple(t[:32] for t in observed)
            start = model.start(len(few[0]))
            step = dq.joint_step_size(counted, model.loss, *start, few, iterations=3, rtol=1e-2)
            sol = infer(kind, model, counted, args.evaluations, step, *observed)
        else:
            sol = infer(kind, model, counted, args.adam_steps, adam_schedule(args.adam_steps), *observed)
    with torch.no_grad():
        pictures = model.decode(sol.z)
    if task.known is not None and task.data == "digits":
        pictures = torch.where(task.known > 0, task.damaged, pictures)
    if task.data == "photograph":
        pictures = put_together(pictures, task.truth.shape[0])
        if task.known is not None:
            known, damaged = (put_together(t, task.truth.shape[0]) for t in (task.known, task.damaged))
            pictures = torch.where(known > 0, damaged, pictures)
    task.restored[method] = pictures
    raw = task.raw.setdefault(method, {"wall": [], "cpu": []})
    raw["wall"].append(clock.wall)
    raw["cpu"].append(clock.cpu)
    raw.update(evaluations=counted.calls, vjps=counted.vjps)
    raw.update(cost=float(sol.cost.mean()), psnr=psnr(pictures, task.truth))


def before(task: Task) -> Tensor:
    """What a viewer sees of the damaged picture; missing pixels are set to the mean of the known ones."""
    if task.known is None:
        damaged, known = task.damaged, None
    else:
        known = task.known
        damaged = torch.where(known > 0, task.damaged, task.damaged.sum() / known.sum())
    return damaged if task.data == "digits" else put_together(damaged, task.truth.shape[0])


def main() -> None:
    args = common.parse(
        __doc__,
        epochs=(12, 2, "passes over the training pictures"),
        samples=(1300, 200, "training pictures"),
        evaluations=(40, 25, "of the joint solve, at most"),
        adam_steps=(40, 4, "steps of the nested loops"),
        repeats=(4, 2, "restorations timed, the first one left out"),
        side=(SIDE, 32, "of the photograph, in pixels"),
    )
    if args.side % STRIDE or args.side < PATCH:
        raise SystemExit(f"--side must be a multiple of {STRIDE} of at least {PATCH}, got {args.side}")
    try:
        import skimage  # noqa: F401
    except ImportError:
        raise SystemExit("scikit-image is not installed, and has the photographs: pip install scikit-image") from None
    tasks = make_tasks(train(args), args)
    steps = [(r, task, m) for task in tasks for r, m in common.turns(args.repeats, list(METHODS))]
    for _, task, method in frame.progress(steps, lambda t: f"{t[1].data}, {t[2]}", "restoration"):
        restore(task, method, args)
    publish(tasks, args)


def publish(tasks: list[Task], args) -> None:
    rows, targets, ratios = [], [], []
    for task in tasks:
        was = psnr(before(task), task.truth)
        joint = task.raw["joint"]
        for method in METHODS:
            raw = task.raw[method]
            slower = common.ratio(raw["wall"][1:], joint["wall"][1:])
            seconds = sorted(raw["wall"][1:])[len(raw["wall"][1:]) // 2]
            rows.append(
                [
                    f"{task.name}, {task.data}: {method}",
                    f"{was:.1f}",
                    f"{raw['psnr']:.2f}",
                    f"{raw['cost']:.3f}",
                    f"{raw['evaluations']}",
                    f"{raw['vjps']}",
                    f"{seconds:.2f}",
                    f"{slower:.1f}{frame.TIMES}",
                ]
            )
        rivals = [method for method in METHODS if "torchdeq" in method]
        ratios.append(min(common.ratio(task.raw[m]["wall"][1:], joint["wall"][1:]) for m in rivals))
        nested = max(raw["psnr"] for method, raw in task.raw.items() if method != "joint")
        gap = joint["psnr"] - nested
        what = f"{task.name}, {task.data}: PSNR against the best nested result"
        targets.append(common.target(what, "at most 0.1 dB below", f"{gap:+.2f} dB", gap >= -0.1))
    header = ["", "dB before", "dB after", "cost", "f", "VJPs", "s", "wall"]
    notes = [
        f"nested: {args.adam_steps} steps of Adam at relative tolerance 1e-2, solves start at the last one's answer",
        "cost: what both minimise, mean of a sample; wall: over the joint solve's, median of pairs side by side",
        f"photograph: {UNSEEN}, {len(tasks[-1].damaged)} overlapping patches; inpainting: half of the pixels missing",
    ]
    record = [{"task": t.name, "data": t.data, "before": psnr(before(t), t.truth), "methods": t.raw} for t in tasks]
    title = "Denoising and inpainting with a generative equilibrium model"
    speed = f"{min(ratios):.1f} to {max(ratios):.1f}{frame.TIMES}"
    common.report(
        args, "joint_inverse", title, header, rows, targets, notes, record, lambda path: draw(path, tasks, speed)
    )


def draw(path: Path, tasks: list[Task], speed: str) -> None:
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(12.5, 10), facecolor="white")
    outer = figure.add_gridspec(
        4, 1, left=0.03, right=0.98, top=0.92, bottom=0.02, hspace=0.16, height_ratios=[0.5, 0.5, 1.5, 1.5]
    )
    for row, task in enumerate(tasks):
        panels = [("truth", task.truth), (task.name, before(task))]
        panels += [(m, task.restored[m]) for m in ("joint", "nested, torchdeq Anderson")]
        inner = outer[row].subgridspec(1, 4, wspace=0.04)
        for i, (label, pictures) in enumerate(panels):
            axis = figure.add_subplot(inner[i])
            title = label if i == 0 else f"{label}: {psnr(pictures, task.truth):.1f} dB"
            common.show_image(axis, mosaic(pictures) if task.data == "digits" else pictures, title)
    title = f"Restored by one joint solve, {speed} faster than torchdeq's fastest nested loop"
    figure.text(0.03, 0.96, title, fontsize=15, fontweight="bold")
    figure.savefig(path, dpi=120)


def mosaic(pictures: Tensor) -> Tensor:
    """The first 24 digits as one image, three rows of eight, a white line between."""
    tiles = torch.nn.functional.pad(pictures[:24].view(3, 8, 8, 8).clamp(0, 1), (1, 1, 1, 1), value=1.0)
    return tiles.permute(0, 2, 1, 3).reshape(30, 80)


if __name__ == "__main__":
    main()
