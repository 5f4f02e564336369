"""Anderson's columns: what is known of them, and how a new one joins them. The letters are those of ``anderson``."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..anderson import AndersonMethod
from ..codes import GROWTH_LIMIT
from .algebra import Algebra, but_not


class Known(NamedTuple):
    """What is known of a sample's columns, besides themselves. Of s = 2 kinds, dG and W; Type II has s = 1.

    Attributes:
        norms: (B, s, m) q and w.
        products: (B, s, m, m) normalised dG . dG and W . dG, or None where they are formed anew at every step.
        ages: (B, m) evaluation that made the column.
        slot: (B,) where the next column goes.
        plain: whether it is known on the host that no column is turned,
        whole: and that all are in use.
    """

    norms: Tensor
    products: Tensor | None
    ages: Tensor
    slot: Tensor
    plain: bool = False
    whole: bool = False


class Evaluation(NamedTuple):
    """One evaluation of f, and what the stopping rule made of it: (B, N) and (B,).

    Attributes:
        calm: known on the host: every sample that runs goes on, in the unit that it had,
        improved: and all run, and none has a smaller residual behind it.
    """

    made: int
    x: Tensor
    f: Tensor
    g: Tensor
    going: Tensor
    reset: Tensor
    unit: Tensor
    norm: Tensor
    last_norm: Tensor
    calm: bool = False
    improved: bool = False


class Columns(Protocol):
    """The columns of every sample, finite where they are empty."""

    def put(self, slot: Tensor, new: list[Tensor], good: Tensor) -> None:
        """Store (B, N) dF and dG in each sample's slot, 0 where they are not good."""

    def rows(self, e: Evaluation, new: list[Tensor]) -> Tensor:
        """``rows_of``, in memory that lasts until the next call."""

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
    """Small tensors that the formulas need at every step, made once a solve."""

    def __init__(self, method: AndersonMethod, acc: torch.dtype, device: torch.device) -> None:
        self.slots = torch.arange(method.m, device=device)
        self.empty = torch.tensor(math.inf, dtype=acc, device=device)
        self.zero = torch.zeros((), dtype=acc, device=device)
        self.one = torch.ones((), dtype=acc, device=device)
        self.free = torch.tensor(-1, dtype=acc, device=device)
        self.growth = torch.tensor(GROWTH_LIMIT, dtype=acc, device=device)
        self.space = torch.tensor(method.test_space, dtype=acc, device=device)
        tiny, self.most = torch.finfo(acc).tiny, torch.tensor(torch.finfo(acc).max, dtype=acc, device=device)
        self.least_of = torch.tensor([tiny, 0 if method.turn else tiny], dtype=acc, device=device)


def difference(now: Tensor, before: Tensor, unit: Tensor) -> Tensor:
    """A column, dF or dG, in the sample's unit."""
    return (now - before) * unit[:, None]


def rows_of(method: AndersonMethod, e: Evaluation, new: list[Tensor]) -> Tensor:
    """(B, 1 + s, N): g in the sample's unit, the new dG, and its W."""
    dF, dG = new
    kinds = [dG, torch.sub(dF, dG, alpha=method.test_space)] if method.test_space else [dG]
    return torch.stack([e.g * e.unit[:, None], *kinds], dim=1)


def test_spaces(method: AndersonMethod, c: Constants, known: Known) -> Tensor | None:
    """(B, m) c of W = dF - c dG: 0 for the columns that are turned. None: Type II."""
    if method.test_space == 0:
        return None
    if known.plain or not method.turn:
        return c.space.expand(known.ages.shape)
    return torch.where(known.norms[:, 1] < 0, c.zero, c.space)


class Added(NamedTuple):
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


def add_column(
    method: AndersonMethod,
    algebra: Algebra,
    c: Constants,
    columns: Columns,
    known: Known,
    e: Evaluation,
    new: list[Tensor] | None,
) -> Added:
    """With the column of this evaluation, ``new``; those that are forgotten at it are empty."""
    forget, grew = None if e.calm else e.reset, None
    same_unit = e.going if e.calm else but_not(e.going, e.reset)
    if not e.improved and (method.test_space == 0 or (method.turn and not known.plain)):
        grew = same_unit & (e.norm > c.growth * e.last_norm)
        if method.turn:
            grew = grew & (known.norms[:, 1] < 0).any(1)
        forget = grew if forget is None else forget | grew
    norms, whole = known.norms, known.whole
    if forget is not None:
        norms, whole = torch.where(forget[:, None, None], c.empty, norms), False
    at = c.slots[: norms.shape[-1]] == known.slot[:, None]
    if new is None:
        return Added(known._replace(norms=norms, whole=whole), (e.g * e.unit[:, None])[:, None], at, None, grew)
    rows = columns.rows(e, new)
    size = algebra.norm(rows[:, 1:])
    least = c.least_of[: size.shape[1]]  # W may vanish: it is turned then
    good = size.clamp(least, c.most) == size  # neither 0, nor infinite, nor no number
    if e.calm and algebra.everywhere(good):
        good = same_unit
    else:
        good, whole = same_unit & good.all(1), False
        size = torch.where(good[:, None], size, c.empty)
    columns.put(known.slot, new, good)
    norms = torch.where(at[:, None], size[..., None], norms)
    ages = known.ages.masked_fill(at, e.made)
    return Added(known._replace(norms=norms, ages=ages, whole=whole), rows, at, size, grew)


def turned(
    turn: float, algebra: Algebra, c: Constants, added: Added, onto_g: Tensor, onto_w: Tensor
) -> tuple[Added, Tensor, Tensor]:
    """With -dF in place of W for the new column where W . dG is next to nothing."""
    assert added.size is not None
    at, size, slot = added.at[:, None], added.size, added.known.slot
    own = onto_g.gather(2, slot.long()[:, None, None].expand(-1, 3, 1))[..., 0]  # with the new dG: of g, of dG, of W
    g2, wv = own[:, 1], own[:, 2]
    # |W . dG| < turn (s + g2) where s + g2 = W . dG + 2 g2; that s is positive follows.
    part = wv / g2
    least, most = -2 * turn / (1 + turn), 2 * turn / (1 - turn)
    so = part.clamp(least, most) == part
    if algebra.nowhere(so):
        return added, onto_g, onto_w
    twice = torch.where(so, 2 * c.one, c.zero)[:, None]
    onto_g = torch.stack([onto_g[:, 0], onto_g[:, 1], onto_g[:, 2] + twice * onto_g[:, 1]], dim=1)
    onto_w = torch.where(at, onto_w + (twice * own[:, :2])[..., None], onto_w)
    w = torch.where(so, -(size[:, 1].square() + 4 * (wv + g2)).sqrt(), size[:, 1])
    size = torch.stack([size[:, 0], torch.where(size[:, 0] < c.empty, w, c.empty)], dim=1)
    norms = torch.where(at, size[..., None], added.known.norms)
    return added._replace(known=added.known._replace(norms=norms, plain=False), size=size), onto_g, onto_w


def add_products(products: Tensor, added: Added, onto_g: Tensor, onto_w: Tensor) -> Tensor:
    """The matrices with the row and the column that belong to the new column."""
    assert added.size is not None
    size, at, norms = added.size, added.at, added.known.norms
    row = onto_g / size[..., None] / norms[:, :1]
    column = row
    if row.shape[1] == 2:
        column = torch.stack([row[:, 0], onto_w[:, 1] / size[:, :1]], dim=1)
    products = torch.where(at[:, None, None, :], column[..., None], products)
    return torch.where(at[:, None, :, None], row[:, :, None, :], products)
