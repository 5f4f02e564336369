"""The nearly free f of the speed benchmarks: one elementwise kernel, so that what is timed is the solver."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SIZES: dict[str, tuple[int, int]] = {
    "1x64": (1, 64),
    "64x128": (64, 128),
    "64x1024": (64, 1024),
    "512x512": (512, 512),
    "32x61440": (32, 61_440),
    "4x365000": (4, 365_000),
    "1x4M": (1, 4_000_000),
    "20000x8": (20_000, 8),
}
QUICK_SIZES = ("1x64", "64x128", "20000x8")


def evaluations(size: str, method: str) -> int:
    """Evaluations of f in one timed solve; fewer for Broyden at the largest sizes, whose memory grows with them."""
    fewer = {"32x61440": 14, "4x365000": 12, "1x4M": 10}
    return fewer.get(size, 30) if method == "broyden" else 30


def coefficients(B: int, N: int) -> tuple[Tensor, Tensor]:
    """a (N,) spread over [-3, .95] in a fixed shuffle, and b (B, N).

    The spread keeps six columns from solving the map in thirty evaluations, and entries below -1 make f(z) == z in
    every digit unlikely even for N = 8, so no method may stop early and every row does the work it reports.
    """
    g = torch.Generator().manual_seed(N)
    a = torch.linspace(-3.0, 0.95, N)[torch.randperm(N, generator=g)]
    return a, torch.randn(B, N, generator=g)


def diagonal_map(B: int, N: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """f(z) = a z + b as one fused kernel, and the start z0 = 0."""
    a, b = coefficients(B, N)

    def f(z: Tensor) -> Tensor:
        return torch.addcmul(b, a, z)

    return f, torch.zeros(B, N)


def contraction(B: int, N: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The same with a in [-.9, .95], on which plain iteration converges too: for time to tolerance."""
    g = torch.Generator().manual_seed(N)
    a, b = torch.empty(N).uniform_(-0.9, 0.95, generator=g), torch.randn(B, N, generator=g)
    return (lambda z: torch.addcmul(b, a, z)), torch.zeros(B, N)
