"""Explicit regulations along the dynamics of an equilibrium classifier of digits: what they are worth under attack.

Two ways that Yang, Li, Pang and Liu (ICML 2023) propose. Training at random states: every call of TRADES training stops
after a number of evaluations that it draws. And input entropy reduction: at inference the pixels move against the
entropy of the prediction while the state is solved for. Both against the same without, under attacks that know of
neither and, for the second, under attacks that go through it.

    python examples/dynamics.py            # tables, out/dynamics.json and out/dynamics.png; minutes
    python examples/dynamics.py --quick    # seconds, to see it run: the numbers mean nothing

Read dynamics_model.py for the model, its training and the reduction, attacks.py for the attacks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attacks
import dynamics_timing as timing
import torch
from attacks import accuracy, standing
from dynamics_figure import draw
from dynamics_model import LAST, RADIUS, Budgets, Classifier, Defence, train_pass
from frame import columns, digits, paint, progress, provenance
from torch import Tensor

PACKAGES = ("deqfast", "torch", "torchdeq", "scikit-learn", "numpy")
EARLY = 2
BLIND = ("pgd", "apgd", "square")  # made for the last state of the model without the reduction


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="splits, initial weights and orders of each model")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training set, for each model")
    parser.add_argument("--hidden", type=int, default=80, help="numbers in the state")
    parser.add_argument("--queries", type=int, default=300, help="of the random search; a third through the reduction")
    parser.add_argument("--turns", type=int, default=25, help="training steps of each solver in the timing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture and the JSON")
    parser.add_argument("--quick", action="store_true", help="one seed, two passes, few digits: to see it run")
    args = parser.parse_args(arguments)
    if args.quick:
        args.seeds, args.epochs, args.hidden, args.queries, args.turns = 1, 2, 24, 30, 1
    for name in ("seeds", "epochs", "hidden", "queries", "turns"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def trained(seed: int, random: bool, data: tuple[Tensor, ...], args: argparse.Namespace) -> Classifier:
    torch.manual_seed(seed)
    model = Classifier(args.hidden).to(args.device)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, args.epochs)
    budget = Budgets(random, seed)
    for epoch in range(args.epochs):
        train_pass(model, optimiser, data[:2], budget, 1000 * seed + epoch)
        schedule.step()
    return model.requires_grad_(False)


def attacked(model: Classifier, pixels: Tensor, labels: Tensor, queries: int) -> dict[str, Tensor]:
    """What the attacks on the last state make of the test set."""

    def last(near: Tensor) -> Tensor:
        return model.at(near, LAST)

    return {
        "pgd": attacks.pgd(last, pixels, labels, RADIUS),
        "apgd": attacks.apgd(last, pixels, labels, RADIUS),
        "square": attacks.square(last, pixels, labels, RADIUS, queries),
    }


def adaptive(model: Classifier, pixels: Tensor, labels: Tensor, start: Tensor, queries: int) -> dict[str, Tensor]:
    """Attacks through the reduction; those with gradients start where PGD on the model alone ended."""
    identity, signs = Defence(model, "identity"), Defence(model, "signs")

    def pgd(through: Defence, loss: attacks.Loss = attacks.cross_entropy) -> Tensor:
        return attacks.pgd(through, pixels, labels, RADIUS, 30, 0.1, loss, start)

    return {
        "PGD, moves constant": pgd(identity),
        "PGD on the margin": pgd(identity, attacks.margin),
        "APGD": attacks.apgd(identity, pixels, labels, RADIUS, start=start),
        "PGD through the signs": pgd(signs),
        "random search": attacks.square(Defence(model), pixels, labels, RADIUS, max(1, queries // 3)),
    }


def measure(model: Classifier, data: tuple[Tensor, ...], args: argparse.Namespace) -> dict[str, Any]:
    """Shares of the test set that are classified rightly; entropies in nats."""
    pixels, labels = data[2:]
    states = []
    for state in range(1, LAST + 1):

        def here(near: Tensor, state: int = state) -> Tensor:
            return model.at(near, state)

        hit = attacks.pgd(here, pixels, labels, RADIUS)
        states.append({"state": state, "clean": accuracy(here, pixels, labels), "pgd": accuracy(here, hit, labels)})
    blind = attacked(model, pixels, labels, args.queries)
    knowing = adaptive(model, pixels, labels, blind["pgd"], args.queries)
    defence = Defence(model)
    found: dict[str, Any] = {"states": states, "entropy": {}}
    for name, logits in (("alone", here), ("reduced", defence)):
        found[name] = {"clean": accuracy(logits, pixels, labels)}
        found[name].update({key: accuracy(logits, near, labels) for key, near in blind.items()})
        found[name]["worst"] = standing(logits, blind.values(), labels)
    found["through"] = {key: accuracy(defence, near, labels) for key, near in knowing.items()}
    found["reduced"]["adaptive"] = standing(defence, [*knowing.values(), *blind.values()], labels)
    for name, near in (("clean", pixels), ("pgd", blind["pgd"])):
        defence(near)
        found["entropy"][name] = [h.mean().item() for h in defence.entropies]
    found["shown"] = shown(model, defence, pixels, blind["pgd"], labels)
    return found


def shown(model: Classifier, defence: Defence, pixels: Tensor, hit: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Digits for the picture: the first that the attack turns, and how they come back or not."""
    with torch.no_grad():
        before, after = model.at(hit, LAST).argmax(1), defence(hit).argmax(1)
    turned = (before != labels).nonzero()[:, 0][:6].tolist()
    return [
        {
            "label": int(labels[k]),
            "said": [int(model.at(pixels[k : k + 1], LAST).argmax(1)), int(before[k]), int(after[k])],
            "images": [t[k].tolist() for t in (pixels, hit, defence.left)],
        }
        for k in turned
    ]


