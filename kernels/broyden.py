"""Broyden step in Triton. What moves, per number: f and x are read once, every step kept is read once (chain form) or
twice (Gram form), the new step and the next iterate are written.

Three schedules, chosen by the sizes of the state alone:
  sample   one tensor of at most SAMPLE_MAX_N numbers a sample: a program a sample with z in registers, one launch;
  chain    else, where the workspace keeps no Gram matrix: `gather` (a program a chunk) puts the residual into scratch
           memory, `decide` (a program a sample) sweeps over it, `apply` (a program a chunk) writes, `finish` (a program
           a sample) keeps the books;
  Gram     else: `gather` multiplies the residual with the steps too, and `decide` does the small recursion instead of
           the sweeps.
In the last two a step that is not finite although its denominator is fine becomes f and forgets the steps, at once.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import RUN, chunk_of, has_status, iterates_of, row_of, sample_of
from .constants import COUNT, DENOMINATOR_RESTARTS, MIN_DENOMINATOR, RUNNING, STEP_FALLBACKS, UNIT
from .measure import BAD, GOING, inverse, judge
from .steps import add_one, chain, count_and_scale, measures, multiply, recur, settle, steps_of, sums_of, sweep, z_of
from .tiles import any_flag, outcome_of, residual_tile, spill_and_rest, take_f, total, totals, widen, write_tile


class Method(NamedTuple):
    """What of Broyden's options is compiled in: how many steps are kept, whether H0 is measured on the first."""

    memory: int
    SCALE_FIRST: bool


class Form(NamedTuple):
    """How numbers are walked where programs share a sample: whether a Gram matrix is kept, numbers at once."""

    GRAM: bool
    BLOCK: int
    PRODUCTS_BLOCK: int


def method_of(options: Any) -> tuple[Method, list[float]]:
    """A ``BroydenMethod`` as the kernels take it: compiled in, and as numbers, of which it has none."""
    return Method(options.memory, options.scale_first), []


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
    steps, norms = steps_of(kept, b, method.memory), kept.norms + b * method.memory
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
            if measures(sample):
                s_g = tl.sum(tl.load(steps + at, mask=inside, other=0.0) * g, axis=0)
                g_g = tl.sum(g * g, axis=0)
        count, scale = count_and_scale(sample, kept.norms, outcome, s_g, g_g, method)
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
        add_one(sample, DENOMINATOR_RESTARTS, bad)

        x_tile = widen(tl.load(here.x + at, mask=inside, other=0.0), acc)
        overflowed = tl.max(write_tile(here.x_prev, at, inside, x_tile + z * inverse(unit)), axis=0) != 0
        tl.store(steps + count * tl.cast(N, tl.int64) + at, z, mask=inside)
        tl.store(norms + count, tl.sum(z * z, axis=0))
        tl.store(sample.ints + COUNT * padded, tl.where(overflowed, 0, count + 1))
        add_one(sample, STEP_FALLBACKS, overflowed)
        if overflowed:
            tl.debug_barrier()
            take_f(now, here.x_prev, N, BLOCK)


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
    form: tl.constexpr,
):
    """The residual of one chunk of one tensor into ``z``, its norms and products into ``partials``."""
    b, begin, end, chunk = chunk_of(chunks)
    sample = sample_of(statistics, b, padded)
    if has_status(sample, RUNNING) == 0:
        return
    BLOCK: tl.constexpr = form.BLOCK
    acc = sample.reals.dtype.element_ty
    unit = tl.load(sample.reals + UNIT * padded)
    now = row_of(f, b, chunks.n)
    x = iterates.x + b * chunks.n
    z = z_of(scratch, kept, b)
    ff = tl.zeros((BLOCK,), tl.float64)
    gg = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        f_tile, g = residual_tile(now, x, at, at < end, acc)
        ff += f_tile.to(tl.float64) * f_tile.to(tl.float64)
        gg += g.to(tl.float64) * g.to(tl.float64)
        if form.GRAM:
            g *= tl.where(unit > 0, unit, 1.0)  # a new unit comes with no steps
        tl.store(z + at, g, mask=at < end)
    out = sums_of(handed, b, chunks.total, method.memory) + chunk
    tl.store(out, tl.sum(ff, axis=0))
    tl.store(out + chunks.total, tl.sum(gg, axis=0))
    if form.GRAM:
        tl.debug_barrier()
        steps = steps_of(kept, b, method.memory)
        count = tl.load(sample.ints + COUNT * padded)
        multiply(z, steps, kept.N, count, begin, end, out + 2 * chunks.total, chunks.total, form.PRODUCTS_BLOCK)


