"""The strongest simple rival: Anderson type II as a user with torch.compile would write it.

Difference form, per sample, ring of m columns, and everything a careful author does: the Gram is incremental (its new
row is the change of the right-hand side, <dG_j, g_k> - <dG_j, g_{k-1}>), the ridge is scale-free, and the small
Cholesky is unrolled over the batch so that the whole step is a handful of fused kernels with no library call.  It
keeps no best iterate and freezes nothing, which is less work than deqfast and torchdeq do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

RIDGE = 1e-6


def _cholesky_solve(a: list[list[Tensor]], b: list[Tensor]) -> list[Tensor]:
    """Solve m x m systems whose entries are (B,) vectors; m is small and static."""
    m = len(b)
    low: list[list[Tensor]] = [[] for _ in range(m)]
    y: list[Tensor] = []
    for i in range(m):
        for j in range(i):
            entry = a[i][j]
            for k in range(j):
                entry = entry - low[i][k] * low[j][k]
            low[i].append(entry / low[j][j])
        pivot = a[i][i]
        for k in range(i):
            pivot = pivot - low[i][k] * low[i][k]
        low[i].append(pivot.clamp_min(RIDGE).sqrt())
        right = b[i]
        for k in range(i):
            right = right - low[i][k] * y[k]
        y.append(right / low[i][i])
    x: list[Tensor] = [b[0]] * m
    for i in reversed(range(m)):
        value = y[i]
        for k in range(i + 1, m):
            value = value - low[k][i] * x[k]
        x[i] = value / low[i][i]
    return x


def step(
    z: Tensor, fz: Tensor, z_old: Tensor, f_old: Tensor,
    d_f: Tensor, d_g: Tensor, gram: Tensor, right: Tensor, slot: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One step: z, fz, z_old, f_old (B, N); d_f, d_g (m, B, N) and gram (m, m, B) updated in place; right (m, B).

    Returns the next iterate, the new right-hand side and the relative residual (B,).
    """
    m = d_f.shape[0]
    g = fz - z
    new_f = fz - f_old
    new_g = new_f - (z - z_old)
    d_f.index_copy_(0, slot, new_f.unsqueeze(0))
    d_g.index_copy_(0, slot, new_g.unsqueeze(0))
    now = torch.stack([(d_g[j] * g).sum(1) for j in range(m)])
    here = (torch.arange(m, device=z.device) == slot).unsqueeze(1)
    row = torch.where(here, (new_g * new_g).sum(1), now - right)
    gram.index_copy_(0, slot, row.unsqueeze(0))
    gram.index_copy_(1, slot, row.unsqueeze(1))
    scale = [torch.where(gram[j, j] > 0, gram[j, j], 1.0).rsqrt() for j in range(m)]
    system = [[gram[i, j] * scale[i] * scale[j] for j in range(i)] + [scale[i] * 0 + 1 + RIDGE] for i in range(m)]
    weight = _cholesky_solve(system, [now[j] * scale[j] for j in range(m)])
    out = fz
    for j in range(m):
        out = out - (weight[j] * scale[j]).unsqueeze(1) * d_f[j]
    return out, now, g.square().sum(1).sqrt() / fz.square().sum(1).sqrt()


@cache
def compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The compiled step; static shapes, because a user of one model has one shape."""
    torch._dynamo.config.recompile_limit = 64
    torch._inductor.config.compile_threads = 1  # no pool of workers left idling beside the measurement
    return torch.compile(step, dynamic=False, fullgraph=True)


def anderson(f: Callable[[Tensor], Tensor], z0: Tensor, evaluations: int, rtol: float, m: int = 6) -> Tensor:
    """Solve with the compiled step; returns the last iterate, or the first whose whole batch meets rtol."""
    advance = compiled()
    B, N = z0.shape[0], z0[0].numel()
    d_f, d_g = z0.new_zeros(2, m, B, N)
    gram, right = z0.new_zeros(m, m, B), z0.new_zeros(m, B)
    slots = [torch.tensor([j]) for j in range(m)]
    z_old = z0.reshape(B, N)
    f_old = z = f(z0).reshape(B, N)
    for k in range(1, evaluations):
        fz = f(z.view_as(z0)).reshape(B, N)
        if k == evaluations - 1:
            break
        z_next, right, residual = advance(z, fz, z_old, f_old, d_f, d_g, gram, right, slots[(k - 1) % m])
        if bool((residual <= rtol).all()):
            break
        z_old, f_old, z = z, fz, z_next
    return z.view_as(z0)
