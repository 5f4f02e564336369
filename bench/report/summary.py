"""Figures of a convergence run: geometric means, failures, ratios and performance profiles.

Every problem weighs the same, however many samples its batch has.  A sample that never meets the tolerance counts as
failed and enters the geometric mean at the cap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Record = Mapping[str, Any]


def counts_at(record: Record, method: str, problem: str, tolerance: float) -> list[int] | None:
    """Per-sample counts, or None if the tolerance is below what this problem can be asked."""
    tolerances = record["problems"][problem]["tolerances"]
    if tolerance not in tolerances:
        return None
    return record["counts"][method][problem]["evaluations"][tolerances.index(tolerance)]


def cells(record: Record, method: str, tolerances: Sequence[float]) -> list[tuple[float, float]]:
    """(mean log evaluations, share failed) of every (problem, tolerance)."""
    cap, out = record["cap"], []
    for problem in record["problems"]:
        for tolerance in tolerances:
            counts = counts_at(record, method, problem, tolerance)
            if counts is not None:
                logs = [math.log(k or cap) for k in counts]
                out.append((sum(logs) / len(logs), sum(k == 0 for k in counts) / len(counts)))
    return out


def geometric_mean(record: Record, method: str, tolerances: Sequence[float]) -> float:
    found = cells(record, method, tolerances)
    return math.exp(sum(mean for mean, _ in found) / len(found))


def failed_percent(record: Record, method: str, tolerances: Sequence[float]) -> float:
    found = cells(record, method, tolerances)
    return 100 * sum(failed for _, failed in found) / len(found)


def both_solve_ratio(record: Record, method: str, other: str, tolerances: Sequence[float]) -> float:
    """Geometric mean of other/method over the samples that both solve: what is left without the failures."""
    logs = []
    for problem in record["problems"]:
        for tolerance in tolerances:
            a, b = (counts_at(record, name, problem, tolerance) for name in (method, other))
            pairs = [math.log(y / x) for x, y in zip(a or (), b or (), strict=True) if x and y]
            if pairs:
                logs.append(sum(pairs) / len(pairs))
    return math.exp(sum(logs) / len(logs)) if logs else float("nan")


def performance_profile(
    record: Record, methods: Sequence[str], tolerance: float, factors: np.ndarray
) -> dict[str, np.ndarray]:
    """Dolan-More profiles: share of samples solved within `factor` times the best of `methods`."""
    share = {method: np.zeros_like(factors) for method in methods}
    weight = 0
    for problem in record["problems"]:
        rows = {method: counts_at(record, method, problem, tolerance) for method in methods}
        if any(row is None for row in rows.values()):
            continue
        table = np.array([[k or math.inf for k in rows[method] or ()] for method in methods])
        best = table.min(axis=0)
        weight += 1
        for method, row in zip(methods, table, strict=True):
            solved = np.isfinite(row)
            ratio = np.where(solved, row / np.where(np.isfinite(best), best, 1.0), math.inf)
            share[method] += (ratio[:, None] <= factors[None, :]).mean(axis=0)
    return {method: values / max(weight, 1) for method, values in share.items()}
