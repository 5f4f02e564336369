"""Broyden's "good" method with one history vector a step.

For F = -g and H0 = h I, with the steps s_j kept and z_0 = h g_k:

    c_j = s_j . z_j,   z_{j+1} = z_j + s_{j+1} c_j / ||s_j||^2   for j < k-1,
    s_k = z_{k-1} / (1 - s_{k-1} . z_{k-1} / ||s_{k-1}||^2).

The chain reads every step twice and has k sums in a row. With the Gram matrix of the steps it is one pass of
independent products b_j = s_j . z_0, a triangular system for the ratios r_j = c_j / ||s_j||^2,

    ||s_j||^2 r_j - sum_{i<j} (s_j . s_{i+1}) r_i = b_j,

and one pass of combination.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..broyden import BroydenMethod
from ..codes import MIN_DENOMINATOR
from .algebra import Algebra

SCALE_RANGE = (0.2, 5.0)  # of an H0 that is measured


class Evaluation(NamedTuple):
    """One evaluation of f, and what the stopping rule made of it: (B, N) and (B,)."""

    x: Tensor
    g: Tensor
    going: Tensor
    reset: Tensor
    unit: Tensor


class Steps(Protocol):
    """The steps of every sample, in its unit."""

    def only(self) -> tuple[Tensor, Tensor] | None:
        """(B, N) step and its (B,) squared norm of the samples that have one step; None: no sample can have one."""

    def apply(self, z: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """z_{k-1} and 1 - s_{k-1} . z_{k-1} / ||s_{k-1}||^2 from z_0, with ``count`` steps of each sample."""


class Step(NamedTuple):
    """The next iterate and what is known then.

    Attributes:
        x: (B, N) next iterate; it need not be finite.
        s: (B, N) the step, in the sample's unit, for the place ``kept``.
        kept: (B,) steps before it.
        scale: (B,) h, 0 while not measured.
        full, bad: whose memory was full; whose denominator was too small: they begin anew.
    """

    x: Tensor
    s: Tensor
    kept: Tensor
    scale: Tensor
    full: Tensor
    bad: Tensor


def step(method: BroydenMethod, algebra: Algebra, steps: Steps, count: Tensor, scale: Tensor, e: Evaluation) -> Step:
    """The next iterate from the steps, ``count`` of each sample, and the evaluation."""
    g = e.g * e.unit[:, None]
    count = torch.where(e.reset, 0, count)
    only = steps.only() if method.scale_first else None
    if only is not None:
        first = e.going & (count == 1) & (scale == 0)
        scale = torch.where(first, _measured(algebra, *only, g, first), scale)
        count = torch.where(first, 0, count)
    full = e.going & (count == method.memory)
    count = torch.where(full, 0, count)
    plain = torch.where(scale > 0, scale, 1.0)[:, None] * g
    z, denominator = steps.apply(plain, count)
    usable = denominator.abs() >= MIN_DENOMINATOR
    s = z / torch.where(usable, denominator, 1.0)[:, None]
    bad = e.going & ~(usable & algebra.finite(s))
    count = torch.where(bad, 0, count)
    s = torch.where(bad[:, None], plain, s)
    return Step(e.x + s / e.unit[:, None], s, count, scale, full, bad)


def _measured(algebra: Algebra, s: Tensor, square: Tensor, g: Tensor, first: Tensor) -> Tensor:
    """H = s.y / y.y of y = s - g, the change of F along the first step s, within bounds."""
    s = torch.where(first[:, None], s, 0.0)
    square = torch.where(first, square, 1.0)
    product = algebra.dot(s, g)
    change = square - 2 * product + algebra.dot(g, g)
    positive = first & (change > 0)
    measured = ((square - product) / torch.where(positive, change, 1.0)).clamp(*SCALE_RANGE)
    return torch.where(positive & (measured < math.inf), measured, 1.0)


class Link(NamedTuple):
    """One step of the chain: (B, N) s_j and s_{j+1}, ||s_j||^2, and of which samples both or only s_j count.

    What does not count is finite; s_{j+1} is None behind the last one.
    """

    s: Tensor
    square: Tensor
    following: Tensor | None
    active: Tensor
    last: Tensor


def chain(algebra: Algebra, z: Tensor, links: Iterable[Link]) -> tuple[Tensor, Tensor]:
    """z_{k-1} and the denominator, step by step."""
    denominator = torch.ones_like(z[:, 0])
    for link in links:
        square = torch.where(link.active & (link.square > 0), link.square, 1.0)
        ratio = torch.where(link.active, algebra.dot(link.s, z) / square, 0.0)
        denominator = torch.where(link.last, 1 - ratio, denominator)
        if link.following is not None:
            z = z + torch.where(link.last, 0.0, ratio)[:, None] * link.following
    return z, denominator


def by_gram(
    products: Tensor,
    gram: Tensor,
    count: Tensor,
    places: Tensor,
    solve: Callable[[Tensor, Tensor], Tensor],
    cut: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The weights of s_1, s_2, ... in z_{k-1} - z_0, (B, k - 1), and the denominator.

    Args:
        products: (B, k) s_j . z_0, finite.
        gram: (B, k, k) s_i . s_j, finite.
        count: (B,) steps that count.
        places: (k,) 0, 1, ...
        solve: lower triangular systems (B, k, k) with (B, k).
        cut: (B, k) steps whose ratio is 0: as if they were infinitely long.
    """
    there = places < count[:, None]
    active = there if cut is None else there & ~cut
    both = active[:, :, None] & there[:, None, :]
    square = gram.diagonal(dim1=1, dim2=2)
    diagonal = torch.where(active & (square > 0), square, 1.0)
    beyond = torch.where(both, gram, 0.0)[:, :, 1:].tril(-1)
    system = torch.diag_embed(diagonal)
    system = torch.cat([system[:, :, :-1] - beyond, system[:, :, -1:]], dim=2)
    ratios = solve(system, torch.where(active, products, 0.0))
    last = places == count[:, None] - 1
    denominator = 1 - torch.where(last, ratios, 0.0).sum(1)
    return torch.where(last | ~active, 0.0, ratios)[:, :-1], denominator
