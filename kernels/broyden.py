"""Broyden step in Triton. What moves, per number: f and x are read once, every step kept is read once (chain form) or
twice (Gram form), the new step and the next iterate are written.

Three schedules, chosen by the sizes of the state alone:
  sample   one tensor of at most SAMPLE_MAX_N numbers a sample: a program a sample with z in registers, one launch;
  chain    else, where the workspace keeps no Gram matrix: `gather` (a program a chunk) puts the residual into scratch
           memory, `chain` (a program a sample) sweeps over it, `apply` (a program a chunk) writes, `finish` (a program
           a sample) keeps the books;
  Gram     else: `gather` multiplies the residual with the steps too, and `recur` (a program a sample) does the small
           recursion instead of the sweeps.
In the last two a step that is not finite although its denominator is fine becomes f and forgets the steps, at once.
"""

import triton
import triton.language as tl

from .measure import (
    BAD,
    COUNT,
    DENOMINATOR_RESTARTS,
    FULL_RESTARTS,
    GOING,
    RESET,
    RUNNING,
    SCALE,
    STATUS,
    STEP_FALLBACKS,
    UNIT,
    any_flag,
    inverse,
    judge,
    residual_tile,
    row_of,
    spill_and_rest,
    take_f,
    total,
    totals,
    widen,
    write_tile,
)

MIN_DENOMINATOR = tl.constexpr(1e-4)
GROUP = tl.constexpr(16)  # steps multiplied at once
RUN_ARGUMENTS = ["padded", "max_iter"]


@triton.jit
def _measured_scale(s_s, s_g, g_g):
    """H0 from the first step s = g_0: y = g_0 - g, so that s.y = s.s - s.g and y.y = s.s - 2 s.g + g.g."""
    scale = (s_s - s_g) / (s_s - 2.0 * s_g + g_g)
    return tl.where(scale == scale, tl.minimum(tl.maximum(scale, 0.2), 5.0), 1.0)


@triton.jit
def _start(ints, reals, norms, b, padded, outcome, s_g, g_g, memory: tl.constexpr, SCALE_FIRST: tl.constexpr):
    """How many steps the new one is made from and with which H0; ``s_g``, ``g_g``: products of the first step, of g."""
    count = tl.load(ints + COUNT * padded + b)
    scale = tl.load(reals + SCALE * padded + b)
    restarts = tl.load(ints + FULL_RESTARTS * padded + b)
    count = tl.where((outcome & RESET) != 0, 0, count)
    if SCALE_FIRST:
        measuring = (count == 1) & (scale == 0)
        s_s = tl.load(norms + b * memory, mask=measuring, other=1.0)
        measured = _measured_scale(s_s.to(tl.float64), s_g.to(tl.float64), g_g.to(tl.float64)).to(scale.dtype)
        scale = tl.where(measuring, measured, scale)
        count = tl.where(measuring, 0, count)
    full = count == memory
    tl.debug_barrier()
    tl.store(reals + SCALE * padded + b, scale)
    tl.store(ints + FULL_RESTARTS * padded + b, restarts + full.to(tl.int32))
    return tl.where(full, 0, count), tl.where(scale > 0, scale, 1.0)


@triton.jit
def _add_one(ints, ROW: tl.constexpr, b, padded, condition):
    """Count an event of the sample."""
    before = tl.load(ints + ROW * padded + b)
    tl.debug_barrier()
    tl.store(ints + ROW * padded + b, before + condition.to(tl.int32))


