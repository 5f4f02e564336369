"""Who solves which system of others' test suites: ``dq.root``, ``dq.compat.scipy``, and SciPy itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor

import deqfast as dq
from adoption.problem_sets import REGISTRY, Problem, System
from adoption.rows import Record

LIMIT = 2000  # evaluations
ASKED, SOLVED = 1e-8, 1e-6  # largest |F_i|
STARTS = 8
FAILURES = (ArithmeticError, RuntimeError, ValueError, np.linalg.LinAlgError, optimize.NoConvergence)

Array = Any
Solver = Callable[[Callable[[Array], Array], Array], Array]
SOLVERS: dict[str, Solver] = {
    "dq.root": lambda F, x: dq.root(
        lambda z: torch.from_numpy(F(z.numpy())),
        torch.from_numpy(x),
        batch_dims=0,
        rtol=0.0,
        atol=ASKED,
        max_iter=LIMIT,
        backward="none",
    ).z.numpy(),
    "dq.compat.scipy.anderson": lambda F, x: dq.compat.scipy.anderson(F, x, f_tol=ASKED),
    "dq.compat.scipy.broyden1": lambda F, x: dq.compat.scipy.broyden1(F, x, f_tol=ASKED),
    "scipy anderson": lambda F, x: optimize.anderson(F, x, f_tol=ASKED),
    "scipy broyden1": lambda F, x: optimize.broyden1(F, x, f_tol=ASKED),
    "scipy newton_krylov": lambda F, x: optimize.newton_krylov(F, x, f_tol=ASKED),
    "scipy hybr": lambda F, x: optimize.root(F, x, method="hybr", tol=1e-12).x,
}
BATCHED = ("dq.compat.scipy.anderson", "dq.compat.scipy.broyden1")
_SOLVED: dict[str, int] = dict.fromkeys(SOLVERS, 0)
_STARTS_SOLVED: dict[str, int] = {}


class Enough(RuntimeError):
    """No more evaluations."""


class Counting:
    """F on arrays, as often as ``LIMIT`` allows."""

    def __init__(self, F: System) -> None:
        self.F, self.calls = F, 0

    def __call__(self, x: Array) -> Array:
        if self.calls >= LIMIT:
            raise Enough
        self.calls += 1
        return self.F(torch.as_tensor(np.asarray(x), dtype=torch.float64)).numpy()


def solved(F: System, x: Array) -> Tensor:
    """Of each row whether it is a root."""
    return F(torch.as_tensor(x, dtype=torch.float64)).abs().amax(-1) <= SOLVED


def evaluations(solver: Solver, problem: Problem, start: Tensor) -> int | None:
    """How many it took, None where no root was found."""
    F = Counting(problem.F)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            x = solver(F, start.numpy().copy())
        except (*FAILURES, dq.compat.scipy.NoConvergence):
            return None
    return F.calls if bool(solved(problem.F, x)) else None


@pytest.mark.parametrize("name", REGISTRY)
def test_one_system(name: str, record: Record) -> None:
    problem = REGISTRY[name]
    if problem.root is not None:
        assert solved(problem.F, problem.root)
    counts = {solver: evaluations(solve, problem, problem.start) for solver, solve in SOLVERS.items()}
    for solver, count in counts.items():
        _SOLVED[solver] += count is not None
    record.solves.append(
        {"suite": problem.suite, "problem": problem.name, "N": problem.start.numel(), "evaluations": counts}
    )


@pytest.mark.parametrize("name", [name for name in REGISTRY if name.startswith("MGH")])
def test_a_batch_of_starts(name: str, record: Record) -> None:
    """The start itself and seven near it: as rows of one call, and one after the other."""
    problem = REGISTRY[name]
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(STARTS, problem.start.numel(), generator=generator, dtype=torch.float64)
    noise[0] = 0.5
    starts = problem.start + 0.2 * (noise - 0.5) * problem.start.abs().clamp(min=0.1)
    counts = {}
    for solver in BATCHED:
        solve = getattr(dq.compat.scipy, solver.rpartition(".")[2])
        try:
            x = solve(problem.F, starts, f_tol=ASKED, maxiter=LIMIT, batched=True)
        except dq.compat.scipy.NoConvergence as failure:
            x = failure.args[0]
        counts[f"{solver}, batched"] = int(solved(problem.F, x).sum())
    for solver in (*BATCHED, "scipy anderson", "scipy broyden1", "scipy hybr"):
        counts[solver] = sum(evaluations(SOLVERS[solver], problem, start) is not None for start in starts)
    for solver, count in counts.items():
        _STARTS_SOLVED[solver] = _STARTS_SOLVED.get(solver, 0) + count
    record.solves.append({"suite": problem.suite, "problem": problem.name, "N": starts.shape[1], "starts": counts})


def test_anderson_solves_no_fewer_than_scipys() -> None:
    """Of Broyden's the table says who solves more."""
    assert _SOLVED["dq.compat.scipy.anderson"] >= _SOLVED["scipy anderson"]
    assert _STARTS_SOLVED.get("dq.compat.scipy.anderson, batched", 0) >= _STARTS_SOLVED.get("scipy anderson", 0)
