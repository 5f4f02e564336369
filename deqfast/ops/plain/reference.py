"""Backend "reference": the oracle of every test. Rows that are not running are left as they are.

It keeps what every backend keeps where every backend keeps it, and adds up in an order that depends on N alone, so that
a sample has the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..anderson import AndersonWorkspace
from ..broyden import BroydenWorkspace
from ..codes import Int, Real
from ..contract import BoundStep, Leaves, Rows
from ..formulas import anderson, broyden
from ..formulas.columns import Evaluation, Known, difference, rows_of
from ..formulas.measure import Verdict
from ..workspace import Workspace, tile, untile
from .codec import decode, encode, stored
from .ordered import Ordered, combine, products
from .rows import Iterates, Statistics, gather

ALGEBRA = Ordered()


class _Step(BoundStep):
    """What both steps do before and after the formula."""

    def __init__(self, ws: Workspace, evaluations: int) -> None:
        super().__init__(ws)
        self.statistics = Statistics(ws, evaluations, torch.float64, looks=False)
        self.iterates = Iterates(ws)
        self.iterates.looks = False
        self.exact = True
        self._device = ws.layout.device.type

    def __call__(self, f: Leaves, f_prev: Leaves | None, f_rows: Rows, f_prev_rows: Rows) -> int:
        """One update."""
        with torch.no_grad(), torch.autocast(self._device, enabled=False):
            ws = self.ws
            x, value = self.iterates.now(), gather(ws, f, f_rows)
            g = value - x if ws.own_residual is None else ws.own_residual
            verdict = self.statistics.measure(ALGEBRA.norm_of_any(g), ALGEBRA.norm_of_any(value))
            answer = self.iterates.answers(x, verdict)
            before = None if f_prev is None else gather(ws, f_prev, f_prev_rows)
            self.move(verdict, x, value, g, before, answer)
            self.iterates.overwrite(answer, verdict.run & ~verdict.going)
            return int(verdict.going.sum())

    def move(self, verdict: Verdict, x: Tensor, f: Tensor, g: Tensor, f_prev: Tensor | None, answer: Tensor) -> None:
        """From the verdict to the next iterate."""
        raise NotImplementedError

    def settle(self, x_new: Tensor, f: Tensor, answer: Tensor, going: Tensor) -> Tensor:
        """Write the next iterate; which of the samples that go on took f's value instead."""
        taken = going & ALGEBRA.finite(x_new.to(self.ws.layout.dtype))
        self.iterates.write(x_new, taken, anderson.fallback(f, answer, going))
        return going & ~taken


