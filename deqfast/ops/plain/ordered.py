"""Sums in an order that depends on N alone: the algebra of the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formulas.sums import ordered_sum


class OrderedDefinite:
    """Symmetric positive definite matrices, by LAPACK."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """By Cholesky's method."""
        factor, info = torch.linalg.cholesky_ex(self.matrix)
        y = torch.cholesky_solve(rhs[..., None], factor)[..., 0]
        return y, (info == 0) & torch.isfinite(y).all(1)

    def root_inverse_diagonal(self) -> Tensor:
        """Of the inverse."""
        return torch.linalg.inv_ex(self.matrix).inverse.diagonal(dim1=1, dim2=2).sqrt()


class Ordered:
    """Every sum is one row's; norms in float64, where no square of a finite float32 overflows or vanishes."""

    def norm(self, rows: Tensor) -> Tensor:
        """In the dtype of the rows."""
        return ordered_sum(rows.square()).sqrt()

    def norm_of_any(self, rows: Tensor) -> Tensor:
        """In float64."""
        return ordered_sum(rows.double().square()).sqrt()

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """(B,) products."""
        return ordered_sum(a * b)

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
        """By LU with partial pivoting."""
        y, info = torch.linalg.solve_ex(matrix, rhs)
        return y, (info == 0) & torch.isfinite(y).all(1)

    def definite(self, matrix: Tensor) -> OrderedDefinite:
        """Matrices to solve with."""
        return OrderedDefinite(matrix)


def products(columns: Tensor, v: Tensor) -> Tensor:
    """(B, m) dot products of (B, m, N) with (B, N); not as matrix products, whose order of summation depends on B."""
    return torch.stack([ordered_sum(column * v) for column in columns.unbind(1)], dim=1)


def combine(weights: Tensor, columns: Tensor) -> Tensor:
    """(B, N) sum of (B, m, N) columns with (B, m) weights."""
    total = torch.zeros_like(columns[:, 0])
    for weight, column in zip(weights.unbind(1), columns.unbind(1), strict=True):
        total += weight[:, None] * column
    return total
