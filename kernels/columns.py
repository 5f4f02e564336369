"""Columns of Anderson's history: rounding them in, reading them back, multiplying with them.

float16 and int8 columns carry a power-of-two scale per 1024 numbers, so that a new column needs the largest magnitude
of 1024 numbers before any of them can be rounded: these are then read twice, the second time from cache.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .constants import SCALE_BLOCK, TILE
from .measure import exponent, power_of_two
from .tiles import residual_tile, widen, write_tile

TO_INTEGER = tl.constexpr(1.5 * 2.0**52)  # added and taken away, rounds a float64 to the nearest integer, ties to even


class History(NamedTuple):
    """The columns of all samples, of N numbers each, and their scales, of so many blocks.

    Where those of one tensor begin: among a column's numbers and among its blocks (None: there is but one tensor).
    """

    columns: Any
    scales: Any
    N: Any
    blocks: Any
    offset: Any
    first_block: Any


class Form(NamedTuple):
    """How columns lie and are walked: by tiles of M columns and BLOCK numbers; with scales, in tiles of samples."""

    M: int
    BLOCK: int
    SCALED: bool
    TILED: bool


class Columns(NamedTuple):
    """Of one sample and one tensor: where columns of dF and dG and their scales begin, and how far apart they lie."""

    f: Any
    g: Any
    scales_f: Any
    scales_g: Any
    blocks: Any
    stride: Any


class Points(NamedTuple):
    """Of one sample: the newest evaluation and the one before."""

    f: Any
    x: Any
    f_prev: Any
    x_prev: Any


class New(NamedTuple):
    """The column that enters: in which units, whether at all, where; which of the older ones are in use, and c of their
    W = dF - c dG.
    """

    unit: Any
    adding: Any
    slot: Any
    used: Any
    space: Any


class Products(NamedTuple):
    """Of an evaluation: ||f||^2 and ||g||^2 in float64; of the new column dG.dG, W.W, W.g, dG.g, W.dG; and with every
    column j in use W_j.g, W.dG_j, W_j.dG, dG_j.dG. W = dF - C dG, of turned columns dF; for C = 0 (Type II) it is dG,
    without its sign.
    """

    ff: Any
    gg: Any
    qq: Any
    ww: Any
    wg: Any
    vg: Any
    wv: Any
    rhs: Any
    across: Any
    down: Any
    gram: Any


@triton.jit
def columns_of(history, b, B, m: tl.constexpr, form: tl.constexpr):
    """Those of sample b."""
    N, blocks = history.N, history.blocks
    columns, scales = history.columns, history.scales
    if history.offset is not None:
        columns += history.offset
        scales += history.first_block
    scales_f, scales_g = scales + b * m * blocks, scales + (B.to(tl.int64) + b) * m * blocks
    if form.TILED:
        start = columns + (b // TILE) * (m * N * TILE) + b % TILE
        to_g = tl.cdiv(B, TILE).to(tl.int64) * (m * N * TILE)  # rows of statistics may be longer
        return Columns(start, start + to_g, scales_f, scales_g, blocks, N * TILE)
    else:
        stride = tl.cast(N, tl.int64)
        f, g = columns + b * (m * stride), columns + (B.to(tl.int64) + b) * (m * stride)
        return Columns(f, g, scales_f, scales_g, blocks, stride)


@triton.jit
def differences(points, at, inside, unit, acc: tl.constexpr):
    """f, the residual, and the new columns dF and dG there; the last three in units of the sample."""
    f_tile, g = residual_tile(points.f, points.x, at, inside, acc)
    x_tile = widen(tl.load(points.x + at, mask=inside, other=0.0), acc)
    d_f = (f_tile - widen(tl.load(points.f_prev + at, mask=inside, other=0.0), acc)) * unit
    d_g = d_f - (x_tile - widen(tl.load(points.x_prev + at, mask=inside, other=0.0), acc)) * unit
    return f_tile, g, d_f, d_g


@triton.jit
def scale_for(largest, INTEGER: tl.constexpr):
    """The power of two, float64, that brings ``largest`` to [1/2, 1), for int8 to [64, 128)."""
    wide = largest.to(tl.float64)
    usable = (wide > 0) & (wide < float("inf"))
    power = tl.where(usable, tl.maximum(exponent(wide), -1000), 0)
    return power_of_two(power - 7) if INTEGER else power_of_two(power)


@triton.jit
def block_scales(points, start, end, unit, INTEGER: tl.constexpr, BLOCK: tl.constexpr):
    """Scales of dF and dG for the 1024 numbers from ``start``."""
    acc = unit.dtype
    largest_f = tl.zeros((BLOCK,), acc)
    largest_g = tl.zeros((BLOCK,), acc)
    for begin in range(start, tl.minimum(start + SCALE_BLOCK, end), BLOCK):
        at = begin + tl.arange(0, BLOCK)
        _, _, d_f, d_g = differences(points, at, at < end, unit, acc)
        largest_f = tl.maximum(largest_f, tl.abs(d_f))
        largest_g = tl.maximum(largest_g, tl.abs(d_g))
    return scale_for(tl.max(largest_f, axis=0), INTEGER), scale_for(tl.max(largest_g, axis=0), INTEGER)


@triton.jit
def rounded(column, scale, dtype: tl.constexpr, SCALED: tl.constexpr):
    """The column's numbers as the history stores them."""
    if SCALED:
        part = column.to(tl.float64) * (1.0 / scale)
        if dtype == tl.int8:
            part = tl.minimum(tl.maximum((part + TO_INTEGER) - TO_INTEGER, -127.0), 127.0)
            return part.to(tl.int8)
        else:
            return part.to(tl.float32).to(dtype)
    elif dtype == tl.bfloat16:
        return column.to(tl.float32).to(dtype)
    else:
        return column.to(dtype)


