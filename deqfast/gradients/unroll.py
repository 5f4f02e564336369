"""Gradients through the solver itself: the updates of ``ops/reference.py`` as pure functions of tensors.

For tests of the other gradients, and for small solves whose every iterate is wanted in the graph: memory grows with
each evaluation. Which sample stops, which column goes and which step falls back are decisions, not differentiated; the
numbers, gamma and the norms that scale it included, are. History is never rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import transforms
from ..ops.anderson import AndersonWorkspace
from ..ops.broyden import BroydenWorkspace
from ..ops.codes import DIVERGENCE, STALL_FRACTION, STALL_MIN_STEPS, UNIT_RANGE, Int
from ..ops.packing import pack, unpack
from ..ops.workspace import Workspace
from ..problem import Problem
from ..solution import ConvergenceError, Solution
from ..status import Status
from .base import Gradient
from .unroll_steps import AndersonUpdate, BroydenUpdate, Evaluation


@dataclass(frozen=True)
class Unroll(Gradient):
    """Gradients through every iteration of the solver, by ordinary autograd.

    Exact derivatives of the iterate that the solver returned, whether or not it converged, to any order and through
    torch.func. Memory and backward cost grow with the evaluations: for tests, and for small solves. Works with
    ``trace`` and ``throw``; ``compact``, ``callback`` and ``progress`` raise ``ValueError``.
    """

    solves = True

    def solve(self, problem: Problem, z0: Any) -> Solution:
        """Solve, keeping the graph of every iteration."""
        options = problem.options
        if options.mode != "loop":
            raise ValueError(
                f"mode={options.mode!r} cannot be combined with backward={self}, which differentiates the loop"
            )
        refused = {
            "compact": options.compact is not False,
            "callback": options.callback is not None,
            "progress": options.progress,
        }
        for name, asked in refused.items():
            if asked:
                raise ValueError(f"{name} does not go together with backward=dq.Unroll()")
        ws = options.solver.workspace(problem.layout, problem.stopping)
        solution = _Unrolled(problem, ws, z0).run(options.returns, options.trace)
        if options.throw and not bool(solution.converged.all()):
            raise ConvergenceError(solution)
        return solution


def _norm(t: Tensor) -> Tensor:
    """Norm of each row in float64, without a graph."""
    return torch.linalg.vector_norm(t.detach().double(), dim=-1)


class _Unrolled:
    """One differentiable solve."""

    def __init__(self, problem: Problem, ws: Workspace, z0: Any) -> None:
        self.problem, self.ws, self.layout = problem, ws, problem.layout
        self.x = pack(self.layout, pytree.tree_leaves(z0))
        B, device = self.layout.B, self.x.device
        new = torch.zeros(B, dtype=torch.float64, device=device)
        self.status = torch.zeros(B, dtype=torch.int32, device=device)
        self.steps = torch.zeros_like(self.status)
        self.best_step = torch.zeros_like(self.status)
        self.best, self.best_x = torch.full_like(new, math.inf), self.x
        self.first, self.residual, self.norm, self.unit = new, new, new, new
        self.counters = torch.zeros(len(Int), B, dtype=torch.int32, device=device)
        self.nfe = 0

    def run(self, returns: str, trace: bool) -> Solution:
        """Iterate until every sample has stopped."""
        layout, problem, ws = self.layout, self.problem, self.ws
        step: Callable[[Evaluation], Tensor]
        if isinstance(ws, AndersonWorkspace):
            step = AndersonUpdate(ws)
        else:
            assert isinstance(ws, BroydenWorkspace)
            step = BroydenUpdate(ws)
        rows: list[Tensor] = []
        while layout.N and bool((self.status == Status.RUNNING).any()):
            z = layout.unflatten(unpack(layout, self.x))
            leaves = layout.flatten(problem.f(z, *problem.args), "f(z)")
            if problem.transformed:
                transforms.values(leaves)  # raises under vmap, where samples could not stop on their own
            f = pack(layout, leaves)
            self.nfe += 1
            evaluation = self._measure(f)
            if trace:
                rows.append(torch.where(self.steps == self.nfe, self.residual, math.nan).to(layout.acc))
            if bool(evaluation.going.any()):
                # Rounded to what f will see, as the stored iterates of the other backends are.
                x_new = step(evaluation).to(layout.dtype).to(layout.acc)
                self.x = torch.where(evaluation.going[:, None], x_new, self.x)
        return self._conclude(returns, rows if trace else None)

    def _measure(self, f: Tensor) -> Evaluation:
        """Statistics and status from a new evaluation."""
        ws = self.ws
        run = self.status == Status.RUNNING
        self.steps = self.steps + run.int()
        g_norm, f_norm = _norm(f - self.x), _norm(f)
        finite = torch.isfinite(g_norm) & torch.isfinite(f_norm)
        relative = torch.where(f_norm > 0, g_norm / f_norm, torch.where(g_norm > 0, math.inf, 0.0))
        relative = torch.where(finite, relative, math.inf).to(self.layout.acc).double()
        self.residual = torch.where(run, relative, self.residual)
        self.first = torch.where(run & (self.steps == 1), relative, self.first)
        converged = run & finite & (g_norm <= ws.stopping.atol + ws.stopping.rtol * f_norm)
        better = converged | (run & finite & ((relative < self.best) | (self.best_step == 0)))
        self.best = torch.where(better, relative, self.best)
        self.best_x = torch.where(better[:, None], self.x, self.best_x)
        self.best_step = torch.where(better, self.steps, self.best_step)

        idle = self.steps - self.best_step
        stalled = (idle >= STALL_MIN_STEPS) & (idle * STALL_FRACTION >= self.steps)
        label = torch.where(stalled, int(Status.STALLED), int(Status.MAX_ITER))
        label = torch.where(relative > DIVERGENCE * self.first, int(Status.DIVERGED), label)
        last = run & finite & ~converged & (self.steps == ws.stopping.max_iter)
        status = torch.where(run & ~finite, int(Status.NON_FINITE), self.status)
        status = torch.where(converged, int(Status.CONVERGED), status)
        self.status = torch.where(last, label, status).int()
        going = run & (self.status == Status.RUNNING)

        rms = torch.maximum(g_norm, f_norm) / math.sqrt(self.layout.N)
        scaled = rms * self.unit
        reset = going & (rms > 0) & ~((scaled >= 1 / UNIT_RANGE) & (scaled <= UNIT_RANGE))
        self.counters[Int.RESCALES] += (reset & (self.unit > 0)).int()
        limit = 120 if self.layout.acc == torch.float32 else 1000
        unit = torch.exp2(1.0 - torch.frexp(rms).exponent.clamp(-limit, limit).double())
        self.unit = torch.where(reset, unit, torch.where(going & (self.unit == 0), 1.0, self.unit))
        last_norm, self.norm = self.norm, torch.where(run, g_norm, self.norm)
        unit = self.unit.to(self.layout.acc)
        return Evaluation(self.x, f, going, reset, unit, self.steps, self.norm, last_norm, self.counters)

    def _conclude(self, returns: str, rows: list[Tensor] | None) -> Solution:
        layout, status = self.layout, self.status
        residual = self.best
        x = self.best_x
        if returns == "last":
            lost = (status == Status.NON_FINITE) & (self.best_step > 0)
            x = torch.where(lost[:, None], self.best_x, self.x)
            residual = torch.where(status == Status.NON_FINITE, self.best, self.residual)
        if layout.N == 0:
            status, residual = torch.full_like(status, Status.CONVERGED), torch.zeros_like(residual)
        residual = residual.to(layout.acc)
        return Solution(
            z=layout.unflatten(unpack(layout, x)),
            converged=status == Status.CONVERGED,
            steps=self.steps,
            residual=residual,
            evaluations=self.nfe,
            status=status,
            trace=None if rows is None else torch.stack(rows) if rows else residual.new_empty(0, layout.B),
            backend="unrolled",
            counters=self.counters,
        )
