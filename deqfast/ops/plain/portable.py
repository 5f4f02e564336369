"""Backend "torch": Anderson's step in few operations of any device that torch has.

All products of a step are two batched matrix products and the mix is one more. Between steps the small matrices are
kept a sample a row, and go into the workspace's tiles when somebody asks for them. Nothing is read from the device but
the count of what still runs, and that late (``lag``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..anderson import AndersonWorkspace
from ..codes import Int
from ..contract import BoundStep, Leaves, Rows
from ..formulas import anderson
from ..formulas.algebra import but_not
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
        self.statistics = Statistics(ws, evaluations, ws.layout.acc)
        self.iterates = Iterates(ws)
        self._device = device.type
        self._lag = Lag(ws.layout.B, device, ws.stopping.max_iter, evaluations)
        self.exact = self._lag.exact

    def __call__(self, f: Leaves, f_prev: Leaves | None, f_rows: Rows, f_prev_rows: Rows) -> int:
        """One update."""
        with torch.no_grad():
            if not (torch.is_autocast_enabled(self._device) or torch.is_inference_mode_enabled()):
                return self._step(f, f_prev, f_rows, f_prev_rows)
            # What a step keeps for the next one must be a normal tensor: that one may be made in another mode.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(self._device, enabled=False):
                return self._step(f, f_prev, f_rows, f_prev_rows)

    def _step(self, f: Leaves, f_prev: Leaves | None, f_rows: Rows, f_prev_rows: Rows) -> int:
        ws = self.ws
        x, value = self.iterates.now(), gather(ws, f, f_rows)
        if ws.own_residual is None:
            both = torch.stack([value, value - x])
            sizes = self.algebra.norm_of_any(both)
            f_norm, g_norm = sizes[0], sizes[1]
        else:
            both = None
            f_norm, g_norm = (self.algebra.norm_of_any(t) for t in (value, ws.own_residual))
        verdict = self.statistics.measure(g_norm, f_norm)
        answer = self.iterates.answers(x, verdict)
        self.move(verdict, x, value, both, (f_prev, f_prev_rows), answer)
        return self._lag.read(verdict.going.sum(dtype=torch.int32))

    def move(
        self,
        verdict: Verdict,
        x: Tensor,
        f: Tensor,
        both: Tensor | None,
        before: tuple[Leaves | None, Rows],
        answer: Tensor,
    ) -> None:
        """From the verdict to the next iterate. ``both``: (2, B, N) f and g, None with a residual of the caller's."""
        raise NotImplementedError

    def settle(self, x_new: Tensor, f: Tensor, answer: Tensor, going: Tensor) -> Tensor:
        """Write the next iterate; which of the samples that go on took f's value instead."""
        ws = self.ws
        rounded = x_new if x_new.dtype == ws.layout.dtype else x_new.to(ws.layout.dtype)
        taken = going & self.algebra.finite(rounded)
        every = self.iterates.looks and bool(taken.all())
        self.iterates.write(x_new, taken, None if every else anderson.fallback(f, answer, going))
        return going ^ taken


class AndersonStep(PortableStep):
    """Anderson's step."""

    ws: AndersonWorkspace

    def __init__(self, ws: AndersonWorkspace, evaluations: int) -> None:
        super().__init__(ws, evaluations)
        self.constants = anderson.Constants(ws.method, ws.layout.acc, ws.layout.device)
        self._known: Rowwise | None = None
        self._both: Tensor | None = None  # f and g of the evaluation before

    def _rowwise(self) -> Rowwise:
        """What is known of the columns; taken up from the tiles if another backend, or nobody, had it last."""
        if self.ws.loose is None or self.ws.loose is not self._known:
            self._known = self.ws.loose = Rowwise(self.ws, self.statistics.made - 1)
        return self._known

    def move(
        self,
        verdict: Verdict,
        x: Tensor,
        f: Tensor,
        both: Tensor | None,
        before: tuple[Leaves | None, Rows],
        answer: Tensor,
    ) -> None:
        """Mix, and choose the slot of the next column."""
        ws, method, statistics, going = self.ws, self.ws.method, self.statistics, verdict.going
        stats, made = verdict.stats, statistics.made
        g = ws.own_residual if both is None else both[1]
        assert g is not None
        unit, last_norm = stats.unit[:, None], statistics.stats.norm
        scaled = None if both is None else both * unit
        own = g * unit if scaled is None else scaled[1]
        e = anderson.Evaluation(made, x, f, g, own, going, verdict.reset, stats.unit, stats.norm, last_norm)
        if method.m == 0:
            overflowed = self.settle(anderson.plain_step(method, e), f, answer, going)
            statistics.write(verdict)
            statistics.count(statistics.of_any_solver(verdict, overflowed))
            return
        loose = self._rowwise()
        loose.grow(made)
        new = self._new(e, loose.columns, scaled, before)
        self._both = both
        step = anderson.step(method, self.algebra, self.constants, loose.columns, loose.known, e, new)
        overflowed = self.settle(step.x, f, answer, going)
        events, lost = statistics.of_any_solver(verdict, overflowed), overflowed
        if step.solved is not None:
            failed = but_not(going, step.solved)
            events[Int.SOLVE_FALLBACKS], lost = failed, overflowed | failed
        if step.grew is not None:
            events[Int.GROWTH_RESTARTS] = step.grew
        chosen = anderson.choose_slot(method, self.algebra, self.constants, step, going, lost, made)
        if anderson.may_give_up(method, made):
            events[Int.EVICTIONS] = chosen.evicting
        loose.known = chosen.known
        statistics.write(verdict, {Int.SLOT: chosen.known.slot.int(), Int.COUNT: chosen.used})
        statistics.count(events)

    def _new(
        self, e: anderson.Evaluation, columns: Columns, scaled: Tensor | None, before: tuple[Leaves | None, Rows]
    ) -> list[Tensor] | None:
        """DF and dG, rounded as they will be stored."""
        ws = self.ws
        f_prev, f_prev_rows = before
        if f_prev is None:
            return None
        if scaled is None:
            assert ws.own_previous is not None
            dF = columns.round(anderson.difference(e.f, gather(ws, f_prev, f_prev_rows), e.unit)[None])[0]
            dG = anderson.difference(e.g, ws.own_previous, e.unit)
            return [dF, dG.nan_to_num_(nan=0.0, posinf=LARGE, neginf=-LARGE)]
        last = self._both
        if last is None:
            value = gather(ws, f_prev, f_prev_rows)
            last = torch.stack([value, value - self.iterates.before()])
        # (now - before) unit with the product that is there already: a unit is a power of two, no bit changes.
        pair = columns.round(torch.addcmul(scaled, last, e.unit[:, None], value=-1))
        return [pair[0], pair[1]]
