"""From a state to a ``Solution``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.codes import Int, Real
from ..ops.layout import Layout
from ..ops.workspace import Stopping
from ..solution import Solution
from ..status import Status
from .state import SolverState

_STATUS_AND_STEPS = int(Int.STATUS), int(Int.STEPS)
_CONVERGED = int(Status.CONVERGED)  # comparing a tensor with an enum takes half as long again


def conclude(
    state: SolverState, returns: str, rows: list[Tensor] | None, shared: bool, images: list[Tensor] | None = None
) -> Solution:
    """The solution a state has reached.

    Args:
        state: of the solve.
        returns: as in ``fixed_point``.
        rows: recorded residuals, one tensor an evaluation.
        shared: somebody else may step the state further.
        images: f at the iterates, for ``returns="image"``.
    """
    ws, layout = state.ws, state.layout
    if returns == "next":
        leaves, residual = ws.x[ws.cur], ws.real_row(Real.RESIDUAL).clone()
        leaves = [t.clone() for t in leaves] if shared else leaves
    else:
        leaves, residual = state.answer(returns)
    counters = ws.ints.clone() if shared else ws.ints
    status, steps = (counters[row, : layout.B] for row in _STATUS_AND_STEPS)
    if layout.total == 0:
        status.fill_(Status.CONVERGED)
        residual = torch.zeros_like(residual)
    elif not state.done:
        status.masked_fill_(status == Status.RUNNING, Status.STOPPED)
    trace = None
    if rows is not None:
        trace = torch.stack(rows) if rows else residual.new_empty(0, *layout.batch_shape)
    return Solution(
        z=layout.unflatten(leaves if images is None else images),
        converged=layout.counted(status == _CONVERGED),
        steps=layout.counted(steps),
        residual=layout.counted(residual),
        evaluations=state.nfe,
        status=layout.counted(status),
        trace=trace,
        backend=state.backend,
        counters=layout.counted_rows(counters),
    )


def out_of_evaluations(state: SolverState, returns: str) -> None:
    """The end of samples that run on, where the loop ended at its limit and not the kernels.

    Their label, and where ``returns`` is not "next" their answer where that of a sample lies that has stopped.
    """
    ws = state.ws
    if returns != "next":
        for now, found in zip(ws.x[ws.cur], state.answer(returns)[0], strict=True):
            now.copy_(found)
    ws.int_row(Int.STATUS).copy_(state.at_limit())
    state.finish(state.nfe)


def stepping_on(rule: Stopping) -> Stopping:
    """The rule by which a step is made from the last evaluation too, for ``returns="next"``."""
    return rule._replace(max_iter=min(rule.max_iter + 1, 2**31 - 1))


def unsolved(layout: Layout, start: list[Tensor], backend: str, traced: bool) -> Solution:
    """The solution that no evaluation was spent on, ``max_iter=0``: the start, and nothing is known of it."""
    B, device = layout.B, layout.device
    counters = torch.zeros(16, B, dtype=torch.int32, device=device)
    status, steps = (counters[row] for row in _STATUS_AND_STEPS)
    status.fill_(Status.MAX_ITER if layout.total else Status.CONVERGED)
    residual = torch.full((B,), torch.nan if layout.total else 0.0, dtype=layout.acc, device=device)
    return Solution(
        z=layout.unflatten(start),
        converged=layout.counted(status == _CONVERGED),
        steps=layout.counted(steps),
        residual=layout.counted(residual),
        evaluations=0,
        status=layout.counted(status),
        trace=residual.new_empty(0, *layout.batch_shape) if traced else None,
        backend=backend,
        counters=counters,
    )
