"""The end of a joint step: what the verdict on each sample means for what the accelerated step does not know.

- tensors that are not accelerated move: a running sample's to their mapped value, a stopped one's to its answer;
- the record of the iterate that would be returned, its norms and cost, is brought up to date, and with
  ``returns="cost"`` the iterate itself;
- with the safeguard, a sample whose residual has grown forgets its columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..status import Status
from .codes import COST_SLACK, SAFEGUARD, Int, Real

if TYPE_CHECKING:
    from .anderson import AndersonWorkspace
    from .joint import JointWorkspace


@dataclass
class Record:
    """What a joint solve keeps of the iterate that it would return now.

    Attributes:
        returns, safeguard: as in ``joint_solve``.
        best_norms: (blocks, 2, padded) float64, ``block_norms`` at that iterate.
        best_cost: (B,) its cost, NaN before there is one.
        saved_norms, saved_cost: with ``returns="last"`` both at the iterate of the least residual, which a sample that
            becomes no number goes back to; else None.
        least: (B,) the best residual since the history was forgotten last.
        taken: (B,) int32, whether the newest evaluation is that iterate.
        kept: with ``returns="cost"`` the iterate, a tensor for each part; else None.
    """

    core: AndersonWorkspace
    returns: str = "best"
    safeguard: bool = False
    kept: list[Tensor] | None = None
    best_norms: Tensor = field(init=False)
    best_cost: Tensor = field(init=False)
    saved_norms: Tensor | None = None
    saved_cost: Tensor | None = None
    least: Tensor = field(init=False)
    taken: Tensor = field(init=False)

    def __post_init__(self) -> None:
        layout, norms = self.core.layout, self.core.block_norms
        assert norms is not None
        self.best_norms = torch.zeros_like(norms)
        self.best_norms[:, 0] = math.inf
        self.best_cost = torch.full((layout.B,), math.nan, dtype=layout.acc, device=layout.device)
        if self.returns == "last":
            self.saved_norms, self.saved_cost = self.best_norms.clone(), self.best_cost.clone()
        self.least = torch.full((layout.B,), math.inf, dtype=layout.acc, device=layout.device)
        self.taken = torch.zeros(layout.B, dtype=torch.int32, device=layout.device)


def joint_finish(ws: JointWorkspace, cost: Tensor | None, made: int) -> None:
    """The oracle, in plain torch; before ``core.cur`` is flipped. ``made``: evaluations, this one included."""
    core, record = ws.core, ws.record
    steps, status = core.int_row(Int.STEPS), core.int_row(Int.STATUS)
    now = core.real_row(Real.RESIDUAL)
    # A sample that was measured just now has used as many evaluations as were made.
    measured = (steps == made) & (status != Status.NON_FINITE)
    better = core.int_row(Int.BEST_STEP) == made
    take = measured if record.returns == "last" else better
    if record.returns == "cost" and cost is not None:
        lower = (cost < record.best_cost) & (now < COST_SLACK * core.real_row(Real.BEST))
        take = better | (measured & lower)
    assert core.block_norms is not None
    _note(record.best_cost, record.best_norms, take, cost, core.block_norms)
    if record.saved_norms is not None and record.saved_cost is not None:
        _note(record.saved_cost, record.saved_norms, better, cost, core.block_norms)
        lost = (steps == made) & (status == Status.NON_FINITE)
        saved_cost = None if cost is None else record.saved_cost
        _note(record.best_cost, record.best_norms, lost, saved_cost, record.saved_norms)
    record.taken.copy_(take)
    if record.kept is not None:
        for i, kept in enumerate(record.kept):
            kept.copy_(_where(take, ws.value(i), kept))
    if record.safeguard:
        # Against the best since the last restart: against the best of all, a sample whose plain steps climb would
        # restart at each of them and never be accelerated again.
        grown = measured & (now > SAFEGUARD * record.least)
        least = torch.where(grown, now, torch.minimum(record.least, now))
        record.least.copy_(torch.where(measured, least, record.least))
        _forget(core, grown)
    _move_plain(ws, steps == made, better, status)


def _note(to_cost: Tensor, to_norms: Tensor, where: Tensor, cost: Tensor | None, norms: Tensor) -> None:
    B = where.shape[0]
    if cost is not None:
        to_cost.copy_(torch.where(where, cost, to_cost))
    to_norms[:, :, :B] = torch.where(where, norms[:, :, :B], to_norms[:, :, :B])


def _move_plain(ws: JointWorkspace, was_running: Tensor, best: Tensor, status: Tensor) -> None:
    core = ws.core
    # A sample whose first evaluation is no number has nothing saved: it stays where it began.
    from_saved = ~best if core.stopping.keep_best else status == Status.NON_FINITE
    from_saved = from_saved & (core.int_row(Int.BEST_STEP) > 0)
    for i, part in enumerate(ws.parts):
        if part.index is not None:
            continue
        x, saved = ws.value(i), ws.plain_saved[i]
        assert saved is not None
        answer = _where(from_saved, saved, x)
        moved = _where(status == Status.RUNNING, ws.mapped[core.cur][i], answer)
        ws.value(i, 1 - core.cur).copy_(_where(was_running, moved, x))
        saved.copy_(_where(best, x, saved))


def _forget(core: AndersonWorkspace, which: Tensor) -> None:
    """Plain damped steps from here: the columns of these samples no longer count."""
    if core.method.m == 0:
        return
    mask = torch.zeros(core.ints.shape[1], dtype=torch.bool, device=which.device)
    mask[: which.shape[0]] = which
    core.norms.masked_fill_(mask.view(core.tiles, 1, 1, -1), 0)


def _where(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(mask.view(-1, *([1] * (a.dim() - 1))), a, b)
