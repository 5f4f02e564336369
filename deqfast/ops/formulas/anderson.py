"""Anderson's step: from the columns and a new residual to the next iterate.

Per sample, with columns dF_j, dG_j in units of the sample, q_j = ||dG_j||, W = dF - c dG and w_i = ||W_i||:

    E_ij = (W_i . dG_j) / (w_i q_j),   (E - lam I) y = (W . g) / w,   gamma_j = y_j / q_j,
    x_{k+1} = x_k + beta g_k - (dF - (1 - beta) dG) gamma.

Type II is W = -dG; both sides change sign, and E + lam I is dG's Gram matrix with a ridge. A full history gives up the
column that is least useful, argmin_j |y_j| / sqrt((H^-1)_jj) with H the Gram matrix of the normalised dG, or the
oldest.

The mixed test space (c = 2) is (2I - J) dX, and where J has an eigenvalue near 2 a column's own W_j . dG_j vanishes
and its row says nothing. With s = dX_j . dG_j and g2 = q_j^2 that product is s - g2; where s > 0 and |s - g2| <
``turn`` (s + g2), W_j is -dF_j instead, with -(s + g2), of the sign that the others have. Such a column is marked by a
negative w_j. As f expands there, a residual that grows then forgets all but the newest column, as with Type II.

With p = ``mix_every`` > 1 only every p-th evaluation mixes; the others take the plain step x + beta g, their columns
are recorded all the same, and a mix leaves room for p columns.

An empty column has infinite norms: whatever is divided by one is 0, so that its weight is 0 without a mask.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..anderson import AndersonMethod, newest_kept
from ..codes import Evict, Int
from .algebra import Algebra, Definite
from .columns import Columns, Constants, Evaluation, Known, add_column, add_products, test_spaces, turned


class Systems(Constants):
    """And those for the small systems."""

    def __init__(self, method: AndersonMethod, acc: torch.dtype, device: torch.device) -> None:
        super().__init__(method, acc, device)
        self.eye = torch.eye(method.m, dtype=acc, device=device)
        signs = [method.ridge, -method.ridge] if method.test_space else [method.ridge]
        self.ridges = torch.stack([sign * self.eye for sign in signs])
        self._of: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def of(self, m: int) -> tuple[Tensor, Tensor, Tensor]:
        """Identity, ridges and slots for ``m`` columns."""
        if m not in self._of:
            self._of[m] = (self.eye[:m, :m], self.ridges[:, :m, :m], self.slots[:m])
        return self._of[m]


class Step(NamedTuple):
    """The next iterate and what is known then.

    Attributes:
        x: (B, N) next iterate; it need not be finite.
        known: with the new column.
        y: (B, m) weights of the normalised columns.
        gram: of the normalised columns, with a ridge; None before there is a column.
        solved: whose small system has a good solution; None: everybody's that has columns.
        grew: Type II, whose residual grew, so that the older columns are forgotten.
    """

    x: Tensor
    known: Known
    y: Tensor | None = None
    gram: Tensor | Definite | None = None
    solved: Tensor | None = None
    grew: Tensor | None = None


def plain_step(method: AndersonMethod, e: Evaluation) -> Tensor:
    """x_k + beta g_k."""
    return e.f if method.mixing == 1 else e.x + method.mixing * e.g


def step(
    method: AndersonMethod,
    algebra: Algebra,
    c: Systems,
    columns: Columns,
    known: Known,
    e: Evaluation,
    new: list[Tensor] | None,
) -> Step:
    """The next iterate from the columns, the evaluation, and ``new``: dF and dG as they will be stored."""
    base = plain_step(method, e)
    if e.made == 1:
        return Step(base, known)
    added = add_column(method, algebra, c, columns, known, e, new)
    known = added.known
    spaces = test_spaces(method, c, known)
    onto_g, onto_w = columns.products(added.rows, spaces)
    if added.size is not None and method.turn:
        added, onto_g, onto_w = turned(method.turn, algebra, c, added, onto_g, onto_w)
        known = added.known
        spaces = test_spaces(method, c, known)
    q, w = known.norms[:, 0], known.norms[:, -1]
    onto_w = onto_w / w[:, None]
    rhs = onto_w[:, 0]
    products = known.products
    if products is None:
        products = columns.every(spaces) / known.norms[..., None] / q[:, None, None, :]
    elif added.size is not None:
        products = add_products(products, added, onto_g[:, 1:], onto_w)
        known = known._replace(products=products)
    if e.made % method.mix_every:
        return Step(base, known, grew=added.grew)
    eye, ridges, _ = c.of(q.shape[1])
    systems = products + ridges
    if not known.whole:
        used = q < c.empty
        both = used[:, None, :, None] & used[:, None, None, :]
        systems = torch.where(both, systems, eye)
    gram: Tensor | Definite = systems[:, 0]
    if method.test_space == 0:
        gram = algebra.definite(systems[:, 0])
        y, solved = gram.solve(rhs)
    else:
        y, solved = algebra.solve(systems[:, 1], rhs)
    well = e.calm and algebra.everywhere(solved)
    if not well:
        y = torch.where(solved[:, None], y, c.zero)
    x = columns.mix(base, y / q / e.unit[:, None])
    return Step(x, known, y, gram, None if well else solved, added.grew)


def fallback(f: Tensor, answer: Tensor, going: Tensor) -> Tensor:
    """What becomes of the samples whose next iterate is not finite, f's value, and of those that have stopped."""
    return torch.where(going[:, None], f, answer)


