"""Anderson step in Triton. What moves, per number: x, f and the previous ones are read once, the two new columns
written, the older columns read for their products and dF read again for the mix, from cache where a sample fits there.

Two schedules, chosen by the sizes of the state alone:
  sample   one tensor of at most SAMPLE_MAX_N numbers a sample: a program a sample, everything in one launch;
  split    else: `reduce` (a program a chunk), `decide` (a program a sample), `mix` (a program a chunk), `finish` (a
           program a sample, which has something to do only where the step was not finite). Tensors of a tree have
           launches of their own for all but `decide`.
Sums are added up in an order that depends on the sizes of a sample alone: the only atomic is an integer's.
"""

import triton
import triton.language as tl

from .arguments import RUN, chunk_of, has_status, iterates_of, row_of, sample_of
from .columns import Points, Products, columns_of, mix, reduce
from .constants import RUNNING
from .measure import EVICTED, GOING, inverse, judge
from .small import MIXING, all_products, decide, forget, method_of, new_column, turns
from .tiles import any_flag, damp, outcome_of, spill_and_rest, squared_norms, take_f, total, totals

__all__ = ["decide_kernel", "finish_kernel", "method_of", "mix_kernel", "reduce_kernel", "sample_kernel"]

HEAD = tl.constexpr(7)  # products that are not one for every column


@triton.jit(do_not_specialize=RUN)
def sample_kernel(
    f,
    f_prev,
    iterates,
    history,
    small,
    statistics,
    stopping,
    numbers,
    B,
    padded,
    max_iter,
    has_previous,
    method: tl.constexpr,
    rule: tl.constexpr,
    form: tl.constexpr,
):
    """A whole step of one sample of one tensor."""
    b = tl.program_id(0).to(tl.int64)
    sample = sample_of(statistics, b, padded)
    if has_status(sample, RUNNING) == 0:
        return
    m: tl.constexpr = method.m
    C: tl.constexpr = method.C
    M: tl.constexpr = form.M
    BLOCK: tl.constexpr = form.BLOCK
    acc = sample.reals.dtype.element_ty
    N = history.N
    here = iterates_of(iterates, b, N)
    points = Points(row_of(f, b, N), here.x, row_of(f_prev, b, N), here.x_prev)
    beta = tl.load(numbers + MIXING).to(acc)
    if m > 0:
        new = new_column(sample, small.norms, has_previous, M, method)
        columns = columns_of(history, b, B, m, form)
        products = reduce(points, columns, new, 0, N, C, form)
        ff, gg = products.ff, products.gg
    else:
        ff, gg = squared_norms(points.f, here.x, 0, N, acc, BLOCK)
    outcome, steps, unit = judge(sample, stopping, max_iter, ff, gg, rule)
    tl.debug_barrier()
    spill_and_rest(here, outcome, 0, N, BLOCK)
    if (outcome & GOING) != 0:
        tl.debug_barrier()
        if m > 0:
            matrices = None
            if form.TILED:
                is_new = tl.arange(0, M) == tl.where(new.adding, new.slot, -1)
                of_new = tl.where(turns(numbers, products.wv, products.qq, method.TURN), 0.0, C)
                space = tl.where(is_new, of_new.to(acc), new.space)
                matrices = all_products(columns, new.used | is_new, space, N, acc, C, BLOCK)
            gamma, evicted = decide(
                sample, small, products, matrices, outcome, steps, new.slot, has_previous,
                numbers, M, form.TILED, method,
            )  # fmt: skip
            finite = mix(points, columns, gamma * inverse(unit), beta, 0, N, method.MIXED, form)
        else:
            evicted = outcome * 0
            finite = damp(points.f, here.x, here.x_prev, beta, 0, N, acc, method.MIXED, BLOCK)
        if finite == 0:
            tl.debug_barrier()
            take_f(points.f, here.x_prev, N, BLOCK)
            forget(sample, small.norms, evicted, m, M)


@triton.jit
def store_products(out, products, chunks, m: tl.constexpr, M: tl.constexpr, C: tl.constexpr):
    """The products of one chunk, for ``load_products``."""
    tl.store(out + 2 * chunks, products.qq.to(tl.float64))
    tl.store(out + 3 * chunks, products.ww.to(tl.float64))
    tl.store(out + 4 * chunks, products.wg.to(tl.float64))
    tl.store(out + 5 * chunks, products.vg.to(tl.float64))
    tl.store(out + 6 * chunks, products.wv.to(tl.float64))
    j = tl.arange(0, M)
    place = out + (HEAD + j) * chunks
    tl.store(place, products.rhs.to(tl.float64), mask=j < m)
    tl.store(place + m * chunks, products.gram.to(tl.float64), mask=j < m)
    if C != 0:
        tl.store(place + 2 * m * chunks, products.across.to(tl.float64), mask=j < m)
        tl.store(place + 3 * m * chunks, products.down.to(tl.float64), mask=j < m)


