"""Columns as their history dtype holds them: rounded, with a power-of-two scale per block where that has few bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..anderson import SCALED_DTYPES, AndersonWorkspace
from ..codes import BLOCK
from ..formulas.algebra import power_below


def encode(ws: AndersonWorkspace, columns: Tensor) -> tuple[Tensor, Tensor | None]:
    """(..., N) columns rounded to the history dtype, and the (..., blocks) scales if it has any."""
    dtype = ws.history.dtype
    if dtype not in SCALED_DTYPES:
        return columns.to(dtype), None
    codes, scales = [], []
    start = 0
    for leaf in ws.layout.leaves:
        part = columns[..., start : start + leaf.n]
        start += leaf.n
        blocks = torch.nn.functional.pad(part, (0, -leaf.n % BLOCK)).unflatten(-1, (-1, BLOCK))
        largest = blocks.abs().amax(-1)
        above = torch.where(largest > 0, 2 * power_below(largest), 1.0)
        scale = above / 128 if dtype == torch.int8 else above
        blocks = blocks / scale[..., None]
        if dtype == torch.int8:
            blocks = blocks.round().clamp(-127, 127)
        codes.append(blocks.to(dtype).flatten(-2)[..., : leaf.n])
        scales.append(scale.float())
    return torch.cat(codes, dim=-1), torch.cat(scales, dim=-1)


def decode(ws: AndersonWorkspace, codes: Tensor, scales: Tensor | None) -> Tensor:
    """(..., N) columns in the accumulation dtype, as stored."""
    columns = codes.to(ws.layout.acc)
    if scales is None:
        return columns
    block = 0
    factors = []
    for leaf in ws.layout.leaves:
        count = -(-leaf.n // BLOCK)
        part = scales[..., block : block + count, None]
        factors.append(part.expand(*part.shape[:-1], BLOCK).flatten(-2)[..., : leaf.n])
        block += count
    return columns * torch.cat(factors, dim=-1).to(columns.dtype)


def stored(ws: AndersonWorkspace, which: int) -> Tensor:
    """(B, m, N) columns in the accumulation dtype, as stored (rounded)."""
    scaled = ws.history.dtype in SCALED_DTYPES
    return decode(ws, ws.columns(which), ws.scales[which] if scaled else None)