def of(rows: list[dict[str, Any]], random: bool) -> list[dict[str, Any]]:
    return [row for row in rows if row["random"] == random]


def spread(values: list[float], form: str = "{:.1f}") -> str:
    """Mean of percentages, and their range over the seeds."""
    values = [100 * v for v in values]
    return f"{form.format(statistics.mean(values))} ({form.format(min(values))} to {form.format(max(values))})"


def early(row: dict[str, Any]) -> float:
    return row["states"][EARLY - 1]["pgd"]


def tables(rows: list[dict[str, Any]], timed: list[dict[str, Any]]) -> dict[str, tuple[list[str], list[list[str]]]]:
    names = {False: f"{LAST} evaluations", True: f"1 to {LAST}, drawn"}
    header = ["trained at", "entropy reduction", "clean", "PGD-20", "APGD-30", "random search", "worst of three"]
    robust = []
    for random, name in names.items():
        for kind, said in (("alone", "no"), ("reduced", "yes")):
            group = [row[kind] for row in of(rows, random)]
            cells = [spread([g[key] for g in group]) for key in ("clean", *BLIND, "worst")]
            last = spread([g["adaptive"] for g in group]) if kind == "reduced" else "as worst"
            robust.append([name, said, *cells, last])
    states = []
    for random, name in names.items():
        for key, said in (("clean", "clean"), ("pgd", "PGD-20 on this state")):
            group = of(rows, random)
            means = [statistics.mean(100 * row["states"][k][key] for row in group) for k in range(LAST)]
            states.append([f"{name}, {said}", *(f"{mean:.1f}" for mean in means)])
    steps = []
    for row in timed:
        turns = f"{row['ratios'][0]:.2f} to {row['ratios'][-1]:.2f}"
        steps.append([row["name"], f"{1000 * row['seconds']:.1f}", f"{row['ratio']:.2f}x", turns])
    through = [
        [name, *(spread([row["through"][name] for row in of(rows, random)]) for random in names)]
        for name in rows[0]["through"]
    ]
    return {
        "robust": ([*header, "adaptive"], robust),
        "states": (["state after", *map(str, range(1, LAST + 1))], states),
        "through": (["attack through the reduction", *(f"trained at {name}" for name in names.values())], through),
        "timed": (["solver", "ms a training step", f"/ {timing.OURS}", "turns"], steps),
    }


