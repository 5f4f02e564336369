"""Columns of Anderson's history: rounding them in, reading them back, multiplying with them.

float16 and int8 columns carry a power-of-two scale per 1024 numbers, so that a new column needs the largest magnitude
of 1024 numbers before any of them can be rounded: these are then read twice, the second time from cache.
"""

import triton
import triton.language as tl

from deqfast.ops.codes import BLOCK as _BLOCK

from .measure import exponent, power_of_two, residual_tile, widen, write_tile

SCALE_BLOCK = tl.constexpr(_BLOCK)
TO_INTEGER = tl.constexpr(1.5 * 2.0**52)  # added and taken away, rounds a float64 to the nearest integer, ties to even


@triton.jit
def differences(f, x, f_prev, x_prev, at, inside, unit, acc: tl.constexpr):
    """f, the residual, and the new columns dF and dG there; the last three in units of the sample."""
    f_tile, g = residual_tile(f, x, at, inside, acc)
    x_tile = widen(tl.load(x + at, mask=inside, other=0.0), acc)
    d_f = (f_tile - widen(tl.load(f_prev + at, mask=inside, other=0.0), acc)) * unit
    d_g = d_f - (x_tile - widen(tl.load(x_prev + at, mask=inside, other=0.0), acc)) * unit
    return f_tile, g, d_f, d_g


@triton.jit
def scale_for(largest, INTEGER: tl.constexpr):
    """The power of two, float64, that brings ``largest`` to [1/2, 1), for int8 to [64, 128)."""
    wide = largest.to(tl.float64)
    usable = (wide > 0) & (wide < float("inf"))
    power = tl.where(usable, tl.maximum(exponent(wide), -1000), 0)
    return power_of_two(power - 7) if INTEGER else power_of_two(power)


@triton.jit
def block_scales(f, x, f_prev, x_prev, start, end, unit, INTEGER: tl.constexpr, BLOCK: tl.constexpr):
    """Scales of dF and dG for the 1024 numbers from ``start``."""
    acc = unit.dtype
    largest_f = tl.zeros((BLOCK,), acc)
    largest_g = tl.zeros((BLOCK,), acc)
    for begin in range(start, tl.minimum(start + SCALE_BLOCK, end), BLOCK):
        at = begin + tl.arange(0, BLOCK)
        _, _, d_f, d_g = differences(f, x, f_prev, x_prev, at, at < end, unit, acc)
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
def read(history, scales, used, at, inside, column, blocks, acc: tl.constexpr, ES: tl.constexpr, SCALED: tl.constexpr):
    """(M, BLOCK) columns there, 0 where not ``used``; ``scales`` points at those of this block of 1024 numbers.

    ``column`` (M, 1) says where columns begin, ES how far apart their numbers lie.
    """
    codes = tl.load(history + column + (at * ES)[None, :], mask=used[:, None] & inside[None, :], other=0)
    if SCALED:
        j = tl.arange(0, used.shape[0])
        return widened(codes, tl.load(scales + j * blocks, mask=used, other=0.0)[:, None], acc, SCALED)
    else:
        return widen(codes, acc)


