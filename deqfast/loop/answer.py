"""Which of the iterates in memory a solve returns."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.codes import DIVERGENCE, At, Int, Real
from ..ops.formulas.measure import label
from ..ops.workspace import Workspace
from ..status import Status
from .together import Together


def answer(ws: Workspace, returns: str, some_run: bool) -> tuple[list[Tensor], Tensor]:
    """Leaves of the returned iterate and its (B,) relative residual.

    Of a sample that has stopped they lie in both iterates; one that runs (``some_run``: there may be one) has moved on
    from the iterate that was evaluated last, and is read, not moved.
    """
    residual = best = ws.real_row(Real.BEST)
    status = ws.int_row(Int.STATUS)
    if returns == "last":
        residual = torch.where(status == int(Status.NON_FINITE), best, ws.real_row(Real.RESIDUAL))
    leaves = ws.x[ws.cur]
    if some_run:
        running = status == int(Status.RUNNING)
        from_saved = running & (ws.int_row(Int.BEST_AT) == int(At.SAVED)) & (returns != "last")
        from_saved, running = ws.layout.spread(from_saved), ws.layout.spread(running)
        leaves = [
            _where(from_saved, saved, _where(running, previous, current))
            for current, previous, saved in zip(leaves, ws.x[1 - ws.cur], ws.saved, strict=True)
        ]
    return leaves, residual.clone()


def _where(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(mask.view(-1, *([1] * (a.dim() - 1))), a, b)


def at_the_limit(ws: Workspace, made: int, together: Together | None = None) -> Tensor:
    """(B,) int32 statuses if every sample that runs had to stop after ``made`` evaluations, as the kernels say it.

    Of samples that stop ``together`` those have converged that are within tolerance there, if it is their best.
    """
    norms = (ws.real_row(row) for row in (Real.NORM, Real.LEAST, Real.FIRST))
    status, best = ws.int_row(Int.STATUS), ws.int_row(Int.BEST_STEP)
    found = ended(status, made, best, *norms)
    if together is None:
        return found
    within = (status == int(Status.RUNNING)) & (best == made) & together.within()
    return found.masked_fill(within, int(Status.CONVERGED))


def ended(status: Tensor, made: int, best_step: Tensor, norm: Tensor, least: Tensor, first: Tensor) -> Tensor:
    """``status``, with the label of what ran out of evaluations where a sample runs on after ``made`` of them."""
    grown = (best_step == 1) & (norm > DIVERGENCE * least)
    found = label(norm, first, made - best_step, made, grown)
    return torch.where(status == int(Status.RUNNING), found.to(status.dtype), status)
