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

from .ops.formulas.joint import Add, project_rows
from .ops.layout import Leaf, widest
from .options import check_number

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
        return self.inside(x)

    def inside(self, x: Any, add: Add | None = None) -> Any:
        """The same of samples that are spread over ranks, whose sums ``add`` makes."""
        leaves, spec = pytree.tree_flatten(x)
        layouts = [Leaf(t) for t in leaves]
        centers = [None] * len(leaves) if self.center is None else pytree.tree_leaves(self.center)
        rows = [leaf.rows(t) for leaf, t in zip(layouts, leaves, strict=True)]
        pairs = zip(layouts, centers, strict=True)
        centered = [None if c is None else leaf.rows(c.expand(leaf.shape)) for leaf, c in pairs]
        inside = project_rows(self, centered, rows, widest(leaves[0].device), add)
        return pytree.tree_unflatten([_like(r, leaf) for r, leaf in zip(inside, layouts, strict=True)], spec)


def _like(rows: Tensor, leaf: Leaf) -> Tensor:
    """Rows as a tensor of the leaf's shape and memory order."""
    shape = [leaf.shape[d] for d in leaf.order]
    found = torch.view_as_complex(rows.reshape(*shape, 2)) if leaf.complex else rows.reshape(shape)
    return found.permute([leaf.order.index(d) for d in range(len(shape))])


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
