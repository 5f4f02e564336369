"""Gradients through the solver itself: the formulas of ``ops/formulas`` as autograd follows them.

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

from .. import transforms
from ..loop.again import CouplingWarning
from ..loop.answer import ended
from ..loop.conclude import stepping_on, unsolved
from ..loop.together import never
from ..naming import named
from ..ops import recheck
from ..ops.anderson import AndersonWorkspace
from ..ops.broyden import BroydenWorkspace
from ..ops.codes import Int
from ..ops.formulas.measure import Codes, Stats, Verdict, measure
from ..ops.layout import widest
from ..ops.packing import pack, unpack
from ..ops.workspace import Workspace
from ..problem import Problem
from ..solution import ConvergenceError, Solution
from ..status import Status
from ..warning import warn
from .base import Gradient
from .unroll_memory import ALGEBRA, AndersonMemory, BroydenMemory


@named()
@dataclass(frozen=True)
class Unroll(Gradient):
    """Gradients through every iteration of the solver, by ordinary autograd.

    Exact derivatives of the iterate that the solver returned, whether or not it converged, to any order and through
    torch.func. Memory and backward cost grow with the evaluations: for tests, and for small solves. Works with
    ``trace`` and ``throw``; ``compact``, ``callback``, ``progress`` and ``states`` raise ``ValueError``.
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
            "states": options.states,
            "group": problem.group is not None,
            "history_device": getattr(options.solver, "history_device", None) is not None,
        }
        for name, asked in refused.items():
            if asked:
                raise ValueError(f"{name} does not go together with backward=dq.Unroll()")
        if options.max_iter == 0:
            return unsolved(problem.layout, problem.layout.tensors(z0), "unrolled", options.trace)
        rule = stepping_on(problem.stopping) if options.returns == "next" else problem.stopping
        ws = options.solver.workspace(problem.layout, never(rule) if options.stop == "all" else rule)
        solution = _Unrolled(problem, ws, z0).run(options.returns, options.trace)
        if options.throw and not bool(solution.converged.all()):
            raise ConvergenceError(solution)
        return solution


_MEMORIES: dict[type[Workspace], Callable[[Any], AndersonMemory | BroydenMemory]] = {
    AndersonWorkspace: AndersonMemory,
    BroydenWorkspace: BroydenMemory,
}


