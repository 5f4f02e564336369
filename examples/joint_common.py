"""What the joint examples share: options, ratios, targets, and the report: table, JSON and picture."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from frame import INK, OURS, RIVALS, columns, paint, provenance
from torch import Tensor

PACKAGES = ("deqfast", "torch", "torchdeq", "scikit-learn", "scikit-image", "numpy")


def parse(doc: str, **numbers: tuple[int, int, str]) -> argparse.Namespace:
    """Options that every example has, and ints of its own: name=(default, with --quick, help)."""
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, (usual, quick, text) in numbers.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=None, help=f"{text} (default: {usual}; {quick} with --quick)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the order")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture and the JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    # Models this small are fastest on one thread, and their times then vary least.
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; the numbers mean nothing")
    args = parser.parse_args()
    for name, (usual, quick, _) in numbers.items():
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else usual)
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    args.started = time.perf_counter()
    return args


def turns(rounds: int, players: Sequence[Any]) -> list[tuple[int, Any]]:
    """(round, player) with everyone once a round; who goes first rotates, so a machine's moods fall on all."""
    return [(r, players[(i + r) % len(players)]) for r in range(rounds) for i in range(len(players))]


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """How many times longer `slow` takes: the median over pairs that ran next to each other."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def target(what: str, asked: str, measured: str, met: bool) -> dict[str, Any]:
    """A line on whether a target was met."""
    return {"what": what, "target": asked, "measured": measured, "met": bool(met)}


def report(
    args: argparse.Namespace,
    name: str,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    targets: Sequence[dict],
    notes: Sequence[str],
    raw: Any,
    draw: Callable[[Path], None],
) -> None:
    """Print the table, write out/<name>.json and out/<name>.png."""
    print(f"\n{title}\n\n{columns(header, rows)}\n")
    for line in notes:
        print(line)
    for t in targets:
        print(f"{'met   ' if t['met'] else 'MISSED'}  {t['what']}: {t['measured']} (target {t['target']})")
    path = args.out / f"{name}.json"
    picture = path.with_suffix(".png")
    painted = paint(draw, picture, title_pad=8)
    document = {
        "name": name,
        "title": title,
        "quick": args.quick,
        **provenance(args, PACKAGES, silent=("out", "started")),
        "seconds": time.perf_counter() - args.started,
        "header": list(header),
        "rows": [list(row) for row in rows],
        "targets": list(targets),
        "notes": list(notes),
        "picture": picture.name if painted else None,
        "raw": raw,
    }
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    print(f"\nWrote {path}" + (f" and {picture}" if painted else ""))


def palette() -> dict[str, str]:
    """One colour a method, distinguishable with any colour vision."""
    rivals = ("torchdeq", "deqfast", "other", "torchdeq plain")
    return {"joint": OURS, **dict(zip(rivals, RIVALS, strict=False)), "ink": INK}


def show_image(axis: Any, image: Tensor, title: str = "") -> None:
    """A grey picture (H, W) in [0, 1], without a frame."""
    axis.imshow(image.detach().cpu().clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_axis_off()
    if title:
        axis.set_title(title, fontsize=9, fontweight="normal", loc="center")
