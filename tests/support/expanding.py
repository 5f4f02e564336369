"""Maps that plain iteration runs away from: eigenvalues at and around 2, 1 and -1, rotations, defective ones, roots."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]
B = 48  # maps of a family


def affine(J: Tensor, b: Tensor) -> Map:
    return lambda z: torch.einsum("bij,bj->bi", J.to(z.dtype), z) + b.to(z.dtype)


def rotations(angle: Tensor) -> Tensor:
    """(B, N, N) of plane rotations by (B, N / 2) angles."""
    many, half = angle.shape
    R = angle.new_zeros(many, 2 * half, 2 * half)
    for i in range(half):
        R[:, 2 * i, 2 * i] = R[:, 2 * i + 1, 2 * i + 1] = angle[:, i].cos()
        R[:, 2 * i, 2 * i + 1], R[:, 2 * i + 1, 2 * i] = -angle[:, i].sin(), angle[:, i].sin()
    return R


class Draw:
    """Random numbers in float64, the same everywhere."""

    def __init__(self, N: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed + N)
        self.N = N

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def symmetric(self, eigenvalues: Tensor) -> Tensor:
        Q = torch.linalg.qr(self.normal(B, self.N, self.N)).Q
        return Q @ torch.diag_embed(eigenvalues) @ Q.mT

    def not_normal(self, eigenvalues: Tensor) -> Tensor:
        S = torch.eye(self.N, dtype=torch.float64) + 0.3 * self.normal(B, self.N, self.N) / self.N**0.5
        return S @ torch.diag_embed(eigenvalues) @ torch.linalg.inv(S)


def named(N: int) -> Iterator[tuple[str, Map]]:
    """The families by which the blind spot of W = dX - dG was found."""
    draw = Draw(N, 0)
    b = draw.normal(B, N)
    yield "root z - c", lambda z: z + (z - b.to(z.dtype))
    yield "root c - z", lambda z: z + (b.to(z.dtype) - z)
    W, x = 0.5 * draw.normal(N, N) / N**0.5, draw.normal(B, N)
    yield "root z - tanh", lambda z: z + (z - torch.tanh(z @ W.to(z.dtype) + x.to(z.dtype)))
    yield "root tanh - z", lambda z: z + (torch.tanh(z @ W.to(z.dtype) + x.to(z.dtype)) - z)
    eigenvalues = 0.8 * draw.uniform(B, N)
    eigenvalues[:, 0] = 2
    yield "one at 2", affine(draw.symmetric(eigenvalues), b)
    yield "diag(l, 2, .3)", affine(torch.diag_embed(eigenvalues), b)
    if N % 2 == 0:
        angle = 0.1 + 1.2 * draw.uniform(B, N // 2)
        size = angle.cos().repeat_interleave(2, 1)[:, :, None]
        yield "I + cos R", affine(torch.eye(N, dtype=torch.float64) + size * rotations(angle), b)


def others(N: int) -> Iterator[tuple[str, Map]]:
    """Eigenvalues at and around 2, 1 and -1, real, complex and defective, and halves of both kinds."""
    draw = Draw(N, 1000)
    b = draw.normal(B, N)
    for center in (2.0, -1.0, 0.0, 1.6, 2.4):
        eigenvalues = center + 0.3 * (draw.uniform(B, N) - 0.5)
        yield f"symmetric around {center}", affine(draw.symmetric(eigenvalues), b)
        yield f"not normal around {center}", affine(draw.not_normal(eigenvalues), b)
    eigenvalues = 0.8 * draw.uniform(B, N)
    eigenvalues[:, 0] = 1.9 + 0.2 * draw.uniform(B)
    yield "one near 2", affine(draw.symmetric(eigenvalues), b)
    eigenvalues[:, 0] = 1 + 0.1 * torch.sign(draw.normal(B))
    yield "one near 1", affine(draw.symmetric(eigenvalues), b)
    eigenvalues = 1.8 * draw.uniform(B, N) - 0.9
    eigenvalues[:, 0] = -1
    yield "one at -1", affine(draw.symmetric(eigenvalues), b)
    half = torch.where(draw.uniform(B, N) < 0.5, 2 + 0.2 * draw.normal(B, N), 0.5 * draw.uniform(B, N))
    yield "half at 2", affine(draw.symmetric(half), b)
    for value in (2.0, 0.5):
        J = torch.diag_embed(torch.full((B, N), value, dtype=torch.float64))
        J = J + 0.3 * torch.diag_embed(torch.ones(B, N - 1, dtype=torch.float64), 1)
        yield f"defective at {value}", affine(J, b)
    if N % 2 == 0:
        for degrees in (30, 45, 60, 75):
            angle = torch.full((B, N // 2), math.radians(degrees), dtype=torch.float64)
            yield f"I + .5 R({degrees})", affine(torch.eye(N, dtype=torch.float64) + 0.5 * rotations(angle), b)
        yield ".9 R", affine(0.9 * rotations(3 * draw.uniform(B, N // 2)), b)
