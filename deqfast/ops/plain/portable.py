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
from ..formulas.anderson import Known
from ..formulas.measure import Verdict
from ..lag import Lag
from ..workspace import Workspace, tile, untile
from .codec import decode, encode
from .matrices import Matrices
from .rows import Statistics, gather, scatter


class PortableStep(BoundStep):
    """What both solvers do before and after the formula."""

    def __init__(self, ws: Workspace, evaluations: int) -> None:
        super().__init__(ws)
        device = ws.layout.device
        self.algebra = Matrices(device.type)
        self.statistics = Statistics(ws, evaluations)
        self._device = device.type
        self._lag = Lag(ws.layout.B, device, ws.stopping.max_iter, evaluations)

    def __call__(self, f: Leaves, f_prev: Leaves | None, f_rows: Rows, f_prev_rows: Rows) -> int:
        """One update."""
        with torch.no_grad():
            if not torch.is_autocast_enabled(self._device):
                return self._step(f, f_prev, f_rows, f_prev_rows)
            with torch.autocast(self._device, enabled=False):
                return self._step(f, f_prev, f_rows, f_prev_rows)

    def _step(self, f: Leaves, f_prev: Leaves | None, f_rows: Rows, f_prev_rows: Rows) -> int:
        ws = self.ws
        x, value = gather(ws, ws.x[ws.cur]), gather(ws, f, f_rows)
        if ws.own_residual is None:
            both = torch.stack([value, value - x])
            sizes = self.algebra.norm_of_any(both)
            f_norm, g_norm = sizes[0], sizes[1]
        else:
            both = None
            f_norm, g_norm = (self.algebra.norm_of_any(t) for t in (value, ws.own_residual))
        verdict = self.statistics.measure(g_norm, f_norm)
        answer = self.statistics.answers(x, verdict)
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
        finite = self.algebra.finite(rounded)
        scatter(ws, ws.x[1 - ws.cur], anderson.settle(x_new, f, answer, going, finite))
        return going & ~finite