@triton.jit(do_not_specialize=RUN)
def decide_kernel(
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
    GRAM: tl.constexpr,
    CHUNKS: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Judge the evaluation, and take z through the steps: itself, or in the Gram form its weights."""
    b = tl.program_id(0).to(tl.int64)
    sample = sample_of(statistics, b, padded)
    if has_status(sample, RUNNING) == 0:
        tl.store(handed.outcomes + b, 0)
        return
    sums = sums_of(handed, b, chunks, method.memory)
    ff, gg = total(sums, chunks, CHUNKS), total(sums + chunks, chunks, CHUNKS)
    outcome, _, unit = judge(sample, stopping, max_iter, ff, gg, rule)
    if (outcome & GOING) != 0:
        tl.debug_barrier()
        wide = unit.to(tl.float64)
        if GRAM:
            i = tl.arange(0, M)
            products = totals(sums + 2 * chunks, i < tl.load(sample.ints + COUNT * padded), chunks, M, CHUNKS)
            s_g = tl.sum(tl.where(i == 0, products, 0.0), axis=0)
            count, scale = count_and_scale(sample, kept.norms, outcome, s_g, gg * wide * wide, method)
            ratio = recur(kept, scratch, b, products, count, scale, method.memory, M)
        else:
            z = scratch.z + b * kept.N
            steps = steps_of(kept, b, method.memory)
            s_g = tl.zeros((), unit.dtype)
            if method.SCALE_FIRST:
                if measures(sample):
                    s_g = sweep(z, steps, s_g, kept.N, BLOCK) * unit
            count, scale = count_and_scale(sample, kept.norms, outcome, s_g, gg * wide * wide, method)
            tl.debug_barrier()
            ratio = chain(z, steps, kept.norms + b * method.memory, kept.N, count, unit, scale, BLOCK)
        settle(sample, handed, scratch, outcome, count, scale, 1.0 - ratio)
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
    form: tl.constexpr,
):
    """Write one chunk of one tensor of the new step and of the next iterate; products of the step to ``partials``."""
    b, begin, end, chunk = chunk_of(chunks)
    here = iterates_of(iterates, b, chunks.n)
    outcome = outcome_of(handed, here, b, begin, end, form.BLOCK)
    if (outcome & GOING) != 0:
        tl.debug_barrier()
        memory: tl.constexpr = method.memory
        BLOCK: tl.constexpr = form.BLOCK
        N = kept.N
        acc = statistics.reals.dtype.element_ty
        unit = tl.load(statistics.reals + UNIT * padded + b)
        starts = scratch.starts + b * 3
        count = tl.load(starts).to(tl.int32)
        scale = tl.load(starts + 1)
        per_denominator = 1.0 / tl.load(starts + 2)
        bad = (outcome & BAD) != 0
        now = row_of(f, b, chunks.n)
        steps = steps_of(kept, b, memory)
        new = steps + count * tl.cast(N, tl.int64)
        z = z_of(scratch, kept, b)
        squared = tl.zeros((BLOCK,), acc)
        infinite = tl.zeros((BLOCK,), tl.int32)
        for start in range(begin, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < end
            _, g = residual_tile(now, here.x, at, inside, acc)
            if form.GRAM:
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
        out = sums_of(handed, b, chunks.total, memory) + chunk
        tl.store(out, tl.sum(squared, axis=0).to(tl.float64))
        if form.GRAM:
            tl.debug_barrier()
            multiply(new, steps, N, count, begin, end, out + 2 * chunks.total, chunks.total, form.PRODUCTS_BLOCK)


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
        sums = sums_of(handed, b, chunks.total, memory)
        squared = total(sums, chunks.total, CHUNKS).to(acc)
        tl.store(kept.norms + b * memory + count, squared)
        if GRAM:
            i = tl.arange(0, M)
            products = totals(sums + 2 * chunks.total, i < count, chunks.total, M, CHUNKS).to(acc)
            row = tl.where(i == count, squared, products)
            tl.store(kept.gram + (b * memory + count) * memory + i, row, mask=i <= count)
        tl.store(sample.ints + COUNT * padded, tl.where(overflowed, 0, count + 1))
        add_one(sample, STEP_FALLBACKS, overflowed)
