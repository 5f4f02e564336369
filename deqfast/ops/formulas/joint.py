"""The joint map of (z, mu, x), and the record of the iterate that would be returned.

    z    <-  z + a_z (f - z)
    mu   <-  mu + a_mu (p - mu),    p = l_z + f_z^T mu
    x    <-  P(x - a_x q),          q = l_x + f_x^T mu

Convergence of z and mu is measured undamped; that of x is the length of its step, after the projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..codes import COST_SLACK, SAFEGUARD
from .sums import norm_of_parts

Add = Callable[[Tensor], None]  # a tensor becomes its sum over the ranks that samples are spread over


class Ball(Protocol):
    """A ball around a centre and a box, of which either may be missing."""

    @property
    def ball(self) -> str | None:
        """None, "l2" or "linf"."""

    @property
    def radius(self) -> float:
        """Of the ball."""

    @property
    def low(self) -> float:
        """Of the box."""

    @property
    def high(self) -> float:
        """Of the box."""


def damped(v: Tensor, f: Tensor, rate: float) -> Tensor:
    """V + rate (f - v)."""
    return f if rate == 1 else v + rate * (f - v)


def gradient_step(
    x: list[Tensor], q: list[Tensor], step_size: float, normalize: bool, wide: torch.dtype, add: Add | None = None
) -> list[Tensor]:
    """X - a_x q, with q divided by its norm if asked for; ``wide``: in which norms are made."""
    if not normalize:
        return [a - step_size * b for a, b in zip(x, q, strict=True)]
    norm = norm_of_parts(q, wide)
    norm = norm if add is None else _everywhere(norm, add)
    rates = torch.where(norm > 0, step_size / norm, 0.0)[:, None].to(x[0].dtype)
    return [a - rates * b for a, b in zip(x, q, strict=True)]


def _everywhere(norm: Tensor, add: Add) -> Tensor:
    """Norms of whole samples from those of what this rank has of them."""
    squares = norm.double().square()
    add(squares)
    return squares.sqrt().to(norm.dtype)


def project_rows(
    options: Ball, centers: list[Tensor | None], x: list[Tensor], wide: torch.dtype, add: Add | None = None
) -> list[Tensor]:
    """Rows (B, n) of real numbers in the ball and the box of ``options``; ``wide``: in which norms are made."""
    if options.ball == "l2":
        away = [t if c is None else t - c for t, c in zip(x, centers, strict=True)]
        apart = torch.stack([(t != 0).any(1) for t in away]).any(0)
        # A root at 0 has no slope: the norm of a sample at the centre is that of something else.
        norm = norm_of_parts([torch.where(apart[:, None], t, 1.0) for t in away], wide)
        if add is not None:
            norm = _everywhere(torch.where(apart, norm, 0.0), add)
            apart = norm > 0
        outside = apart & (norm > options.radius)
        shrink = torch.where(outside, options.radius / norm, 1.0)[:, None].to(x[0].dtype)
        x = [t * shrink if c is None else c + t * shrink for t, c in zip(away, centers, strict=True)]
    elif options.ball == "linf":
        r = options.radius
        x = [t.clamp(-r, r) if c is None else torch.clamp(t, c - r, c + r) for t, c in zip(x, centers, strict=True)]
    if options.low > -math.inf or options.high < math.inf:
        x = [t.clamp(options.low, options.high) for t in x]
    return x


def take_note(
    returns: str,
    measured: Tensor,
    better: Tensor,
    residual: Tensor,
    best: Tensor,
    cost: Tensor | None,
    best_cost: Tensor,
) -> Tensor:
    """Of which samples this evaluation's iterate would be returned now: ``returns`` as in ``joint_solve``.

    Args:
        returns: "best", "last" or "cost".
        measured: whom this evaluation measured.
        better: whose residual is the least so far.
        residual: of this evaluation.
        best: the least one so far, this one included.
        cost: of this evaluation, or None.
        best_cost: at the iterate that would be returned before.
    """
    if returns == "last":
        return measured
    if returns != "cost" or cost is None:
        return better
    return better | (measured & (cost < best_cost) & (residual < COST_SLACK * best))


def safeguarded(measured: Tensor, residual: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Who forgets the history, and the least residuals since then.

    Against the best since the last restart: against the best of all, a sample whose plain steps climb would restart at
    each of them and never be accelerated again.
    """
    grown = measured & (residual > SAFEGUARD * least)
    now = torch.where(grown, residual, torch.minimum(least, residual))
    return grown, torch.where(measured, now, least)
