"""Gradients by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .. import compiled
from ..naming import named
from ..ops.workspace import Stopping
from ..options import DEFAULT_LIMIT, DEFAULT_RTOL, check_callable, stopping
from ..problem import Problem
from ..solution import BackwardReport
from ..solvers.base import Solver
from ..solvers.broyden import Broyden
from ..solvers.choose import choose_solver
from . import adjoint, functional
from .base import Gradient
from .linear import LinearOptions


@named("backward", b_tol="rtol", b_max_iter="max_iter", b_thres="max_iter")
@dataclass(frozen=True)
class Implicit(Gradient):
    """Gradients by the implicit function theorem: the backward solves u = J^T u + g with a solver of its own.

    The memory is that of one evaluation of f, whatever the solver did (with ``compact`` of one more, of at most three
    quarters of the samples); the cost is one more evaluation in forward (not
    counted in ``nfe``) and one vjp an iteration in backward. Gradients are those of the solution, so they are as good
    as both solves: a forward that stopped early, or a backward that did, gives approximate ones, the second with a
    ``GradientWarning``. Differentiable twice. Works in torch.func.grad, vjp and jvp and in forward mode, where the
    tangent solves v = J v + t.

    Args:
        solver: of the backward solve; default that of the forward solve (Broyden with ``scale="first_step"``).
        rtol: relative tolerance per sample, so that the scale of the loss does not matter; default that of the forward
            solve, where that is 0 the default of the dtype, and under autocast at least the default of its dtype (2e-2
            for bfloat16, 4e-3 for float16).
        max_iter: vjps at most; default that of the forward solve, where that is 0 100.
        callback: called with a ``BackwardReport`` after every backward solve; ``Solution.backward`` has the last one.
        u0: start of the backward solve, shaped like z; default the incoming gradient. A good one saves iterations: the
            adjoint of a similar problem, for example.

    Source: Bai, Kolter and Koltun, Deep Equilibrium Models, NeurIPS 2019.
    """

    solver: str | Solver | None = None
    rtol: float | None = None
    max_iter: int | None = None
    u0: Any = field(default=None, compare=False)
    callback: Callable[[BackwardReport], Any] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.solver is not None:
            choose_solver(self.solver)
        stopping(self.rtol, 0.0, self.max_iter, torch.float32)
        if self.callback is not None:
            check_callable("callback", self.callback)

    def attach(self, problem: Problem, z: Any) -> Any:
        """``z`` as a fresh tensor whose backward solves for its gradient."""
        layout = problem.layout
        leaves = layout.tensors(z)
        options = self._options(problem)
        if problem.transformed:
            return layout.unflatten(functional.attach(problem.f, problem.args, layout, leaves, options))
        f = compiled.eager(problem.f)
        return layout.unflatten(adjoint.attach(f, problem.args, layout, leaves, options, copy_z=problem.copy_z))

    def _options(self, problem: Problem) -> LinearOptions:
        chosen = problem.options.solver if self.solver is None else choose_solver(self.solver)
        if self.solver is None and isinstance(chosen, Broyden) and chosen.scale == "unit":
            chosen = replace(chosen, scale="first_step")
        rtol = self.rtol
        if rtol is None:  # a forward solve to an absolute tolerance alone says nothing of this one
            rtol = problem.stopping.rtol or DEFAULT_RTOL[problem.layout.dtype]
        device = problem.layout.device.type
        if self.rtol is None and torch.is_autocast_enabled(device):
            rtol = max(rtol, DEFAULT_RTOL[torch.get_autocast_dtype(device)])
        max_iter = (problem.stopping.max_iter or DEFAULT_LIMIT) if self.max_iter is None else self.max_iter
        rule = Stopping(rtol, max_iter=max_iter)
        return LinearOptions(
            chosen,
            rule,
            problem.options.backend,
            self.u0,
            problem.options.mode,
            problem.group,
            self._tell(problem),
            following=problem.following,
        )

    def _tell(self, problem: Problem) -> Callable[[BackwardReport], Any]:
        """Who hears of a backward solve: the solution, and the caller."""
        reports, callback = problem.reports, self.callback

        def tell(report: BackwardReport) -> None:
            reports[:] = [report]
            if callback is not None:
                callback(report)

        return tell
