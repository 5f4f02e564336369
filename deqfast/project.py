"""Sets that the input of a joint solve stays in.

A projection acts on each sample by itself. The classes here run inside of the joint step's kernels; any callable
x -> x that is row-wise does too, between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .state import check_number

__all__ = ["Box", "L2Ball", "LinfBall"]


@dataclass(frozen=True)
class Projection:
    """A product of a ball around a centre and a box, of which either may be missing.

    Of complex numbers a box bounds real and imaginary parts, each by itself, as the largest-entry ball does.

    Attributes:
        ball: None, "l2" or "linf".
        radius: of the ball.
        center: of the ball, structured and shaped like x; None: the origin.
        low, high: of the box, for every number.
    """

    ball: str | None = None
    radius: float = math.inf
    center: Any = None
    low: float = -math.inf
    high: float = math.inf

    def __call__(self, x: Any) -> Any:
        """The nearest point of the set to each sample of ``x``, a tensor (B, ...) or a tree of them."""
        given, spec = pytree.tree_flatten(x)
        leaves = [_real(t) for t in given]
        centers = [None] * len(leaves) if self.center is None else [_real(c) for c in pytree.tree_leaves(self.center)]
        if self.ball == "l2":
            moved = [t if c is None else t - c for t, c in zip(leaves, centers, strict=True)]
            squares = torch.stack([_rows(t).double().square().sum(1) for t in moved]).sum(0)
            # A root at zero has no derivative, so none is taken there.
            norm = torch.where(squares > 0, squares, 1.0).sqrt()
            outside = (squares > 0) & (norm > self.radius)
            shrink = torch.where(outside, self.radius / norm, 1.0)
            leaves = [
                _scale(t, shrink) if c is None else c + _scale(t, shrink) for t, c in zip(moved, centers, strict=True)
            ]
        elif self.ball == "linf":
            leaves = [
                t.clamp(-self.radius, self.radius) if c is None else torch.clamp(t, c - self.radius, c + self.radius)
                for t, c in zip(leaves, centers, strict=True)
            ]
        if self.low > -math.inf or self.high < math.inf:
            leaves = [t.clamp(self.low, self.high) for t in leaves]
        leaves = [torch.view_as_complex(t) if g.is_complex() else t for t, g in zip(leaves, given, strict=True)]
        return pytree.tree_unflatten(leaves, spec)


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _rows(t: Tensor) -> Tensor:
    return t.reshape(t.shape[0], math.prod(t.shape[1:]))


def _scale(t: Tensor, by: Tensor) -> Tensor:
    return t * by.to(t.dtype).view(-1, *([1] * (t.dim() - 1)))


def Box(low: float, high: float) -> Projection:
    """Every number of x within [low, high].

    Raises:
        ValueError: low is not below high.
    """
    for name, value in (("low", low), ("high", high)):
        check_number(name, value)
    if not low < high:
        raise ValueError(f"low must be below high, got {low} and {high}")
    return Projection(low=float(low), high=float(high))


def L2Ball(radius: float, center: Any = None) -> Projection:
    """Each sample of x, all its tensors together, within ``radius`` of ``center`` in the Euclidean norm.

    Args:
        radius: positive.
        center: structured and shaped like x; None: the origin.
    """
    return Projection(ball="l2", radius=_radius(radius), center=center)


def LinfBall(radius: float, center: Any = None, low: float = -math.inf, high: float = math.inf) -> Projection:
    """Every number of x within ``radius`` of ``center``'s, and within the box [low, high].

    The box must meet the ball, as it does if the centre lies in it.

    Args:
        radius: positive.
        center: structured and shaped like x; None: the origin.
        low: lower end of the box, for pixels for example; default none.
        high: upper end of the box; default none.
    """
    for name, value in (("low", low), ("high", high)):
        check_number(name, value)
    if not low < high:
        raise ValueError(f"low must be below high, got {low} and {high}")
    return Projection(ball="linf", radius=_radius(radius), center=center, low=float(low), high=float(high))


def _radius(value: float) -> float:
    check_number("radius", value)
    if not 0 < value < math.inf:
        raise ValueError(f"radius must be positive and finite, got {value}")
    return float(value)
