"""Anderson's step that reads its columns piece by piece, so that little else than the state is on the device.

Two passes a step. The first takes the differences, stores the new column, and multiplies all columns with the residual
and with the new one; the second mixes. What is known of the columns is that of the other steps, and so are the
formulas: they are handed sums, and see rows of no numbers where they would see those of a state.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..anderson import SCALED_DTYPES, AndersonWorkspace
from ..codes import Real
from ..contract import Leaves, Rows
from ..formulas.columns import Evaluation
from ..formulas.measure import Verdict
from ..formulas.sums import chunked_norm, scaled_norm
from ..hosted import Piece
from ..layout import Layout
from .codec import encode_part, scale_part
from .columns import LARGE, Columns
from .portable import AndersonStep
from .stores import parts_of, pieces_of, store_of

WIDE_MOST = 1 << 30  # bytes of columns beside those of a narrower history, up to which a step is faster by them


class Values:
    """A state, or what f made of one, in pieces."""

    def __init__(self, layout: Layout, leaves: Leaves, rows: Rows = None) -> None:
        """``rows``: where the samples are."""
        self._acc = layout.acc
        self._leaves = layout.rows(leaves)
        self._at = None if rows is None else rows.clamp(min=0)

    def of(self, piece: Piece) -> Tensor:
        """(samples, numbers) in the accumulation dtype: a view where they are in that."""
        numbers = self._leaves[piece.leaf][:, piece.inside]
        part = numbers[piece.rows] if self._at is None else numbers.index_select(0, self._at[piece.rows])
        return part.to(self._acc)


class Now:
    """What a step makes of an evaluation: x and f, and both at the evaluation before if there was one."""

    def __init__(self, x: Values, f: Values, before: tuple[Values, Values] | None) -> None:
        self.x, self.f, self._before = x, f, before

    def pair(self, piece: Piece, unit: Tensor) -> Tensor:
        """(2, samples, numbers) dF and dG in the samples' units."""
        assert self._before is not None
        x_prev, f_prev = (values.of(piece) for values in self._before)
        f = self.f.of(piece)
        pair = torch.stack([f - f_prev, (f - self.x.of(piece)).sub_(f_prev - x_prev)])
        return pair.mul_(unit[piece.rows, None])


