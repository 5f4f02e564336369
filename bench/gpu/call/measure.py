"""Facts and the benchmark's sections, one item each: `python -m bench.gpu.call.measure facts|model|sections`.

What an item returns goes into gpu.json as it comes, so that a call that is cut off leaves what `python -m bench.report`
reads. ``--device cpu`` takes the same paths on CPU tensors of a few numbers: it tries the script.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import meta
from bench.gpu import solves, steps, training
from bench.gpu.call.items import Items
from bench.gpu.device import Place
from bench.gpu.run import backends, device_facts

BUDGET = 170.0  # seconds after which a section begins no further row


def launch_microseconds(place: Place) -> float:
    """A launch of the smallest kernel, of a thousand in a row by the host's clock."""
    t = torch.zeros(1, device=place.device)
    found = []
    for _ in range(5):
        place.synchronize()
        begin = time.perf_counter()
        for _ in range(1000):
            t.add_(1)
        place.synchronize()
        found.append((time.perf_counter() - begin) * 1e3)  # seconds of a thousand, in microseconds of one
    return statistics.median(found)


def facts(place: Place, items: Items) -> None:
    """What the figures belong to, and what the device can do at best."""
    items.run("device", lambda: device_facts(place), gpu="device")
    items.run("what it belongs to", lambda: meta.describe("python .ci/gpu.py"), gpu="meta")
    items.run("backends", lambda: backends(place)[0], gpu="backends")
    items.run("missing backends", lambda: backends(place)[1], gpu="missing_backends")
    items.run("launch, us", lambda: launch_microseconds(place), gpu="launch_us")
    items.run("copy, bytes a second", lambda: steps.copy_bandwidth(place, 5), gpu="copy_bytes_per_second")


def model(place: Place, items: Items) -> None:
    """The steps of the notes' table, row by row, the shortest rounds that tell something."""
    found, _ = backends(place)
    copy = steps.copy_bandwidth(place, 3)
    for section, cases, taken, rounds in (
        ("latency", steps.latency_cases(place, found), 96 if place.cuda else 16, 6),
        ("bandwidth", steps.bandwidth_cases(place, found), 8, 3),
    ):
        for case in cases:
            name = f"{section}: {case.name}, {case.B} x {case.N}, {case.h}, {case.backend}"

            def row(case: steps.Case = case, taken: int = taken, rounds: int = rounds) -> list[dict[str, Any]]:
                return steps.measure(place, [case], copy, taken, rounds)

            items.run(name, row, gpu=section)


def sections(place: Place, items: Items) -> None:
    """The rest of the benchmark."""
    found, _ = backends(place)
    copy, rounds = steps.copy_bandwidth(place, 3), 3 if not place.cuda else 9
    parts: dict[str, Callable[[], Any]] = {
        "histories": lambda: steps.measure(place, steps.history_cases(place, found), copy, 8, rounds),
        "joint": lambda: steps.measure(place, steps.joint_cases(place, found), copy, 8, rounds),
        "device_loop": lambda: solves.loop_on_device(place, found, rounds),
        "solves": lambda: solves.whole_solves(place, found, rounds),
        "training": lambda: training.measure(place, found, rounds),
    }
    for name, part in parts.items():
        items.run(name, part, gpu=name)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.call.measure", description=__doc__)
    parser.add_argument("what", choices=("facts", "model", "sections"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--done", type=Path)
    options = parser.parse_args()
    sys.path[1:1] = filter(None, os.environ.get("DEQFAST_BENCH_PATH", "").split(os.pathsep))
    place = Place(options.device, BUDGET, quick=not options.device.startswith("cuda"))
    items = Items(options.done, place.synchronize)
    {"facts": facts, "model": model, "sections": sections}[options.what](place, items)
    return int(items.bad)


if __name__ == "__main__":
    sys.exit(main())
