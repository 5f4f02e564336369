"""Sums as matrix products and small solves in batches: the algebra of the portable backend.

It asks for no float64, and for torch.linalg only where the device has it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..formulas.algebra import Definite
from ..formulas.sums import chunked_norm, scaled_norm
from .elimination import forward_substitution, gauss_jordan

PLAIN_NORMS = (2.0**-40, 2.0**60)  # norms whose squares are numbers, as are those of all that counts in them


@functools.cache
def has_linalg(device_type: str) -> bool:
    """Whether the device has the solves of torch.linalg."""
    try:
        one = torch.ones(1, 1, 1, device=device_type)
        factor = torch.linalg.cholesky_ex(one).L
        torch.linalg.solve_triangular(factor, one, upper=False)
        torch.linalg.solve_ex(one, one)
    except (NotImplementedError, RuntimeError):
        return False
    return True


class Factored:
    """Symmetric positive definite matrices L L^T, by Cholesky's method and the inverse of L: H^-1 = L^-T L^-1."""

    def __init__(self, matrix: Tensor, eye: Tensor, good: Tensor) -> None:
        factor, self.info = torch.linalg.cholesky_ex(matrix)
        self.good = good
        m = matrix.shape[-1]
        self.inverse = torch.linalg.solve_triangular(factor, eye[:m, :m].expand_as(matrix), upper=False)

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """L^-T L^-1 rhs, and which matrices had a factor."""
        half = torch.bmm(rhs[:, None], self.inverse.mT)
        return torch.bmm(half, self.inverse)[:, 0], self.info == self.good

    def root_inverse_diagonal(self) -> Tensor:
        """The norms of the columns of L^-1."""
        return torch.linalg.vector_norm(self.inverse, dim=1)


class Inverted:
    """The same by elimination."""

    def __init__(self, matrix: Tensor) -> None:
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        self.inverse, self.regular = gauss_jordan(matrix, eye.expand_as(matrix))

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """H^-1 rhs, and which matrices had pivots and look definite."""
        definite = self.regular & (self.inverse.diagonal(dim1=1, dim2=2) > 0).all(1)
        return torch.bmm(self.inverse, rhs[..., None])[..., 0], definite

    def root_inverse_diagonal(self) -> Tensor:
        """Of the inverse."""
        return self.inverse.diagonal(dim1=1, dim2=2).sqrt()


class Matrices:
    """For systems of up to ``m`` unknowns, of one dtype on one device."""

    def __init__(self, m: int, acc: torch.dtype, device: torch.device) -> None:
        self.linalg = has_linalg(device.type)
        self._looks = device.type == "cpu"
        self._eye = torch.eye(m, dtype=acc, device=device)
        self._zero = torch.zeros((), dtype=acc, device=device)
        self._good = torch.zeros((), dtype=torch.int32, device=device)  # LAPACK's word for it

    def norm(self, rows: Tensor) -> Tensor:
        """Of rows of magnitude about one."""
        return chunked_norm(rows)

    def nowhere(self, mask: Tensor) -> bool:
        """It looks on a CPU alone."""
        return self._looks and not bool(mask.any())

    def everywhere(self, mask: Tensor) -> bool:
        """Likewise."""
        return self._looks and bool(mask.all())

    def norms(self, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Of f and g, of any magnitude: on a CPU as if it were about one, and again if it was not."""
        if self._looks:
            sizes = torch.stack([chunked_norm(f), chunked_norm(g)])
            lowest, highest = sizes.aminmax()
            if lowest.item() > PLAIN_NORMS[0] and highest.item() < PLAIN_NORMS[1]:
                return sizes[0], sizes[1]
        if f.shape != g.shape:
            return scaled_norm(f), scaled_norm(g)
        sizes = scaled_norm(torch.stack([f, g]))
        return sizes[0], sizes[1]

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """(B,) products."""
        return (a * b).sum(1)

    def finite(self, rows: Tensor) -> Tensor:
        """Which rows hold numbers alone: every other one times 0 is no number."""
        return (rows * self._zero.to(rows.dtype)).sum(1) == self._zero

    def solve(self, matrix: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """By LU with partial pivoting."""
        if self.linalg:
            # As a column: of vectors it returns a layout that sends the mix into a loop over samples.
            y, info = torch.linalg.solve_ex(matrix, rhs[..., None])
            return y[..., 0], info == self._good
        solution, regular = gauss_jordan(matrix, rhs[..., None])
        return solution[..., 0], regular

    def definite(self, matrix: Tensor) -> Definite:
        """By Cholesky's method."""
        return Factored(matrix, self._eye, self._good) if self.linalg else Inverted(matrix)

    def triangular(self, matrix: Tensor, rhs: Tensor) -> Tensor:
        """(B, k) solutions of lower triangular systems."""
        if self.linalg:
            return torch.linalg.solve_triangular(matrix, rhs[..., None], upper=False)[..., 0]
        return forward_substitution(matrix, rhs)
