"""Maps whose rows of dim 0 depend on each other, as those of graphs and of vectors of unknowns do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


def two_unknowns(z: Tensor) -> Tensor:
    """[0.9 z_1, 0.5 z_1 + 1]: at zeros the first is at rest already, until the second has moved. Solution [1.8, 2]."""
    return torch.stack([0.9 * z[1], 0.5 * z[1] + 1])


def graph_network(nodes: int = 1000, dtype: torch.dtype = torch.float32) -> tuple[Map, Tensor]:
    """tanh(A z W + x): A sparse and symmetric, rows sum to 1, ||W|| = .95, x zero but for a tenth of the nodes."""
    generator = torch.Generator().manual_seed(0)
    A = torch.eye(nodes, dtype=torch.float64)
    for _ in range(3):  # a sum of permutations and their inverses: rows and columns sum to the same
        p = torch.eye(nodes, dtype=torch.float64)[torch.randperm(nodes, generator=generator)]
        A = A + p + p.T
    A = (A / A.sum(1, keepdim=True)).to(dtype)
    W = torch.randn(16, 16, dtype=torch.float64, generator=generator)
    W = (0.95 * W / torch.linalg.matrix_norm(W, 2)).to(dtype)
    x = torch.zeros(nodes, 16, dtype=dtype)
    x[: nodes // 10] = torch.randn(nodes // 10, 16, dtype=torch.float64, generator=generator).to(dtype)
    return lambda z: torch.tanh(A @ z @ W + x), torch.zeros(nodes, 16, dtype=dtype)


def page_rank(pages: int = 60) -> tuple[Map, Tensor, Tensor]:
    """Personalised PageRank as a vector: the map, a start, the exact answer."""
    generator = torch.Generator().manual_seed(1)
    links = (torch.rand(pages, pages, generator=generator) < 0.1).double() + torch.eye(pages, dtype=torch.float64)
    P = links / links.sum(0)
    v = torch.zeros(pages, dtype=torch.float64)
    v[0] = 1
    exact = torch.linalg.solve(torch.eye(pages, dtype=torch.float64) - 0.85 * P, 0.15 * v)
    return lambda z: 0.85 * (P @ z) + 0.15 * v, v.clone(), exact


def row_residuals(f: Map, z: Tensor) -> Tensor:
    """(B,) ||f(z) - z|| / ||f(z)||, 0 / 0 being 0."""
    fz = f(z)
    g, size = (fz - z).reshape(z.shape[0], -1).double().norm(dim=1), fz.reshape(z.shape[0], -1).double().norm(dim=1)
    return torch.where(g > 0, g / size, 0.0)
