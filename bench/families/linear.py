"""Linear maps z -> A z + b: the local picture of every smooth fixed point, with its spectrum chosen.

The samples of a batch share a matrix, so that f stays one product, and each has a right-hand side of its own.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.families.base import Map, affine, generator, normal, orthogonal, register, uniform

B, N = 8, 96


def _sides(g: torch.Generator) -> Tensor:
    """Right-hand sides whose sizes differ a hundredfold over the batch."""
    return torch.logspace(-1, 1, B, dtype=torch.float64)[:, None] * normal(g, B, N)


def _normal_map(low: float, high: float, key: str, dtype: torch.dtype) -> tuple[Map, Tensor]:
    """Symmetric A, eigenvalues uniform in [low, high] with both ends present."""
    g = generator(key)
    eigenvalues = uniform(g, low, high, N)
    eigenvalues[0], eigenvalues[1] = low, high
    q = orthogonal(g, N)
    return affine((q * eigenvalues) @ q.T, _sides(g), dtype)


for _low, _high, _label in ((-0.9, 0.9, ".9"), (-0.5, 0.99, ".99"), (0.0, 0.999, ".999")):
    register(f"linear/normal {_label}", f"symmetric, spectrum in [{_low}, {_high}]", cheap=True)(
        partial(_normal_map, _low, _high, f"normal {_label}")
    )
register("linear/indefinite", "symmetric, spectrum in [-3, .9]: plain iteration diverges", cheap=True)(
    partial(_normal_map, -3.0, 0.9, "indefinite")
)


def _rotation_blocks(modulus: Tensor, angle: Tensor) -> Tensor:
    """Block-diagonal real Schur form of complex pairs modulus * exp(+-i angle): (2P, 2P)."""
    c, s = modulus * torch.cos(angle), modulus * torch.sin(angle)
    return torch.block_diag(*(torch.stack([c, s, -s, c], dim=1).view(-1, 2, 2)))


def non_normal(radius: float, key: str, dtype: torch.dtype) -> tuple[Map, Tensor]:
    """Complex eigenvalues of modulus up to `radius`, and a strictly upper triangle as large as the eigenvalues."""
    g = generator(key)
    modulus = radius * uniform(g, 0.0, 1.0, N // 2).sqrt()
    modulus[0] = radius
    t = _rotation_blocks(modulus, uniform(g, 0.0, torch.pi, N // 2))
    t = t + torch.triu(normal(g, N, N), diagonal=2) * (radius / N**0.5)
    q = orthogonal(g, N)
    return affine(q @ t @ q.T, _sides(g), dtype)


for _radius, _label in ((0.5, ".5"), (0.9, ".9"), (0.99, ".99")):
    register(f"linear/non-normal {_label}", f"complex pairs, spectral radius {_radius}, norm above 1", cheap=True)(
        partial(non_normal, _radius, f"non-normal {_label}")
    )


@register("linear/rotation .95", "normal, every eigenvalue of modulus .95, angles pi/4 to 3pi/4", cheap=True)
def rotation(dtype: torch.dtype) -> tuple[Map, Tensor]:
    g = generator("rotation")
    t = _rotation_blocks(torch.full((N // 2,), 0.95, dtype=torch.float64), uniform(g, 0.785, 2.356, N // 2))
    q = orthogonal(g, N)
    return affine(q @ t @ q.T, _sides(g), dtype)


@register("linear/saddle point", "gradient descent-ascent on a regularised bilinear game", cheap=True)
def saddle_point(dtype: torch.dtype) -> tuple[Map, Tensor]:
    """(x, y) -> (x - h (mu x + C y + p), y - h (mu y - C^T x + q)); eigenvalues 1 - h mu +- i h sigma."""
    g = generator("saddle point")
    half, mu = N // 2, 0.2
    c = normal(g, half, half) / half**0.5
    step = mu / (mu**2 + torch.linalg.matrix_norm(c, 2) ** 2)
    eye = torch.eye(half, dtype=torch.float64)
    a = torch.cat([torch.cat([mu * eye, c], dim=1), torch.cat([-c.T, mu * eye], dim=1)], dim=0)
    return affine(torch.eye(N, dtype=torch.float64) - step * a, step * _sides(g), dtype)


@register("linear/PageRank .99", "random surfer on a sparse directed graph, damping .85 to .99", cheap=True)
def page_rank(dtype: torch.dtype) -> tuple[Map, Tensor]:
    g = generator("page rank")
    n = 256
    popularity = uniform(g, 0.0, 1.0, n) ** 4 + 1e-3
    links = torch.multinomial(popularity.expand(n, n), 4, replacement=False, generator=g)
    transition = torch.zeros(n, n, dtype=torch.float64).scatter_(1, links, 0.25).T
    damping = torch.linspace(0.85, 0.99, B, dtype=torch.float64)[:, None]
    personal = torch.softmax(2 * normal(g, B, n), dim=1)
    matrix = transition.T.contiguous().to(dtype)
    keep, restart = damping.to(dtype), ((1 - damping) * personal).to(dtype)

    def f(z: Tensor) -> Tensor:
        return torch.addcmul(restart, keep, z @ matrix)

    return f, torch.full((B, n), 1.0 / n, dtype=dtype)