@triton.jit
def reduce(
    f,
    x,
    f_prev,
    x_prev,
    history_f,
    history_g,
    scales_f,
    scales_g,
    blocks,
    unit,
    column_stride,
    used,
    slot,
    adding,
    begin,
    end,
    C: tl.constexpr,
    ES: tl.constexpr,
    SCALED: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Enter the new column for numbers [begin, end) of a sample's leaf, and add up products there.

    Returns ||f||^2 and ||g||^2 in float64; of the new column dG.dG, W.W, W.g, dG.g, W.dG; and with every column j that
    is ``used`` W_j.g, W.dG_j, W_j.dG, dG_j.dG. W = dF - C dG; for C = 0 (Type II) W stands for dG, without its sign.
    """
    acc = unit.dtype
    INTEGER: tl.constexpr = history_f.dtype.element_ty == tl.int8
    dtype: tl.constexpr = history_f.dtype.element_ty
    ff = tl.zeros((BLOCK,), tl.float64)
    gg = tl.zeros((BLOCK,), tl.float64)
    qq = tl.zeros((BLOCK,), acc)
    ww = tl.zeros((BLOCK,), acc)
    wg = tl.zeros((BLOCK,), acc)
    vg = tl.zeros((BLOCK,), acc)
    wv = tl.zeros((BLOCK,), acc)
    rhs = tl.zeros((M,), acc)
    row = tl.zeros((M,), acc)
    col = tl.zeros((M,), acc)
    gram = tl.zeros((M,), acc)
    column = (tl.arange(0, M) * column_stride)[:, None]
    written = tl.where(adding, end, begin)
    SPAN: tl.constexpr = SCALE_BLOCK if SCALED else BLOCK
    for start in range(begin, end, SPAN):
        block = start // SCALE_BLOCK
        scale_f = tl.full((), 1.0, tl.float64)
        scale_g = tl.full((), 1.0, tl.float64)
        if SCALED:
            scale_f, scale_g = block_scales(f, x, f_prev, x_prev, start, end, unit, INTEGER, BLOCK)
            tl.store(scales_f + slot * blocks + block, scale_f.to(tl.float32), mask=adding)
            tl.store(scales_g + slot * blocks + block, scale_g.to(tl.float32), mask=adding)
        for tile in range(start, tl.minimum(start + SPAN, end), BLOCK):
            at = tile + tl.arange(0, BLOCK)
            inside = at < end
            f_tile, g, d_f, d_g = differences(f, x, f_prev, x_prev, at, inside, unit, acc)
            f_wide, g_wide = f_tile.to(tl.float64), g.to(tl.float64)
            ff += f_wide * f_wide
            gg += g_wide * g_wide
            g = g * unit
            codes_f = rounded(d_f, scale_f, dtype, SCALED)
            codes_g = rounded(d_g, scale_g, dtype, SCALED)
            tl.store(history_f + slot * column_stride + at * ES, codes_f, mask=at < written)
            tl.store(history_g + slot * column_stride + at * ES, codes_g, mask=at < written)
            v = widened(codes_g, scale_g, acc, SCALED)
            old_v = read(history_g, scales_g + block, used, at, inside, column, blocks, acc, ES, SCALED)
            w, old_w = v, old_v
            if C != 0:
                w = widened(codes_f, scale_f, acc, SCALED) - C * v
                old_f = read(history_f, scales_f + block, used, at, inside, column, blocks, acc, ES, SCALED)
                old_w = old_f - C * old_v
                row += tl.sum(old_v * w[None, :], axis=1)
                col += tl.sum(old_w * v[None, :], axis=1)
            qq += v * v
            ww += w * w
            wg += w * g
            vg += v * g
            wv += w * v
            rhs += tl.sum(old_w * g[None, :], axis=1)
            gram += tl.sum(old_v * v[None, :], axis=1)
    qq, ww = tl.sum(qq, axis=0), tl.sum(ww, axis=0)
    wg, vg, wv = tl.sum(wg, axis=0), tl.sum(vg, axis=0), tl.sum(wv, axis=0)
    return tl.sum(ff, axis=0), tl.sum(gg, axis=0), qq, ww, wg, vg, wv, rhs, row, col, gram


@triton.jit
def mix(
    f,
    x,
    x_prev,
    history_f,
    history_g,
    scales_f,
    scales_g,
    blocks,
    weights,
    beta,
    column_stride,
    begin,
    end,
    MIXED: tl.constexpr,
    ES: tl.constexpr,
    SCALED: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the next iterate for numbers [begin, end); whether all of it is finite.

    ``weights`` (M,) are gamma / unit; MIXED: beta is not 1.
    """
    acc = weights.dtype
    column = (tl.arange(0, M) * column_stride)[:, None]
    infinite = tl.zeros((BLOCK,), tl.int32)
    used = weights != 0
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        block = start // SCALE_BLOCK
        moved = read(history_f, scales_f + block, used, at, inside, column, blocks, acc, ES, SCALED)
        if MIXED:
            d_g = read(history_g, scales_g + block, used, at, inside, column, blocks, acc, ES, SCALED)
            moved -= (1.0 - beta) * d_g
            x_tile = widen(tl.load(x + at, mask=inside, other=0.0), acc)
            _, g = residual_tile(f, x, at, inside, acc)
            base = x_tile + beta * g
        else:
            base = widen(tl.load(f + at, mask=inside, other=0.0), acc)
        infinite |= write_tile(x_prev, at, inside, base - tl.sum(weights[:, None] * moved, axis=0))
    return tl.max(infinite, axis=0) == 0
