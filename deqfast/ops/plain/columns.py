"""Anderson's columns for backend "torch", and what is known of them, a sample a row."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from ..anderson import SCALED_DTYPES, AndersonWorkspace
from ..codes import Int
from ..formulas.columns import Evaluation, Known
from ..workspace import tile, untile
from .codec import decode, encode, stored

LARGE = 1e38  # finite in bfloat16, too
GROWTH = 4  # columns that room is made for at a time


class Columns:
    """The columns in the dtype of the products, a sample a row: the workspace's history itself where it is that.

    Narrower ones are rounded as the history would hold them and go there when somebody asks: to widen all of them at
    every step would take longer than the step. The first ``count`` slots have been written to, of every sample, and
    hold numbers alone.
    """

    def __init__(self, ws: AndersonWorkspace, used: Tensor | None) -> None:
        """``used``: (B, count) columns that are in use already, None: none."""
        # The workspace keeps this object, and whoever steps keeps the workspace.
        self.ws: AndersonWorkspace = weakref.proxy(ws)
        self.method = ws.method
        layout = ws.layout
        B, m = layout.B, ws.method.m
        self.own = ws.keeps_products and ws.history.dtype == layout.acc
        self.count = 0 if used is None else used.shape[1]
        if self.own:
            self.wide = ws.history
        elif used is None:
            self.wide = torch.empty(2, B, m, layout.N, dtype=layout.acc, device=layout.device)
        else:
            self.wide = torch.stack([stored(ws, which) for which in (0, 1)])
        if used is not None:
            self.wide[:, :, : self.count].masked_fill_(~used[None, :, :, None], 0)
            if ws.own_columns is not None:
                ws.own_columns[:, : self.count].masked_fill_(~used[:, :, None], 0)
        self.base = torch.arange(2 * B, device=layout.device).view(2, B) * m
        self.pair: Tensor | None = None
        # Memory that is new at every step costs more than the sums that fill it.
        self.fresh = torch.empty(2, B, layout.N, dtype=layout.acc, device=layout.device)
        self._rows = self.fresh.new_empty(B, 3 if ws.method.test_space else 2, layout.N)
        self._codes: Tensor | None = None
        self.into = self.fresh[0]  # where the next mix goes
        self._views = (-1, self.wide, self.wide)
        self._flat = self.wide.view(2 * B * m, layout.N)

    def grow(self, count: int) -> None:
        """Make slots ready to be written to."""
        fresh = slice(self.count, count)
        self.wide[:, :, fresh].zero_()
        if self.ws.own_columns is not None:
            self.ws.own_columns[:, fresh].zero_()
        self.count = count

    def round(self, pair: Tensor, finite: bool) -> Tensor:
        """(2, B, N) dF and dG, or dF alone, as they will be stored; what is no number of a sample's becomes one.

        Such a column is never used, but 0 times what is no number is none. ``finite``: it is known that all are.
        """
        if not finite:
            pair.nan_to_num_(nan=0.0, posinf=LARGE, neginf=-LARGE)
        dtype = self.ws.history.dtype
        self.pair = pair
        if dtype in SCALED_DTYPES:
            self.pair = decode(self.ws, *encode(self.ws, pair))
        elif dtype != pair.dtype:
            if self._codes is None:
                self._codes = torch.empty_like(pair, dtype=dtype)
            pair.copy_(self._codes.copy_(pair))
        return self.pair

    def rows(self, e: Evaluation, new: list[Tensor]) -> Tensor:
        """In the same memory every time."""
        width = e.g.shape[1]
        if self._rows.shape[2] != width:  # a residual of the caller's own, in another space
            self._rows = self._rows.new_empty(*self._rows.shape[:2], width)
        torch.mul(e.g, e.unit[:, None], out=self._rows[:, 0])
        self._rows[:, 1].copy_(new[1])
        if self.method.test_space:
            torch.sub(*new, alpha=self.method.test_space, out=self._rows[:, 2])
        return self._rows

    def put(self, slot: Tensor, new: list[Tensor], good: Tensor) -> None:
        """Write them, of every sample: one that is not good counts as empty."""
        own = self.ws.own_columns
        index = self.base + slot
        if own is None:
            assert self.pair is not None
            self._flat.index_copy_(0, index.view(-1), self.pair.flatten(0, 1))
            return
        for target, column in ((self.wide[0], new[0]), (own, new[1])):
            target.view(-1, column.shape[1]).index_copy_(0, index[0], column)

    def settle(self) -> None:
        """Write them where every backend looks for them."""
        ws = self.ws
        if self.own:
            return
        codes, scales = encode(ws, self.wide[:, :, : self.count])
        if not ws.keeps_products:
            for target, columns in zip(ws.history, codes, strict=True):
                target[:, : self.count].copy_(tile(columns, ws.tiles))
            return
        ws.history[:, :, : self.count].copy_(codes)
        if scales is not None:
            ws.scales[:, :, : self.count].copy_(scales)

    def products(self, rows: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Two batched products; W . v = dF . v - c dG . v."""
        dF, dG = self._columns()
        onto_g = torch.bmm(rows, dG.mT)
        if c is None:
            return onto_g, onto_g[:, :1]
        onto_f = torch.bmm(rows[:, :2], dF.mT)
        return onto_g, torch.addcmul(onto_f, onto_g[:, :2], c[:, None], value=-1)

    def _columns(self) -> tuple[Tensor, Tensor]:
        own = self.ws.own_columns
        if own is not None:
            return self.wide[0, :, : self.count], own[:, : self.count]
        if self._views[0] != self.count:
            self._views = (self.count, self.wide[0, :, : self.count], self.wide[1, :, : self.count])
        return self._views[1:]

    def every(self, c: Tensor | None) -> Tensor:
        """All products of the columns with each other."""
        dF, dG = self._columns()
        gram = torch.bmm(dG, dG.mT)
        if c is None:
            return gram[:, None]
        return torch.stack([gram, torch.addcmul(torch.bmm(dF, dG.mT), gram, c[:, :, None], value=-1)], dim=1)

    def mix(self, base: Tensor, weights: Tensor) -> Tensor:
        """One batched product, two below full mixing."""
        beta = self.method.mixing
        dF, dG = self._columns()
        mixed = torch.baddbmm(base[:, None], weights[:, None], dF, alpha=-1, out=self.into[:, None])
        if beta != 1:
            mixed.baddbmm_(weights[:, None], dG, alpha=1 - beta)
        return self.into


