"""Nonlinear systems: random networks near chaos, self-consistent fields, many small implicit time steps."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.families.base import Map, generator, normal, register, uniform


def _tanh_network(gain: float, dtype: torch.dtype) -> tuple[Map, Tensor]:
    """z = tanh(W z + b), W random with spectral radius `gain`; the undriven network is chaotic above 1."""
    g = generator("tanh network")
    n, batch = 256, 16
    w = (gain * normal(g, n, n) / n**0.5).to(dtype)
    drive = (0.5 * normal(g, batch, n)).to(dtype)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(torch.addmm(drive, z, w.T))

    return f, torch.zeros(batch, n, dtype=dtype)


for _gain in (0.95, 1.25, 1.4):
    register(f"network/tanh {_gain}", f"random recurrent network, gain {_gain}, constant drive", cheap=True)(
        partial(_tanh_network, _gain)
    )


@register("physics/self-consistent field", "density of a 1-D interacting gas, plain mixing sloshes")
def self_consistent_field(dtype: torch.dtype) -> tuple[Map, Tensor]:
    """rho -> Fermi occupation of the levels of T + V_ext + U rho (screened), strength U growing over the batch."""
    g = generator("scf")
    n, batch, electrons, beta = 48, 8, 6, 4.0
    x = torch.linspace(-1, 1, n, dtype=torch.float64)
    off = torch.ones(n - 1, dtype=torch.float64)
    kinetic = 10.0 * (2 * torch.eye(n, dtype=torch.float64) - torch.diag(off, 1) - torch.diag(off, -1))
    external = 8 * x**2 + 0.5 * normal(g, batch, n)
    coupling = torch.exp(-4 * (x[:, None] - x[None, :]).abs())
    strength = torch.linspace(0.3, 1.5, batch, dtype=torch.float64)[:, None]
    bare = (kinetic + torch.diag_embed(external)).to(dtype)
    interaction, strength = coupling.to(dtype), strength.to(dtype)

    def f(rho: Tensor) -> Tensor:
        energy, orbital = torch.linalg.eigh(bare + torch.diag_embed(strength * (rho @ interaction)))
        level = 0.5 * (energy[:, electrons - 1] + energy[:, electrons]).unsqueeze(1)
        occupied = torch.sigmoid(-beta * (energy - level))
        return (orbital**2 * occupied.unsqueeze(1)).sum(dim=2)

    return f, torch.full((batch, n), electrons / n, dtype=dtype)


@register("physics/Lorenz steps", "implicit midpoint steps of 2,000 Lorenz systems, N = 3", cheap=True)
def lorenz(dtype: torch.dtype) -> tuple[Map, Tensor]:
    g = generator("lorenz")
    batch = 2000
    centre = torch.tensor([0.0, 0.0, 25.0], dtype=torch.float64)
    old = (centre + 8 * normal(g, batch, 3)).to(dtype)
    dt = uniform(g, 0.01, 0.05, batch, 1).to(dtype)

    def f(z: Tensor) -> Tensor:
        x, y, w = (0.5 * (z + old)).unbind(1)
        return old + dt * torch.stack([10 * (y - x), x * (28 - w) - y, x * y - 8 / 3 * w], dim=1)

    return f, old.clone()


@register("physics/chemical equilibrium", "bound fractions of 12 competing ligands, 500 mixtures", cheap=True)
def chemical_equilibrium(dtype: torch.dtype) -> tuple[Map, Tensor]:
    """Free concentrations c_i = total_i / (1 + sum_j K_ij c_j), in logarithms; affinities over three decades."""
    g = generator("chemistry")
    batch, n = 500, 12
    affinity = torch.exp(1.5 * normal(g, n, n))
    affinity = ((affinity + affinity.T) / 2).to(dtype)
    total = uniform(g, -2.0, 1.5, batch, n).to(dtype)

    def f(z: Tensor) -> Tensor:
        return total - torch.log1p(z.exp() @ affinity)

    return f, total.clone()
