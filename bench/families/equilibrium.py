"""A slow, dependable float64 equilibrium for building adjoint problems; independent of every solver measured."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def equilibrium(f: Callable[[Tensor], Tensor], z0: Tensor, *, memory: int = 25, evaluations: int = 400) -> Tensor:
    """Least-residual iterate of Anderson's method with an orthogonal-factorisation least squares (gelsd), float64.

    A fixed point is wanted where there is one, and a representative state where there is not: the adjoint system at the
    least-residual state is what a training step meets in that case.
    """
    shape, batch = z0.shape, z0.shape[0]
    z = z0.double().reshape(batch, -1)
    best, least = z.clone(), z.new_full((batch,), torch.inf)
    columns_f: list[Tensor] = []
    columns_g: list[Tensor] = []
    last: tuple[Tensor, Tensor] | None = None
    for _ in range(evaluations):
        fz = f(z.view(shape)).reshape(batch, -1)
        g = fz - z
        if not fz.isfinite().all():
            break
        size = g.norm(dim=1) / fz.norm(dim=1)
        improved = size < least
        best, least = torch.where(improved[:, None], z, best), torch.where(improved, size, least)
        if least.max() < 1e-12:
            break
        if last is not None:
            columns_f.append(fz - last[0])
            columns_g.append(g - last[1])
            del columns_f[:-memory], columns_g[:-memory]
        last = (fz, g)
        z = fz
        if columns_g:
            matrix = torch.stack(columns_g, dim=2)
            scale = matrix.norm(dim=1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
            solution = torch.linalg.lstsq(matrix / scale, g.unsqueeze(2), rcond=1e-10, driver="gelsd").solution
            mixed = fz - (torch.stack(columns_f, dim=2) / scale @ solution).squeeze(2)
            z = torch.where(mixed.isfinite().all(dim=1, keepdim=True), mixed, fz)
    return best.view(shape)
