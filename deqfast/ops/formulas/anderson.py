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
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..anderson import AndersonMethod, newest_kept
from ..codes import GROWTH_LIMIT, Evict
from .algebra import Algebra, Definite, but_not


class Known(NamedTuple):
    """What is known of a sample's columns, besides themselves. Of s = 2 kinds, dG and W; Type II has s = 1.

    Attributes:
        norms: (B, s, m) q and w.
        products: (B, s, m, m) normalised dG . dG and W . dG, or None where they are formed anew at every step.
        ages: (B, m) evaluation that made the column.
        slot: (B,) where the next column goes.
        plain: whether it is known on the host that no column is turned.
    """

    norms: Tensor
    products: Tensor | None
    ages: Tensor
    slot: Tensor
    plain: bool = False


class Evaluation(NamedTuple):
    """One evaluation of f, and what the stopping rule made of it: (B, N) and (B,).

    ``scaled``: g in the sample's unit.
    """

    made: int
    x: Tensor
    f: Tensor
    g: Tensor
    scaled: Tensor
    going: Tensor
    reset: Tensor
    unit: Tensor
    norm: Tensor
    last_norm: Tensor


class Columns(Protocol):
    """The columns of every sample, finite where they are empty."""

    def put(self, slot: Tensor, new: list[Tensor], good: Tensor) -> None:
        """Store (B, N) dF and dG in each sample's slot, 0 where they are not good."""

    def products(self, rows: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of (B, r, N) rows g, and behind it dG and W of the new column if there is one.

        ``c``: (B, m) of W_j = dF_j - c_j dG_j; None: Type II.

        Returns:
            (B, r, m) products of all with every dG_j, and (B, min(r, 2), m) of g and dG with every W_j; for Type II,
            where W is dG, of g alone.
        """

    def every(self, c: Tensor | None) -> Tensor:
        """(B, s, m, m) products dG_i . dG_j and W_i . dG_j."""

    def mix(self, base: Tensor, weights: Tensor) -> Tensor:
        """Base - (dF - (1 - beta) dG) weights, (B, N)."""


class Constants:
    """Small tensors that a formula needs at every step, made once a solve."""

    def __init__(self, method: AndersonMethod, acc: torch.dtype, device: torch.device) -> None:
        self.eye = torch.eye(method.m, dtype=acc, device=device)
        signs = [method.ridge, -method.ridge] if method.test_space else [method.ridge]
        self.ridges = torch.stack([sign * self.eye for sign in signs])
        self.slots = torch.arange(method.m, device=device)
        self.empty = torch.tensor(math.inf, dtype=acc, device=device)
        self.zero = torch.zeros((), dtype=acc, device=device)
        self.one = torch.ones((), dtype=acc, device=device)
        self.free = torch.tensor(-1, dtype=acc, device=device)
        self.growth = torch.tensor(GROWTH_LIMIT, dtype=acc, device=device)
        self.space = torch.tensor(method.test_space, dtype=acc, device=device)
        tiny, self.most = torch.finfo(acc).tiny, torch.tensor(torch.finfo(acc).max, dtype=acc, device=device)
        self.least_of = torch.tensor([tiny, 0 if method.turn else tiny], dtype=acc, device=device)
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
        solved: whose small system has a good solution.
        grew: Type II, whose residual grew, so that the older columns are forgotten.
    """

    x: Tensor
    known: Known
    y: Tensor | None = None
    gram: Tensor | Definite | None = None
    solved: Tensor | None = None
    grew: Tensor | None = None


def difference(now: Tensor, before: Tensor, unit: Tensor) -> Tensor:
    """A column, dF or dG, in the sample's unit."""
    return (now - before) * unit[:, None]


def plain_step(method: AndersonMethod, e: Evaluation) -> Tensor:
    """x_k + beta g_k."""
    return e.f if method.mixing == 1 else e.x + method.mixing * e.g


def step(
    method: AndersonMethod,
    algebra: Algebra,
    c: Constants,
    columns: Columns,
    known: Known,
    e: Evaluation,
    new: list[Tensor] | None,
) -> Step:
    """The next iterate from the columns, the evaluation, and ``new``: dF and dG as they will be stored."""
    base = plain_step(method, e)
    if e.made == 1:
        return Step(base, known)
    added = _add_column(method, algebra, c, columns, known, e, new)
    known = added.known
    spaces = test_spaces(method, c, known)
    onto_g, onto_w = columns.products(added.rows, spaces)
    if added.size is not None and method.turn:
        added, onto_g, onto_w = _turn(method.turn, algebra, c, added, onto_g, onto_w)
        known = added.known
        spaces = test_spaces(method, c, known)
    q, w = known.norms[:, 0], known.norms[:, -1]
    onto_w = onto_w / w[:, None]
    rhs = onto_w[:, 0]
    products = known.products
    if products is None:
        products = columns.every(spaces) / known.norms[..., None] / q[:, None, None, :]
    elif added.size is not None:
        products = _add_products(products, added, onto_g[:, 1:], onto_w)
        known = known._replace(products=products)
    if e.made % method.mix_every:
        return Step(base, known, grew=added.grew)
    eye, ridges, _ = c.of(q.shape[1])
    used = q < c.empty
    both = used[:, None, :, None] & used[:, None, None, :]
    systems = torch.where(both, products + ridges, eye)
    gram: Tensor | Definite = systems[:, 0]
    if method.test_space == 0:
        gram = algebra.definite(systems[:, 0])
        y, solved = gram.solve(rhs)
    else:
        y, solved = algebra.solve(systems[:, 1], rhs)
    y = torch.where(solved[:, None], y, c.zero)
    x = columns.mix(base, y / q / e.unit[:, None])
    return Step(x, known, y, gram, solved, added.grew)


def test_spaces(method: AndersonMethod, c: Constants, known: Known) -> Tensor | None:
    """(B, m) c of W = dF - c dG: 0 for the columns that are turned. None: Type II."""
    if method.test_space == 0:
        return None
    if known.plain or not method.turn:
        return c.space.expand(known.ages.shape)
    return torch.where(known.norms[:, 1] < 0, c.zero, c.space)


class _Added(NamedTuple):
    """The columns with the new one.

    Attributes:
        known: what is known of them, but for the new products.
        rows: (B, 1 + s, N) g and, if there is a new column, its dG and W.
        at: (B, m) where the new column is.
        size: (B, s) its norms; None: there is none.
        grew: Type II, whose residual grew.
    """

    known: Known
    rows: Tensor
    at: Tensor
    size: Tensor | None
    grew: Tensor | None


def _add_column(
    method: AndersonMethod,
    algebra: Algebra,
    c: Constants,
    columns: Columns,
    known: Known,
    e: Evaluation,
    new: list[Tensor] | None,
) -> _Added:
    forget, grew = e.reset, None
    same_unit = but_not(e.going, e.reset)
    if method.test_space == 0 or (method.turn and not known.plain):
        grew = same_unit & (e.norm > c.growth * e.last_norm)
        if method.turn:
            grew = grew & (known.norms[:, 1] < 0).any(1)
        forget = forget | grew
    norms = torch.where(forget[:, None, None], c.empty, known.norms)
    at = c.of(norms.shape[-1])[2] == known.slot[:, None]
    if new is None:
        return _Added(known._replace(norms=norms), e.scaled[:, None], at, None, grew)
    dF, dG = new
    kinds = [dG, torch.sub(dF, dG, alpha=method.test_space)] if method.test_space else [dG]
    rows = torch.stack([e.scaled, *kinds], dim=1)
    size = algebra.norm(rows[:, 1:])
    least = c.least_of[: size.shape[1]]  # W may vanish: it is turned then
    good = same_unit & (size.clamp(least, c.most) == size).all(1)  # neither 0, nor infinite, nor no number
    size = torch.where(good[:, None], size, c.empty)
    columns.put(known.slot, new, good)
    norms = torch.where(at[:, None], size[..., None], norms)
    ages = known.ages.masked_fill(at, e.made)
    return _Added(known._replace(norms=norms, ages=ages), rows, at, size, grew)


def _turn(
    turn: float, algebra: Algebra, c: Constants, added: _Added, onto_g: Tensor, onto_w: Tensor
) -> tuple[_Added, Tensor, Tensor]:
    """With -dF in place of W for the new column where W . dG is next to nothing."""
    assert added.size is not None
    at, size, slot = added.at[:, None], added.size, added.known.slot
    own = onto_g.gather(2, slot.long()[:, None, None].expand(-1, 3, 1))[..., 0]  # with the new dG: of g, of dG, of W
    g2, wv = own[:, 1], own[:, 2]
    # |W . dG| < turn (s + g2) where s + g2 = W . dG + 2 g2; that s is positive follows.
    part = wv / g2
    least, most = -2 * turn / (1 + turn), 2 * turn / (1 - turn)
    turned = part.clamp(least, most) == part
    if algebra.nowhere(turned):
        return added, onto_g, onto_w
    twice = torch.where(turned, 2 * c.one, c.zero)[:, None]
    onto_g = torch.stack([onto_g[:, 0], onto_g[:, 1], onto_g[:, 2] + twice * onto_g[:, 1]], dim=1)
    onto_w = torch.where(at, onto_w + (twice * own[:, :2])[..., None], onto_w)
    w = torch.where(turned, -(size[:, 1].square() + 4 * (wv + g2)).sqrt(), size[:, 1])
    size = torch.stack([size[:, 0], torch.where(size[:, 0] < c.empty, w, c.empty)], dim=1)
    norms = torch.where(at, size[..., None], added.known.norms)
    return added._replace(known=added.known._replace(norms=norms, plain=False), size=size), onto_g, onto_w


def _add_products(products: Tensor, added: _Added, onto_g: Tensor, onto_w: Tensor) -> Tensor:
    """The matrices with the row and the column that belong to the new column."""
    assert added.size is not None
    size, at, norms = added.size, added.at, added.known.norms
    row = onto_g / size[..., None] / norms[:, :1]
    column = row
    if row.shape[1] == 2:
        column = torch.stack([row[:, 0], onto_w[:, 1] / size[:, :1]], dim=1)
    products = torch.where(at[:, None, None, :], column[..., None], products)
    return torch.where(at[:, None, :, None], row[:, :, None, :], products)


def fallback(f: Tensor, answer: Tensor, going: Tensor) -> Tensor:
    """What becomes of the samples whose next iterate is not finite, f's value, and of those that have stopped."""
    return torch.where(going[:, None], f, answer)


class Chosen(NamedTuple):
    """What is known after the step, how many columns are in use, and how many are given up."""

    known: Known
    used: Tensor
    evicting: Tensor


def may_give_up(method: AndersonMethod, made: int) -> bool:
    """Whether so many evaluations can have filled a history."""
    return made > method.m - method.mix_every + 1


def choose_slot(
    method: AndersonMethod, algebra: Algebra, c: Constants, s: Step, going: Tensor, lost: Tensor | None, made: int
) -> Chosen:
    """The slot of the next column: an empty one, else the least useful or the oldest.

    ``lost``: samples whose step failed, which forget their columns.
    """
    known = s.known
    norms = known.norms if lost is None else torch.where(lost[:, None, None], c.empty, known.norms)
    used = norms[:, 0] < c.empty
    count = used.sum(1, dtype=torch.int32)
    full = going & (count == method.m)
    if s.y is None or not may_give_up(method, made):
        slot = used.view(torch.uint8).argmin(1)
        return Chosen(known._replace(norms=norms, slot=slot), count, full)
    if method.evict is Evict.LEAST_USEFUL and method.m > 3:
        assert s.gram is not None
        gram = algebra.definite(s.gram) if isinstance(s.gram, Tensor) else s.gram
        newest = known.ages > made - newest_kept(method.m)
        score = (s.y / gram.root_inverse_diagonal()).abs().masked_fill(newest, math.inf)
    else:
        score = known.ages.to(norms.dtype)
    slot = torch.where(used, score, c.free).argmin(1)
    chosen = Chosen(known._replace(norms=norms, slot=slot), count, full)
    return chosen if method.mix_every == 1 else _make_room(method, c, chosen, used, score, going)


def _make_room(
    method: AndersonMethod, c: Constants, chosen: Chosen, used: Tensor, score: Tensor, going: Tensor
) -> Chosen:
    """Empty the columns of least ``score`` until the next ``mix_every`` columns find a slot."""
    known, count, evicted = chosen.known, chosen.used, chosen.evicting.int()
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
