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

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import RUN, chunk_of, has_status, iterates_of, row_of, sample_of
from .constants import (
    COUNT,
    DENOMINATOR_RESTARTS,
    FULL_RESTARTS,
    MIN_DENOMINATOR,
    RUNNING,
    SCALE,
    STEP_FALLBACKS,
    UNIT,
)
from .measure import BAD, GOING, RESET, inverse, judge
from .tiles import any_flag, residual_tile, spill_and_rest, take_f, total, totals, widen, write_tile

GROUP = tl.constexpr(16)  # steps multiplied at once


class Method(NamedTuple):
    """What of Broyden's options is compiled in: how many steps are kept, whether H0 is measured on the first."""

    memory: int
    SCALE_FIRST: bool


class Steps(NamedTuple):
    """The steps kept of all samples, of N numbers each, their squared norms and Gram matrices.

    Where those of one tensor begin (None: there is but one).
    """

    history: Any
    norms: Any
    gram: Any
    N: Any
    offset: Any


class Scratch(NamedTuple):
    """What the kernels of a step hand on beside ``Handed``: z (B, N), weights (B, memory), starts (see ``_settle``)."""

    z: Any
    weights: Any
    starts: Any


def method_of(options: Any) -> tuple[Method, list[float]]:
    """A ``BroydenMethod`` as the kernels take it: compiled in, and as numbers, of which it has none."""
    return Method(options.memory, options.scale_first), []


@triton.jit
def _measured_scale(s_s, s_g, g_g):
    """H0 from the first step s = g_0: y = g_0 - g, so that s.y = s.s - s.g and y.y = s.s - 2 s.g + g.g."""
    scale = (s_s - s_g) / (s_s - 2.0 * s_g + g_g)
    return tl.where(scale == scale, tl.minimum(tl.maximum(scale, 0.2), 5.0), 1.0)


@triton.jit
def _measures(sample):
    """Whether H0, if it is measured on the first step, is so now."""
    count = tl.load(sample.ints + COUNT * sample.padded)
    return (count == 1) & (tl.load(sample.reals + SCALE * sample.padded) == 0)


@triton.jit
def _steps_of(kept, b, memory: tl.constexpr):
    """Where the sample's steps in this tensor begin."""
    steps = kept.history + b * (memory * tl.cast(kept.N, tl.int64))
    if kept.offset is not None:
        steps += kept.offset
    return steps


@triton.jit
def _z_of(scratch, kept, b):
    """Where its part of z begins."""
    z = scratch.z + b * kept.N
    if kept.offset is not None:
        z += kept.offset
    return z


@triton.jit
def _sums_of(handed, b, chunks, memory: tl.constexpr):
    """Where the sample's sums begin: ||f||^2, ||g||^2, products with the steps, each ``chunks`` numbers."""
    return handed.partials + b * ((2 + memory) * chunks)


@triton.jit
def _start(sample, norms, outcome, s_g, g_g, method: tl.constexpr):
    """How many steps the new one is made from and with which H0; ``s_g``, ``g_g``: products of the first step, of g."""
    memory: tl.constexpr = method.memory
    count = tl.load(sample.ints + COUNT * sample.padded)
    scale = tl.load(sample.reals + SCALE * sample.padded)
    restarts = tl.load(sample.ints + FULL_RESTARTS * sample.padded)
    count = tl.where((outcome & RESET) != 0, 0, count)
    if method.SCALE_FIRST:
        measuring = (count == 1) & (scale == 0)
        s_s = tl.load(norms + sample.b * memory, mask=measuring, other=1.0)
        measured = _measured_scale(s_s.to(tl.float64), s_g.to(tl.float64), g_g.to(tl.float64)).to(scale.dtype)
        scale = tl.where(measuring, measured, scale)
        count = tl.where(measuring, 0, count)
    full = count == memory
    tl.debug_barrier()
    tl.store(sample.reals + SCALE * sample.padded, scale)
    tl.store(sample.ints + FULL_RESTARTS * sample.padded, restarts + full.to(tl.int32))
    return tl.where(full, 0, count), tl.where(scale > 0, scale, 1.0)


@triton.jit
def _add_one(sample, ROW: tl.constexpr, condition):
    """Count an event of the sample."""
    before = tl.load(sample.ints + ROW * sample.padded)
    tl.debug_barrier()
    tl.store(sample.ints + ROW * sample.padded, before + condition.to(tl.int32))


