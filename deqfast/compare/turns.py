"""Timing in turns: memory speed drifts between runs, so rows are called one after the other, round by round."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

_RESOLUTION = 1e-2  # seconds that a turn lasts at the least
_LEAST_ROUNDS = 3


def alternate(
    rows: Mapping[str, Callable[[], object]], rounds: int, budget: float, device: torch.device
) -> dict[str, list[float]]:
    """Seconds a call of every row, one entry a round, each round begun by another row.

    A row is called once before, which does not count. ``budget`` (seconds) makes it fewer rounds, never below three.
    """
    names = list(rows)
    found: dict[str, list[float]] = {name: [] for name in names}
    wait = torch.cuda.synchronize if device.type == "cuda" else _nothing
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        once = {}
        for name in names:
            rows[name]()
            once[name] = max(_seconds(rows[name], 1, wait), 1e-7)
        repeats = {name: max(1, round(_RESOLUTION / once[name])) for name in names}
        total = sum(once[name] * repeats[name] for name in names)
        for turn in range(min(rounds, max(_LEAST_ROUNDS, int(budget / total)))):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                found[name].append(_seconds(rows[name], repeats[name], wait))
    finally:
        if collecting:
            gc.enable()
    return found


def _seconds(call: Callable[[], object], repeat: int, wait: Callable[[], object]) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    wait()
    return (time.perf_counter() - start) / repeat


def _nothing() -> None:
    pass


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