@triton.jit
def widened(codes, scale, acc: tl.constexpr, SCALED: tl.constexpr):
    """The numbers that stored ones stand for."""
    return widen(codes, acc) * scale.to(acc) if SCALED else widen(codes, acc)


@triton.jit
def read(codes, scales, columns, used, at, inside, acc: tl.constexpr, form: tl.constexpr):
    """(M, BLOCK) columns there, 0 where not ``used``: those of dF or of dG, as ``codes`` and ``scales`` say."""
    j = tl.arange(0, form.M)
    number = at * TILE if form.TILED else at
    mask = used[:, None] & inside[None, :]
    stored = tl.load(codes + (j * columns.stride)[:, None] + number[None, :], mask=mask, other=0)
    if form.SCALED:
        return widened(stored, tl.load(scales + j * columns.blocks, mask=used, other=0.0)[:, None], acc, form.SCALED)
    else:
        return widen(stored, acc)


@triton.jit
def reduce(points, columns, new, begin, end, C: tl.constexpr, form: tl.constexpr):
    """Enter the new column for numbers [begin, end) of a sample's tensor, and add up products there."""
    acc = new.unit.dtype
    unit, used = new.unit, new.used
    dtype: tl.constexpr = columns.f.dtype.element_ty
    INTEGER: tl.constexpr = dtype == tl.int8
    M: tl.constexpr = form.M
    BLOCK: tl.constexpr = form.BLOCK
    SCALED: tl.constexpr = form.SCALED
    ff = tl.zeros((BLOCK,), tl.float64)
    gg = tl.zeros((BLOCK,), tl.float64)
    qq = tl.zeros((BLOCK,), acc)
    ww = tl.zeros((BLOCK,), acc)
    wg = tl.zeros((BLOCK,), acc)
    vg = tl.zeros((BLOCK,), acc)
    wv = tl.zeros((BLOCK,), acc)
    rhs = tl.zeros((M,), acc)
    across = tl.zeros((M,), acc)
    down = tl.zeros((M,), acc)
    gram = tl.zeros((M,), acc)
    to_new = new.slot * columns.stride
    written = tl.where(new.adding, end, begin)
    SPAN: tl.constexpr = SCALE_BLOCK if SCALED else BLOCK
    for start in range(begin, end, SPAN):
        block = start // SCALE_BLOCK
        scale_f = tl.full((), 1.0, tl.float64)
        scale_g = tl.full((), 1.0, tl.float64)
        if SCALED:
            scale_f, scale_g = block_scales(points, start, end, unit, INTEGER, BLOCK)
            tl.store(columns.scales_f + new.slot * columns.blocks + block, scale_f.to(tl.float32), mask=new.adding)
            tl.store(columns.scales_g + new.slot * columns.blocks + block, scale_g.to(tl.float32), mask=new.adding)
        for tile in range(start, tl.minimum(start + SPAN, end), BLOCK):
            at = tile + tl.arange(0, BLOCK)
            inside = at < end
            f_tile, g, d_f, d_g = differences(points, at, inside, unit, acc)
            f_wide, g_wide = f_tile.to(tl.float64), g.to(tl.float64)
            ff += f_wide * f_wide
            gg += g_wide * g_wide
            g = g * unit
            codes_f = rounded(d_f, scale_f, dtype, SCALED)
            codes_g = rounded(d_g, scale_g, dtype, SCALED)
            number = at * TILE if form.TILED else at
            tl.store(columns.f + to_new + number, codes_f, mask=at < written)
            tl.store(columns.g + to_new + number, codes_g, mask=at < written)
            v = widened(codes_g, scale_g, acc, SCALED)
            old_v = read(columns.g, columns.scales_g + block, columns, used, at, inside, acc, form)
            w, old_w = v, old_v
            if C != 0:
                w = widened(codes_f, scale_f, acc, SCALED) - C * v
                old_f = read(columns.f, columns.scales_f + block, columns, used, at, inside, acc, form)
                old_w = old_f - new.space[:, None] * old_v
                across += tl.sum(old_v * w[None, :], axis=1)
                down += tl.sum(old_w * v[None, :], axis=1)
            qq += v * v
            ww += w * w
            wg += w * g
            vg += v * g
            wv += w * v
            rhs += tl.sum(old_w * g[None, :], axis=1)
            gram += tl.sum(old_v * v[None, :], axis=1)
    qq, ww = tl.sum(qq, axis=0), tl.sum(ww, axis=0)
    wg, vg, wv = tl.sum(wg, axis=0), tl.sum(vg, axis=0), tl.sum(wv, axis=0)
    return Products(tl.sum(ff, axis=0), tl.sum(gg, axis=0), qq, ww, wg, vg, wv, rhs, across, down, gram)


@triton.jit
def mix(points, columns, weights, beta, begin, end, MIXED: tl.constexpr, form: tl.constexpr):
    """Write the next iterate, over ``x_prev``, for numbers [begin, end); whether all of it is finite.

    ``weights`` (M,) are gamma / unit; MIXED: beta is not 1.
    """
    acc = weights.dtype
    BLOCK: tl.constexpr = form.BLOCK
    infinite = tl.zeros((BLOCK,), tl.int32)
    used = weights != 0
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        block = start // SCALE_BLOCK
        moved = read(columns.f, columns.scales_f + block, columns, used, at, inside, acc, form)
        if MIXED:
            d_g = read(columns.g, columns.scales_g + block, columns, used, at, inside, acc, form)
            moved -= (1.0 - beta) * d_g
            x_tile = widen(tl.load(points.x + at, mask=inside, other=0.0), acc)
            _, g = residual_tile(points.f, points.x, at, inside, acc)
            base = x_tile + beta * g
        else:
            base = widen(tl.load(points.f + at, mask=inside, other=0.0), acc)
        infinite |= write_tile(points.x_prev, at, inside, base - tl.sum(weights[:, None] * moved, axis=0))
    return tl.max(infinite, axis=0) == 0
