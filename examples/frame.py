"""What every example shares: the digits, progress bars, tables, one style of pictures, and where figures come from."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

Item = TypeVar("Item")

TIMES = "\N{MULTIPLICATION SIGN}"
# Okabe and Ito's palette: distinguishable with any colour vision. One colour a method, in every panel.
OURS = "#0072B2"
RIVALS = ["#D55E00", "#E69F00", "#009E73", "#CC79A7", "#8C6D46"]
INK = "#222222"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": "#B5B5B5",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#EBEBEB",
    "grid.linewidth": 0.8,
    "xtick.color": "#6E6E6E",
    "ytick.color": "#6E6E6E",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "lines.solid_capstyle": "round",
}


def digits(seed: int, device: str, keep: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train pixels (B, 64) in [0, 1] and labels, test pixels and labels; a quarter, stratified, is held out."""
    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(pixels / 16, labels, test_size=0.25, stratify=labels, random_state=seed)
    train, test = (torch.tensor(a, dtype=torch.float32, device=device)[:keep] for a in split[:2])
    train_labels, test_labels = (torch.tensor(a, device=device)[:keep] for a in split[2:])
    return train, train_labels, test, test_labels


def progress(items: Iterable[Item], describe: Callable[[Item], str], unit: str) -> Iterator[Item]:
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


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table: first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def paint(draw: Callable[[Path], None], path: Path, title_pad: float) -> bool:
    """Whether there is a picture; without matplotlib, say so."""
    try:
        import matplotlib
    except ImportError:
        print("\nmatplotlib is not installed, so there is no picture: pip install matplotlib")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({**STYLE, "axes.titlepad": title_pad}):
        draw(path)
        pyplot.close("all")
    return True


def provenance(args: argparse.Namespace, packages: Sequence[str], silent: Sequence[str] = ("out",)) -> dict[str, Any]:
    """What a JSON file says of its figures: date, options but for the ``silent`` ones, machine, versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "options": {key: str(value) for key, value in vars(args).items() if key not in silent},
        "machine": {
            "processor": processor(),
            "device": torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "cpu",
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
        },
        "versions": {package: version(package) for package in packages},
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
