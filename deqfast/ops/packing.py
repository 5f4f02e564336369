"""A state as one (B, N) matrix, for the helpers that are not in a hurry."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Layout


def pack(layout: Layout, leaves: list[Tensor]) -> Tensor:
    """Leaves as (B, N) numbers of the accumulation dtype, in new memory."""
    return torch.cat([rows.to(layout.acc) for rows in layout.rows(leaves)], dim=1)


def unpack(layout: Layout, rows: Tensor) -> list[Tensor]:
    """The leaves of (B, N) numbers, in new memory; the inverse of ``pack``."""
    leaves, start = [], 0
    for leaf in layout.leaves:
        t = rows[:, start : start + leaf.n].to(layout.dtype)
        start += leaf.n
        shape = [leaf.shape[d] for d in leaf.order]
        t = torch.view_as_complex(t.contiguous().view(*shape, 2)) if leaf.complex else t.reshape(shape)
        back = sorted(range(len(shape)), key=lambda d: leaf.order[d])
        leaves.append(t.permute(back).clone())
    return leaves