class _Columns:
    """The columns as the workspace holds them."""

    def __init__(self, ws: AndersonWorkspace, used: Tensor) -> None:
        self.ws, self.used = ws, used

    def put(self, slot: Tensor, new: list[Tensor], good: Tensor) -> None:
        ws = self.ws
        index = torch.arange(ws.layout.B, device=slot.device)
        self.used = self.used.index_put((index, slot.long()), good)
        where = index[good]
        at = slot[good].long()
        for which, column in enumerate(new):
            if which == 1 and ws.own_columns is not None:
                ws.own_columns[where, at] = column[good]
                continue
            codes, scales = encode(ws, column)
            columns = ws.columns(which)
            columns[where, at] = codes[good]
            if not ws.keeps_products:
                ws.history[which].copy_(tile(columns, ws.tiles))
            if scales is not None:
                ws.scales[which, where, at] = scales[good]

    def rows(self, e: Evaluation, new: list[Tensor]) -> Tensor:
        return rows_of(self.ws.method, e, new)

    def _stored(self, which: int) -> Tensor:
        own = self.ws.own_columns if which == 1 else None
        columns = stored(self.ws, which) if own is None else own
        return torch.where(self.used[..., None], columns, 0)

    def _tests(self, c: Tensor) -> Tensor:
        return self._stored(0) - c[..., None] * self._stored(1)

    def products(self, rows: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        dG = self._stored(1)
        onto_g = [products(dG, row) for row in rows.unbind(1)]
        if c is None:
            return torch.stack(onto_g, dim=1), onto_g[0][:, None]
        W = self._tests(c)
        onto_w = [products(W, row) for row in rows[:, :2].unbind(1)]
        return torch.stack(onto_g, dim=1), torch.stack(onto_w, dim=1)

    def every(self, c: Tensor | None) -> Tensor:
        dG = self._stored(1)
        left = [dG] if c is None else [dG, self._tests(c)]
        return torch.stack([(t[:, :, None] * dG[:, None]).sum(3) for t in left], dim=1)

    def mix(self, base: Tensor, weights: Tensor) -> Tensor:
        beta = self.ws.method.mixing
        columns = self._stored(0)
        return base - combine(weights, columns if beta == 1 else columns - (1 - beta) * self._stored(1))


class AndersonStep(_Step):
    """The oracle of Anderson's step."""

    ws: AndersonWorkspace

    def __init__(self, ws: AndersonWorkspace, evaluations: int) -> None:
        super().__init__(ws, evaluations)
        self.constants = anderson.Systems(ws.method, ws.layout.acc, ws.layout.device)

    def move(self, verdict: Verdict, x: Tensor, f: Tensor, g: Tensor, f_prev: Tensor | None, answer: Tensor) -> None:
        """Mix, and choose the slot of the next column."""
        ws, statistics, going = self.ws, self.statistics, verdict.going
        stats = verdict.stats
        made = statistics.made
        e = Evaluation(made, x, f, g, going, verdict.reset, stats.unit, stats.norm, statistics.stats.norm)
        if ws.method.m == 0:
            overflowed = self.settle(anderson.plain_step(ws.method, e), f, answer, going)
            statistics.write(verdict)
            statistics.count(statistics.of_any_solver(verdict, overflowed))
            return
        known = self._known()
        columns = _Columns(ws, known.norms[:, 0] < torch.inf)
        new = None if f_prev is None else self._new(e, f_prev)
        step = anderson.step(ws.method, ALGEBRA, self.constants, columns, known, e, new)
        overflowed = self.settle(step.x, f, answer, going)
        events = statistics.of_any_solver(verdict, overflowed)
        lost = overflowed
        if step.solved is not None:
            events[Int.SOLVE_FALLBACKS] = going & ~step.solved
            lost = lost | events[Int.SOLVE_FALLBACKS]
        if step.grew is not None:
            events[Int.GROWTH_RESTARTS] = step.grew
        chosen = anderson.choose_slot(ws.method, ALGEBRA, self.constants, step, going, lost, made)
        events[Int.EVICTIONS] = chosen.evicting
        statistics.write(verdict, chosen.rows())
        statistics.count(events)
        self._keep(chosen.known, going)

    def _new(self, e: Evaluation, f_prev: Tensor) -> list[Tensor]:
        """DF and dG, rounded as they will be stored."""
        ws = self.ws
        dF = difference(e.f, f_prev, e.unit)
        if ws.own_previous is not None:
            dG = difference(e.g, ws.own_previous, e.unit)
            return [decode(ws, *encode(ws, dF)), dG]
        dG = dF - difference(e.x, self.iterates.before(), e.unit)  # with the bits of the kernels
        return [decode(ws, *encode(ws, column)) for column in (dF, dG)]

    def _known(self) -> Known:
        """From the tiles, where a norm of 0 means an empty column."""
        ws, kinds = self.ws, 2 if self.ws.method.test_space else 1
        B = ws.layout.B
        norms = untile(ws.norms, B)[:, :kinds]
        norms = torch.where((norms[:, :1] > 0), norms, torch.inf)
        products = None
        if ws.keeps_products:
            gram = untile(ws.gram, B)
            gram = gram.tril() + gram.tril(-1).mT
            products = torch.stack([gram, untile(ws.matrix, B)] if kinds == 2 else [gram], dim=1)
        return Known(norms, products, untile(ws.ages, B), ws.int_row(Int.SLOT))

    def _keep(self, known: Known, going: Tensor) -> None:
        ws = self.ws
        norms = torch.where(known.norms[:, :1] < torch.inf, known.norms, 0)
        _write(ws.norms, norms.expand(-1, 2, -1), going, ws.tiles)
        _write(ws.ages, known.ages, going, ws.tiles)
        if known.products is not None:
            _write(ws.gram, known.products[:, 0], going, ws.tiles)
            if ws.method.test_space:
                _write(ws.matrix, known.products[:, 1], going, ws.tiles)


def _write(target: Tensor, value: Tensor, where: Tensor, tiles: int) -> None:
    B = where.shape[0]
    mask = where.view(B, *([1] * (value.dim() - 1)))
    target.copy_(tile(torch.where(mask, value, untile(target, B)), tiles))


class _Steps:
    """Broyden's steps as the workspace holds them, as the links of a chain."""

    def __init__(self, ws: BroydenWorkspace) -> None:
        self.ws = ws

    def only(self) -> tuple[Tensor, Tensor] | None:
        return self.ws.history[:, 0], self.ws.norms[:, 0]

    def apply(self, z: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return broyden.chain(ALGEBRA, z, self._links(count))

    def _links(self, count: Tensor) -> Iterator[broyden.Link]:
        ws = self.ws
        longest = int(count.max()) if count.numel() else 0
        for j in range(longest):
            active, last = count > j, count == j + 1
            s = torch.where(active[:, None], ws.history[:, j], 0)
            following = None
            if j + 1 < longest:
                following = torch.where((count > j + 1)[:, None], ws.history[:, j + 1], 0)
            yield broyden.Link(s, ws.norms[:, j], following, active, last)


class BroydenStep(_Step):
    """The oracle of Broyden's step."""

    ws: BroydenWorkspace

    def move(self, verdict: Verdict, x: Tensor, f: Tensor, g: Tensor, f_prev: Tensor | None, answer: Tensor) -> None:
        """Apply the inverse, and keep the step."""
        ws, statistics, going = self.ws, self.statistics, verdict.going
        e = broyden.Evaluation(x, g, going, verdict.reset, verdict.stats.unit)
        count, scale = ws.int_row(Int.COUNT), ws.real_row(Real.SCALE)
        step = broyden.step(ws.method, ALGEBRA, _Steps(ws), count, scale, e)
        overflowed = self.settle(step.x, f, answer, going)
        keep = going & ~overflowed
        where, at = keep.nonzero()[:, 0], step.kept[keep].long()
        ws.history[where, at] = step.s[keep]
        ws.norms[where, at] = ALGEBRA.dot(step.s, step.s)[keep]
        if ws.gram.shape[1]:
            finite = torch.where(torch.isfinite(ws.history), ws.history, 0)
            ws.gram[where, at] = products(finite, step.s)[keep]
        events = statistics.of_any_solver(verdict, overflowed)
        events |= {Int.FULL_RESTARTS: step.full, Int.DENOMINATOR_RESTARTS: step.bad}
        statistics.write(verdict, {Int.COUNT: torch.where(overflowed, 0, step.kept + 1).int()})
        statistics.count(events)
        scale.copy_(torch.where(going, step.scale, scale))
