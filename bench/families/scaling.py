"""The same maps in bad units, with noise in f, or computed in half precision.

A solver whose ridge or tolerance is absolute changes its behaviour when a user changes metres to millimetres.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.families.base import Map, affine, generator, normal, orthogonal, register
from bench.families.linear import non_normal
from bench.families.models import forward_map


def rescaled(f: Map, z0: Tensor, s: Tensor | float) -> tuple[Map, Tensor]:
    """The map s f(z / s), whose fixed point is s times that of f."""
    return (lambda z: s * f(z / s)), z0 * s


def _units(factor: float, dtype: torch.dtype) -> tuple[Map, Tensor]:
    return rescaled(*forward_map("mlp", 2.0, dtype), factor)


for _factor, _label in ((1e-3, "1e-3"), (1e3, "1e3")):
    register(f"scaling/units {_label}", f"mlp/2 in units {_label}")(partial(_units, _factor))


@register("scaling/linear 1e-3", "linear/non-normal .9 in units 1e-3", cheap=True)
def linear_units(dtype: torch.dtype) -> tuple[Map, Tensor]:
    return rescaled(*non_normal(0.9, "non-normal .9", dtype), 1e-3)


@register("scaling/blocks 1e-3 to 1e3", "three coupled blocks whose units differ by 1e3 each", cheap=True)
def blocks(dtype: torch.dtype) -> tuple[Map, Tensor]:
    """A contraction of norm .9 in natural units; the relative residual is dominated by the block in large units."""
    g = generator("blocks")
    batch, n = 8, 96
    a = 0.9 * orthogonal(g, n) * torch.rand(n, generator=g, dtype=torch.float64)
    units = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64).repeat_interleave(n // 3)
    return affine(units[:, None] * a / units, units * normal(g, batch, n), dtype)


def _noisy(level: float, dtype: torch.dtype) -> tuple[Map, Tensor]:
    """A rough perturbation of f, the same at the same iterate, as non-deterministic kernels or inner solves give."""
    clean, z0 = forward_map("mlp", 2.0, dtype)

    def f(z: Tensor) -> Tensor:
        return clean(z) + level * torch.sin(1e6 * z)

    return f, z0


register("noise/1e-4", "mlp/2 with noise of relative size about 1e-4", tightest=1e-3)(partial(_noisy, 1e-4))
register("noise/1e-6", "mlp/2 with noise of relative size about 1e-6", tightest=1e-5)(partial(_noisy, 1e-6))


@register(
    "noise/float16 output", "conv/1 whose output is rounded to float16, state kept in full precision", tightest=1e-3
)
def half_precision(dtype: torch.dtype) -> tuple[Map, Tensor]:
    clean, z0 = forward_map("conv", 1.0, dtype)
    return (lambda z: clean(z).to(torch.float16).to(dtype)), z0