class Chosen(NamedTuple):
    """What is known after the step, how many columns are in use (None: all, as before), and how many are given up."""

    known: Known
    used: Tensor | None
    evicting: Tensor

    def rows(self) -> dict[Int, Tensor]:
        """What has changed of ``Workspace.ints``."""
        slot = {Int.SLOT: self.known.slot}
        return slot if self.used is None else {**slot, Int.COUNT: self.used}


def may_give_up(method: AndersonMethod, made: int) -> bool:
    """Whether so many evaluations can have filled a history."""
    return made > method.m - method.mix_every + 1


def choose_slot(
    method: AndersonMethod, algebra: Algebra, c: Systems, s: Step, going: Tensor, lost: Tensor | None, made: int
) -> Chosen:
    """The slot of the next column: an empty one, else the least useful or the oldest.

    ``lost``: samples whose step failed, which forget their columns.
    """
    known = s.known
    norms = known.norms if lost is None else torch.where(lost[:, None, None], c.empty, known.norms)
    used, whole = norms[:, 0] < c.empty, known.whole and lost is None
    count = None if whole else used.sum(1, dtype=torch.int32)
    full = going if count is None else going & (count == method.m)
    whole = whole or (method.mix_every == 1 and may_give_up(method, made) and algebra.everywhere(used))
    known = known._replace(norms=norms, whole=whole)
    if s.y is None or not may_give_up(method, made):
        slot = used.view(torch.uint8).argmin(1)
        return Chosen(known._replace(slot=slot), count, full)
    if method.evict is Evict.LEAST_USEFUL and method.m > 3:
        assert s.gram is not None
        gram = algebra.definite(s.gram) if isinstance(s.gram, Tensor) else s.gram
        newest = known.ages > made - newest_kept(method.m)
        score = (s.y / gram.root_inverse_diagonal()).abs().masked_fill(newest, math.inf)
    else:
        score = known.ages.to(norms.dtype)
    slot = torch.where(used, score, c.free).argmin(1)
    chosen = Chosen(known._replace(slot=slot), count, full)
    return (
        chosen if count is None or method.mix_every == 1 else _make_room(method, c, chosen, count, used, score, going)
    )


def _make_room(
    method: AndersonMethod, c: Systems, chosen: Chosen, count: Tensor, used: Tensor, score: Tensor, going: Tensor
) -> Chosen:
    """Empty the columns of least ``score`` until the next ``mix_every`` columns find a slot."""
    known, evicted = chosen.known, chosen.evicting.int()
    slots, norms = c.of(used.shape[1])[2], known.norms
    room = method.m - count + evicted  # the chosen slot is room, full or not
    used = used & (slots != known.slot[:, None])
    for wanted in range(2, method.mix_every + 1):
        short = going & (room < wanted)
        least = torch.where(used, score, c.empty).argmin(1)
        gone = used & short[:, None] & (slots == least[:, None])
        norms, used = torch.where(gone[:, None], c.empty, norms), used & ~gone
        room, count, evicted = room + short.int(), count - short.int(), evicted + short.int()
    return Chosen(known._replace(norms=norms), count, evicted)
