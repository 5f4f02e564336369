"""The joint op: one step of the joint fixed-point and gradient map, and its acceleration.

The state v = (z, mu, x) is made of blocks of tensors. A step takes what f and its gradients gave at v,

    z    <-  z + a_z (f - z)
    mu   <-  mu + a_mu (p - mu),    p = l_z + f_z^T mu
    x    <-  P(x - a_x q),          q = l_x + f_x^T mu

as the mapped state, measures how far each block moves, and hands the mapped state to the Anderson step of the blocks
that are accelerated; the others move to their mapped value. So a step is the map, the accelerated step and the finish
(``joint_step``, ``formulas.joint``); between the first two a caller's own projection may change the mapped x.

A sample stops when every block is within its own tolerance. Convergence of z and mu is measured undamped; that of x is
the length of its step, after the projection.
"""

from __future__ import annotations

import math
from dataclasses import InitVar, dataclass, field

import torch
from torch import Tensor

from ..status import Status
from .anderson import AndersonWorkspace
from .codes import BLOCKS, Int
from .formulas.sums import norm_of_parts
from .layout import Leaf


@dataclass
class Part:
    """One tensor of the state: its block, its memory, where the accelerated step keeps it (None: it does not)."""

    block: int
    leaf: Leaf
    index: int | None
    center: Tensor | None = None  # (B, n), of a ball


@dataclass
class MapOptions:
    """The joint map's own numbers.

    ``normalize``: the gradient of x is divided by its norm, sample by sample.
    """

    damping: tuple[float, float] = (1.0, 1.0)
    normalize: bool = False
    ball: str | None = None
    radius: float = math.inf
    low: float = -math.inf
    high: float = math.inf


@dataclass
class Record:
    """What a joint solve keeps of the iterate that it would return now.

    Attributes:
        returns, safeguard: as in ``joint_solve``.
        best_norms: (blocks, 2, padded) float64, ``block_norms`` at that iterate.
        best_cost: (B,) its cost, NaN before there is one.
        saved_norms, saved_cost: with ``returns="last"`` both at the iterate of the least residual, which a sample that
            becomes no number goes back to; else None.
        least: (B,) the best residual since the history was forgotten last.
        taken: (B,) int32, whether the newest evaluation is that iterate.
        kept: with ``returns="cost"`` the iterate, a tensor for each part; else None.
    """

    core: AndersonWorkspace
    returns: str = "best"
    safeguard: bool = False
    kept: list[Tensor] | None = None
    best_norms: Tensor = field(init=False)
    best_cost: Tensor = field(init=False)
    saved_norms: Tensor | None = None
    saved_cost: Tensor | None = None
    least: Tensor = field(init=False)
    taken: Tensor = field(init=False)

    def __post_init__(self) -> None:
        layout, norms = self.core.layout, self.core.block_norms
        assert norms is not None
        self.best_norms = torch.zeros_like(norms)
        self.best_norms[:, 0] = math.inf
        self.best_cost = torch.full((layout.B,), math.nan, dtype=layout.acc, device=layout.device)
        if self.returns == "last":
            self.saved_norms, self.saved_cost = self.best_norms.clone(), self.best_cost.clone()
        self.least = torch.full((layout.B,), math.inf, dtype=layout.acc, device=layout.device)
        self.taken = torch.zeros(layout.B, dtype=torch.int32, device=layout.device)


@dataclass
class JointWorkspace:
    """The memory of a joint solve: the accelerated part's workspace, and what lies beside it.

    Attributes:
        core: Anderson's workspace on the accelerated tensors; its ``block_norms`` (blocks, 2, padded) receive, for each
            block and sample, how far it moves and how large it is.
        parts: every tensor of (z, mu, x), in order.
        mapped: the mapped state of this step and of the one before, by ``core.cur``.
        plain, plain_saved: iterates and best iterates of the tensors that are not accelerated, as ``core.x`` and
            ``core.saved`` are for the others; None for those.
        record: of the iterate that would be returned.
    """

    core: AndersonWorkspace
    parts: list[Part]
    options: MapOptions
    returns: InitVar[str] = "best"
    safeguard: InitVar[bool] = False
    record: Record = field(init=False)
    mapped: tuple[list[Tensor], list[Tensor]] = field(init=False)
    plain: tuple[list[Tensor | None], list[Tensor | None]] = field(init=False)
    plain_saved: list[Tensor | None] = field(init=False)

    def __post_init__(self, returns: str, safeguard: bool) -> None:
        layout = self.core.layout

        def empty() -> list[Tensor]:
            return [part.leaf.empty(layout.device) for part in self.parts]

        def empty_plain() -> list[Tensor | None]:
            return [t if part.index is None else None for part, t in zip(self.parts, empty(), strict=True)]

        self.mapped = (empty(), empty())
        self.plain = (empty_plain(), empty_plain())
        self.plain_saved = empty_plain()
        self.record = Record(self.core, returns, safeguard, empty() if returns == "cost" else None)

    def value(self, i: int, which: int | None = None) -> Tensor:
        """Tensor i of the iterate: the current one, or buffer ``which``."""
        which = self.core.cur if which is None else which
        index = self.parts[i].index
        plain = self.plain[which][i]
        return self.core.x[which][index] if index is not None else plain  # type: ignore[return-value]

    def accelerated(self, leaves: list[Tensor]) -> list[Tensor]:
        """Those of a tensor a part that Anderson's step works on, in its order."""
        return [t for part, t in zip(self.parts, leaves, strict=True) if part.index is not None]


def measure_block(ws: JointWorkspace, inputs: list[int]) -> None:
    """The norms of the x block, from what ``mapped`` holds."""
    core = ws.core
    acc, norms = core.layout.acc, core.block_norms
    assert norms is not None
    running = core.int_row(Int.STATUS) == Status.RUNNING
    to = [ws.parts[i].leaf.rows(ws.mapped[core.cur][i]).to(acc) for i in inputs]
    at = [ws.parts[i].leaf.rows(ws.value(i)).to(acc) for i in inputs]
    store_norms(norms, BLOCKS.index("x"), running, [a - b for a, b in zip(to, at, strict=True)], to)


def store_norms(norms: Tensor, block: int, where: Tensor, step: list[Tensor], size: list[Tensor]) -> None:
    """How far a block moves and how large it is, of some samples, into ``block_norms``."""
    B = where.shape[0]
    for row, rows in enumerate((step, size)):
        target = norms[block, row, :B]
        norm = norm_of_parts(rows, norms.dtype) if rows else torch.zeros_like(target)
        target.copy_(torch.where(where, norm, target))


def note(to_cost: Tensor, to_norms: Tensor, where: Tensor, cost: Tensor | None, norms: Tensor) -> None:
    """Record cost and block norms of an evaluation, of some samples."""
    B = where.shape[0]
    if cost is not None:
        to_cost.copy_(torch.where(where, cost, to_cost))
    to_norms[:, :, :B] = torch.where(where, norms[:, :, :B], to_norms[:, :, :B])