class _Unrolled:
    """One differentiable solve."""

    def __init__(self, problem: Problem, ws: Workspace, z0: Any) -> None:
        self.problem, self.ws, self.layout = problem, ws, problem.layout
        self.x = self.best_x = self.best_f = pack(self.layout, self.layout.tensors(z0))
        B, device = self.layout.B, self.x.device
        none = torch.zeros(B, dtype=torch.int32, device=device)
        new = torch.zeros(B, dtype=self.layout.acc, device=device)
        self.stats = Stats(none, none, none, none, new, new, new + math.inf, new + math.inf, new, new, new)
        self.codes = Codes(ws.stopping, self.layout, widest(device))
        self.counters = torch.zeros(len(Int), B, dtype=torch.int32, device=device)
        self.nfe = 0
        self.limit = problem.options.max_iter

    def run(self, returns: str, trace: bool) -> Solution:
        """Iterate until every sample has stopped."""
        layout, problem, ws = self.layout, self.problem, self.ws
        memory = _MEMORIES[type(ws)](ws)
        rows: list[Tensor] = []
        while layout.N and self.nfe < self.limit and bool((self.stats.status == Status.RUNNING).any()):
            z = layout.unflatten(unpack(layout, self.x))
            leaves = layout.flatten(problem.f(z, *problem.args), "f(z)")
            if problem.transformed:
                transforms.values(leaves)  # raises under vmap, where samples could not stop on their own
            f = pack(layout, leaves)
            self.nfe += 1
            last_norm = self.stats.norm
            verdict = self._measure(f)
            if trace:
                rows.append(layout.counted(torch.where(verdict.run, self.stats.residual, math.nan)))
            if problem.options.stop == "all" and self._all_within(verdict.run):
                break
            if bool(verdict.going.any()):
                f = torch.where(verdict.going[:, None], f, self.x)  # what a stopped sample's f may be has no gradient
                moved = memory(verdict, self.x, f, self.nfe, last_norm)
                self.x = moved.x
                for row, where in moved.events.items():
                    self.counters[row] += where.int()
            self._judge_again()
        self._out_of_evaluations()
        return self._conclude(returns, rows if trace else None)

    def _all_within(self, run: Tensor) -> bool:
        """With ``stop="all"``: whether it is time; then everybody has converged here."""
        stats = self.stats
        going = run & (stats.status != Status.NON_FINITE)
        (moved, size), rule = self._sizes, self.problem.stopping
        if not bool(((moved <= rule.atol + rule.rtol * size) | ~going).all()):
            return False
        status = stats.status.masked_fill(going, int(Status.CONVERGED))
        best_step = stats.best_step.masked_fill(going, self.nfe)
        best = torch.where(going, stats.residual, stats.best)
        self.stats = stats._replace(status=status, best_step=best_step, best=best)
        self.best_x = torch.where(going[:, None], self.x, self.best_x)
        self.best_f = torch.where(going[:, None], self._f, self.best_f)
        return True

    def _judge_again(self) -> None:
        """At the last evaluation: whoever had converged before and is not within tolerance there has not."""
        stats = self.stats
        if self.nfe < self.limit and bool((stats.status == Status.RUNNING).any()):
            return
        rule = self.problem.stopping
        within = recheck.still_within(*self._sizes, rule.rtol, rule.atol, recheck.noise(self.ws))
        outside = (stats.status == Status.CONVERGED) & (stats.steps < self.nfe) & ~within
        if bool(outside.any()):
            self.counters[Int.WOKEN] += outside.int()
            self.stats = stats._replace(status=stats.status.masked_fill(outside, int(Status.MAX_ITER)))
            warn(
                f"f couples samples: {int(outside.sum())} of {self.layout.B} are no longer within tolerance, and "
                'dq.Unroll() cannot let them go on; give batch_dims=0, segments= or stop="all"',
                CouplingWarning,
            )

    def _out_of_evaluations(self) -> None:
        """The label of samples that run on where the loop ends at its limit: with returns="next"."""
        stats = self.stats
        status = ended(stats.status, self.nfe, stats.best_step, stats.norm, stats.least, stats.first)
        self.stats = stats._replace(status=status)

    def _measure(self, f: Tensor) -> Verdict:
        """The verdict on a new evaluation, with what is known of samples that had stopped unchanged."""
        g_norm, f_norm = ALGEBRA.norm_of_any(f - self.x), ALGEBRA.norm_of_any(f)
        self._sizes, self._f = (g_norm, f_norm), f
        verdict = measure(self.ws.stopping, self.codes, self.stats, g_norm, f_norm, self.nfe)
        run = verdict.run
        self.stats = Stats(*(torch.where(run, new, old) for new, old in zip(verdict.stats, self.stats, strict=True)))
        better = run & (self.stats.best_step == self.nfe)
        self.best_x = torch.where(better[:, None], self.x, self.best_x)
        self.best_f = torch.where(better[:, None], f, self.best_f)
        return verdict

    def _conclude(self, returns: str, rows: list[Tensor] | None) -> Solution:
        layout, stats = self.layout, self.stats
        status = stats.status
        residual = stats.best
        x = self.best_f if returns == "image" else self.best_x
        if returns == "next":
            x = torch.where((status == Status.CONVERGED)[:, None], self._f, self.x)
            residual = stats.residual
        if returns == "last":
            lost = (status == Status.NON_FINITE) & (stats.best_step > 0)
            x = torch.where(lost[:, None], self.best_x, self.x)
            residual = torch.where(status == Status.NON_FINITE, stats.best, stats.residual)
        if layout.N == 0:
            status, residual = torch.full_like(status, Status.CONVERGED), torch.zeros_like(residual)
        return Solution(
            z=layout.unflatten(unpack(layout, x)),
            converged=layout.counted(status == Status.CONVERGED),
            steps=layout.counted(stats.steps),
            residual=layout.counted(residual),
            evaluations=self.nfe,
            status=layout.counted(status),
            trace=None if rows is None else torch.stack(rows) if rows else residual.new_empty(0, *layout.batch_shape),
            backend="unrolled",
            counters=self.counters,
        )
