"""What a problem is, how a family registers, and the seeded draws that every family shares."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]
Build = Callable[[torch.dtype], tuple[Map, Tensor]]


@dataclass(frozen=True)
class Problem:
    """A batch of B independent fixed points z = f(z), z of shape (B, ...).

    cheap     f is a few dense kernels, so the solver's own time shows in the time to tolerance.
    tightest  smallest relative residual that f's own rounding or noise lets any method reach; smaller tolerances are
              asked of nobody.
    """

    name: str
    family: str
    f: Map
    z0: Tensor
    notes: str = ""
    cheap: bool = False
    tightest: float = 1e-6

    @property
    def B(self) -> int:
        return self.z0.shape[0]

    @property
    def N(self) -> int:
        return self.z0[0].numel()


@dataclass(frozen=True)
class Entry:
    family: str
    build: Build
    notes: str
    cheap: bool
    tightest: float


REGISTRY: dict[str, Entry] = {}


def register(name: str, notes: str, *, cheap: bool = False, tightest: float = 1e-6) -> Callable[[Build], Build]:
    """Enter a builder under a name; the part before the slash is its family."""

    def enter(build: Build) -> Build:
        if name in REGISTRY:
            raise ValueError(f"problem {name!r} is registered twice")
        REGISTRY[name] = Entry(name.split("/")[0], build, notes, cheap, tightest)
        return build

    return enter


def generator(key: str) -> torch.Generator:
    """A generator seeded by a name, so that adding a family moves no other family's numbers."""
    return torch.Generator().manual_seed(zlib.crc32(key.encode()))


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def uniform(g: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float64)


def orthogonal(g: torch.Generator, n: int) -> Tensor:
    """A Haar-distributed orthogonal matrix, (n, n)."""
    q, r = torch.linalg.qr(normal(g, n, n))
    return q * torch.sign(torch.diagonal(r))


def affine(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Map, Tensor]:
    """z -> A z + b for a shared A (N, N) and b (B, N), started at zero.  One matrix product: nearly free."""
    transposed, b = a.T.contiguous().to(dtype), b.to(dtype)

    def f(z: Tensor) -> Tensor:
        return torch.addmm(b, z, transposed)

    return f, torch.zeros_like(b)
