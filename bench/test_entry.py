"""What an eager call pays for being compilable: a small solve through its entry (deqfast/compiled.py) and without it.

Taken in turns; the ratio is in extra_info. An entry looks at the thread's callback once a call, whatever f is.
"""

from __future__ import annotations

from typing import Any

import torch

import deqfast as dq
from bench import timing


def test_entry(benchmark: Any) -> None:
    z0 = torch.zeros(1, 8)
    inside = dq.fixed_point.__wrapped__  # type: ignore[attr-defined]

    def solve(fixed_point: Any) -> Any:
        return lambda: fixed_point(torch.cos, z0, solver="picard", max_iter=1, backward="none")

    rows = {"with": solve(dq.fixed_point), "without": solve(inside)}
    times = timing.alternate(rows, rounds=51)
    benchmark.group = "Entry of an eager call"
    benchmark.extra_info.update(
        us=1e6 * times["with"].median,
        without_us=1e6 * times["without"].median,
        ratio=times["with"].median / times["without"].median,
    )
    benchmark(rows["with"])