@triton.jit(do_not_specialize=RUN_ARGUMENTS)
def sample_kernel(
    f,
    f_rows,
    x,
    x_prev,
    saved,
    history,
    norms,
    ints,
    reals,
    settings,
    running,
    N,
    padded,
    max_iter,
    memory: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    KEEP_BEST: tl.constexpr,
    F_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A whole step of one sample of one tensor that fits into one tile."""
    b = tl.program_id(0).to(tl.int64)
    if tl.load(ints + STATUS * padded + b) != RUNNING:
        return
    acc = reals.dtype.element_ty
    f += row_of(f_rows, b, F_ROWS) * N
    x += b * N
    x_prev += b * N
    steps = history + b * (memory * tl.cast(N, tl.int64))
    at = tl.arange(0, BLOCK)
    inside = at < N
    f_tile, g = residual_tile(f, x, at, inside, acc)
    f_wide, g_wide = f_tile.to(tl.float64), g.to(tl.float64)
    ff, gg = tl.sum(f_wide * f_wide, axis=0), tl.sum(g_wide * g_wide, axis=0)
    outcome, _, unit = judge(ints, reals, settings, running, b, padded, max_iter, ff, gg, KEEP_BEST)
    tl.debug_barrier()
    spill_and_rest(x, x_prev, saved + b * N, outcome, 0, N, BLOCK)
    if (outcome & GOING) != 0:
        tl.debug_barrier()
        g *= unit
        s_g = tl.zeros((), acc)
        g_g = tl.zeros((), acc)
        if SCALE_FIRST:
            if (tl.load(ints + COUNT * padded + b) == 1) & (tl.load(reals + SCALE * padded + b) == 0):
                s_g = tl.sum(tl.load(steps + at, mask=inside, other=0.0) * g, axis=0)
                g_g = tl.sum(g * g, axis=0)
        count, scale = _start(ints, reals, norms, b, padded, outcome, s_g, g_g, memory, SCALE_FIRST)
        z = scale * g
        ratio = tl.zeros((), acc)
        for j in range(0, count):
            s = tl.load(steps + j * tl.cast(N, tl.int64) + at, mask=inside, other=0.0)
            z += ratio * s
            ratio = tl.sum(s * z, axis=0) / tl.load(norms + b * memory + j)
        denominator = 1.0 - ratio
        z = z / denominator
        finite = tl.min((tl.abs(z) < float("inf")).to(tl.int32), axis=0) > 0
        bad = ((tl.abs(denominator) >= MIN_DENOMINATOR) & finite) == 0
        z = tl.where(bad, scale * g, z)
        count = tl.where(bad, 0, count)
        _add_one(ints, DENOMINATOR_RESTARTS, b, padded, bad)

        x_tile = widen(tl.load(x + at, mask=inside, other=0.0), acc)
        overflowed = tl.max(write_tile(x_prev, at, inside, x_tile + z * inverse(unit)), axis=0) != 0
        tl.store(steps + count * tl.cast(N, tl.int64) + at, z, mask=inside)
        tl.store(norms + b * memory + count, tl.sum(z * z, axis=0))
        tl.store(ints + COUNT * padded + b, tl.where(overflowed, 0, count + 1))
        _add_one(ints, STEP_FALLBACKS, b, padded, overflowed)
        if overflowed:
            tl.debug_barrier()
            take_f(f, x_prev, N, BLOCK)


@triton.jit
def _products(vector, steps, N, count, begin, end, out, chunks, BLOCK: tl.constexpr):
    """Products of ``vector`` with every step over [begin, end), into ``out``."""
    for first in range(0, count, GROUP):
        j = first + tl.arange(0, GROUP)
        sums = tl.zeros((GROUP,), tl.float64)
        for start in range(begin, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            v = tl.load(vector + at, mask=at < end, other=0.0)
            place = steps + (j.to(tl.int64) * N)[:, None] + at[None, :]
            s = tl.load(place, mask=(j < count)[:, None] & (at < end)[None, :], other=0.0)
            sums += tl.sum(s * v[None, :], axis=1).to(tl.float64)
        tl.store(out + j * chunks, sums, mask=j < count)


@triton.jit(do_not_specialize=RUN_ARGUMENTS)
def gather_kernel(
    f,
    f_rows,
    x,
    z,
    history,
    ints,
    reals,
    partials,
    n,
    offset,
    N,
    first_chunk,
    leaf_chunks,
    chunks,
    chunk_size,
    padded,
    memory: tl.constexpr,
    GRAM: tl.constexpr,
    F_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRODUCTS_BLOCK: tl.constexpr,
):
    """The residual of one chunk of one tensor into ``z``, its norms and products into ``partials``."""
    b = (tl.program_id(0) // leaf_chunks).to(tl.int64)
    chunk = tl.program_id(0) % leaf_chunks
    if tl.load(ints + STATUS * padded + b) != RUNNING:
        return
    acc = reals.dtype.element_ty
    unit = tl.load(reals + UNIT * padded + b)
    begin = chunk * chunk_size
    end = tl.minimum(begin + chunk_size, n)
    f += row_of(f_rows, b, F_ROWS) * n
    x += b * n
    z += b * N + offset
    ff = tl.zeros((BLOCK,), tl.float64)
    gg = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        f_tile, g = residual_tile(f, x, at, at < end, acc)
        ff += f_tile.to(tl.float64) * f_tile.to(tl.float64)
        gg += g.to(tl.float64) * g.to(tl.float64)
        if GRAM:
            g *= tl.where(unit > 0, unit, 1.0)  # a new unit comes with no steps
        tl.store(z + at, g, mask=at < end)
    out = partials + b * ((2 + memory) * chunks) + (first_chunk + chunk)
    tl.store(out, tl.sum(ff, axis=0))
    tl.store(out + chunks, tl.sum(gg, axis=0))
    if GRAM:
        tl.debug_barrier()
        steps = history + b * (memory * tl.cast(N, tl.int64)) + offset
        count = tl.load(ints + COUNT * padded + b)
        _products(z, steps, N, count, begin, end, out + 2 * chunks, chunks, PRODUCTS_BLOCK)


@triton.jit
def _sweep(z, s, weight, N, BLOCK: tl.constexpr):
    """z += weight s, and the product of s with the result."""
    product = tl.zeros((BLOCK,), weight.dtype)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        s_tile = tl.load(s + at, mask=at < N, other=0.0)
        z_tile = tl.load(z + at, mask=at < N, other=0.0) + weight * s_tile
        tl.store(z + at, z_tile, mask=at < N)
        product += s_tile * z_tile
    return tl.sum(product, axis=0)


@triton.jit
def _settle(outcomes, starts, ints, b, padded, outcome, count, scale, denominator):
    """What `apply` needs to know of a sample: its outcome, and in ``starts`` (B, 3) count, H0 and denominator."""
    bad = (tl.abs(denominator) >= MIN_DENOMINATOR) == 0
    _add_one(ints, DENOMINATOR_RESTARTS, b, padded, bad)
    tl.store(starts + b * 3, tl.where(bad, 0, count).to(scale.dtype))
    tl.store(starts + b * 3 + 1, scale)
    tl.store(starts + b * 3 + 2, tl.where(bad, 1.0, denominator).to(scale.dtype))
    tl.store(outcomes + b, outcome | tl.where(bad, BAD, 0))


@triton.jit(do_not_specialize=RUN_ARGUMENTS)
def chain_kernel(
    z,
    history,
    norms,
    partials,
    outcomes,
    starts,
    ints,
    reals,
    settings,
    running,
    N,
    chunks,
    padded,
    max_iter,
    memory: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    KEEP_BEST: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Judge the evaluation, and take z through the chain of steps."""
    b = tl.program_id(0).to(tl.int64)
    if tl.load(ints + STATUS * padded + b) != RUNNING:
        tl.store(outcomes + b, 0)
        return
    acc = reals.dtype.element_ty
    sums = partials + b * ((2 + memory) * chunks)
    ff, gg = total(sums, chunks, CHUNKS), total(sums + chunks, chunks, CHUNKS)
    outcome, _, unit = judge(ints, reals, settings, running, b, padded, max_iter, ff, gg, KEEP_BEST)
    if (outcome & GOING) != 0:
        tl.debug_barrier()
        z += b * N
        steps = history + b * (memory * tl.cast(N, tl.int64))
        s_g = tl.zeros((), acc)
        if SCALE_FIRST:
            if (tl.load(ints + COUNT * padded + b) == 1) & (tl.load(reals + SCALE * padded + b) == 0):
                s_g = _sweep(z, steps, s_g, N, BLOCK) * unit
        wide = unit.to(tl.float64)
        count, scale = _start(ints, reals, norms, b, padded, outcome, s_g, gg * wide * wide, memory, SCALE_FIRST)
        tl.debug_barrier()
        for start in range(0, N, BLOCK):
            at = start + tl.arange(0, BLOCK)
            g = tl.load(z + at, mask=at < N, other=0.0) * unit
            tl.store(z + at, scale * g, mask=at < N)
        ratio = tl.zeros((), acc)
        for j in range(0, count):
            tl.debug_barrier()
            ratio = _sweep(z, steps + j * tl.cast(N, tl.int64), ratio, N, BLOCK) / tl.load(norms + b * memory + j)
        _settle(outcomes, starts, ints, b, padded, outcome, count, scale, 1.0 - ratio)
    else:
        tl.store(outcomes + b, outcome)


@triton.jit(do_not_specialize=RUN_ARGUMENTS)
def recur_kernel(
    norms,
    gram,
    weights,
    partials,
    outcomes,
    starts,
    ints,
    reals,
    settings,
    running,
    chunks,
    padded,
    max_iter,
    memory: tl.constexpr,
    M: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    KEEP_BEST: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Judge the evaluation, and find the weights (B, memory) of the steps in z from their products."""
    b = tl.program_id(0).to(tl.int64)
    if tl.load(ints + STATUS * padded + b) != RUNNING:
        tl.store(outcomes + b, 0)
        return
    acc = reals.dtype.element_ty
    sums = partials + b * ((2 + memory) * chunks)
    ff, gg = total(sums, chunks, CHUNKS), total(sums + chunks, chunks, CHUNKS)
    i = tl.arange(0, M)
    dots = totals(sums + 2 * chunks, i < tl.load(ints + COUNT * padded + b), chunks, M, CHUNKS)
    outcome, _, unit = judge(ints, reals, settings, running, b, padded, max_iter, ff, gg, KEEP_BEST)
    if (outcome & GOING) != 0:
        wide = unit.to(tl.float64)
        s_g = tl.sum(tl.where(i == 0, dots, 0.0), axis=0)
        count, scale = _start(ints, reals, norms, b, padded, outcome, s_g, gg * wide * wide, memory, SCALE_FIRST)
        weight = tl.zeros((M,), tl.float64)
        ratio = tl.zeros((), tl.float64)
        for j in range(0, count):
            weight = tl.where((i == j) & (j > 0), ratio, weight)
            row = tl.load(gram + (b * memory + j) * memory + i, mask=i <= j, other=0.0).to(tl.float64)
            product = scale.to(tl.float64) * tl.sum(tl.where(i == j, dots, 0.0), axis=0) + tl.sum(weight * row, axis=0)
            ratio = product / tl.load(norms + b * memory + j).to(tl.float64)
        tl.store(weights + b * memory + i, weight.to(acc), mask=i < memory)
        _settle(outcomes, starts, ints, b, padded, outcome, count, scale, 1.0 - ratio)
    else:
        tl.store(outcomes + b, outcome)


@triton.jit(do_not_specialize=RUN_ARGUMENTS)
def apply_kernel(
    f,
    f_rows,
    x,
    x_prev,
    saved,
    z,
    history,
    weights,
    starts,
    outcomes,
    partials,
    flags,
    reals,
    n,
    offset,
    N,
    first_chunk,
    leaf_chunks,
    chunks,
    chunk_size,
    padded,
    memory: tl.constexpr,
    GRAM: tl.constexpr,
    F_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRODUCTS_BLOCK: tl.constexpr,
):
    """Write one chunk of one tensor of the new step and of the next iterate; products of the step to ``partials``."""
    b = (tl.program_id(0) // leaf_chunks).to(tl.int64)
    chunk = tl.program_id(0) % leaf_chunks
    outcome = tl.load(outcomes + b)
    if outcome == 0:
        return
    begin = chunk * chunk_size
    end = tl.minimum(begin + chunk_size, n)
    x += b * n
    x_prev += b * n
    spill_and_rest(x, x_prev, saved + b * n, outcome, begin, end, BLOCK)
    if (outcome & GOING) != 0:
        tl.debug_barrier()
        acc = reals.dtype.element_ty
        unit = tl.load(reals + UNIT * padded + b)
        count = tl.load(starts + b * 3).to(tl.int32)
        scale = tl.load(starts + b * 3 + 1)
        per_denominator = 1.0 / tl.load(starts + b * 3 + 2)
        bad = (outcome & BAD) != 0
        f += row_of(f_rows, b, F_ROWS) * n
        steps = history + b * (memory * tl.cast(N, tl.int64)) + offset
        z += b * N + offset
        squared = tl.zeros((BLOCK,), acc)
        infinite = tl.zeros((BLOCK,), tl.int32)
        for start in range(begin, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < end
            _, g = residual_tile(f, x, at, inside, acc)
            if GRAM:
                step = scale * (g * unit)
                for j in range(1, count):
                    s = tl.load(steps + j * tl.cast(N, tl.int64) + at, mask=inside, other=0.0)
                    step += tl.load(weights + b * memory + j) * s
                step *= per_denominator
            else:
                step = tl.load(z + at, mask=inside, other=0.0) * per_denominator
                step = tl.where(bad, scale * (g * unit), step)
            x_tile = widen(tl.load(x + at, mask=inside, other=0.0), acc)
            infinite |= write_tile(x_prev, at, inside, x_tile + step * inverse(unit))
            tl.store(steps + count * tl.cast(N, tl.int64) + at, step, mask=inside)
            squared += step * step
        place = b * chunks + (first_chunk + chunk)
        tl.store(flags + place, tl.max(infinite, axis=0))
        out = partials + b * ((2 + memory) * chunks) + (first_chunk + chunk)
        tl.store(out, tl.sum(squared, axis=0).to(tl.float64))
        if GRAM:
            tl.debug_barrier()
            new = steps + count * tl.cast(N, tl.int64)
            _products(new, steps, N, count, begin, end, out + 2 * chunks, chunks, PRODUCTS_BLOCK)


@triton.jit(do_not_specialize=RUN_ARGUMENTS)
def finish_kernel(
    f,
    f_rows,
    x_prev,
    norms,
    gram,
    starts,
    outcomes,
    partials,
    flags,
    ints,
    n,
    chunks,
    padded,
    memory: tl.constexpr,
    M: tl.constexpr,
    GRAM: tl.constexpr,
    F_ROWS: tl.constexpr,
    LAST: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take f where the next iterate is not finite; with the LAST tensor, enter the new step or forget them all."""
    b = tl.program_id(0).to(tl.int64)
    if (tl.load(outcomes + b) & GOING) == 0:
        return
    overflowed = any_flag(flags + b * chunks, chunks, BLOCK)
    if overflowed:
        take_f(f + row_of(f_rows, b, F_ROWS) * n, x_prev + b * n, n, BLOCK)
    if LAST:
        acc: tl.constexpr = norms.dtype.element_ty
        count = tl.load(starts + b * 3).to(tl.int32)
        sums = partials + b * ((2 + memory) * chunks)
        squared = total(sums, chunks, CHUNKS).to(acc)
        tl.store(norms + b * memory + count, squared)
        if GRAM:
            i = tl.arange(0, M)
            products = totals(sums + 2 * chunks, i < count, chunks, M, CHUNKS).to(acc)
            row = tl.where(i == count, squared, products)
            tl.store(gram + (b * memory + count) * memory + i, row, mask=i <= count)
        tl.store(ints + COUNT * padded + b, tl.where(overflowed, 0, count + 1))
        _add_one(ints, STEP_FALLBACKS, b, padded, overflowed)
