"""The joint op: one step of the joint fixed-point and gradient map, and its acceleration.

The state v = (z, mu, x) is made of blocks of tensors. A step takes what f and its gradients gave at v,

    z    <-  z + a_z (f - z)
    mu   <-  mu + a_mu (p - mu),    p = l_z + f_z^T mu
    x    <-  P(x - a_x q),          q = l_x + f_x^T mu

as the mapped state, measures how far each block moves, and hands the mapped state to the Anderson step of the blocks
that are accelerated; the others move to their mapped value. So a step is the map, the accelerated step and the finish
(``joint_step``, ``joint_finish``); between the first two a caller's own projection may change the mapped x.

A sample stops when every block is within its own tolerance. Convergence of z and mu is measured undamped; that of x is
the length of its step, after the projection.
"""

from __future__ import annotations

import math
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..status import Status
from .anderson import AndersonWorkspace
from .codes import Int
from .joint_finish import Record
from .layout import Leaf
from .reference import _sum


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


def joint_map(ws: JointWorkspace, values: list[Tensor], step_size: float, cost: Tensor | None = None) -> None:
    """The oracle of the map, in plain torch: ``mapped`` and ``block_norms`` of running samples."""
    core, options = ws.core, ws.options
    B, acc = core.layout.B, core.layout.acc
    running = core.int_row(Int.STATUS) == Status.RUNNING
    now = [part.leaf.rows(ws.value(i)).to(acc) for i, part in enumerate(ws.parts)]
    given = [part.leaf.rows(t).to(acc) for part, t in zip(ws.parts, values, strict=True)]
    moved: list[Tensor] = []
    towards: list[Tensor] = []
    for part, v, f in zip(ws.parts, now, given, strict=True):
        if part.block == 2:
            moved.append(v)
            towards.append(v)
            continue
        rate = options.damping[part.block]
        moved.append(f if rate == 1 else v + rate * (f - v))
        towards.append(f)
    inputs = [i for i, part in enumerate(ws.parts) if part.block == 2]
    if inputs:
        rates = torch.full((B,), step_size, dtype=torch.float64, device=core.layout.device)
        if options.normalize:
            norm = _norm([given[i] for i in inputs])
            rates = torch.where(norm > 0, rates / norm, 0.0)
        stepped = [now[i] - rates[:, None].to(acc) * given[i] for i in inputs]
        for i, t in zip(inputs, project_rows(options, [ws.parts[i].center for i in inputs], stepped), strict=True):
            moved[i] = towards[i] = t
    for i, part in enumerate(ws.parts):
        target = part.leaf.rows(ws.mapped[core.cur][i])
        target.copy_(torch.where(running[:, None], moved[i].to(target.dtype), target))
    norms = core.block_norms
    assert norms is not None
    for block in range(norms.shape[0]):
        some = [i for i, part in enumerate(ws.parts) if part.block == block]
        _store(norms, block, running, [towards[i] - now[i] for i in some], [towards[i] for i in some])
    if cost is not None:
        norms[1, 0, :B] += torch.where(running, cost * 0, 0.0)


def measure_block(ws: JointWorkspace, inputs: list[int]) -> None:
    """The norms of the x block, from what ``mapped`` holds."""
    core = ws.core
    acc, norms = core.layout.acc, core.block_norms
    assert norms is not None
    running = core.int_row(Int.STATUS) == Status.RUNNING
    to = [ws.parts[i].leaf.rows(ws.mapped[core.cur][i]).to(acc) for i in inputs]
    at = [ws.parts[i].leaf.rows(ws.value(i)).to(acc) for i in inputs]
    _store(norms, 2, running, [a - b for a, b in zip(to, at, strict=True)], to)


def _store(norms: Tensor, block: int, where: Tensor, step: list[Tensor], size: list[Tensor]) -> None:
    B = where.shape[0]
    for row, rows in enumerate((step, size)):
        target = norms[block, row, :B]
        target.copy_(torch.where(where, _norm(rows) if rows else torch.zeros_like(target), target))


def project_rows(options: Any, centers: list[Tensor | None], x: list[Tensor]) -> list[Tensor]:
    """Rows (B, n) of real numbers in the ball and the box of ``options``, ``MapOptions`` or a ``Projection``."""
    if options.ball == "l2":
        away = [t if c is None else t - c for t, c in zip(x, centers, strict=True)]
        squares = torch.stack([_sum(t.double().square()) for t in away]).sum(0)
        norm = torch.where(squares > 0, squares, 1.0).sqrt()  # a root at zero has no derivative
        outside = (squares > 0) & (norm > options.radius)
        shrink = torch.where(outside, options.radius / norm, 1.0)[:, None].to(x[0].dtype)
        x = [t * shrink if c is None else c + t * shrink for t, c in zip(away, centers, strict=True)]
    elif options.ball == "linf":
        r = options.radius
        x = [t.clamp(-r, r) if c is None else torch.clamp(t, c - r, c + r) for t, c in zip(x, centers, strict=True)]
    if options.low > -math.inf or options.high < math.inf:
        x = [t.clamp(options.low, options.high) for t in x]
    return x


def _norm(rows: list[Tensor]) -> Tensor:
    """(B,) Euclidean norms in float64 of samples whose numbers lie in several (B, n)."""
    return torch.stack([_sum(t.double().square()) for t in rows]).sum(0).sqrt()
