"""What the formulas of ``ops/formulas`` work on when autograd follows them: columns that are never overwritten."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops.anderson import AndersonWorkspace
from ..ops.broyden import BroydenWorkspace
from ..ops.codes import Int
from ..ops.formulas import anderson, broyden
from ..ops.formulas.columns import Evaluation, Known, difference, rows_of
from ..ops.formulas.measure import Verdict
from ..ops.formulas.sums import norm_of_parts
from ..ops.layout import widest


class _Definite:
    """Symmetric positive definite matrices."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        matrix = self.matrix
        solvable = torch.linalg.cholesky_ex(matrix.detach()).info == 0
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        factor = torch.linalg.cholesky(torch.where(solvable[:, None, None], matrix, eye))
        y = torch.cholesky_solve(rhs[..., None], factor)[..., 0]
        return y, solvable & torch.isfinite(y).all(1)

    def root_inverse_diagonal(self) -> Tensor:
        return torch.linalg.inv_ex(self.matrix.detach()).inverse.diagonal(dim1=1, dim2=2).sqrt()


class Differentiable:
    """Sums and solves that autograd can follow; norms that only decide are not differentiated."""

    def norm(self, rows: Tensor) -> Tensor:
        """With a derivative at 0, too."""
        square = rows.square().sum(-1)
        positive = square > 0  # the derivative of a root at 0 is infinite
        return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)

    def norm_of_any(self, rows: Tensor) -> Tensor:
        """Without a graph."""
        return norm_of_parts([rows.detach()], widest(rows.device))

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """(B,) products."""
        return (a * b).sum(1)

    def finite(self, rows: Tensor) -> Tensor:
        """Which rows hold numbers alone."""
        return torch.isfinite(rows).all(1)

    def nowhere(self, mask: Tensor) -> bool:
        """It looks."""
        return not bool(mask.any())

    def everywhere(self, mask: Tensor) -> bool:
        """Likewise."""
        return bool(mask.all())

    def solve(self, matrix: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """By LU; what cannot be solved is replaced before, so that it has no part in the gradient."""
        solvable = torch.linalg.solve_ex(matrix.detach(), rhs.detach()).info == 0
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        y = torch.linalg.solve(torch.where(solvable[:, None, None], matrix, eye), rhs)
        return y, solvable & torch.isfinite(y).all(1)

    def definite(self, matrix: Tensor) -> _Definite:
        """Matrices to solve with."""
        return _Definite(matrix)


ALGEBRA = Differentiable()


class _Columns:
    """dF and dG of every sample; new tensors at every step."""

    def __init__(self, ws: AndersonWorkspace) -> None:
        self.method = ws.method
        layout = ws.layout
        self.dF = torch.zeros(layout.B, ws.method.m, layout.N, dtype=layout.acc, device=layout.device)
        self.dG = self.dF
        self.slots = torch.arange(ws.method.m, device=layout.device)

    def put(self, slot: Tensor, new: list[Tensor], good: Tensor) -> None:
        at = (self.slots == slot[:, None])[..., None]
        dF, dG = (torch.where(good[:, None], column, 0.0)[:, None] for column in new)
        self.dF, self.dG = torch.where(at, dF, self.dF), torch.where(at, dG, self.dG)

    def rows(self, e: Evaluation, new: list[Tensor]) -> Tensor:
        return rows_of(self.method, e, new)

    def _tests(self, c: Tensor | None) -> Tensor:
        return self.dG if c is None else self.dF - c[..., None] * self.dG

    def products(self, rows: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        onto_g = torch.einsum("brn,bmn->brm", rows, self.dG)
        return onto_g, torch.einsum("brn,bmn->brm", rows[:, : 1 if c is None else 2], self._tests(c))

    def every(self, c: Tensor | None) -> Tensor:
        left = [self.dG] if c is None else [self.dG, self._tests(c)]
        return torch.stack([torch.einsum("bin,bjn->bij", t, self.dG) for t in left], dim=1)

    def mix(self, base: Tensor, weights: Tensor) -> Tensor:
        beta = self.method.mixing
        return base - torch.einsum("bm,bmn->bn", weights, self.dF if beta == 1 else self.dF - (1 - beta) * self.dG)


class AndersonMemory:
    """Anderson's step, keeping its columns; plain (damped) iteration when m = 0."""

    def __init__(self, ws: AndersonWorkspace) -> None:
        self.ws = ws
        layout, m = ws.layout, ws.method.m
        self.constants = anderson.Systems(ws.method, layout.acc, layout.device)
        self.columns = _Columns(ws)
        kinds = 2 if ws.method.test_space else 1
        options = {"dtype": layout.acc, "device": layout.device}
        self.known = Known(
            torch.full((layout.B, kinds, m), torch.inf, **options),
            torch.zeros(layout.B, kinds, m, m, **options),
            torch.zeros(layout.B, m, dtype=torch.int32, device=layout.device),
            torch.zeros(layout.B, dtype=torch.int32, device=layout.device),
        )
        self.previous: tuple[Tensor, Tensor] | None = None

    def __call__(self, verdict: Verdict, x: Tensor, f: Tensor, made: int, last_norm: Tensor) -> Moved:
        """The next iterate (B, N)."""
        ws, stats, going = self.ws, verdict.stats, verdict.going
        g = f - x
        e = Evaluation(made, x, f, g, going, verdict.reset, stats.unit, stats.norm, last_norm)
        events = {Int.RESCALES: verdict.reset} if made > 1 else {}
        if ws.method.m == 0:
            return _settle(anderson.plain_step(ws.method, e), e.x, e.f, going, events, ws)
        new = None
        if self.previous is not None:
            x_prev, f_prev = self.previous
            dF = difference(f, f_prev, stats.unit)
            new = [dF, dF - difference(x, x_prev, stats.unit)]
        step = anderson.step(ws.method, ALGEBRA, self.constants, self.columns, self.known, e, new)
        if step.solved is not None:
            events[Int.SOLVE_FALLBACKS] = going & ~step.solved
        if step.grew is not None:
            events[Int.GROWTH_RESTARTS] = step.grew
        moved = _settle(step.x, e.x, e.f, going, events, ws)
        lost = moved.overflowed | events.get(Int.SOLVE_FALLBACKS, moved.overflowed)
        chosen = anderson.choose_slot(ws.method, ALGEBRA, self.constants, step, going, lost, made)
        events[Int.EVICTIONS] = chosen.evicting
        self.known = chosen.known
        self.previous = (x, f)
        return moved


class Moved:
    """The next iterate of every sample, and what to count."""

    def __init__(self, x: Tensor, overflowed: Tensor, events: dict[Int, Tensor]) -> None:
        self.x, self.overflowed, self.events = x, overflowed, events


def _settle(
    x_new: Tensor,
    x: Tensor,
    f: Tensor,
    going: Tensor,
    events: dict[Int, Tensor],
    ws: AndersonWorkspace | BroydenWorkspace,
) -> Moved:
    # Rounded to what f will see, as the stored iterates of the backends are.
    x_new, f = (t.to(ws.layout.dtype).to(ws.layout.acc) for t in (x_new, f))
    finite = ALGEBRA.finite(x_new)
    events[Int.STEP_FALLBACKS] = going & ~finite
    x_new = torch.where((going & finite)[:, None], x_new, anderson.fallback(f, x, going))
    return Moved(x_new, events[Int.STEP_FALLBACKS], events)


class _Steps:
    """A sample's steps are the newest ``count`` of those kept for all of them."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Tensor]] = []  # steps (B, N) and their squared norms (B,)

    def only(self) -> tuple[Tensor, Tensor] | None:
        return self.kept[-1] if self.kept else None

    def apply(self, z: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return broyden.chain(ALGEBRA, z, self._links(count))

    def _links(self, count: Tensor) -> Iterator[broyden.Link]:
        made = len(self.kept)
        longest = int(count.max()) if count.numel() else 0
        for i in range(made - longest, made):
            s, square = self.kept[i]
            active = count >= made - i
            newest = i + 1 == made
            following = None if newest else self.kept[i + 1][0]
            yield broyden.Link(s, square, following, active, active if newest else torch.zeros_like(active))


class BroydenMemory:
    """Broyden's step, keeping its steps."""

    def __init__(self, ws: BroydenWorkspace) -> None:
        self.ws = ws
        layout = ws.layout
        self.steps = _Steps()
        self.count = torch.zeros(layout.B, dtype=torch.int32, device=layout.device)
        self.scale = torch.zeros(layout.B, dtype=layout.acc, device=layout.device)

    def __call__(self, verdict: Verdict, x: Tensor, f: Tensor, made: int, last_norm: Tensor) -> Moved:
        """The next iterate (B, N)."""
        ws, going = self.ws, verdict.going
        e = broyden.Evaluation(x, f - x, going, verdict.reset, verdict.stats.unit)
        step = broyden.step(ws.method, ALGEBRA, self.steps, self.count, self.scale, e)
        events = {Int.FULL_RESTARTS: step.full, Int.DENOMINATOR_RESTARTS: step.bad}
        if made > 1:
            events[Int.RESCALES] = verdict.reset
        moved = _settle(step.x, x, f, going, events, ws)
        # A stopped sample's step is of no use to anyone, but may hold what was not finite.
        kept = torch.where((going & ~moved.overflowed)[:, None], step.s, 0.0)
        self.steps.kept.append((kept, ALGEBRA.dot(kept, kept)))
        count = torch.where(moved.overflowed, 0, step.kept + 1)
        self.count = torch.where(going, count, self.count).int()
        self.scale = torch.where(going, step.scale, self.scale)
        return moved
