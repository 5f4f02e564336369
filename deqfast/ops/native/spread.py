"""Steps of samples that are spread over ranks: each has some numbers of every sample, and dots are added up between.

A step is the two halves of the kernels with one all-reduce between them. It carries every product and norm, and what
the step before has left to be added up: of Anderson whether its mix was finite, of Broyden the products of its newest
step. Where the unit of a sample does not fit, at the first evaluation and where magnitudes change by orders, its norms
are added up by a second one. Every decision follows from the sums, which are the same bits on all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...status import Status
from .. import recheck
from ..anderson import AndersonWorkspace
from ..codes import Int
from ..contract import BoundStep, Leaves, Rows
from ..ranks import Ranks
from ..workspace import Workspace
from .extension import _C, array
from .plan import general_step, make_plan


class SpreadStep(BoundStep):
    """The update of a workspace whose samples are spread over ``ranks``; on a CPU."""

    counts_writes = False
    exact = True

    def __init__(self, ws: Workspace, ranks: Ranks) -> None:
        super().__init__(ws)
        self.ranks = ranks
        self.plan, _ = make_plan(ws)
        B = ws.layout.B
        count = B * self.plan.summed
        # One number more: how many ranks cannot make a new column, for f has overwritten its last output there.
        self.buffer = torch.zeros(count + 1, dtype=torch.float64)
        self.squares = torch.zeros(B, 2, dtype=torch.float64)
        self.carry = self.buffer[count - B * self.plan.carried : count].view(B, self.plan.carried)
        if not isinstance(ws, AndersonWorkspace):
            self.carry[:, 0] = -1  # no step is owed its products
        self.plan.spread(buffer=array(self.buffer[:count]), squares=array(self.squares), numbers=ws.layout.spread_n)

    def __call__(self, f: Leaves, f_prev: Leaves | None, f_rows: Rows, f_prev_rows: Rows) -> int:
        """Reduce, add up, apply."""
        ws, ranks = self.ws, self.ranks
        uses = isinstance(ws, AndersonWorkspace)
        general_step(self.plan, ws, f, f_prev, f_rows, f_prev_rows, _C.REDUCE)
        self.buffer[-1] = float(uses and f_prev is None)
        ranks.add(self.buffer)
        if uses and f_prev is not None and float(self.buffer[-1]):
            ws.woken(ws.int_row(Int.STATUS) == int(Status.RUNNING))  # the column that this rank has made
            f_prev = f_prev_rows = None
        if self.plan.squares():
            ranks.add(self.squares)
        return general_step(self.plan, ws, f, f_prev, f_rows, f_prev_rows, _C.APPLY)

    def settle_into(self, saved: dict[str, Tensor]) -> None:
        """What the last step has left to be added up; on every rank at once. As ``take_carried`` in C++ does it."""
        found = self.carry.clone()
        self.ranks.add(found)
        ints, norms = saved["ints"], saved["norms"]
        running = ints[int(Int.STATUS)] == int(Status.RUNNING)
        if isinstance(self.ws, AndersonWorkspace):
            lost = running & (found[:, 0] > 0)
            norms[:, 0].masked_fill_(lost[:, None], 0)
        else:
            count = ints[int(Int.COUNT)]
            owed = running & (count > 0) & (found[:, 0] >= 0)
            good = owed & (found[:, 0] == 0) & torch.isfinite(found[:, 1])
            lost = owed & ~good
            newest = good[:, None] & (torch.arange(norms.shape[2]) == count[:, None] - 1)
            norms[:, 0].copy_(torch.where(newest, found[:, 1:2].to(norms.dtype), norms[:, 0]))
            saved["gram"].copy_(torch.where(newest[:, :, None], found[:, None, 2:].to(norms.dtype), saved["gram"]))
            count.masked_fill_(lost, 0)
        ints[int(Int.STEP_FALLBACKS)] += lost

    def outside(self, f: Leaves, f_rows: Rows, made: int | Tensor) -> Tensor | None:
        """Samples that converged earlier and are not within tolerance, by their norms on all ranks."""
        return recheck.outside(self.ws, f, f_rows, made, add=self.ranks.add)