class Columns:
    """The columns: the workspace's history, where it lies a sample a row, else a copy that does.

    The first ``count`` slots have been written to, of every sample, and hold numbers alone.
    """

    def __init__(self, ws: AndersonWorkspace, used: Tensor | None) -> None:
        """``used``: (B, m) columns that are in use already, None: none."""
        self.ws, self.method = ws, ws.method
        B, m = ws.layout.B, ws.method.m
        self.history = ws.history
        if not ws.keeps_products:
            self.history = torch.stack([untile(t, B) for t in ws.history])
        self.scales = ws.scales if ws.scales.shape[3] else None
        self.count = 0
        if used is not None:
            self.count = m
            self.history.masked_fill_(~used[None, :, :, None], 0)
            if self.scales is not None:
                self.scales.masked_fill_(~used[None, :, :, None], 1)
            if ws.own_columns is not None:
                ws.own_columns.masked_fill_(~used[:, :, None], 0)
        self.base = torch.arange(2 * B, device=ws.layout.device).view(2, B) * m
        self.new: tuple[Tensor, Tensor | None] = (self.base, None)
        self._zero = torch.zeros((), dtype=self.history.dtype, device=ws.layout.device)
        self._wide = self.history

    def grow(self, count: int) -> None:
        """Make slots ready to be written to."""
        if count > self.count:
            fresh = slice(self.count, count)
            self.history[:, :, fresh].zero_()
            if self.scales is not None:
                self.scales[:, :, fresh].fill_(1)
            if self.ws.own_columns is not None:
                self.ws.own_columns[:, fresh].zero_()
            self.count = count

    def round(self, pair: Tensor) -> Tensor:
        """(2, B, N) dF and dG, or dF alone, as they will be stored."""
        if self.history.dtype == pair.dtype:
            self.new = (pair, None)
            return pair
        self.new = encode(self.ws, pair)
        return decode(self.ws, *self.new)

    def put(self, slot: Tensor, new: list[Tensor], good: Tensor) -> None:
        codes, scales = self.new
        kinds = codes.shape[0]
        index = (self.base[:kinds] + slot).flatten()
        codes = torch.where(good[:, None], codes, self._zero)
        flat = self.history.view(-1, codes.shape[-1])
        flat.index_copy_(0, index, codes.view(-1, codes.shape[-1]))
        if scales is not None and self.scales is not None:
            self.scales.view(-1, scales.shape[-1]).index_copy_(0, index, scales.view(-1, scales.shape[-1]))
        own = self.ws.own_columns
        if own is not None:
            column = torch.where(good[:, None], new[1], 0.0)
            own.view(-1, own.shape[-1]).index_copy_(0, self.base[0] + slot, column)

    def products(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        dG = self._read()
        onto_g = torch.bmm(rows, dG.mT)
        if self.method.test_space == 0:
            return onto_g[:, 1:], onto_g[:, :1]
        onto_f = torch.bmm(rows[:, :2], self._wide[0].mT)
        return onto_g[:, 1:], torch.sub(onto_f, onto_g[:, :2], alpha=self.method.test_space)

    def _read(self) -> Tensor:
        """Widen the columns for this step; those of the residual."""
        columns = self.history[:, :, : self.count]
        if columns.dtype != self.ws.layout.acc:
            columns = decode(self.ws, columns, None if self.scales is None else self.scales[:, :, : self.count])
        self._wide = columns
        own = self.ws.own_columns
        return columns[1] if own is None else own[:, : self.count]

    def every(self) -> Tensor:
        dF, dG = self._wide
        gram = torch.bmm(dG, dG.mT)
        if self.method.test_space == 0:
            return gram[:, None]
        return torch.stack([gram, torch.sub(torch.bmm(dF, dG.mT), gram, alpha=self.method.test_space)], dim=1)

    def mix(self, base: Tensor, weights: Tensor) -> Tensor:
        beta = self.method.mixing
        mixed = torch.baddbmm(base[:, None], weights[:, None], self._wide[0], alpha=-1)
        if beta != 1:
            mixed = torch.baddbmm(mixed, weights[:, None], self._wide[1], alpha=1 - beta)
        return mixed[:, 0]


class Rowwise:
    """What is known of the columns, a sample a row, until somebody asks for the tiles."""

    def __init__(self, ws: AndersonWorkspace, made: int) -> None:
        self._targets = (ws.norms, ws.ages, ws.gram, ws.matrix, ws.history)
        self._tiles = ws.tiles
        B, kinds = ws.layout.B, 2 if ws.method.test_space else 1
        norms = untile(ws.norms, B)[:, :kinds]
        used = norms[:, :1] > 0
        products = None
        if ws.keeps_products:
            gram = untile(ws.gram, B)
            gram = gram.tril() + gram.tril(-1).mT
            products = torch.stack([gram, untile(ws.matrix, B)] if kinds == 2 else [gram], dim=1)
        infinite = torch.full_like(norms[:, :1], torch.inf)
        self.known = Known(torch.where(used, norms, infinite), products, untile(ws.ages, B), ws.int_row(Int.SLOT))
        self.columns = Columns(ws, used[:, 0] if made else None)
        if not made:
            self.known = _first(self.known, 0)

    def grow(self, count: int) -> None:
        """Room for one more column, while the history fills."""
        have = self.known.ages.shape[1]
        if count > have:
            pad, more = torch.nn.functional.pad, count - have
            known = self.known
            products = None if known.products is None else pad(known.products, (0, more, 0, more))
            norms, ages = pad(known.norms, (0, more), value=torch.inf), pad(known.ages, (0, more))
            self.known = known._replace(norms=norms, products=products, ages=ages)
        self.columns.grow(count)

    def forget(self, which: Tensor) -> None:
        """The columns of some samples no longer count."""
        self.known = self.known._replace(norms=self.known.norms.masked_fill(which[:, None, None], torch.inf))

    def settle(self) -> None:
        """Write the tiles."""
        norms, ages, gram, matrix, history = self._targets
        known = self.known
        m, have = ages.shape[1], known.ages.shape[1]
        pad, more, tiles = torch.nn.functional.pad, ages.shape[1] - known.ages.shape[1], self._tiles
        kept = torch.where(known.norms[:, :1] < torch.inf, known.norms, torch.zeros_like(known.norms))
        norms.copy_(tile(pad(kept, (0, more)).expand(-1, 2, m), tiles))
        ages.copy_(tile(pad(known.ages, (0, more)), tiles))
        if known.products is None:
            for target, columns in zip(history, self.columns.history, strict=True):
                target.copy_(tile(columns, tiles))
            return
        gram[:, :have, :have].copy_(tile(known.products[:, 0], tiles))
        if known.products.shape[1] == 2:
            matrix[:, :have, :have].copy_(tile(known.products[:, 1], tiles))


def _first(known: Known, count: int) -> Known:
    products = None if known.products is None else known.products[:, :, :count, :count]
    return known._replace(norms=known.norms[..., :count], products=products, ages=known.ages[:, :count])


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
        last_norm = statistics.stats.norm
        e = anderson.Evaluation(made, x, f, g, going, verdict.reset, stats.unit, stats.norm, last_norm)
        if method.m == 0:
            self.settle(anderson.plain_step(method, e), f, answer, going)
            statistics.write(verdict)
            return
        loose = self._rowwise()
        loose.grow(min(made - 1, method.m))
        new = self._new(e, loose.columns, both, before)
        self._both = both
        step = anderson.step(method, self.algebra, self.constants, loose.columns, loose.known, e, new)
        overflowed = self.settle(step.x, f, answer, going)
        events, lost = {Int.STEP_FALLBACKS: overflowed}, overflowed
        if step.solved is not None:
            failed = going & ~step.solved
            events[Int.SOLVE_FALLBACKS], lost = failed, overflowed | failed
        if step.grew is not None:
            events[Int.GROWTH_RESTARTS] = step.grew
        if made > 1:
            events[Int.RESCALES] = verdict.reset
        chosen = anderson.choose_slot(method, self.algebra, self.constants, step, going, lost, made)
        if made > method.m:
            events[Int.EVICTIONS] = chosen.evicting
        loose.known = chosen.known
        statistics.write(verdict)
        statistics.count(events)
        statistics.keep(slice(Int.SLOT, Int.COUNT + 1), [chosen.known.slot.int(), chosen.count], going)

    def _new(
        self, e: anderson.Evaluation, columns: Columns, both: Tensor | None, before: tuple[Leaves | None, Rows]
    ) -> list[Tensor] | None:
        """dF and dG, rounded as they will be stored."""
        ws = self.ws
        f_prev, f_prev_rows = before
        if f_prev is None:
            return None
        if both is None:
            assert ws.own_previous is not None
            dF = columns.round(anderson.difference(e.f, gather(ws, f_prev, f_prev_rows), e.unit)[None])[0]
            return [dF, anderson.difference(e.g, ws.own_previous, e.unit)]
        last = self._both
        if last is None:
            value = gather(ws, f_prev, f_prev_rows)
            last = torch.stack([value, value - gather(ws, ws.x[1 - ws.cur])])
        pair = columns.round(anderson.difference(both, last, e.unit))
        return [pair[0], pair[1]]
