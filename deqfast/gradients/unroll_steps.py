"""Anderson's and Broyden's updates as functions that autograd can follow: ``ops/reference.py`` for ``unroll.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.anderson import AndersonWorkspace
from ..ops.broyden import BroydenWorkspace
from ..ops.codes import GROWTH_LIMIT, MIN_DENOMINATOR, Evict, Int


@dataclass
class Evaluation:
    """One evaluation of f, and what the stopping rule made of it; (B, N) and (B,) tensors."""

    x: Tensor
    f: Tensor
    going: Tensor  # samples that take the step
    reset: Tensor  # samples whose unit is new, so that columns in the old one are dropped
    unit: Tensor
    steps: Tensor
    norm: Tensor
    last_norm: Tensor
    counters: Tensor

    def count(self, row: Int, where: Tensor) -> None:
        """Count an event."""
        self.counters[row] += where.int()

    def settle(self, x_new: Tensor) -> tuple[Tensor, Tensor]:
        """``x_new``, or the Picard step where it is not finite; and where that is."""
        bad = self.going & ~torch.isfinite(x_new).all(1)
        self.count(Int.STEP_FALLBACKS, bad)
        return torch.where(bad[:, None], self.f, x_new), bad


class AndersonUpdate:
    """Anderson's step, keeping its columns; plain (damped) iteration when m = 0."""

    def __init__(self, ws: AndersonWorkspace) -> None:
        self.ws = ws
        layout, m = ws.layout, ws.method.m
        options = {"device": layout.device}
        self.columns_f = torch.zeros(layout.B, m, layout.N, dtype=layout.acc, **options)
        self.columns_g = self.columns_f
        self.valid = torch.zeros(layout.B, m, dtype=torch.bool, **options)
        self.ages = torch.zeros(layout.B, m, dtype=torch.int32, **options)
        self.slot = torch.zeros(layout.B, dtype=torch.int64, **options)
        self.eye = torch.eye(m, dtype=layout.acc, **options)
        self.previous: tuple[Tensor, Tensor] | None = None

    def __call__(self, e: Evaluation) -> Tensor:
        """The next iterate (B, N)."""
        ws = self.ws
        base = e.f if ws.method.mixing == 1 else e.x + ws.method.mixing * (e.f - e.x)
        if ws.method.m == 0:
            return base
        unit = e.unit[:, None]
        is_new = self._add_column(e, unit)
        test = -self.columns_g if ws.method.test_space == 0 else self.columns_f - ws.method.test_space * self.columns_g
        if ws.method.test_space == 0:
            grew = e.going & (e.steps > 1) & ~e.reset & (e.norm > GROWTH_LIMIT * e.last_norm)
            e.count(Int.GROWTH_RESTARTS, grew)
            self.valid = self.valid & (~grew[:, None] | is_new)
        q_square, w_square = self.columns_g.square().sum(2), test.square().sum(2)
        usable = (q_square > 0) & (w_square > 0) & torch.isfinite(q_square) & torch.isfinite(w_square)
        self.valid = self.valid & usable
        # Inside the roots: the derivative of sqrt at an empty column's zero is infinite.
        q = torch.where(self.valid, q_square, 1).sqrt()
        w = torch.where(self.valid, w_square, 1).sqrt()
        both = self.valid[:, :, None] & self.valid[:, None, :]
        products = torch.einsum("bin,bjn->bij", self.columns_g, self.columns_g)
        gram = torch.where(both, products / (q[:, :, None] * q[:, None, :]), self.eye)
        rhs = torch.where(self.valid, -torch.einsum("bmn,bn->bm", test, (e.f - e.x) * unit) / w, 0)
        if ws.method.test_space == 0:
            y, solved = self._cholesky(gram, rhs)
        else:
            products = torch.einsum("bin,bjn->bij", test, self.columns_g)
            matrix = -products / (w[:, :, None] * q[:, None, :])
            y, solved = self._lu(torch.where(both, matrix + ws.method.ridge * self.eye, self.eye), rhs)
        failed = e.going & ~solved
        e.count(Int.SOLVE_FALLBACKS, failed)
        y = torch.where(failed[:, None], 0, y)
        gamma = torch.where(self.valid, y / q, 0)
        mixed = self.columns_f if ws.method.mixing == 1 else self.columns_f - (1 - ws.method.mixing) * self.columns_g
        x_new, overflowed = e.settle(base - torch.einsum("bm,bmn->bn", gamma, mixed) / unit)
        self.valid = self.valid & ~(failed | overflowed)[:, None]
        self._choose_slot(e, gram.detach(), y.detach())
        self.previous = (e.x, e.f)
        return x_new

    def _add_column(self, e: Evaluation, unit: Tensor) -> Tensor:
        self.valid = self.valid & ~e.reset[:, None]
        slots = torch.arange(self.ws.method.m, device=self.slot.device)
        if self.previous is None:
            return torch.zeros_like(self.valid)
        x_prev, f_prev = self.previous
        is_new = (slots == self.slot[:, None]) & (e.going & ~e.reset)[:, None]
        d_f = (e.f - f_prev) * unit
        d_g = d_f - (e.x - x_prev) * unit
        self.columns_f = torch.where(is_new[..., None], d_f[:, None, :], self.columns_f)
        self.columns_g = torch.where(is_new[..., None], d_g[:, None, :], self.columns_g)
        # An invalid column counts as empty everywhere, as in the reference, where it reads as zeros.
        self.valid = self.valid | is_new
        self.columns_f = torch.where(self.valid[..., None], self.columns_f, 0)
        self.columns_g = torch.where(self.valid[..., None], self.columns_g, 0)
        self.ages = torch.where(is_new, e.steps[:, None], self.ages)
        return is_new

    def _cholesky(self, gram: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
        matrix = gram + self.ws.method.ridge * self.eye
        solvable = torch.linalg.cholesky_ex(matrix.detach()).info == 0
        factor = torch.linalg.cholesky(torch.where(solvable[:, None, None], matrix, self.eye))
        y = torch.cholesky_solve(rhs[..., None], factor)[..., 0]
        return y, solvable & torch.isfinite(y).all(1)

    def _lu(self, matrix: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
        solvable = torch.linalg.solve_ex(matrix.detach(), rhs.detach()).info == 0
        y = torch.linalg.solve(torch.where(solvable[:, None, None], matrix, self.eye), rhs)
        return y, solvable & torch.isfinite(y).all(1)

    def _choose_slot(self, e: Evaluation, gram: Tensor, y: Tensor) -> None:
        ws, m = self.ws, self.ws.method.m
        full = self.valid.all(1)
        if ws.method.evict == Evict.LEAST_USEFUL and m > 3:
            inverse = torch.linalg.inv_ex(gram + ws.method.ridge * self.eye).inverse
            loss = y.square() / inverse.diagonal(dim1=1, dim2=2)
            newest = self.ages > (e.steps - max(2, m // 3))[:, None]
            victim = torch.where(newest, math.inf, loss).argmin(dim=1)
        else:
            victim = self.ages.argmin(dim=1)
        slot = torch.where(full, victim, (~self.valid).int().argmax(dim=1))
        e.count(Int.EVICTIONS, e.going & full)
        self.slot = torch.where(e.going, slot, self.slot)


class BroydenUpdate:
    """Broyden's step. A sample's history is the newest ``count`` of the steps kept for all of them."""

    def __init__(self, ws: BroydenWorkspace) -> None:
        self.ws = ws
        layout = ws.layout
        self.kept: list[tuple[Tensor, Tensor]] = []  # steps (B, N) and their squared norms (B,)
        self.count = torch.zeros(layout.B, dtype=torch.int64, device=layout.device)
        self.scale = torch.zeros(layout.B, dtype=layout.acc, device=layout.device)

    def __call__(self, e: Evaluation) -> Tensor:
        """The next iterate (B, N)."""
        g = (e.f - e.x) * e.unit[:, None]
        count = torch.where(e.reset, 0, self.count)
        if self.ws.method.scale_first and self.kept:
            count = self._measure_scale(e, g, count)
        full = e.going & (count == self.ws.method.memory)
        e.count(Int.FULL_RESTARTS, full)
        count = torch.where(full, 0, count)

        plain = torch.where(self.scale > 0, self.scale, 1)[:, None] * g
        z, denominator = self._chain(plain, count)
        usable = denominator.detach().abs() >= MIN_DENOMINATOR
        step = z / torch.where(usable, denominator, 1)[:, None]
        bad = e.going & ~(usable & torch.isfinite(step).all(1))
        e.count(Int.DENOMINATOR_RESTARTS, bad)
        count = torch.where(bad, 0, count)
        step = torch.where(bad[:, None], plain, step)
        x_new, overflowed = e.settle(e.x + step / e.unit[:, None])
        # A stopped sample's step is of no use to anyone, but may hold what was not finite.
        step = torch.where((e.going & ~overflowed)[:, None], step, 0)
        self.kept.append((step, step.square().sum(1)))
        self.count = torch.where(e.going, torch.where(overflowed, 0, count + 1), self.count)
        return x_new

    def _measure_scale(self, e: Evaluation, g: Tensor, count: Tensor) -> Tensor:
        s, s_square = self.kept[-1]
        first = e.going & (count == 1) & (self.scale == 0)
        s_dot_g = (s * g).sum(1)
        y_square = torch.where(first, s_square - 2 * s_dot_g + g.square().sum(1), 1)
        measured = ((s_square - s_dot_g) / torch.where(y_square > 0, y_square, 1)).clamp(0.2, 5.0)
        measured = torch.where(torch.isfinite(measured) & (y_square > 0), measured, 1)
        self.scale = torch.where(first, measured, self.scale)
        return torch.where(first, 0, count)

    def _chain(self, plain: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        z, denominator = plain, torch.ones_like(plain[:, 0])
        newest = len(self.kept) - 1
        longest = int(count.max()) if count.numel() else 0
        for i in range(len(self.kept) - longest, len(self.kept)):
            s, s_square = self.kept[i]
            active = i >= len(self.kept) - count
            ratio = torch.where(active, (s * z).sum(1) / torch.where(active & (s_square > 0), s_square, 1), 0)
            if i == newest:
                denominator = torch.where(active, 1 - ratio, denominator)
            else:
                z = z + ratio[:, None] * self.kept[i + 1][0]
        return z, denominator
