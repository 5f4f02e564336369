"""What the joint examples share: options, data, progress bars, tables, and the JSON beside the picture."""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from digits_report import processor, version
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for the nested loop of bench/

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

PACKAGES = ("deqfast", "torch", "torchdeq", "scikit-learn", "scikit-image", "numpy")
TIMES = "\N{MULTIPLICATION SIGN}"


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


def digits(seed: int, device: str, keep: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train pixels (B, 64) in [0, 1] and labels, test pixels and labels; a quarter, stratified, is held out."""
    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(pixels / 16, labels, test_size=0.25, stratify=labels, random_state=seed)
    train, test = (torch.tensor(a, dtype=torch.float32, device=device)[:keep] for a in split[:2])
    train_labels, test_labels = (torch.tensor(a, device=device)[:keep] for a in split[2:])
    return train, train_labels, test, test_labels


def progress(items: Iterable, describe: Callable[[Any], str], unit: str) -> Iterable:
    """The items behind a progress bar, or plain where tqdm is not installed."""
    items = list(items)
    if tqdm is None:
        print(f"{len(items)} {unit}s (pip install tqdm to see how far it is) ...", flush=True)
        yield from items
        return
    with tqdm(items, unit=unit, bar_format="{desc}|{bar}| {n}/{total} [{elapsed}<{remaining}]") as bar:
        for item in bar:
            bar.set_description(f"{describe(item):32} ", refresh=False)
            yield item


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
    picture = paint(draw, args.out / f"{name}.png")
    given = {key: value for key, value in vars(args).items() if key not in ("out", "started")}
    document = {
        "name": name,
        "title": title,
        "date": datetime.date.today().isoformat(),
        "quick": args.quick,
        "options": {key: str(value) for key, value in given.items()},
        "machine": {
            "processor": processor(),
            "device": torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "cpu",
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
        },
        "versions": {package: version(package) for package in PACKAGES},
        "seconds": time.perf_counter() - args.started,
        "header": list(header),
        "rows": [list(row) for row in rows],
        "targets": list(targets),
        "notes": list(notes),
        "picture": picture,
        "raw": raw,
    }
    path = args.out / f"{name}.json"
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    print(f"\nWrote {path}" + (f" and {args.out / picture}" if picture else ""))


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table: first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def paint(draw: Callable[[Path], None], path: Path) -> str | None:
    """The picture's file name; without matplotlib, say so and return None."""
    try:
        import matplotlib
    except ImportError:
        print("\nmatplotlib is not installed, so there is no picture: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    from digits_figure import STYLE
    from matplotlib import pyplot

    with pyplot.rc_context({**STYLE, "axes.titlepad": 8}):
        draw(path)
        pyplot.close("all")
    return path.name


@functools.cache
def palette() -> dict[str, str]:
    """One colour a method, distinguishable with any colour vision."""
    from digits_figure import INK, OURS, RIVALS

    rivals = ("torchdeq", "deqfast", "other", "torchdeq plain")
    return {"joint": OURS, **dict(zip(rivals, RIVALS, strict=False)), "ink": INK}


def show_image(axis: Any, image: Tensor, title: str = "") -> None:
    """A grey picture (H, W) in [0, 1], without a frame."""
    axis.imshow(image.detach().cpu().clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_axis_off()
    if title:
        axis.set_title(title, fontsize=9, fontweight="normal", loc="center")
