"""Small solves in plain torch, for devices that lack the operations of torch.linalg."""

from __future__ import annotations

import torch
from torch import Tensor


def gauss_jordan(matrix: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """Solutions (B, m, r) of (B, m, m) systems with (B, m, r), by row pivots, and which of them are good.

    All samples take the same operations; nothing is exchanged, the rows that have served are remembered.
    """
    m = matrix.shape[-1]
    rows = torch.cat([matrix, rhs], dim=2)
    free = torch.ones_like(rows[:, :, 0], dtype=torch.bool)
    places = torch.arange(m, device=rows.device)
    order, regular = [], free[:, 0]
    for k in range(m):
        column = rows[:, :, k]
        pivot = torch.where(free, column.abs(), -1.0).argmax(1, keepdim=True)
        at = places == pivot
        value = column.gather(1, pivot)
        regular = regular & (value[:, 0].abs() > 0)
        row = rows.gather(1, pivot[:, :, None].expand(-1, 1, rows.shape[2])) / value[:, :, None]
        factor = torch.where(at, 0.0, column)
        rows = torch.where(at[:, :, None], row, rows - factor[:, :, None] * row)
        free = free & ~at
        order.append(pivot)
    index = torch.cat(order, dim=1)[:, :, None].expand(-1, -1, rhs.shape[2])
    return rows[:, :, m:].gather(1, index), regular


def forward_substitution(matrix: Tensor, rhs: Tensor) -> Tensor:
    """(B, k) solutions of lower triangular (B, k, k) systems with (B, k)."""
    known: list[Tensor] = []
    for j in range(matrix.shape[-1]):
        rest = rhs[:, j]
        if known:
            rest = rest - (matrix[:, j, :j] * torch.stack(known, dim=1)).sum(1)
        known.append(rest / matrix[:, j, j])
    return torch.stack(known, dim=1)
