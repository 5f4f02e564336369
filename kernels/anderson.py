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

from .columns import mix, reduce
from .measure import (
    FULL,
    GOING,
    MIXING,
    RIDGE,
    RUNNING,
    SLOT,
    STATUS,
    UNIT,
    any_flag,
    damp,
    inverse,
    judge,
    row_of,
    spill_and_rest,
    squared_norms,
    take_f,
    total,
    totals,
)
from .small import all_products, columns_of, decide, forget, norms_of

HEAD = tl.constexpr(7)  # products that are not one for every column

# Arguments that belong to a batch or a run: nothing that decides the order of a sum may be specialised on them.
RUN_ARGUMENTS = ["B", "padded", "max_iter", "has_previous", "tiles"]


@triton.jit(do_not_specialize=RUN_ARGUMENTS)
def sample_kernel(
    f,
    f_prev,
    f_rows,
    f_prev_rows,
    x,
    x_prev,
    saved,
    history,
    scales,
    matrix,
    gram,
    norms,
    ages,
    ints,
    reals,
    settings,
    block_norms,
    running,
    N,
    blocks,
    B,
    tiles,
    padded,
    max_iter,
    has_previous,
    m: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    MIXED: tl.constexpr,
    USEFUL: tl.constexpr,
    KEEP_BEST: tl.constexpr,
    BLOCKS: tl.constexpr,
    SCALED: tl.constexpr,
    TILED: tl.constexpr,
    F_ROWS: tl.constexpr,
    F_PREV_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A whole step of one sample of one tensor."""
    b = tl.program_id(0).to(tl.int64)
    if tl.load(ints + STATUS * padded + b) != RUNNING:
        return
    acc = reals.dtype.element_ty
    ES: tl.constexpr = 16 if TILED else 1
    f += row_of(f_rows, b, F_ROWS) * N
    x += b * N
    x_prev += b * N
    saved += b * N
    beta = tl.load(settings + MIXING).to(acc)
    if m > 0:
        f_prev += row_of(f_prev_rows, b, F_PREV_ROWS) * N
        unit = tl.load(reals + UNIT * padded + b)
        slot = tl.load(ints + SLOT * padded + b)
        j = tl.arange(0, M)
        entering = (has_previous != 0) & (unit > 0)
        q = tl.load(norms_of(norms, b, j, m), mask=j < m, other=0.0)
        used = (q > 0) & (j != tl.where(entering, slot, -1))
        history_f, history_g, stride = columns_of(history, b, B, tiles, N, m, TILED)
        scales_f = scales + b * m * blocks
        scales_g = scales + (B.to(tl.int64) + b) * m * blocks
        ff, gg, qq, ww, wg, vg, wv, rhs, across, down, gram_row = reduce(
            f, x, f_prev, x_prev, history_f, history_g, scales_f, scales_g, blocks, unit, stride, used, slot, entering,
            0, N, C, ES, SCALED, M, BLOCK,
        )  # fmt: skip
    else:
        ff, gg = squared_norms(f, x, 0, N, acc, BLOCK)
    outcome, steps, unit = judge(
        ints, reals, settings, running, b, padded, max_iter, ff, gg, KEEP_BEST, block_norms, BLOCKS
    )
    tl.debug_barrier()
    spill_and_rest(x, x_prev, saved, outcome, 0, N, BLOCK)
    if (outcome & GOING) != 0:
        tl.debug_barrier()
        if m > 0:
            products = across[:, None], across[:, None]
            if TILED:
                products = all_products(
                    history_f, history_g, stride, used | (j == tl.where(entering, slot, -1)), N, acc, C, ES, BLOCK
                )
            gamma, full = decide(
                (qq, ww, wg, vg, wv), (rhs, across, down, gram_row), products[0], products[1], outcome, steps, slot,
                has_previous, b, matrix, gram, norms, ages, ints, padded, tl.load(settings + RIDGE).to(acc),
                m, M, C, USEFUL, TILED,
            )  # fmt: skip
            finite = mix(
                f, x, x_prev, history_f, history_g, scales_f, scales_g, blocks, gamma * inverse(unit), beta, stride,
                0, N, MIXED, ES, SCALED, M, BLOCK,
            )  # fmt: skip
        else:
            full = beta != beta
            finite = damp(f, x, x_prev, beta, 0, N, acc, MIXED, BLOCK)
        if finite == 0:
            tl.debug_barrier()
            take_f(f, x_prev, N, BLOCK)
            forget(norms, ints, b, padded, full, m, M)


@triton.jit(do_not_specialize=RUN_ARGUMENTS)
def reduce_kernel(
    f,
    f_prev,
    f_rows,
    f_prev_rows,
    x,
    x_prev,
    history,
    scales,
    norms,
    ints,
    reals,
    partials,
    n,
    offset,
    N,
    first_block,
    blocks,
    first_chunk,
    leaf_chunks,
    chunks,
    chunk_size,
    B,
    padded,
    has_previous,
    m: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    SCALED: tl.constexpr,
    F_ROWS: tl.constexpr,
    F_PREV_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The products of one chunk of one tensor, into ``partials`` (B, HEAD + 4 m, chunks)."""
    b = (tl.program_id(0) // leaf_chunks).to(tl.int64)
    chunk = tl.program_id(0) % leaf_chunks
    if tl.load(ints + STATUS * padded + b) != RUNNING:
        return
    begin = chunk * chunk_size
    end = tl.minimum(begin + chunk_size, n)
    f += row_of(f_rows, b, F_ROWS) * n
    x += b * n
    out = partials + b * ((HEAD + 4 * m) * chunks) + (first_chunk + chunk)
    if m > 0:
        j = tl.arange(0, M)
        f_prev += row_of(f_prev_rows, b, F_PREV_ROWS) * n
        unit = tl.load(reals + UNIT * padded + b)
        slot = tl.load(ints + SLOT * padded + b)
        entering = (has_previous != 0) & (unit > 0)
        q = tl.load(norms_of(norms, b, j, m), mask=j < m, other=0.0)
        used = (q > 0) & (j != tl.where(entering, slot, -1))
        history_f, history_g, stride = columns_of(history, b, B, B, N, m, False)
        ff, gg, qq, ww, wg, vg, wv, rhs, across, down, gram_row = reduce(
            f, x, f_prev, x_prev + b * n, history_f + offset, history_g + offset,
            scales + b * m * blocks + first_block, scales + (B.to(tl.int64) + b) * m * blocks + first_block, blocks,
            unit, stride, used, slot, entering, begin, end, C, 1, SCALED, M, BLOCK,
        )  # fmt: skip
        tl.store(out + 2 * chunks, qq.to(tl.float64))
        tl.store(out + 3 * chunks, ww.to(tl.float64))
        tl.store(out + 4 * chunks, wg.to(tl.float64))
        tl.store(out + 5 * chunks, vg.to(tl.float64))
        tl.store(out + 6 * chunks, wv.to(tl.float64))
        place = out + (HEAD + j) * chunks
        tl.store(place, rhs.to(tl.float64), mask=j < m)
        tl.store(place + m * chunks, gram_row.to(tl.float64), mask=j < m)
        if C != 0:
            tl.store(place + 2 * m * chunks, across.to(tl.float64), mask=j < m)
            tl.store(place + 3 * m * chunks, down.to(tl.float64), mask=j < m)
    else:
        ff, gg = squared_norms(f, x, begin, end, reals.dtype.element_ty, BLOCK)
    tl.store(out, ff)
    tl.store(out + chunks, gg)


@triton.jit(do_not_specialize=RUN_ARGUMENTS)
def decide_kernel(
    partials,
    outcomes,
    gammas,
    matrix,
    gram,
    norms,
    ages,
    ints,
    reals,
    settings,
    block_norms,
    running,
    chunks,
    padded,
    max_iter,
    has_previous,
    m: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    USEFUL: tl.constexpr,
    KEEP_BEST: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Add the chunks up, judge the evaluation, solve for gamma."""
    b = tl.program_id(0).to(tl.int64)
    acc = reals.dtype.element_ty
    if tl.load(ints + STATUS * padded + b) != RUNNING:
        tl.store(outcomes + b, 0)
        return
    sums = partials + b * ((HEAD + 4 * m) * chunks)
    ff, gg = total(sums, chunks, CHUNKS), total(sums + chunks, chunks, CHUNKS)
    if m > 0:
        unit = tl.load(reals + UNIT * padded + b)
        slot = tl.load(ints + SLOT * padded + b)
    outcome, steps, new_unit = judge(
        ints, reals, settings, running, b, padded, max_iter, ff, gg, KEEP_BEST, block_norms, BLOCKS
    )
    if m > 0:
        if (outcome & GOING) != 0:
            j = tl.arange(0, M)
            entering = (has_previous != 0) & (unit > 0)
            q = tl.load(norms_of(norms, b, j, m), mask=j < m, other=0.0)
            used = (q > 0) & (j != tl.where(entering, slot, -1))
            qq = total(sums + 2 * chunks, chunks, CHUNKS).to(acc)
            ww = total(sums + 3 * chunks, chunks, CHUNKS).to(acc)
            wg = total(sums + 4 * chunks, chunks, CHUNKS).to(acc)
            vg = total(sums + 5 * chunks, chunks, CHUNKS).to(acc)
            wv = total(sums + 6 * chunks, chunks, CHUNKS).to(acc)
            sums += HEAD * chunks
            rhs = totals(sums, used, chunks, M, CHUNKS).to(acc)
            gram_row = totals(sums + m * chunks, used, chunks, M, CHUNKS).to(acc)
            across = rhs
            down = rhs
            if C != 0:
                across = totals(sums + 2 * m * chunks, used, chunks, M, CHUNKS).to(acc)
                down = totals(sums + 3 * m * chunks, used, chunks, M, CHUNKS).to(acc)
            tl.debug_barrier()
            gamma, full = decide(
                (qq, ww, wg, vg, wv), (rhs, across, down, gram_row), rhs, rhs, outcome, steps, slot, has_previous, b,
                matrix, gram, norms, ages, ints, padded, tl.load(settings + RIDGE).to(acc), m, M, C, USEFUL, False,
            )  # fmt: skip
            tl.store(gammas + b * m + j, gamma * inverse(new_unit), mask=j < m)
            outcome |= tl.where(full, FULL, 0)
    tl.store(outcomes + b, outcome)


@triton.jit(do_not_specialize=RUN_ARGUMENTS)
def mix_kernel(
    f,
    f_rows,
    x,
    x_prev,
    saved,
    history,
    scales,
    gammas,
    outcomes,
    settings,
    flags,
    n,
    offset,
    N,
    first_block,
    blocks,
    first_chunk,
    leaf_chunks,
    chunks,
    chunk_size,
    B,
    m: tl.constexpr,
    M: tl.constexpr,
    MIXED: tl.constexpr,
    SCALED: tl.constexpr,
    F_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one chunk of one tensor of the next iterate."""
    b = (tl.program_id(0) // leaf_chunks).to(tl.int64)
    chunk = tl.program_id(0) % leaf_chunks
    outcome = tl.load(outcomes + b)
    if outcome == 0:
        return
    begin = chunk * chunk_size
    end = tl.minimum(begin + chunk_size, n)
    f += row_of(f_rows, b, F_ROWS) * n
    x += b * n
    x_prev += b * n
    spill_and_rest(x, x_prev, saved + b * n, outcome, begin, end, BLOCK)
    if (outcome & GOING) != 0:
        tl.debug_barrier()
        acc = gammas.dtype.element_ty
        beta = tl.load(settings + MIXING).to(acc)
        if m > 0:
            j = tl.arange(0, M)
            history_f, history_g, stride = columns_of(history, b, B, B, N, m, False)
            finite = mix(
                f, x, x_prev, history_f + offset, history_g + offset, scales + b * m * blocks + first_block,
                scales + (B.to(tl.int64) + b) * m * blocks + first_block, blocks,
                tl.load(gammas + b * m + j, mask=j < m, other=0.0), beta, stride, begin, end,
                MIXED, 1, SCALED, M, BLOCK,
            )  # fmt: skip
        else:
            finite = damp(f, x, x_prev, beta, begin, end, acc, MIXED, BLOCK)
        tl.store(flags + b * chunks + (first_chunk + chunk), (finite == 0).to(tl.int32))


@triton.jit(do_not_specialize=RUN_ARGUMENTS)
def finish_kernel(
    f,
    f_rows,
    x_prev,
    norms,
    outcomes,
    flags,
    ints,
    n,
    chunks,
    padded,
    m: tl.constexpr,
    M: tl.constexpr,
    F_ROWS: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where some chunk of the next iterate is not finite, take f instead; with the LAST tensor, forget the history."""
    b = tl.program_id(0).to(tl.int64)
    outcome = tl.load(outcomes + b)
    if (outcome & GOING) == 0:
        return
    if any_flag(flags + b * chunks, chunks, BLOCK):
        take_f(f + row_of(f_rows, b, F_ROWS) * n, x_prev + b * n, n, BLOCK)
        if LAST:
            forget(norms, ints, b, padded, (outcome & FULL) != 0, m, M)
