"""Backend "torch": Anderson's step in few operations of any device that torch has.

All products of a step are two batched matrix products and the mix is one more. Between steps the small matrices are
kept a sample a row, and go into the workspace's tiles when somebody asks for them. Nothing is read from the device but
the count of what still runs, and that late (``lag``).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from ..anderson import AndersonWorkspace
from ..codes import Int
from ..contract import BoundStep, Leaves, Rows
from ..formulas import anderson
from ..formulas.algebra import but_not
from ..formulas.columns import Evaluation, difference
from ..formulas.measure import Verdict
from ..lag import Lag
from ..workspace import Workspace
from .columns import LARGE, Columns, Rowwise
from .matrices import Matrices
from .rows import Iterates, Statistics, gather


class PortableStep(BoundStep):
    """What both solvers do before and after the formula."""

    def __init__(self, ws: Workspace, evaluations: int) -> None:
        super().__init__(ws)
        device = ws.layout.device
        self.algebra = Matrices(ws.method[0], ws.layout.acc, device)
        self.statistics = Statistics(ws, evaluations, ws.layout.acc, device.type == "cpu")
        self.iterates = Iterates(ws)
        self._device = device.type
        self._lag = Lag(ws.layout.B, device, ws.stopping.max_iter, evaluations)
        self.exact = self._lag.exact
        self.residuals: list[Tensor] = []  # g of this evaluation, and of the one before if it was judged here, too
        self.first = evaluations + 1  # that is judged here

    def __call__(self, f: Leaves, f_prev: Leaves | None, f_rows: Rows, f_prev_rows: Rows) -> int:
        """One update."""
        if not self.ws.layout.B:
            return 0
        with torch.no_grad():
            if not (torch.is_autocast_enabled(self._device) or torch.is_inference_mode_enabled()):
                return self._step(f, f_prev, f_rows, f_prev_rows)
            # What a step keeps for the next one must be a normal tensor: that one may be made in another mode.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(self._device, enabled=False):
                return self._step(f, f_prev, f_rows, f_prev_rows)

    def _step(self, f: Leaves, f_prev: Leaves | None, f_rows: Rows, f_prev_rows: Rows) -> int:
        ws = self.ws
        x, value = self.iterates.now(), gather(ws, f, f_rows)
        g = self._residual(value, x) if ws.own_residual is None else ws.own_residual
        f_norm, g_norm = self.algebra.norms(value, g)
        verdict = self.statistics.measure(g_norm, f_norm)
        answer = self.iterates.answers(x, verdict)
        self.move(verdict, x, value, g, (f_prev, f_prev_rows), answer)
        return ws.layout.B if verdict.improved else self._lag.read(verdict.going.sum(dtype=torch.int32))

    def _residual(self, f: Tensor, x: Tensor) -> Tensor:
        """G in one of two places in turn: memory that is new at every step costs more than the sum that fills it."""
        if not self.residuals:
            self.residuals = [torch.empty_like(f), torch.empty_like(f)]
        self.residuals.reverse()
        return torch.sub(f, x, out=self.residuals[0])

    def move(
        self,
        verdict: Verdict,
        x: Tensor,
        f: Tensor,
        g: Tensor,
        before: tuple[Leaves | None, Rows],
        answer: Tensor,
    ) -> None:
        """From the verdict to the next iterate."""
        raise NotImplementedError

    def settle(self, x_new: Tensor, f: Tensor, answer: Tensor, verdict: Verdict) -> Tensor | None:
        """Write the next iterate; which of the samples that go on took f's value instead. None: nobody."""
        ws, going = self.ws, verdict.going
        rounded = x_new if x_new.dtype == ws.layout.dtype else x_new.to(ws.layout.dtype)
        if verdict.calm and math.isfinite(rounded.sum().item()):
            every = verdict.improved or (self.iterates.looks and bool(going.all()))
            self.iterates.write(rounded, going, None if every else answer)
            return None
        taken = going & self.algebra.finite(rounded)
        every = self.iterates.looks and bool(taken.all())
        self.iterates.write(x_new, taken, None if every else anderson.fallback(f, answer, going))
        return going ^ taken


class AndersonStep(PortableStep):
    """Anderson's step."""

    ws: AndersonWorkspace
    columns: ClassVar[type[Columns]] = Columns

    def __init__(self, ws: AndersonWorkspace, evaluations: int) -> None:
        super().__init__(ws, evaluations)
        self.constants = anderson.Systems(ws.method, ws.layout.acc, ws.layout.device)
        self._known: Rowwise | None = None

    def _rowwise(self) -> Rowwise:
        """What is known of the columns; taken up from the tiles if another backend, or nobody, had it last."""
        if self.ws.loose is None or self.ws.loose is not self._known:
            self._known = self.ws.loose = Rowwise(self.ws, self.statistics.made - 1, self.columns)
        return self._known

    def move(
        self,
        verdict: Verdict,
        x: Tensor,
        f: Tensor,
        g: Tensor,
        before: tuple[Leaves | None, Rows],
        answer: Tensor,
    ) -> None:
        """Mix, and choose the slot of the next column."""
        method, statistics, going = self.ws.method, self.statistics, verdict.going
        stats, made = verdict.stats, statistics.made
        e = Evaluation(
            made,
            x,
            f,
            g,
            going,
            verdict.reset,
            stats.unit,
            stats.norm,
            statistics.stats.norm,
            verdict.calm,
            verdict.improved,
        )
        if method.m == 0:
            overflowed = self.settle(anderson.plain_step(method, e), f, answer, verdict)
            statistics.write(verdict)
            statistics.count(statistics.of_any_solver(verdict, overflowed))
            return
        loose = self._rowwise()
        loose.grow(made)
        new = self._new(e, loose.columns, before)
        step = anderson.step(method, self.algebra, self.constants, loose.columns, loose.known, e, new)
        lost = self.settle(step.x, f, answer, verdict)
        events = statistics.of_any_solver(verdict, lost)
        if step.solved is not None:
            events[Int.SOLVE_FALLBACKS] = failed = but_not(going, step.solved)
            lost = failed if lost is None else lost | failed
        if step.grew is not None:
            events[Int.GROWTH_RESTARTS] = step.grew
        chosen = anderson.choose_slot(method, self.algebra, self.constants, step, going, lost, made)
        if anderson.may_give_up(method, made):
            events[Int.EVICTIONS] = chosen.evicting
        loose.known = chosen.known
        statistics.write(verdict, chosen.rows())
        statistics.count(events)

    def _new(self, e: Evaluation, columns: Columns, before: tuple[Leaves | None, Rows]) -> list[Tensor] | None:
        """DF and dG, rounded as they will be stored."""
        ws = self.ws
        f_prev, f_prev_rows = before
        columns.into = self.iterates.target()
        if f_prev is None:
            return None
        value = gather(ws, f_prev, f_prev_rows)
        if ws.own_previous is not None:
            dF = columns.round(difference(e.f, value, e.unit)[None], e.calm)[0]
            dG = difference(e.g, ws.own_previous, e.unit)
            return [dF, dG.nan_to_num_(nan=0.0, posinf=LARGE, neginf=-LARGE)]
        last = self.residuals[1] if e.made > self.first else value - self.iterates.before()
        pair = columns.fresh
        torch.sub(e.f, value, out=pair[0])
        torch.sub(e.g, last, out=pair[1])
        pair = columns.round(pair.mul_(e.unit[:, None]), e.calm)
        return [pair[0], pair[1]]