@triton.jit
def load_products(
    sums,
    ff,
    gg,
    used,
    chunks,
    acc: tl.constexpr,
    m: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The products of a sample, its chunks added up."""
    qq = total(sums + 2 * chunks, chunks, CHUNKS).to(acc)
    ww = total(sums + 3 * chunks, chunks, CHUNKS).to(acc)
    wg = total(sums + 4 * chunks, chunks, CHUNKS).to(acc)
    vg = total(sums + 5 * chunks, chunks, CHUNKS).to(acc)
    wv = total(sums + 6 * chunks, chunks, CHUNKS).to(acc)
    sums += HEAD * chunks
    rhs = totals(sums, used, chunks, M, CHUNKS).to(acc)
    gram = totals(sums + m * chunks, used, chunks, M, CHUNKS).to(acc)
    across = rhs
    down = rhs
    if C != 0:
        across = totals(sums + 2 * m * chunks, used, chunks, M, CHUNKS).to(acc)
        down = totals(sums + 3 * m * chunks, used, chunks, M, CHUNKS).to(acc)
    return Products(ff, gg, qq, ww, wg, vg, wv, rhs, across, down, gram)


@triton.jit(do_not_specialize=RUN)
def reduce_kernel(
    f,
    f_prev,
    iterates,
    history,
    small,
    statistics,
    handed,
    chunks,
    B,
    padded,
    has_previous,
    method: tl.constexpr,
    form: tl.constexpr,
):
    """The products of one chunk of one tensor, into ``partials`` (B, HEAD + 4 m, chunks)."""
    b, begin, end, chunk = chunk_of(chunks)
    sample = sample_of(statistics, b, padded)
    if has_status(sample, RUNNING) == 0:
        return
    m: tl.constexpr = method.m
    here = iterates_of(iterates, b, chunks.n)
    out = handed.partials + b * ((HEAD + 4 * m) * chunks.total) + chunk
    points = Points(row_of(f, b, chunks.n), here.x, row_of(f_prev, b, chunks.n), here.x_prev)
    if m > 0:
        new = new_column(sample, small.norms, has_previous, form.M, method)
        columns = columns_of(history, b, B, m, form)
        products = reduce(points, columns, new, begin, end, method.C, form)
        ff, gg = products.ff, products.gg
        store_products(out, products, chunks.total, m, form.M, method.C)
    else:
        ff, gg = squared_norms(points.f, here.x, begin, end, sample.reals.dtype.element_ty, form.BLOCK)
    tl.store(out, ff)
    tl.store(out + chunks.total, gg)


@triton.jit(do_not_specialize=RUN)
def decide_kernel(
    small,
    statistics,
    stopping,
    numbers,
    handed,
    gammas,
    chunks,
    padded,
    max_iter,
    has_previous,
    method: tl.constexpr,
    rule: tl.constexpr,
    M: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Add the chunks up, judge the evaluation, solve for gamma."""
    b = tl.program_id(0).to(tl.int64)
    sample = sample_of(statistics, b, padded)
    if has_status(sample, RUNNING) == 0:
        tl.store(handed.outcomes + b, 0)
        return
    m: tl.constexpr = method.m
    C: tl.constexpr = method.C
    acc = sample.reals.dtype.element_ty
    sums = handed.partials + b * ((HEAD + 4 * m) * chunks)
    ff, gg = total(sums, chunks, CHUNKS), total(sums + chunks, chunks, CHUNKS)
    if m > 0:
        new = new_column(sample, small.norms, has_previous, M, method)
    outcome, steps, unit = judge(sample, stopping, max_iter, ff, gg, rule)
    if m > 0:
        if (outcome & GOING) != 0:
            products = load_products(sums, ff, gg, new.used, chunks, acc, m, M, C, CHUNKS)
            tl.debug_barrier()
            gamma, evicted = decide(
                sample, small, products, None, outcome, steps, new.slot, has_previous,
                numbers, M, False, method,
            )  # fmt: skip
            j = tl.arange(0, M)
            tl.store(gammas + b * m + j, gamma * inverse(unit), mask=j < m)
            outcome += evicted * EVICTED
    tl.store(handed.outcomes + b, outcome)


@triton.jit(do_not_specialize=RUN)
def mix_kernel(
    f,
    iterates,
    history,
    numbers,
    handed,
    gammas,
    chunks,
    B,
    padded,
    method: tl.constexpr,
    form: tl.constexpr,
):
    """Write one chunk of one tensor of the next iterate."""
    m: tl.constexpr = method.m
    b, begin, end, chunk = chunk_of(chunks)
    here = iterates_of(iterates, b, chunks.n)
    outcome = outcome_of(handed, here, b, begin, end, form.BLOCK)
    if (outcome & GOING) != 0:
        tl.debug_barrier()
        acc = gammas.dtype.element_ty
        beta = tl.load(numbers + MIXING).to(acc)
        now = row_of(f, b, chunks.n)
        if m > 0:
            j = tl.arange(0, form.M)
            weights = tl.load(gammas + b * m + j, mask=j < m, other=0.0)
            columns = columns_of(history, b, B, m, form)
            points = Points(now, here.x, now, here.x_prev)
            finite = mix(points, columns, weights, beta, begin, end, method.MIXED, form)
        else:
            finite = damp(now, here.x, here.x_prev, beta, begin, end, acc, method.MIXED, form.BLOCK)
        tl.store(handed.flags + b * chunks.total + chunk, (finite == 0).to(tl.int32))


@triton.jit(do_not_specialize=RUN)
def finish_kernel(
    f,
    iterates,
    small,
    statistics,
    handed,
    chunks,
    padded,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    M: tl.constexpr,
    method: tl.constexpr,
):
    """Where some chunk of the next iterate is not finite, take f instead; with the LAST tensor, forget the history."""
    b = tl.program_id(0).to(tl.int64)
    outcome = tl.load(handed.outcomes + b)
    if (outcome & GOING) == 0:
        return
    if any_flag(handed.flags + b * chunks.total, chunks.total, BLOCK):
        take_f(row_of(f, b, chunks.n), iterates.x_prev + b * chunks.n, chunks.n, BLOCK)
        if LAST:
            forget(sample_of(statistics, b, padded), small.norms, outcome // EVICTED, method.m, M)
