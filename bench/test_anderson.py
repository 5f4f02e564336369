"""Time of one Anderson step at equal evaluations, float32, nearly free f.

The figures are in extra_info: rivals taken in turns within one run (bench/timing.py).  pytest-benchmark's own columns
time a row alone and serve `--benchmark-compare` between commits.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench import free, targets

ROWS = (
    targets.LIKE_FOR_LIKE, targets.BFLOAT16, targets.DEFAULT, targets.REFERENCE, targets.COMPILED, targets.TORCHDEQ,
    "scipy",
)  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("size", list(free.SIZES))
def test_anderson(benchmark: Any, equal_evaluations: Any, size: str, row: str) -> None:
    comparison = equal_evaluations(size, "anderson")
    if row not in comparison.facts:
        pytest.skip(comparison.skipped.get(row, "takes one small sample at a time"))
    facts = comparison.facts[row]
    benchmark.group = f"Anderson {size}"
    benchmark.extra_info.update(facts, row=row)
    if row == targets.TORCHDEQ:  # rivals that ran elsewhere or not at all are told beside the one all are compared with
        benchmark.extra_info.update(elsewhere=comparison.elsewhere, skipped=comparison.skipped)
    rounds = 5 if facts["us"] * facts["evaluations"] < 2e5 else 1
    benchmark.pedantic(comparison.calls[row], rounds=rounds, iterations=1, warmup_rounds=0)