class Rowwise:
    """What is known of the columns, a sample a row, until somebody asks for the tiles."""

    def __init__(self, ws: AndersonWorkspace, made: int, kind: type[Columns] = Columns) -> None:
        """After ``made`` evaluations; ``kind``: of what holds the columns."""
        self._targets = (ws.norms, ws.ages, ws.gram, ws.matrix)
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
        self.known = Known(
            torch.where(used, norms, infinite), products, untile(ws.ages, B), ws.int_row(Int.SLOT).long()
        )
        plain = norms.device.type == "cpu" and not bool((norms < 0).any())
        self.known = self.known._replace(plain=plain)
        room = min(-(-made // GROWTH) * GROWTH, ws.method.m)  # as if it had grown here
        self.known = _first(self.known, room)
        self.columns = kind(ws, used[:, 0, :room] if made else None)

    def grow(self, made: int) -> None:
        """Room for the column of this step and a free slot for the next, while the history fills."""
        have, m = self.known.ages.shape[1], self.columns.method.m
        count = min(-(-made // GROWTH) * GROWTH, m)
        if made > have and count > have:
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
        norms, ages, gram, matrix = self._targets
        known = self.known
        m, have = ages.shape[1], known.ages.shape[1]
        pad, more, tiles = torch.nn.functional.pad, ages.shape[1] - known.ages.shape[1], self._tiles
        kept = torch.where(known.norms[:, :1] < torch.inf, known.norms, torch.zeros_like(known.norms))
        norms.copy_(tile(pad(kept, (0, more)).expand(-1, 2, m), tiles))
        ages.copy_(tile(pad(known.ages, (0, more)), tiles))
        self.columns.settle()
        if known.products is None:
            return
        gram[:, :have, :have].copy_(tile(known.products[:, 0], tiles))
        if known.products.shape[1] == 2:
            matrix[:, :have, :have].copy_(tile(known.products[:, 1], tiles))


def _first(known: Known, count: int) -> Known:
    products = None if known.products is None else known.products[:, :, :count, :count]
    return known._replace(norms=known.norms[..., :count], products=products, ages=known.ages[:, :count])
