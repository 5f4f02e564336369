"""Discretised PDEs in the fixed-point forms their codes iterate: Picard linearisation, Jacobi, semi-implicit steps.

Samples of a batch differ in the physical parameter, from mild to close to the fold or the stability limit.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.families.base import Map, generator, normal, register, uniform


def _sine_basis(n: int) -> tuple[Tensor, Tensor]:
    """Orthonormal sine basis and eigenvalues of the 1-D Dirichlet Laplacian (negated) on n inner points of (0, 1)."""
    k = torch.arange(1, n + 1, dtype=torch.float64)
    basis = math.sqrt(2 / (n + 1)) * torch.sin(math.pi * torch.outer(k, k) / (n + 1))
    return basis, (2 * (n + 1) * torch.sin(math.pi * k / (2 * (n + 1)))) ** 2


@register(
    "pde/bratu Picard",
    "-Lap u = lambda exp(u) on 24 x 24, Laplacian inverted, lambda up to 6.6 (fold 6.81)",
    cheap=True,
)
def bratu_picard(dtype: torch.dtype) -> tuple[Map, Tensor]:
    n, batch = 24, 8
    basis, eigenvalues = _sine_basis(n)
    scale = torch.linspace(2.0, 6.6, batch, dtype=torch.float64)[:, None, None]
    inverse = (scale / (eigenvalues[:, None] + eigenvalues[None, :])).to(dtype)
    s = basis.to(dtype)

    def f(u: Tensor) -> Tensor:
        return s @ ((s @ u.exp() @ s) * inverse) @ s

    return f, torch.zeros(batch, n, n, dtype=dtype)


@register("pde/bratu Jacobi", "-Lap u = lambda exp(u) on 16 x 16 by Jacobi sweeps: spectral radius about .98")
def bratu_jacobi(dtype: torch.dtype) -> tuple[Map, Tensor]:
    n, batch = 16, 8
    stencil = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=dtype)[None, None] / 4
    source = (torch.linspace(1.0, 6.0, batch, dtype=torch.float64) / (4 * (n + 1) ** 2))[:, None, None, None].to(dtype)

    def f(u: Tensor) -> Tensor:
        return torch.addcmul(F.conv2d(u, stencil, padding=1), source, u.exp())

    return f, torch.zeros(batch, 1, n, n, dtype=dtype)


@register("pde/nonlinear heat", "backward Euler for u_t = ((1 + u^2) u_x)_x, 128 points, dt/h^2 from 1 to 30")
def nonlinear_heat(dtype: torch.dtype) -> tuple[Map, Tensor]:
    n, batch = 128, 8
    g = generator("heat")
    x = torch.linspace(0, 1, n, dtype=torch.float64)
    centre, height = uniform(g, 0.3, 0.7, batch, 1), uniform(g, 0.5, 2.0, batch, 1)
    start = (height * torch.exp(-100 * (x - centre) ** 2)).to(dtype)
    ratio = torch.logspace(0, math.log10(30), batch, dtype=torch.float64)[:, None].to(dtype)

    def f(u: Tensor) -> Tensor:
        v = F.pad(u, (1, 1))
        k = 1 + 0.25 * (v[:, 1:] + v[:, :-1]) ** 2
        left, right = k[:, :-1], k[:, 1:]
        return (start + ratio * (left * v[:, :-2] + right * v[:, 2:])) / (1 + ratio * (left + right))

    return f, start.clone()


@register(
    "pde/reaction-diffusion",
    "implicit Gray-Scott step on 24 x 24 x 2, diffusion inverted, time step up to 12",
    cheap=True,
)
def reaction_diffusion(dtype: torch.dtype) -> tuple[Map, Tensor]:
    n, batch = 24, 8
    g = generator("gray-scott")
    basis, eigenvalues = _sine_basis(n)
    s = basis.to(dtype)
    dt = torch.linspace(2.0, 12.0, batch, dtype=torch.float64)[:, None, None, None]
    diffusion = torch.tensor([2e-4, 1e-4], dtype=torch.float64)[:, None, None] * (eigenvalues[:, None] + eigenvalues)
    feed, kill = 0.04, 0.06
    damping = torch.tensor([feed, feed + kill], dtype=torch.float64)[:, None, None]
    inverse = (1 / (1 + dt * (diffusion + damping))).to(dtype)
    blob = torch.exp(-20 * normal(g, batch, 1, n, n) ** 2)
    old = torch.cat([1 - 0.5 * blob, 0.4 * blob], dim=1).to(dtype)
    supply = torch.zeros(2, 1, 1, dtype=dtype)
    supply[0] = feed
    sign = torch.tensor([-1.0, 1.0], dtype=dtype)[:, None, None]
    step = dt.to(dtype)

    def f(u: Tensor) -> Tensor:
        reaction = (u[:, 0] * u[:, 1] ** 2).unsqueeze(1)
        return s @ ((s @ (old + step * (sign * reaction + supply)) @ s) * inverse) @ s

    return f, old.clone()


@register(
    "pde/viscous Burgers", "steady (u^2/2)_x = nu u_xx + source, 64 points, damped Jacobi: non-normal", cheap=True
)
def burgers(dtype: torch.dtype) -> tuple[Map, Tensor]:
    n, batch = 64, 8
    h = 1 / (n + 1)
    x = torch.linspace(h, 1 - h, n, dtype=torch.float64)
    nu = torch.logspace(math.log10(0.02), math.log10(0.5), batch, dtype=torch.float64)[:, None].to(dtype)
    source = (torch.sin(math.pi * x) * torch.linspace(0.5, 1.0, batch, dtype=torch.float64)[:, None]).to(dtype)

    def f(u: Tensor) -> Tensor:
        v = F.pad(u, (1, 1))
        advection = (u.abs() * u - v[:, :-2].abs() * v[:, :-2]) / (2 * h)
        residual = source - advection + nu * (v[:, :-2] - 2 * u + v[:, 2:]) / h**2
        return u + 0.8 * residual / (u.abs() / h + 2 * nu / h**2)

    return f, torch.zeros(batch, n, dtype=dtype)


@register("pde/Helmholtz", "shifted Poisson with the Laplacian inverted: eigenvalues on both sides of 1", cheap=True)
def helmholtz(dtype: torch.dtype) -> tuple[Map, Tensor]:
    """-Lap u - kappa^2 c(x) u = b with kappa^2 c straddling the first eigenvalue: plain iteration diverges."""
    n, batch = 24, 8
    g = generator("helmholtz")
    basis, eigenvalues = _sine_basis(n)
    s = basis.to(dtype)
    inverse = (1 / (eigenvalues[:, None] + eigenvalues)).to(dtype)
    speed = 1 + 0.2 * torch.sin(3 * torch.linspace(0, math.pi, n, dtype=torch.float64))[:, None]
    wave = (torch.linspace(10.0, 120.0, batch, dtype=torch.float64)[:, None, None] * speed).to(dtype)
    source = (40 * normal(g, batch, n, n)).to(dtype)

    def f(u: Tensor) -> Tensor:
        return s @ ((s @ torch.addcmul(source, wave, u) @ s) * inverse) @ s

    return f, torch.zeros(batch, n, n, dtype=dtype)
