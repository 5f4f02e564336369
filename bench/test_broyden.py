"""Time of one Broyden step at equal evaluations, full memory, float32, nearly free f; see bench/test_anderson.py."""

from __future__ import annotations

from typing import Any

import pytest

from bench import free, targets

ROWS = (targets.BROYDEN, targets.REFERENCE, targets.TORCHDEQ, "scipy")


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("size", list(free.SIZES))
def test_broyden(benchmark: Any, equal_evaluations: Any, size: str, row: str) -> None:
    comparison = equal_evaluations(size, "broyden")
    if row not in comparison.facts:
        pytest.skip(comparison.skipped.get(row, "takes one small sample at a time"))
    facts = comparison.facts[row]
    benchmark.group = f"Broyden {size}"
    benchmark.extra_info.update(facts, row=row)
    if row == targets.TORCHDEQ:  # rivals that ran elsewhere or not at all are told beside the one all are compared with
        benchmark.extra_info.update(elsewhere=comparison.elsewhere, skipped=comparison.skipped)
    rounds = 5 if facts["us"] * facts["evaluations"] < 2e5 else 1
    benchmark.pedantic(comparison.calls[row], rounds=rounds, iterations=1, warmup_rounds=0)
