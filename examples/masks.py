"""One weight with a mask of its own for every step, beside equilibrium and other models: accuracy, time, memory, work.

A block of shared weights, applied K times, is what a DEQ solves for when K grows. Song, Majumder and Lin (Revisiting
Implicit Models, 2023) find that applying it a few times is often the better model, and that a distinct sparse mask at
each step gives it back what sharing takes. Here that is measured, on real data that other packages bring along: digits,
patches of photographs, and a text; each model is trained with the same number of updates, on the same batches.

    python examples/masks.py                    # tables, out/masks.png and out/masks.json: minutes
    python examples/masks.py --sweep            # and over depth, width, density and samples: half an hour

Models and counts are in masks_model.py, what is measured in masks_measure.py.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import torch
from frame import paint, progress, provenance
from joint_common import turns
from masks_data import Data, load_digits, load_photographs, load_text
from masks_figure import draw
from masks_measure import memory_by_depth, reversibility, run, storage, torchdeq_fastest
from masks_model import SOLVED, Kind
from masks_report import printed, targets

try:
    import torchdeq
except ImportError:
    torchdeq = None

PACKAGES = ("deqfast", "torch", "torchdeq", "scikit-learn", "scikit-image", "numpy")
LOADERS = {"digits": load_digits, "photographs": load_photographs, "text": load_text}
DENSITIES = (0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
SIZES, ROWS = (128, 256, 512, 1024, 2048), (1, 16, 128, 512)
DEPTHS = (1, 2, 4, 8, 16, 32, 64)


Point = tuple[str, float, Kind, "int | None"]  # axis, value on it, model, training samples


def models(data: str, width: int) -> list[Kind]:
    tied = Kind("tied", width)
    masked = tied.but(way="masked", density=0.25)
    if data == "text":
        ways: tuple[str, ...] = ("implicit",)
        others = [masked.but(learn="scores")]
    else:
        ways = SOLVED
        others = [masked.but(learn="magnitude"), masked.but(learn="scores"), masked.but(way="one mask")]
    return [tied, masked, *others, tied.but(way="untied"), *(tied.but(way=way) for way in ways)]


def swept(width: int, sweep: bool) -> list[Point]:
    """The points that the main table does not have."""
    tied = Kind("tied", width)
    masked, one = (tied.but(way=way, density=0.25) for way in ("masked", "one mask"))
    untied, solved = tied.but(way="untied"), tied.but(way="implicit")
    points: list[Point] = []
    if not sweep:
        points += [("density", d, masked.but(density=d), None) for d in (0.1, 0.5)]
        return points
    for d in (0.05, 0.1, 0.5):
        points += [("density", d, kind.but(density=d), None) for kind in (masked, one)]
    for k in (1, 2, 4, 8, 16):
        points += [("depth", k, kind.but(depth=k), None) for kind in (tied, masked, untied)]
    for n in (width // 4, width // 2, 2 * width):
        points += [("width", n, kind.but(width=n), None) for kind in (tied, masked, untied, solved)]
    for n in (100, 300, 1000):
        points += [("samples", n, kind, n) for kind in (tied, masked, untied, solved)]
    return points


def jobs(args: argparse.Namespace, fastest: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """All trainings, in the order in which they run: seed by seed, models in turn, the first one another each time."""
    found = []
    for name in LOADERS:
        width = max(2, args.width // 2) if name == "text" else args.width
        points: list[Point] = [("main", 0.0, kind, None) for kind in models(name, width)]
        for way, race in fastest.get(name, {}).items():
            points.append(("main", 0.0, Kind(way, width, solver=race["fastest"]), None))
        points += swept(width, args.sweep) if name != "text" else []
        seeds = args.text_seeds if name == "text" else args.seeds
        for seed, (axis, value, kind, keep) in turns(seeds, points):
            if kind.solver == "deqfast" or seed < args.torchdeq_seeds:
                found.append({"data": name, "axis": axis, "value": value, "kind": kind, "keep": keep, "seed": seed})
    return found


def measured(args: argparse.Namespace) -> dict[str, Any]:
    load = functools.cache(lambda name, seed: LOADERS[name](seed, args.device))
    races = [] if torchdeq is None else [(n, k) for n in LOADERS for k in models(n, args.width) if k.way in SOLVED]
    if torchdeq is None:
        print("torchdeq is not installed, so deqfast's DEQs have no rival (pip install torchdeq==0.1.0 --no-deps)")
    fastest: dict[str, dict[str, Any]] = {}
    for name, kind in progress(races, lambda race: f"torchdeq's fastest, {race[0]}", "race"):
        kind = kind.but(width=max(2, args.width // 2)) if name == "text" else kind
        pair, seconds = torchdeq_fastest(kind, load(name, 0), args.updates)
        fastest.setdefault(name, {})[kind.way] = {"fastest": pair, "seconds": seconds}
    runs = []
    for job in progress(jobs(args, fastest), lambda j: f"{j['data']}, {j['kind'].name}"[:32], "training"):
        kind, data = job.pop("kind"), load(job["data"], job["seed"]).first(job["keep"])
        found = run(kind, data, args.updates, job["seed"])
        runs.append({**job, "name": kind.name, **vars(kind), "used": len(data.inputs), **found})
    return {"torchdeq": fastest, "runs": runs, **asides(args, load("digits", 0))}


def asides(args: argparse.Namespace, data: Data) -> dict[str, Any]:
    """What needs no training: memory by depth, when sparse matrices are faster, how exact the way back is."""
    sizes = [size for size in SIZES if size <= args.largest]
    grid = [(size, rows) for size in sizes for rows in ROWS]
    cells = progress(grid, lambda c: f"storage, {c[0]} x {c[0]}, {c[1]} rows", "size")
    stored = [storage(size, rows, DENSITIES, args.device) for size, rows in cells]
    ways = [(torch.float64, 20, 0.3), (torch.float64, 100, 0.1)]
    ways += [(torch.float32, 20, 0.3), *((torch.float32, 100, damping) for damping in (0.05, 0.1, 0.2))]
    return {
        "memory": {"depths": DEPTHS, "bytes": memory_by_depth(data, args.width, DEPTHS)},
        "storage": {"densities": DENSITIES, "cells": stored},
        "reversible": [reversibility(*way, args.width, args.device) for way in ways],
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sweep", action="store_true", help="over depth, width, density and samples too")
    parser.add_argument("--updates", type=int, default=300, help="of each training")
    parser.add_argument("--seeds", type=int, default=5, help="of data, weights, masks and order")
    parser.add_argument("--text-seeds", type=int, default=None, help="those of the text (default: 3; 5 with --sweep)")
    parser.add_argument("--torchdeq-seeds", type=int, default=None, help="and torchdeq's (default: 1; 3 with --sweep)")
    parser.add_argument("--width", type=int, default=128, help="numbers in the state; half as many for the text")
    parser.add_argument("--largest", type=int, default=2048, help="matrix whose storage is timed")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture and the JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    # Models this small are fastest on one thread, and their times then vary least.
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    args = parser.parse_args()
    for name, usual in (("text_seeds", 5 if args.sweep else 3), ("torchdeq_seeds", 3 if args.sweep else 1)):
        if getattr(args, name) is None:
            setattr(args, name, min(usual, args.seeds))
    for name in ("updates", "seeds", "text_seeds", "torchdeq_seeds", "width", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    found = measured(args)
    record = {"name": "masks", **provenance(args, PACKAGES), **found, "seconds": time.perf_counter() - start}
    record["targets"] = targets(record)
    print(printed(record))
    path = args.out / "masks.json"
    path.write_text(json.dumps(record, allow_nan=False).replace('{"data"', '\n{"data"') + "\n")
    painted = paint(lambda picture: draw(picture, record), path.with_suffix(".png"), title_pad=8)
    print(f"\nWrote {path}" + (f" and {path.with_suffix('.png')}" if painted else ""))


if __name__ == "__main__":
    main()
