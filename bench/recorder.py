"""Counts evaluations to tolerance from outside a solver, by watching the iterates it hands to f.

Every method is measured by the same ruler: evaluation k is the k-th call of f, its iterate z_k is judged by
||f(z_k) - z_k|| / ||f(z_k)|| in float64, sample by sample, and a sample's count is the first k that meets the
tolerance. A solver may freeze samples that it considers done, restart, or return another iterate; a first hit is not
undone by that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.families.base import Problem
from bench.peers import Peer, relative_residual


class Enough(Exception):
    """Raised out of f when nothing is left to learn from the solve."""


class Recorder:
    """Wraps f; `first[t]` is the evaluation at which each sample met tolerance t, or 0."""

    def __init__(self, f: Callable[[Tensor], Tensor], batch: int, tolerances: Sequence[float], cap: int) -> None:
        self.f, self.cap, self.calls = f, cap, 0
        self.tolerances = tuple(tolerances)
        self.first = torch.zeros(len(self.tolerances), batch, dtype=torch.long)
        self.least = torch.full((batch,), torch.inf, dtype=torch.float64)

    def __call__(self, z: Tensor) -> Tensor:
        if self.calls >= self.cap:
            raise Enough
        self.calls += 1
        fz = self.f(z)
        residual = relative_residual(z, fz)
        self.least = torch.fmin(self.least, residual)
        for row, tolerance in enumerate(self.tolerances):
            new = (residual <= tolerance) & (self.first[row] == 0)
            self.first[row][new] = self.calls
        open_samples = (self.first == 0).any(dim=0)
        if not open_samples.any() or not z.flatten(1)[open_samples].isfinite().all(dim=1).any():
            raise Enough
        return fz


@dataclass(frozen=True)
class Count:
    """Evaluations per tolerance and sample, 0 where the cap came first; `error` if the solver raised."""

    evaluations: list[list[int]]
    least_residual: list[float]
    error: str | None


def count(peer: Peer, problem: Problem, tolerances: Sequence[float], cap: int) -> Count:
    """Run a peer on a problem without a tolerance of its own and record when each sample got where.

    With its tolerance at zero a solver works on until f's wrapper stops it, so one run serves all tolerances; samples
    are independent in every method measured, so the early part of a run is the run to a larger tolerance.
    """
    recorder = Recorder(problem.f, problem.B, tolerances, cap)
    error = None
    with torch.no_grad():
        try:
            peer.solve(recorder, problem.z0, cap, 0.0)
        except Enough:
            pass
        except torch.linalg.LinAlgError as raised:  # type: ignore[attr-defined]  # a batch that raises has failed its open samples; the row says so
            error = f"{type(raised).__name__}: {str(raised).splitlines()[0][:120]}"
    least = [value if value < float("inf") else -1.0 for value in recorder.least.tolist()]
    return Count(recorder.first.tolist(), least, error)
