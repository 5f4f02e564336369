"""What one comparison found: a problem, a package's own solver and deqfast in its place."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench import timing

RESOLUTION = 0.02  # seconds a turn


@dataclass(frozen=True)
class Row:
    """A line of docs/adoption.md.

    Args:
        package: whose solver was replaced.
        problem: what was solved.
        own: the package's solver.
        evaluations: own and deqfast's; None where a solver has no such count.
        ratio: own processor time over deqfast's, in turns within one process, with its interval.
        difference: largest of the answers'; ``within`` is what was asked for.
        solved: whether own and deqfast's met the tolerance.
        note: what a reader has to know.
    """

    package: str
    problem: str
    own: str
    evaluations: tuple[float | None, float | None] = (None, None)
    ratio: tuple[float, float, float] | None = None
    difference: float | None = None
    within: float | None = None
    solved: tuple[bool, bool] = (True, True)
    note: str = ""


@dataclass
class Record:
    """All rows of a run, tables of who solves what, and what was left out."""

    rows: list[Row] = field(default_factory=list)
    solves: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, row: Row) -> Row:
        self.rows.append(row)
        return row

    def as_dict(self) -> dict[str, Any]:
        return {"rows": [asdict(row) for row in self.rows], "solves": self.solves, "skipped": self.skipped}


def in_turns(
    own: Callable[[], object], ours: Callable[[], object], rounds: int = 11, budget: float = 12.0, least: int = 7
) -> tuple[float, float, float]:
    """Own processor time over deqfast's: the median of turns, and its interval.

    Both run on one thread, so that other programs lengthen neither's, but for what they do to the caches.
    """
    calls = (own, ours)
    seconds: tuple[list[float], list[float]] = ([], [])
    with timing.no_collection():
        for call in calls:
            call()
        once = sum(_seconds(call, 1) for call in calls)
        repeat = max(1, round(RESOLUTION / max(once, 1e-9)))
        for turn in range(min(rounds, max(least, int(budget / (once * repeat))))):
            for which in (0, 1) if turn % 2 else (1, 0):
                seconds[which].append(_seconds(calls[which], repeat))
    ratio = timing.ratio(*seconds)
    return ratio.ratio, ratio.low, ratio.high


def _seconds(call: Callable[[], object], repeat: int) -> float:
    start = time.process_time()
    for _ in range(repeat):
        call()
    return time.process_time() - start


class Counted:
    """A callable that counts its calls."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f, self.calls = f, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.f(*args, **kwargs)

    def of(self, solve: Callable[[], Any]) -> tuple[Any, int]:
        """What a solve returns, and how often it called."""
        before = self.calls
        return solve(), self.calls - before


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference of two answers, relative to the largest number of the first."""
    scale = float(a.detach().abs().max())
    return float((a - b).detach().abs().max()) / (scale or 1.0)


class Passes(torch.autograd.Function):
    """Identity that counts its backward passes."""

    count = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Passes.count += 1
        return gradient
