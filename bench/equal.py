"""Equal-evaluations comparison at one size: every row solves the same map with as many evaluations, in turns.

A row's facts: microseconds an evaluation with f's own time and without, evaluations, residual of what it returned
(float64), samples whose residual is exactly zero (frozen work is not work done), floor bytes and the fraction of
the floor, and the ratio of torchdeq's median to its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench import floor, free, peers, targets, timing
from bench.peers import Peer


@dataclass
class Comparison:
    """Facts by row name; `calls` are the timed callables, `elsewhere` rows that another interpreter timed, and
    `skipped` says why a row is absent.
    """

    facts: dict[str, dict[str, Any]]
    elsewhere: dict[str, dict[str, Any]]
    calls: dict[str, Callable[[], object]]
    skipped: dict[str, str]


def own_anderson() -> dict[str, Any]:
    """deqfast's Anderson by row name: torchdeq's own method with two histories, and the defaults."""
    import deqfast as dq

    return {
        targets.LIKE_FOR_LIKE: dq.Anderson(m=6, type=2, history_dtype=torch.float32, evict="oldest"),
        targets.BFLOAT16: dq.Anderson(m=6, type=2, history_dtype=torch.bfloat16, evict="oldest"),
        targets.DEFAULT: dq.Anderson(),
    }


def contestants(method: str, single: bool) -> dict[str, Callable[[], Peer]]:
    """Builders by row name, so that a rival that is not installed becomes a skipped row."""
    import deqfast as dq

    rows: dict[str, Callable[[], Peer]] = {}
    if method == "anderson":
        own = own_anderson()
        for name, solver in own.items():
            rows[name] = partial(peers.deqfast, solver, name)
        rows[targets.REFERENCE] = partial(peers.deqfast, own[targets.LIKE_FOR_LIKE], targets.REFERENCE, "reference")
        rows[targets.COMPILED] = peers.compiled
    else:
        rows[targets.BROYDEN] = partial(peers.deqfast, dq.Broyden(), targets.BROYDEN)
        rows[targets.REFERENCE] = partial(peers.deqfast, dq.Broyden(), targets.REFERENCE, "reference")
    rows[targets.TORCHDEQ] = partial(peers.torchdeq, method, targets.TORCHDEQ)
    if single:
        rows["scipy"] = partial(peers.scipy, "anderson" if method == "anderson" else "broyden1")
    return rows


def floor_bytes(row: str, method: str, numbers: int, evaluations: int) -> int | None:
    """Floor of the row's own algorithm and history width; rivals are held against the float32 one."""
    import deqfast as dq

    if method == "broyden":
        return floor.broyden_bytes(numbers, evaluations)
    if row == targets.DEFAULT:
        chosen = dq.Anderson()
        width = torch.empty(0, dtype=chosen.history_dtype or torch.bfloat16).element_size()
        return floor.anderson_bytes(numbers, evaluations, chosen.m, width, mixed=chosen.type == "mixed")
    return floor.anderson_bytes(numbers, evaluations, 6, 2 if row == targets.BFLOAT16 else 4)


def compare(size: str, method: str, *, rounds: int, budget: float, jax_python: str | None = None) -> Comparison:
    """Measure all rows of one size; `method` is 'anderson' or 'broyden'."""
    B, N = free.SIZES[size]
    evaluations = free.evaluations(size, method)
    f, z0 = free.diagonal_map(B, N)
    facts: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], object]] = {}
    skipped: dict[str, str] = {}
    with torch.no_grad():
        for name, build in contestants(method, single=B == 1 and N <= 100_000).items():
            try:
                peer = build()
            except ImportError as error:
                skipped[name] = str(error)
                continue
            outcome = peers.run(peer, f, z0, evaluations)
            facts[name] = {
                "evaluations": outcome.evaluations,
                "residual": float(outcome.residual.median()),
                "residual_worst": float(outcome.residual.max()),
                "exact_share": float((outcome.residual == 0).double().mean()),
            }
            calls[name] = partial(_no_grad, peer, f, z0, evaluations)
        timed: dict[str, Callable[[], object]] = {**calls, "f": lambda: f(z0)}
        copy, copied = timing.copier()
        if B * N >= 1_000_000:
            timed["copy"] = copy
        taken = timing.alternate(timed, rounds=rounds, budget=budget)
    own_f = taken["f"].median
    bandwidth = copied / taken["copy"].median if "copy" in taken else None
    for name, row in facts.items():
        seconds, (low, high) = taken[name].median, taken[name].quartiles
        row.update(_speed(seconds, low, high, row["evaluations"], own_f))
        total = floor_bytes(name, method, B * N, evaluations)
        if total is not None and bandwidth is not None:
            row["floor_bytes"], row["copy_GB_s"] = total, bandwidth / 1e9
            row["floor_fraction"] = total / max(seconds - row["evaluations"] * own_f, 1e-9) / bandwidth
    elsewhere = _jaxopt_row(skipped, method, size, evaluations, own_f, jax_python)
    rival = facts.get(targets.TORCHDEQ)
    for row in (*facts.values(), *elsewhere.values()):
        row.update(B=B, N=N, size=size, method=method)
        if rival is not None:
            row["ratio_to_torchdeq"] = rival["us"] / row["us"]
            row["ratio_to_torchdeq_without_f"] = rival["us_without_f"] / row["us_without_f"]
    return Comparison(facts, elsewhere, calls, skipped)


def _no_grad(peer: Peer, f: peers.Map, z0: torch.Tensor, evaluations: int) -> torch.Tensor:
    with torch.no_grad():
        return peer.solve(f, z0, evaluations, 0.0)


def _speed(seconds: float, low: float, high: float, evaluations: int, own_f: float) -> dict[str, float]:
    """Microseconds an evaluation: median and quartiles with f, and the median without f's separately timed share."""
    scale = 1e6 / evaluations
    return {
        "us": seconds * scale,
        "us_low": low * scale,
        "us_high": high * scale,
        "us_f": own_f * 1e6,
        "us_without_f": max(seconds * scale - own_f * 1e6, 1e-3),
    }


def _jaxopt_row(
    skipped: dict[str, str], method: str, size: str, evaluations: int, own_f: float, python: str | None
) -> dict[str, dict[str, Any]]:
    a, b = free.coefficients(*free.SIZES[size])
    found = peers.jaxopt(method, a, b, evaluations, python=python)
    if "skipped" in found:
        skipped["jaxopt"] = found["skipped"]
        return {}
    row = _speed(found["median"], found["low"], found["high"], evaluations, own_f)
    return {"jaxopt": {"evaluations": evaluations, "residual": found["residual"], "versions": found["versions"], **row}}
