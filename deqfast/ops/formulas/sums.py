"""Sums that do not depend on the batch, and norms that neither overflow nor vanish."""

from __future__ import annotations

import torch
from torch import Tensor

from .algebra import power_below

CHUNK = 8192  # numbers whose sum torch does not split over threads


def ordered_sum(t: Tensor) -> Tensor:
    """(..., N) to (...), in an order that depends on N alone: torch may split one long row over threads."""
    if t.shape[-1] <= CHUNK:
        return t.sum(dim=-1)
    whole = t.shape[-1] // CHUNK * CHUNK
    chunks = t[..., :whole].unflatten(-1, (-1, CHUNK)).sum(dim=-1)
    return chunks.sum(dim=-1) + t[..., whole:].sum(dim=-1)


def chunked_norm(rows: Tensor) -> Tensor:
    """Norms of (..., N) rows of magnitude about one, in their own dtype: long ones by the norms of their chunks."""
    if rows.shape[-1] <= CHUNK:
        return torch.linalg.vector_norm(rows, dim=-1)
    whole = rows.shape[-1] // CHUNK * CHUNK
    chunks = torch.linalg.vector_norm(rows[..., :whole].unflatten(-1, (-1, CHUNK)), dim=-1)
    rest = torch.linalg.vector_norm(rows[..., whole:], dim=-1, keepdim=True)
    return torch.linalg.vector_norm(torch.cat([chunks, rest], dim=-1), dim=-1)


def scaled_norm(rows: Tensor) -> Tensor:
    """Norms of (..., N) rows of any magnitude in their own dtype: once to find a power of two, once to scale by it."""
    edge = 2.0**100 if rows.dtype == torch.float32 else 2.0**900
    scale = power_below(torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(1 / edge, edge))
    return chunked_norm(rows / scale).mul_(scale[..., 0])


def norm_of_parts(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """(B,) norms in ``dtype`` of samples whose numbers lie in several (B, n)."""
    if dtype == torch.float64:
        return torch.stack([ordered_sum(t.double().square()) for t in parts]).sum(0).sqrt()
    return scaled_norm(torch.stack([scaled_norm(t) for t in parts], dim=-1))
