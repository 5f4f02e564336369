"""Time to tolerance: whole solves, stop tests included, where f is nearly free, deqfast against torchdeq in turns.

Problems are the suite's cheap ones and elementwise contractions up to B N = 262,144.  A rival takes part where its
count says it reaches the tolerance on every sample, and is given the fewest evaluations with which it does, so that the
max_iter-sized buffers of torchdeq's Broyden cost it nothing.  Where no rival gets there the row has no ratio.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from bench import free, methods, peers, problems, timing
from bench.families.base import Problem
from bench.peers import Peer
from bench.recorder import count

FREE_SIZES = ("1x64", "64x128", "64x1024", "512x512")
SLACK = 2.0  # torchdeq returns f of the iterate that met the tolerance, whose own residual may be a little above


def cheap_problems(quick: bool) -> list[Problem]:
    pool = [problem for problem in problems.suite(quick=quick) if problem.cheap]
    for size in FREE_SIZES[:2] if quick else FREE_SIZES:
        f, z0 = free.contraction(*free.SIZES[size])
        pool.append(Problem(f"free/{size}", "free", f, z0, "elementwise contraction", cheap=True))
    return pool


def time_one(problem: Problem, tolerance: float, contestants: Sequence[Peer], cap: int, rounds: int) -> dict[str, Any]:
    """Median seconds, evaluations and worst returned residual of every method that reaches the tolerance."""
    calls: dict[str, Callable[[], object]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for peer in contestants:
        reached = count(peer, problem, (tolerance,), cap).evaluations[0]
        if not all(reached):
            facts[peer.name] = {"failed": sum(k == 0 for k in reached)}
            continue
        # the rival's own test sees float32 residuals and a batch that must meet the tolerance at once, hence the slack
        allowed = min(cap, max(reached) + 10)
        outcome = peers.run(peer, problem.f, problem.z0, allowed, tolerance)
        missed = int((~(outcome.residual <= SLACK * tolerance)).sum())
        if missed:
            facts[peer.name] = {"failed": missed}
            continue
        facts[peer.name] = {"evaluations": outcome.evaluations, "residual": float(outcome.residual.max())}
        calls[peer.name] = partial(peer.solve, problem.f, problem.z0, allowed, tolerance)
    if calls:
        for name, taken in timing.alternate(calls, rounds=rounds, budget=3.0, resolution=1e-3).items():
            low, high = taken.quartiles
            facts[name].update(seconds=taken.median, low=low, high=high)
    return facts


def measure(contestants: Sequence[Peer], tolerances: Sequence[float], cap: int, quick: bool) -> dict[str, Any]:
    rows = []
    with torch.no_grad():
        for problem in cheap_problems(quick):
            for tolerance in tolerances:
                if tolerance < problem.tightest:
                    continue
                facts = time_one(problem, tolerance, contestants, cap, rounds=3 if quick else 7)
                rows.append({"problem": problem.name, "tolerance": tolerance, "methods": facts})
    return {"rows": rows, "summary": summarise(rows)}


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Geometric mean of (best rival's time / deqfast's), over the rows in which both sides arrive."""
    ratios, only_own, only_rival = [], 0, 0
    for row in rows:
        facts = row["methods"]
        own = facts[methods.DEFAULT].get("seconds")
        best = min((facts[name]["seconds"] for name in methods.TORCHDEQ if "seconds" in facts[name]), default=None)
        if own and best:
            ratios.append(best / own)
        elif own:
            only_own += 1
        elif best:
            only_rival += 1
    return {
        "geometric_mean": statistics.geometric_mean(ratios) if ratios else None,
        "least": min(ratios, default=None),
        "most": max(ratios, default=None),
        "rows": len(ratios),
        "only_deqfast": only_own,
        "only_torchdeq": only_rival,
    }
