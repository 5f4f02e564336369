"""What the formulas ask of those who call them: sums, norms and small solves."""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor


class Definite(Protocol):
    """A batch of symmetric positive definite matrices (B, m, m)."""

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """(B, m) solutions and which of them are good."""

    def root_inverse_diagonal(self) -> Tensor:
        """(B, m) roots of the diagonals of the inverses."""


class Algebra(Protocol):
    """How sums and small solves are made."""

    def norm(self, rows: Tensor) -> Tensor:
        """Euclidean norms of (..., N) rows of magnitude about one."""

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """(B,) dot products of (B, N) rows."""

    def finite(self, rows: Tensor) -> Tensor:
        """Which of (B, N) rows hold numbers alone."""

    def nowhere(self, mask: Tensor) -> bool:
        """Whether a mask is known to be false everywhere: looked at only where that is no wait."""

    def everywhere(self, mask: Tensor) -> bool:
        """Whether a mask is known to be true everywhere."""

    def solve(self, matrix: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """(B, m) solutions of systems (B, m, m), with partial pivoting, and which of them are good."""

    def definite(self, matrix: Tensor) -> Definite:
        """Factors for the solves with symmetric positive definite matrices."""


def but_not(a: Tensor, b: Tensor) -> Tensor:
    """A and not b, in one operation: of booleans, or of statuses, where RUNNING is 0."""
    return a > b


_EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}


@functools.cache
def _exponent(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The bits of the exponent, as a number of the same size."""
    integer, bits = _EXPONENT[dtype]
    return torch.tensor(bits, dtype=integer, device=device)


def power_below(t: Tensor) -> Tensor:
    """The greatest power of two that is not above each positive number; 0 for 0 and for subnormal ones."""
    bits = _exponent(t.dtype, t.device)
    return (t.view(bits.dtype) & bits).view(t.dtype)
