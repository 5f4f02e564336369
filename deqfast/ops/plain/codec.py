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
    parts = columns.split([leaf.n for leaf in ws.layout.leaves], dim=-1)
    codes, scales = zip(*(encode_part(dtype, part) for part in parts), strict=True)
    return torch.cat(codes, dim=-1), torch.cat(scales, dim=-1)


def encode_part(dtype: torch.dtype, part: Tensor) -> tuple[Tensor, Tensor]:
    """(..., n) numbers of one tensor that begin a block: in float16 or int8, and their (..., blocks) scales."""
    blocks = torch.nn.functional.pad(part, (0, -part.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1)
    above = torch.where(largest > 0, 2 * power_below(largest), 1.0)
    scale = above / 128 if dtype == torch.int8 else above
    blocks = blocks / scale[..., None]
    if dtype == torch.int8:
        blocks = blocks.round().clamp(-127, 127)
    return blocks.to(dtype).flatten(-2)[..., : part.shape[-1]], scale.float()


def decode(ws: AndersonWorkspace, codes: Tensor, scales: Tensor | None) -> Tensor:
    """(..., N) columns in the accumulation dtype, as stored."""
    columns = codes.to(ws.layout.acc, copy=scales is not None)
    if scales is None:
        return columns
    sizes = [leaf.n for leaf in ws.layout.leaves]
    counts = [-(-n // BLOCK) for n in sizes]
    for part, scale in zip(columns.split(sizes, dim=-1), scales.split(counts, dim=-1), strict=True):
        scale_part(part, scale)
    return columns


def scale_part(part: Tensor, scales: Tensor) -> None:
    """Multiply (..., n) numbers that begin a block by the (..., blocks) scales."""
    whole = part.shape[-1] // BLOCK
    scales = scales.to(part.dtype)
    part[..., : whole * BLOCK].unflatten(-1, (whole, BLOCK)).mul_(scales[..., :whole, None])
    if part.shape[-1] % BLOCK:
        part[..., whole * BLOCK :].mul_(scales[..., whole:])


def stored(ws: AndersonWorkspace, which: int) -> Tensor:
    """(B, m, N) columns in the accumulation dtype, as stored (rounded)."""
    scaled = ws.history.dtype in SCALED_DTYPES
    return decode(ws, ws.columns(which), ws.scales[which] if scaled else None)