class StreamedColumns(Columns):
    """The columns as they are stored, and their products of this step."""

    def __init__(self, ws: AndersonWorkspace, used: Tensor | None) -> None:
        """``used``: (B, count) columns that are in use already, None: none."""
        self.ws: AndersonWorkspace = weakref.proxy(ws)
        self.method = ws.method
        self.store = store_of(self.ws)
        self.count = 0 if used is None else used.shape[1]
        self.parts = parts_of(self.store.pieces)
        self.scaled = ws.history.dtype in SCALED_DTYPES
        self.have = 0  # of them, that may have been written to
        self.now: Now | None = None
        self.weights: Tensor | None = None
        most = max((piece.shape[0] * piece.shape[1] for piece in self.store.pieces), default=0)
        self._wide = torch.empty(2, ws.method.m * most, dtype=ws.layout.acc, device=ws.layout.device)
        self._rows = self._slot = torch.arange(ws.layout.B, device=ws.layout.device)
        self._unit = ws.real_row(Real.UNIT)
        self._found: tuple[Tensor, Tensor] | None = None
        if used is not None:
            self.store.clean(used)
            ws.scales[:, :, : self.count].masked_fill_(~used[None, :, :, None], 0)

    def grow(self, count: int) -> None:
        """Make slots ready to be written to."""
        self.store.clear(self.count, count)
        self.ws.scales[:, :, self.count : count].zero_()
        self.count = count

    def begin(self, now: Now, e: Evaluation, slot: Tensor) -> None:
        """A step; the new column, if there will be one, goes into ``slot``."""
        self.now, self._unit, self._slot, self._found, self.weights = now, e.unit, slot.long(), None, None
        self.have = min(self.count, e.made - 1)

    def read(self, kinds: Sequence[int]) -> Iterator[tuple[Piece, list[Tensor]]]:
        """Each piece, and the columns of these kinds in it, (samples, columns, numbers) in the dtype of the products.

        They last until the next piece is asked for.
        """
        for piece, codes in self.store.read(kinds, self.have):
            yield piece, [self._widened(piece, *one) for one in zip(kinds, codes, self._wide, strict=False)]

    def _widened(self, piece: Piece, kind: int, codes: Tensor, place: Tensor) -> Tensor:
        if codes.dtype == place.dtype and codes.is_contiguous():
            return codes
        wide = place[: codes.numel()].view(codes.shape).copy_(codes)
        if self.scaled:
            scale_part(wide, self.ws.scales[kind, piece.rows, : self.have, piece.blocks])
        return wide

    def rows(self, e: Evaluation, new: list[Tensor]) -> Tensor:
        """(B, 1 + s, parts) norms of the parts of each row, 0 for g, whose own is known; all products are made here."""
        space, have = self.method.test_space, self.have
        B, height = e.unit.shape[0], 3 if space else 2
        sizes = e.unit.new_zeros(B, height, self.parts)
        onto_g = e.unit.new_zeros(B, height, self.count)
        onto_f = e.unit.new_zeros(B, 2, self.count if space else 0)
        for piece, columns in self.read((1, 0) if space else (1,)):
            pair = self._keep(piece, e.calm)
            inside, slot = self._rows[: piece.shape[0]], self._slot[piece.rows]
            for wide, column in zip(columns, (pair[1], pair[0]), strict=False):
                wide[inside, slot] = column
            rows = self._rows_of(piece, pair)
            sizes[piece.rows, 1:, piece.part] = chunked_norm(rows[:, 1:])
            onto_g[piece.rows, :, :have] += torch.bmm(rows, columns[0].mT)
            if space:
                onto_f[piece.rows, :, :have] += torch.bmm(rows[:, :2], columns[1].mT)
        self._found = onto_g, onto_f
        return sizes

    def _keep(self, piece: Piece, finite: bool) -> Tensor:
        """(2, samples, numbers) of the new column as it is stored from now on."""
        assert self.now is not None
        pair = self.now.pair(piece, self._unit)
        if not finite:
            pair.nan_to_num_(nan=0.0, posinf=LARGE, neginf=-LARGE)
        dtype = self.ws.history.dtype
        if self.scaled:
            codes, scales = encode_part(dtype, pair)
            kept = codes.contiguous()
            pair.copy_(kept)
            scale_part(pair, scales)
            inside, slot = self._rows[: piece.shape[0]], self._slot[piece.rows]
            self.ws.scales[:, piece.rows, :, piece.blocks][:, inside, slot] = scales
        else:
            kept = pair.to(dtype)
            if kept is not pair:
                pair.copy_(kept)
        self.store.put(piece, kept.unbind(), self._slot)
        return pair

    def _residual(self, piece: Piece) -> Tensor:
        assert self.now is not None
        return (self.now.f.of(piece) - self.now.x.of(piece)).mul_(self._unit[piece.rows, None])

    def _rows_of(self, piece: Piece, pair: Tensor) -> Tensor:
        g = self._residual(piece)
        space = self.method.test_space
        kinds = [g, pair[1], torch.sub(*pair, alpha=space)] if space else [g, pair[1]]
        return torch.stack(kinds, dim=1)

    def put(self, slot: Tensor, new: list[Tensor], good: Tensor) -> None:
        """They are kept already."""

    def products(self, rows: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Those of this step; W . v = dF . v - c dG . v."""
        if self._found is None:
            self._found = self._of_residual(c is not None)
        onto_g, onto_f = self._found
        if c is None:
            return onto_g, onto_g[:, :1]
        return onto_g, torch.addcmul(onto_f, onto_g[:, :2], c[:, None], value=-1)

    def _of_residual(self, both: bool) -> tuple[Tensor, Tensor]:
        """Of g alone, where there is no new column."""
        ws = self.ws
        found = torch.zeros(2, ws.layout.B, 1, self.count, dtype=ws.layout.acc, device=ws.layout.device)
        for piece, columns in self.read((1, 0) if both else (1,)):
            g = self._residual(piece)
            for onto, wide in zip(found, columns, strict=False):
                onto[piece.rows, :, : self.have] += torch.bmm(g[:, None], wide.mT)
        return found[0], found[1]

    def every(self, c: Tensor | None) -> Tensor:
        """Such workspaces keep their products."""
        raise NotImplementedError("columns that are read piece by piece have kept products")

    def mix(self, base: Tensor, weights: Tensor) -> Tensor:
        """It is made in the second pass."""
        self.weights = weights
        return base

    def settle(self) -> None:
        """They are where they are stored."""
        self.store.settle()


class StreamedStep(AndersonStep):
    """Anderson's step, piece by piece."""

    columns = StreamedColumns

    def __init__(self, ws: AndersonWorkspace, evaluations: int) -> None:
        super().__init__(ws, evaluations)
        self._nothing = torch.empty(ws.layout.B, 0, dtype=ws.layout.acc, device=ws.layout.device)
        self._pieces = pieces_of(ws)
        self._parts = parts_of(self._pieces)
        self._whole: AndersonStep | None = None
        self._now: Now | None = None

    def __call__(self, f: Leaves, f_prev: Leaves | None, f_rows: Rows, f_prev_rows: Rows) -> int:
        """One update; with a residual of the caller's own the step that has all columns in memory makes it."""
        if self.ws.own_residual is None:
            return super().__call__(f, f_prev, f_rows, f_prev_rows)
        if self._whole is None:
            self._whole = AndersonStep(self.ws, self.statistics.made)
        return self._whole(f, f_prev, f_rows, f_prev_rows)

    def _step(self, f: Leaves, f_prev: Leaves | None, f_rows: Rows, f_prev_rows: Rows) -> int:
        ws, layout, nothing = self.ws, self.ws.layout, self._nothing
        x, value, before = Values(layout, ws.x[ws.cur]), Values(layout, f, f_rows), None
        if f_prev is not None:
            before = Values(layout, ws.x[1 - ws.cur]), Values(layout, f_prev, f_prev_rows)
        self._now = Now(x, value, before)
        verdict = self.statistics.measure(*self._norms(self._now))
        self.iterates.save(verdict)
        self.move(verdict, nothing, nothing, nothing, (f_prev, f_prev_rows), nothing)
        columns, slot = self._kept()
        columns.store.chosen(slot)
        self._now = columns.now = None
        return ws.layout.B if verdict.improved else self._lag.read(verdict.going.sum(dtype=torch.int32))

    def _kept(self) -> tuple[StreamedColumns, Tensor]:
        """The columns, and where the next one goes."""
        loose = self._rowwise()
        assert isinstance(loose.columns, StreamedColumns)
        return loose.columns, loose.known.slot

    def _norms(self, now: Now) -> tuple[Tensor, Tensor]:
        """Of g and f, of any magnitude."""
        layout = self.ws.layout
        sizes = torch.zeros(2, layout.B, self._parts, dtype=layout.acc, device=layout.device)
        for piece in self._pieces:
            f = now.f.of(piece)
            f_norm, g_norm = self.algebra.norms(f, f - now.x.of(piece))
            sizes[0, piece.rows, piece.part], sizes[1, piece.rows, piece.part] = g_norm, f_norm
        g_norm, f_norm = scaled_norm(sizes)
        return g_norm, f_norm

    def _new(self, e: Evaluation, columns: Columns, before: tuple[Leaves | None, Rows]) -> list[Tensor] | None:
        """No differences: they are made in the first pass."""
        kept, slot = self._kept()
        assert self._now is not None
        kept.begin(self._now, e, slot)
        return None if before[0] is None else []

    def settle(self, x_new: Tensor, f: Tensor, answer: Tensor, verdict: Verdict) -> Tensor | None:
        """The second pass: mix, and write the next iterate; which of the samples that go on took f's value instead."""
        ws, layout, going = self.ws, self.ws.layout, verdict.going
        targets = layout.rows(ws.x[1 - ws.cur])
        nought = torch.zeros(layout.B, dtype=layout.acc, device=layout.device)
        for piece, new in self._mixed():
            rounded = new.to(layout.dtype)
            targets[piece.leaf][piece.rows, piece.inside] = rounded
            nought[piece.rows] += rounded.mul_(0).sum(1)  # what is no number stays none
        taken = going & (nought == 0)
        if self.iterates.looks and bool(taken.all()):
            return None
        self._give(targets, taken, verdict)
        return going ^ taken

    def _mixed(self) -> Iterator[tuple[Piece, Tensor]]:
        columns, _ = self._kept()
        beta, weights = self.ws.method.mixing, columns.weights
        if weights is None:
            yield from ((piece, self._base(piece, beta)) for piece in self._pieces)
            return
        weights = weights[:, None, : columns.have]
        for piece, (dF, *dG) in columns.read((0,) if beta == 1 else (0, 1)):
            own = weights[piece.rows]
            mixed = torch.baddbmm(self._base(piece, beta)[:, None], own, dF, alpha=-1)
            if dG:
                mixed.baddbmm_(own, dG[0], alpha=1 - beta)
            yield piece, mixed[:, 0]

    def _base(self, piece: Piece, beta: float) -> Tensor:
        """X + beta g, in memory of its own."""
        assert self._now is not None
        f = self._now.f.of(piece)
        return f.clone() if beta == 1 else torch.lerp(self._now.x.of(piece), f, beta)

    def _give(self, targets: list[Tensor], taken: Tensor, verdict: Verdict) -> None:
        """The value of f where the next iterate is not finite, and the answer where a sample has stopped."""
        assert self._now is not None
        saved = None if verdict.from_saved is None or verdict.calm else Values(self.ws.layout, self.ws.saved)
        for piece in self._pieces:
            answer = self._now.x.of(piece)
            if saved is not None and verdict.from_saved is not None:
                answer = torch.where(verdict.from_saved[piece.rows, None], saved.of(piece), answer)
            rest = torch.where(verdict.going[piece.rows, None], self._now.f.of(piece), answer)
            target = targets[piece.leaf][piece.rows, piece.inside]
            target.copy_(torch.where(taken[piece.rows, None], target, rest.to(target.dtype)))


def step_of(ws: AndersonWorkspace, evaluations: int) -> AndersonStep:
    """The step that has all columns in the dtype of the products, or this one where they would take too much memory."""
    layout, acc = ws.layout, ws.layout.acc
    wide = 2 * ws.method.m * layout.B * layout.N * acc.itemsize
    if ws.history.dtype == acc or not ws.keeps_products or wide <= WIDE_MOST:
        return AndersonStep(ws, evaluations)
    return StreamedStep(ws, evaluations)