@triton.jit(do_not_specialize=RUN)
def sample_kernel(
    f,
    iterates,
    kept,
    statistics,
    stopping,
    padded,
    max_iter,
    method: tl.constexpr,
    rule: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A whole step of one sample of one tensor that fits into one tile."""
    b = tl.program_id(0).to(tl.int64)
    sample = sample_of(statistics, b, padded)
    if has_status(sample, RUNNING) == 0:
        return
    acc = sample.reals.dtype.element_ty
    N = kept.N
    here = iterates_of(iterates, b, N)
    now = row_of(f, b, N)
    steps, norms = _steps_of(kept, b, method.memory), kept.norms + b * method.memory
    at = tl.arange(0, BLOCK)
    inside = at < N
    f_tile, g = residual_tile(now, here.x, at, inside, acc)
    f_wide, g_wide = f_tile.to(tl.float64), g.to(tl.float64)
    ff, gg = tl.sum(f_wide * f_wide, axis=0), tl.sum(g_wide * g_wide, axis=0)
    outcome, _, unit = judge(sample, stopping, max_iter, ff, gg, rule)
    tl.debug_barrier()
    spill_and_rest(here, outcome, 0, N, BLOCK)
    if (outcome & GOING) != 0:
        tl.debug_barrier()
        g *= unit
        s_g = tl.zeros((), acc)
        g_g = tl.zeros((), acc)
        if method.SCALE_FIRST:
            if _measures(sample):
                s_g = tl.sum(tl.load(steps + at, mask=inside, other=0.0) * g, axis=0)
                g_g = tl.sum(g * g, axis=0)
        count, scale = _start(sample, kept.norms, outcome, s_g, g_g, method)
        z = scale * g
        ratio = tl.zeros((), acc)
        for j in range(0, count):
            s = tl.load(steps + j * tl.cast(N, tl.int64) + at, mask=inside, other=0.0)
            z += ratio * s
            ratio = tl.sum(s * z, axis=0) / tl.load(norms + j)
        denominator = 1.0 - ratio
        z = z / denominator
        finite = tl.min((tl.abs(z) < float("inf")).to(tl.int32), axis=0) > 0
        bad = ((tl.abs(denominator) >= MIN_DENOMINATOR) & finite) == 0
        z = tl.where(bad, scale * g, z)
        count = tl.where(bad, 0, count)
        _add_one(sample, DENOMINATOR_RESTARTS, bad)

        x_tile = widen(tl.load(here.x + at, mask=inside, other=0.0), acc)
        overflowed = tl.max(write_tile(here.x_prev, at, inside, x_tile + z * inverse(unit)), axis=0) != 0
        tl.store(steps + count * tl.cast(N, tl.int64) + at, z, mask=inside)
        tl.store(norms + count, tl.sum(z * z, axis=0))
        tl.store(sample.ints + COUNT * padded, tl.where(overflowed, 0, count + 1))
        _add_one(sample, STEP_FALLBACKS, overflowed)
        if overflowed:
            tl.debug_barrier()
            take_f(now, here.x_prev, N, BLOCK)


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


@triton.jit(do_not_specialize=RUN)
def gather_kernel(
    f,
    iterates,
    kept,
    statistics,
    handed,
    scratch,
    chunks,
    padded,
    method: tl.constexpr,
    GRAM: tl.constexpr,
    BLOCK: tl.constexpr,
    PRODUCTS_BLOCK: tl.constexpr,
):
    """The residual of one chunk of one tensor into ``z``, its norms and products into ``partials``."""
    b, begin, end, chunk = chunk_of(chunks)
    sample = sample_of(statistics, b, padded)
    if has_status(sample, RUNNING) == 0:
        return
    acc = sample.reals.dtype.element_ty
    unit = tl.load(sample.reals + UNIT * padded)
    now = row_of(f, b, chunks.n)
    x = iterates.x + b * chunks.n
    z = _z_of(scratch, kept, b)
    ff = tl.zeros((BLOCK,), tl.float64)
    gg = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        f_tile, g = residual_tile(now, x, at, at < end, acc)
        ff += f_tile.to(tl.float64) * f_tile.to(tl.float64)
        gg += g.to(tl.float64) * g.to(tl.float64)
        if GRAM:
            g *= tl.where(unit > 0, unit, 1.0)  # a new unit comes with no steps
        tl.store(z + at, g, mask=at < end)
    out = _sums_of(handed, b, chunks.total, method.memory) + chunk
    tl.store(out, tl.sum(ff, axis=0))
    tl.store(out + chunks.total, tl.sum(gg, axis=0))
    if GRAM:
        tl.debug_barrier()
        steps = _steps_of(kept, b, method.memory)
        count = tl.load(sample.ints + COUNT * padded)
        _products(z, steps, kept.N, count, begin, end, out + 2 * chunks.total, chunks.total, PRODUCTS_BLOCK)


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
def _settle(sample, handed, scratch, outcome, count, scale, denominator):
    """What `apply` needs to know of a sample: its outcome, and in ``starts`` (B, 3) count, H0 and denominator."""
    bad = (tl.abs(denominator) >= MIN_DENOMINATOR) == 0
    _add_one(sample, DENOMINATOR_RESTARTS, bad)
    starts = scratch.starts + sample.b * 3
    tl.store(starts, tl.where(bad, 0, count).to(scale.dtype))
    tl.store(starts + 1, scale)
    tl.store(starts + 2, tl.where(bad, 1.0, denominator).to(scale.dtype))
    tl.store(handed.outcomes + sample.b, outcome | tl.where(bad, BAD, 0))


@triton.jit(do_not_specialize=RUN)
def chain_kernel(
    kept,
    statistics,
    stopping,
    handed,
    scratch,
    chunks,
    padded,
    max_iter,
    method: tl.constexpr,
    rule: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Judge the evaluation, and take z through the chain of steps."""
    b = tl.program_id(0).to(tl.int64)
    sample = sample_of(statistics, b, padded)
    if has_status(sample, RUNNING) == 0:
        tl.store(handed.outcomes + b, 0)
        return
    acc = sample.reals.dtype.element_ty
    N = kept.N
    sums = _sums_of(handed, b, chunks, method.memory)
    ff, gg = total(sums, chunks, CHUNKS), total(sums + chunks, chunks, CHUNKS)
    outcome, _, unit = judge(sample, stopping, max_iter, ff, gg, rule)
    if (outcome & GOING) != 0:
        tl.debug_barrier()
        z = scratch.z + b * N
        steps, norms = _steps_of(kept, b, method.memory), kept.norms + b * method.memory
        s_g = tl.zeros((), acc)
        if method.SCALE_FIRST:
            if _measures(sample):
                s_g = _sweep(z, steps, s_g, N, BLOCK) * unit
        wide = unit.to(tl.float64)
        count, scale = _start(sample, kept.norms, outcome, s_g, gg * wide * wide, method)
        tl.debug_barrier()
        for start in range(0, N, BLOCK):
            at = start + tl.arange(0, BLOCK)
            g = tl.load(z + at, mask=at < N, other=0.0) * unit
            tl.store(z + at, scale * g, mask=at < N)
        ratio = tl.zeros((), acc)
        for j in range(0, count):
            tl.debug_barrier()
            ratio = _sweep(z, steps + j * tl.cast(N, tl.int64), ratio, N, BLOCK) / tl.load(norms + j)
        _settle(sample, handed, scratch, outcome, count, scale, 1.0 - ratio)
    else:
        tl.store(handed.outcomes + b, outcome)


@triton.jit(do_not_specialize=RUN)
def recur_kernel(
    kept,
    statistics,
    stopping,
    handed,
    scratch,
    chunks,
    padded,
    max_iter,
    method: tl.constexpr,
    rule: tl.constexpr,
    CHUNKS: tl.constexpr,
    M: tl.constexpr,
):
    """Judge the evaluation, and find the weights (B, memory) of the steps in z from their products."""
    b = tl.program_id(0).to(tl.int64)
    sample = sample_of(statistics, b, padded)
    if has_status(sample, RUNNING) == 0:
        tl.store(handed.outcomes + b, 0)
        return
    acc = sample.reals.dtype.element_ty
    memory: tl.constexpr = method.memory
    sums = _sums_of(handed, b, chunks, memory)
    ff, gg = total(sums, chunks, CHUNKS), total(sums + chunks, chunks, CHUNKS)
    i = tl.arange(0, M)
    dots = totals(sums + 2 * chunks, i < tl.load(sample.ints + COUNT * padded), chunks, M, CHUNKS)
    outcome, _, unit = judge(sample, stopping, max_iter, ff, gg, rule)
    if (outcome & GOING) != 0:
        wide = unit.to(tl.float64)
        s_g = tl.sum(tl.where(i == 0, dots, 0.0), axis=0)
        count, scale = _start(sample, kept.norms, outcome, s_g, gg * wide * wide, method)
        weight = tl.zeros((M,), tl.float64)
        ratio = tl.zeros((), tl.float64)
        for j in range(0, count):
            weight = tl.where((i == j) & (j > 0), ratio, weight)
            row = tl.load(kept.gram + (b * memory + j) * memory + i, mask=i <= j, other=0.0).to(tl.float64)
            product = scale.to(tl.float64) * tl.sum(tl.where(i == j, dots, 0.0), axis=0) + tl.sum(weight * row, axis=0)
            ratio = product / tl.load(kept.norms + b * memory + j).to(tl.float64)
        tl.store(scratch.weights + b * memory + i, weight.to(acc), mask=i < memory)
        _settle(sample, handed, scratch, outcome, count, scale, 1.0 - ratio)
    else:
        tl.store(handed.outcomes + b, outcome)


@triton.jit(do_not_specialize=RUN)
def apply_kernel(
    f,
    iterates,
    kept,
    statistics,
    handed,
    scratch,
    chunks,
    padded,
    method: tl.constexpr,
    GRAM: tl.constexpr,
    BLOCK: tl.constexpr,
    PRODUCTS_BLOCK: tl.constexpr,
):
    """Write one chunk of one tensor of the new step and of the next iterate; products of the step to ``partials``."""
    b, begin, end, chunk = chunk_of(chunks)
    outcome = tl.load(handed.outcomes + b)
    if outcome == 0:
        return
    here = iterates_of(iterates, b, chunks.n)
    spill_and_rest(here, outcome, begin, end, BLOCK)
    if (outcome & GOING) != 0:
        tl.debug_barrier()
        memory: tl.constexpr = method.memory
        N = kept.N
        acc = statistics.reals.dtype.element_ty
        unit = tl.load(statistics.reals + UNIT * padded + b)
        starts = scratch.starts + b * 3
        count = tl.load(starts).to(tl.int32)
        scale = tl.load(starts + 1)
        per_denominator = 1.0 / tl.load(starts + 2)
        bad = (outcome & BAD) != 0
        now = row_of(f, b, chunks.n)
        steps = _steps_of(kept, b, memory)
        new = steps + count * tl.cast(N, tl.int64)
        z = _z_of(scratch, kept, b)
        squared = tl.zeros((BLOCK,), acc)
        infinite = tl.zeros((BLOCK,), tl.int32)
        for start in range(begin, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < end
            _, g = residual_tile(now, here.x, at, inside, acc)
            if GRAM:
                step = scale * (g * unit)
                for j in range(1, count):
                    s = tl.load(steps + j * tl.cast(N, tl.int64) + at, mask=inside, other=0.0)
                    step += tl.load(scratch.weights + b * memory + j) * s
                step *= per_denominator
            else:
                step = tl.load(z + at, mask=inside, other=0.0) * per_denominator
                step = tl.where(bad, scale * (g * unit), step)
            x_tile = widen(tl.load(here.x + at, mask=inside, other=0.0), acc)
            infinite |= write_tile(here.x_prev, at, inside, x_tile + step * inverse(unit))
            tl.store(new + at, step, mask=inside)
            squared += step * step
        tl.store(handed.flags + b * chunks.total + chunk, tl.max(infinite, axis=0))
        out = _sums_of(handed, b, chunks.total, memory) + chunk
        tl.store(out, tl.sum(squared, axis=0).to(tl.float64))
        if GRAM:
            tl.debug_barrier()
            _products(new, steps, N, count, begin, end, out + 2 * chunks.total, chunks.total, PRODUCTS_BLOCK)


@triton.jit(do_not_specialize=RUN)
def finish_kernel(
    f,
    iterates,
    kept,
    statistics,
    handed,
    scratch,
    chunks,
    padded,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    M: tl.constexpr,
    GRAM: tl.constexpr,
    method: tl.constexpr,
):
    """Take f where the next iterate is not finite; with the LAST tensor, enter the new step or forget them all."""
    b = tl.program_id(0).to(tl.int64)
    if (tl.load(handed.outcomes + b) & GOING) == 0:
        return
    overflowed = any_flag(handed.flags + b * chunks.total, chunks.total, BLOCK)
    if overflowed:
        take_f(row_of(f, b, chunks.n), iterates.x_prev + b * chunks.n, chunks.n, BLOCK)
    if LAST:
        memory: tl.constexpr = method.memory
        sample = sample_of(statistics, b, padded)
        acc: tl.constexpr = kept.norms.dtype.element_ty
        count = tl.load(scratch.starts + b * 3).to(tl.int32)
        sums = _sums_of(handed, b, chunks.total, memory)
        squared = total(sums, chunks.total, CHUNKS).to(acc)
        tl.store(kept.norms + b * memory + count, squared)
        if GRAM:
            i = tl.arange(0, M)
            products = totals(sums + 2 * chunks.total, i < count, chunks.total, M, CHUNKS).to(acc)
            row = tl.where(i == count, squared, products)
            tl.store(kept.gram + (b * memory + count) * memory + i, row, mask=i <= count)
        tl.store(sample.ints + COUNT * padded, tl.where(overflowed, 0, count + 1))
        _add_one(sample, STEP_FALLBACKS, overflowed)
