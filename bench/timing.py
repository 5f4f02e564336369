"""Alternating timing: rivals take turns inside one run, because memory speed drifts two to four times between runs.

Every round calls every row once, starting from another row each time, with the garbage collector off.  Only ratios of
medians from one run are compared.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

LEVEL = 0.95  # of the interval around a ratio


@dataclass
class Timing:
    """Seconds a call, one entry a round."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True)
class Ratio:
    """Median of ratios that were taken in turns, and the interval that holds its true value with ``coverage``."""

    ratio: float
    low: float
    high: float
    coverage: float


def ratio(above: Sequence[float], below: Sequence[float], level: float = LEVEL) -> Ratio:
    """Median of ``above / below``, turn by turn, with an interval of order statistics.

    The interval assumes nothing of the distribution: the true median lies between the j-th smallest and the j-th
    largest of n ratios unless fewer than j fall on one side of it, with the probability of so few heads in n tosses.
    Of all j, the largest whose coverage is at least ``level``; with fewer than six ratios none reaches 0.95, and the
    interval is all of them.
    """
    found = sorted(a / b for a, b in zip(above, below, strict=True))
    n = len(found)

    def coverage(j: int) -> float:
        return 1 - 2 * sum(math.comb(n, i) for i in range(j)) / 2**n

    j = max([1, *(j for j in range(1, n // 2 + 1) if coverage(j) >= level)])
    return Ratio(statistics.median(found), found[j - 1], found[n - j], max(0.0, coverage(j)))


@contextmanager
def no_collection() -> Iterator[None]:
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def alternate(
    rows: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    least_rounds: int = 5,
    budget: float = 20.0,
    resolution: float = 2e-3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time callables in turn.

    A fast row is repeated within its turn until the turn lasts `resolution` seconds.  `budget` (seconds) shortens the
    run to fewer rounds, never below `least_rounds`.  One warm-up call a row comes first and is discarded.
    With `time.process_time` as `clock` a single thread may be timed where other programs keep its core busy.
    A row with a method `seconds(count)` is timed by that: a call of it runs in another process.
    """
    names = list(rows)
    repeats: dict[str, int] = {}
    total = 0.0
    timings = {name: Timing() for name in names}
    with no_collection():
        for name in names:
            rows[name]()
            once = max(_seconds(rows[name], 1, clock), 1e-7)
            repeats[name] = max(1, round(resolution / once))
            total += once * repeats[name]
        count = min(rounds, max(least_rounds, int(budget / total)))
        for turn in range(count):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                timings[name].seconds.append(_seconds(rows[name], repeats[name], clock))
    return timings


def _seconds(call: Callable[[], object], count: int, clock: Callable[[], float]) -> float:
    """Of a call, of so many in a row."""
    elsewhere: Callable[[int], float] | None = getattr(call, "seconds", None)
    if elsewhere is not None:
        return elsewhere(count)
    start = clock()
    for _ in range(count):
        call()
    return (clock() - start) / count


def copier(nbytes: int = 256 * 2**20) -> tuple[Callable[[], object], int]:
    """A memory copy to be timed as a row, and the bytes it moves (read plus written): the machine's bandwidth."""
    source = torch.ones(nbytes // 4)
    target = torch.zeros_like(source)
    return (lambda: target.copy_(source)), 2 * nbytes
