"""A training step of dynamics.py with deqfast and with torchdeq's solvers, in turns: same weights, batch and budgets.

All solve with at most as many evaluations as were drawn, at the same relative tolerance, and differentiate by the same
phantom steps.
"""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import torch
from dynamics_model import BATCH, DAMPING, LAST, PHANTOM, RTOL, Budgets, Classifier, Solve, by_deqfast, train_pass
from torch import Tensor, nn

import deqfast as dq

try:
    import torchdeq
except ImportError:
    torchdeq = None
HAS_TORCHDEQ = torchdeq is not None

SOLVERS = {
    "torchdeq Anderson": "anderson",
    "torchdeq Broyden": "broyden",
    "torchdeq plain iteration": "fixed_point_iter",
}
OURS = "deqfast Broyden"


def by_torchdeq(solver: str) -> Solve:
    deq = torchdeq.get_deq(
        ift=False, grad=PHANTOM, tau=DAMPING, f_solver=solver, f_tol=RTOL, f_stop_mode="rel", f_max_iter=LAST
    )

    def solve(cell: nn.Module, x: Tensor, budget: int) -> Tensor:
        states, _ = deq(lambda z: cell(z, x), torch.zeros_like(x), solver_kwargs={"f_max_iter": budget})
        return states[-1]

    return solve


def players() -> dict[str, Solve]:
    """deqfast first, as the models of the table are trained."""
    found: dict[str, Solve] = {OURS: by_deqfast}
    found["deqfast plain iteration"] = functools.partial(by_deqfast, solver=dq.Picard())
    if HAS_TORCHDEQ:
        found.update({name: by_torchdeq(solver) for name, solver in SOLVERS.items()})
    return found


def measure(hidden: int, data: tuple[Tensor, ...], turns: int, device: str) -> list[dict[str, Any]]:
    """A row a solver: seconds of a training step, and the ratio to deqfast's by turn."""
    data = tuple(t[:BATCH] for t in data)
    models = {}
    for name, solve in players().items():
        torch.manual_seed(0)
        models[name] = Classifier(hidden, solve).to(device)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    order = list(models)
    for turn in range(-2, turns):  # the first two load code and fill caches: they are timed for nobody
        for name in order:
            optimiser = torch.optim.SGD(models[name].parameters(), lr=0.0)  # the weights stay the same
            start = clock(device)
            train_pass(models[name], optimiser, data, Budgets(True, turn + 2), turn + 2)
            if turn >= 0:
                seconds[name].append(clock(device) - start)
        order = order[1:] + order[:1]
    rows = []
    for name, spent in seconds.items():
        ratios = sorted(mine / ours for mine, ours in zip(spent, seconds[OURS], strict=True))
        found = {"name": name, "seconds": statistics.median(spent), "ratio": statistics.median(ratios)}
        rows.append({**found, "ratios": ratios})
    return rows


def clock(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()
