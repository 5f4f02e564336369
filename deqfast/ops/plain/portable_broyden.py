"""Backend "torch": Broyden's step in the Gram form, so that its operations do not grow with the steps kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ..broyden import BroydenWorkspace
from ..codes import Int, Real
from ..contract import Leaves, Rows
from ..formulas import broyden
from ..formulas.measure import Verdict
from .columns import LARGE
from .matrices import Matrices
from .portable import PortableStep

GROWTH = 8  # steps that room is made for at a time


class Steps:
    """The steps and their Gram matrix. The first ``room`` places have been written to, and hold numbers alone."""

    def __init__(self, ws: BroydenWorkspace, algebra: Matrices, made: int) -> None:
        self.ws, self.algebra = ws, algebra
        layout, memory = ws.layout, ws.method.memory
        B, device = layout.B, layout.device
        self.places = torch.arange(memory, dtype=torch.int32, device=device)
        self.base = torch.arange(B, device=device) * memory
        self.room = 0
        kept = ws.gram.shape[1] > 0
        self.gram = ws.gram if kept else torch.empty(B, memory, memory, dtype=layout.acc, device=device)
        self.cut = False  # whether there may be steps of infinite norm, of which no update is made
        if made:
            self._take_up(kept, made)

    def _take_up(self, kept: bool, made: int) -> None:
        """The steps that another backend, or a loaded state, left."""
        ws = self.ws
        used = self.places < ws.int_row(Int.COUNT)[:, None]
        self.room = min(-(-made // GROWTH) * GROWTH, ws.method.memory)  # as if it had grown here
        ws.history.masked_fill_(~used[..., None], 0)
        ws.norms.masked_fill_(~used, 0)
        self.cut = bool(torch.isinf(ws.norms).any())
        if kept:
            self.gram.masked_fill_(~(used[:, :, None] & used[:, None, :]), 0)
        else:
            torch.bmm(ws.history, ws.history.mT, out=self.gram)

    def grow(self, made: int) -> None:
        """Room for the step of this evaluation."""
        if made > self.room and self.room < self.ws.method.memory:
            room = min(-(-made // GROWTH) * GROWTH, self.ws.method.memory)
            self.ws.history[:, self.room : room].zero_()
            self.ws.norms[:, self.room : room].zero_()
            self.gram[:, self.room : room].zero_()
            self.gram[:, : self.room, self.room : room].zero_()
            self.room = room

    def only(self) -> tuple[Tensor, Tensor] | None:
        """The first step."""
        return self.ws.history[:, 0], self.ws.norms[:, 0]

    def apply(self, z: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """By the Gram matrix."""
        room = self.room
        steps = self.ws.history[:, :room]
        products = torch.bmm(z[:, None], steps.mT)[:, 0]
        gram = self.gram[:, :room, :room]
        cut = torch.isinf(self.ws.norms[:, :room]) if self.cut else None
        weights, denominator = broyden.by_gram(products, gram, count, self.places[:room], self.algebra.triangular, cut)
        return torch.baddbmm(z[:, None], weights[:, None], steps[:, 1:])[:, 0], denominator

    def put(self, count: Tensor, s: Tensor) -> None:
        """Keep a step of every sample in the place ``count``."""
        ws, room = self.ws, self.room
        s = s.nan_to_num(nan=0.0, posinf=LARGE, neginf=-LARGE)
        index = self.base + count.clamp(max=room - 1)
        ws.history.view(-1, s.shape[1]).index_copy_(0, index, s)
        products = torch.bmm(s[:, None], ws.history[:, :room].mT)[:, 0].nan_to_num_(
            nan=0.0, posinf=LARGE, neginf=-LARGE
        )
        self.gram.view(-1, self.gram.shape[2])[:, :room].index_copy_(0, index, products)
        square = self.algebra.dot(s, s)
        ws.norms.view(-1).index_copy_(0, index, square)


class BroydenStep(PortableStep):
    """Broyden's step."""

    ws: BroydenWorkspace

    def __init__(self, ws: BroydenWorkspace, evaluations: int) -> None:
        super().__init__(ws, evaluations)
        self.steps = Steps(ws, self.algebra, evaluations)

    def move(
        self,
        verdict: Verdict,
        x: Tensor,
        f: Tensor,
        g: Tensor,
        before: tuple[Leaves | None, Rows],
        answer: Tensor,
    ) -> None:
        """Apply the inverse, and keep the step."""
        ws, statistics, going = self.ws, self.statistics, verdict.going
        self.steps.grow(statistics.made)
        e = broyden.Evaluation(x, g, going, verdict.reset, verdict.stats.unit)
        count, scale = ws.int_row(Int.COUNT), ws.real_row(Real.SCALE)
        step = broyden.step(ws.method, self.algebra, self.steps, count, scale, e)
        overflowed = self.settle(step.x, f, answer, verdict)
        self.steps.put(step.kept, step.s)
        events = statistics.of_any_solver(verdict, overflowed)
        events |= {Int.FULL_RESTARTS: step.full, Int.DENOMINATOR_RESTARTS: step.bad}
        new_count = step.kept + self.statistics.codes.step
        if overflowed is not None:
            new_count = new_count.masked_fill(overflowed, 0)
        statistics.write(verdict, {Int.COUNT: new_count})
        statistics.count(events)
        torch.where(going, step.scale, scale, out=scale)
