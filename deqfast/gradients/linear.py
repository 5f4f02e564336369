"""The linear fixed-point solves behind derivatives: u = A u + b, by the same solvers as everything else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ranges
from ..following import Following
from ..log import LOG, telling
from ..loop.compaction import Compactor, Rowwise
from ..loop.state import SolverState
from ..ops.codes import Int
from ..ops.contract import Method
from ..ops.layout import Layout
from ..ops.shared import Group
from ..ops.workspace import Stopping
from ..solution import BackwardReport
from ..status import Status
from ..warning import warn

PRICE = 1.0  # vjps of a part that its graph costs: ``python -m bench.rows --sweep``


class GradientWarning(RuntimeWarning):
    """The linear solve behind a derivative did not converge for some samples, so that it may be inaccurate."""


@dataclass
class LinearOptions:
    """How the linear solve behind a derivative runs."""

    solver: Method
    stopping: Stopping
    backend: str
    u0: Any = None  # start, or a function of the leaves of the right-hand side that gives it
    mode: str = "loop"
    group: Group | None = None  # ranks that share it
    tell: Callable[[BackwardReport], Any] | None = None  # who hears how it went
    watch: Callable[[SolverState], Any] | None = None  # who looks after every evaluation, where a loop makes them
    following: Following | None = None  # what a batch that shrinks takes along; None: it does not shrink


def solve_linear(
    f: Callable[[Any], Any],
    start: Any,
    known: list[Tensor],
    layout: Layout,
    options: LinearOptions,
    rows: Rowwise | None = None,
) -> list[Tensor]:
    """Leaves of the solution of u = f(u), an affine map, each sample to a relative tolerance of its own.

    Where a sample does not converge its best iterate is returned, with a ``GradientWarning`` unless its right-hand side
    ``known`` was not finite: an overflowing loss scale, for example, is no failure of this solve. ``rows``: f at all
    samples and at some, for a batch that shrinks where the options say so.
    """
    with torch.no_grad(), ranges.within(ranges.BACKWARD):
        group, f = options.group, ranges.around(ranges.VJP, f)
        state = SolverState(
            options.solver,
            start,
            options.stopping,
            backend=options.backend,
            layout=layout,
            together=group is not None and not group.spread,
            group=group,
        )
        compactor = None
        if rows is not None and options.following is not None:
            compactor = Compactor(state, rows, options.following, price=PRICE)
        while not state.done or (compactor is not None and compactor.unsure):
            if compactor is None:
                state.step(f(state.z))
            else:
                compactor.evaluate()
            if options.watch is not None:
                options.watch(state)
        if layout.B and layout.total and state.failed():
            warn_of_failures(state, known)
        leaves, residual = state.answer()
        if telling():
            worst = float(residual.max()) if residual.numel() else 0.0
            told = "derivative, %d samples of %d numbers: %d products, largest residual %.2e"
            LOG.debug(told, layout.B, layout.N, state.nfe, worst)
        if options.tell is not None:
            count = None if compactor is None else compactor.count
            options.tell(BackwardReport(state.nfe, layout.counted(residual), state.status, count))
        state.release()
        return leaves


def warn_of_failures(state: SolverState, known: list[Tensor]) -> None:
    """Say how many samples of a solve did not converge, but for those whose right-hand side ``known`` is not finite."""
    failed = state.ws.int_row(Int.STATUS) != Status.CONVERGED
    failed = failed & state.layout.finite(known)
    count = int(failed.sum())
    if count:
        worst, rule = float(state.answer()[1][failed].max()), state.ws.stopping
        warn(
            f"the linear solve of a derivative did not converge for {count} of {failed.shape[0]} samples: relative "
            f"residual up to {worst:.1e} after {state.nfe} evaluations, asked for rtol={rule.rtol:g} within "
            f"max_iter={rule.max_iter}. Raise Implicit(max_iter=), loosen Implicit(rtol=), or use dq.Phantom()",
            GradientWarning,
        )


def adjoint_start(g: list[Tensor], layout: Layout, options: LinearOptions) -> Any:
    """Where a backward solve begins: at its right-hand side, or where the user said."""
    if options.u0 is None:
        return layout.unflatten(g)
    if callable(options.u0):
        return options.u0(g)
    layout.flatten(options.u0, "u0")
    return options.u0