def targets(rows: list[dict[str, Any]], timed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def points(values: list[float]) -> str:
        return ", ".join(f"{100 * v:+.1f}" for v in values)

    gains = [early(a) - early(b) for a, b in zip(of(rows, True), of(rows, False), strict=True)]
    curves = [curve for row in rows for curve in row["entropy"].values()]
    falling = sum(all(curve[k + 1] < curve[k] for k in range(len(curve) - 1)) for curve in curves)
    kept = [row["reduced"]["adaptive"] - row["alone"]["worst"] for row in rows]
    found = [
        target(
            f"state {EARLY} under PGD-20, random states less the same without, by seed",
            "above 0 on every seed", f"{points(gains)} points", min(gains) > 0,
        ),
        target(
            "entropy falls in every round, clean and attacked, each model", f"{len(curves)} of {len(curves)}",
            f"{falling} of {len(curves)}", falling == len(curves),
        ),
        target(
            "reduction under the adaptive attack, less worst of three without it, each model",
            "above 0", f"{points(kept)} points", min(kept) > 0,
        ),
    ]  # fmt: skip
    rivals = [row for row in timed if row["name"].startswith("torchdeq")]
    if rivals:
        fastest = min(rivals, key=lambda row: row["ratio"])
        what = f"training step: fastest torchdeq ({fastest['name']}) over {timing.OURS}"
        found.append(target(what, "above 1x", f"{fastest['ratio']:.2f}x", fastest["ratio"] > 1))
    return found


def target(what: str, asked: str, measured: str, met: bool) -> dict[str, Any]:
    return {"what": what, "target": asked, "measured": measured, "met": bool(met)}


def remarks(rows: list[dict[str, Any]]) -> list[str]:
    pairs = list(zip(of(rows, True), of(rows, False), strict=True))
    last = [100 * (a["alone"]["worst"] - b["alone"]["worst"]) for a, b in pairs]
    lifts = [100 * (row["reduced"]["worst"] - row["alone"]["worst"]) for row in rows]
    knows = [100 * (row["reduced"]["adaptive"] - row["reduced"]["worst"]) for row in rows]
    first = "; ".join(
        f"{name} "
        + ", ".join(f"{statistics.mean(h):.2f}" for h in zip(*(r["entropy"][name] for r in rows), strict=True))
        for name in rows[0]["entropy"]
    )
    return [
        f"last state, worst of three attacks, random states less the same without, by seed: "
        f"{', '.join(f'{v:+.1f}' for v in last)} points.",
        f"entropy reduction against attacks that do not know of it: {min(lifts):+.1f} to {max(lifts):+.1f} points; an "
        f"attacker who does takes {-max(knows):.1f} to {-min(knows):.1f} of them back.",
        f"mean entropy at the end of each round, nats: {first}.",
        f"adaptive: of each digit the worst of five attacks through the reduction and of the three that do not know of "
        f"it; radius {RADIUS} in the maximum norm, pixels in [0, 1]; in brackets the least and most of the seeds.",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    started = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    turns = [(seed, random, k) for seed in range(args.seeds) for random in (False, True) for k in ("train", "attack")]
    for seed, random, part in progress(turns, lambda t: f"seed {t[0]}, {'random' if t[1] else 'last'}: {t[2]}", "part"):
        data = digits(seed, args.device, 96 if args.quick else None)
        if part == "train":
            model = trained(seed, random, data, args)
        else:
            rows.append({"seed": seed, "random": random, **measure(model, data, args)})
    timed = timing.measure(args.hidden, digits(0, args.device)[:2], args.turns, args.device)
    if not timing.HAS_TORCHDEQ:
        print("torchdeq is not installed, so nothing is timed against: pip install torchdeq==0.1.0 --no-deps")
    found, met, notes = tables(rows, timed), targets(rows, timed), remarks(rows)
    for header, cells in found.values():
        print("\n" + columns(header, cells))
    print("\n" + "\n".join(notes))
    for t in met:
        print(f"{'met   ' if t['met'] else 'MISSED'}  {t['what']}: {t['measured']} (target {t['target']})")
    picture = args.out / "dynamics.png"
    painted = paint(lambda path: draw(path, rows, timed), picture, title_pad=22)
    record = {
        "name": "dynamics",
        "title": "Regulations along the dynamics of an equilibrium classifier",
        "quick": args.quick,
        **provenance(args, PACKAGES),
        "seconds": time.perf_counter() - started,
        "tables": {name: {"header": header, "rows": cells} for name, (header, cells) in found.items()},
        "targets": met,
        "notes": notes,
        "picture": picture.name if painted else None,
        "rows": rows,
        "timed": timed,
    }
    (args.out / "dynamics.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    print(f"\nWrote {args.out / 'dynamics.json'}" + (f" and {picture}" if painted else ""))


if __name__ == "__main__":
    main()
