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
from .dense import factor_ldl, inverse_diagonal, solve_ldl, solve_lu
from .measure import (
    COUNT,
    EVICTIONS,
    FULL,
    GOING,
    GREW,
    GROWTH_RESTARTS,
    MIXING,
    RESET,
    RIDGE,
    RUNNING,
    SLOT,
    SOLVE_FALLBACKS,
    STATUS,
    STEP_FALLBACKS,
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
    widen,
)

TILE = tl.constexpr(16)  # samples whose small matrices lie interleaved
HEAD = tl.constexpr(7)  # products that are not one for every column

# Arguments that belong to a batch or a run: nothing that decides the order of a sum may be specialised on them.
RUN_ARGUMENTS = ["B", "padded", "max_iter", "has_previous", "tiles"]


@triton.jit
def _norms(norms, b, j, m: tl.constexpr):
    """Where the sample's ||dG_j|| lie; its ||W_j|| lie m * TILE further."""
    return norms + (b // TILE) * (2 * m * TILE) + b % TILE + j * TILE


@triton.jit
def _history(history, b, B, tiles, N, m: tl.constexpr, TILED: tl.constexpr):
    """Where the sample's columns of dF and of dG begin, and how far apart they are."""
    if TILED:
        start = (b // TILE) * (m * N * TILE) + b % TILE
        return history + start, history + tiles.to(tl.int64) * (m * N * TILE) + start, N * TILE
    else:
        size = m * tl.cast(N, tl.int64)
        return history + b * size, history + (B.to(tl.int64) + b) * size, tl.cast(N, tl.int64)


@triton.jit
def _enter(pointer, across, down, j, new, m: tl.constexpr, LOWER: tl.constexpr):
    """A small matrix with the row and column ``new`` (-1: none) entered; LOWER: symmetric, the upper part not kept."""
    row, col = j[:, None], j[None, :]
    inside = (row < m) & (col < m)
    if LOWER:
        place = pointer + (tl.maximum(row, col) * m + tl.minimum(row, col)) * TILE
    else:
        place = pointer + (row * m + col) * TILE
    old = tl.load(place, mask=inside, other=0.0)
    entered = tl.where(row == new, across[None, :], tl.where(col == new, down[:, None], old))
    tl.debug_barrier()
    changed = inside & ((row == new) | (col == new))
    if LOWER:
        changed = changed & (row >= col)
    tl.store(place, entered, mask=changed)
    return entered


@triton.jit
def _victim(h, factors, diagonal, y, age, steps, ridge, n, m: tl.constexpr, M: tl.constexpr, C: tl.constexpr):
    """The least useful column of a full history that is not among the newest."""
    j = tl.arange(0, M)
    if C != 0:
        factors, diagonal = factor_ldl(tl.where(j[:, None] == j[None, :], h + ridge, h), n, M)
    loss = y * y / inverse_diagonal(factors, diagonal)
    NEWEST: tl.constexpr = m // 3 if m // 3 > 2 else 2
    return tl.argmin(tl.where((j < m) & (age <= steps - NEWEST), loss, float("inf")), axis=0)


@triton.jit
def _decide(
    sums,
    columns,
    matrix_products,
    gram_products,
    outcome,
    steps,
    slot,
    has_previous,
    b,
    matrix,
    gram,
    norms,
    ages,
    ints,
    padded,
    ridge,
    m: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    USEFUL: tl.constexpr,
    TILED: tl.constexpr,
):
    """Enter the new column into the small matrices, solve them for gamma, choose the slot of the next column.

    ``sums`` and ``columns`` are the products of the new column and those with every column (see ``columns.reduce``);
    of tiny samples (TILED) all products come in the two matrices. Returns gamma and whether a column will be evicted.
    """
    acc = norms.dtype.element_ty
    qq, ww, wg, vg, wv = sums
    rhs, across, down, gram_row = columns
    j = tl.arange(0, M)
    row, col = j[:, None], j[None, :]
    inside = j < m
    reset, grew = (outcome & RESET) != 0, (outcome & GREW) != 0
    adding = (has_previous != 0) & (reset == 0)
    new = tl.where(adding, slot, -1)
    is_new = j == new
    place = _norms(norms, b, j, m)
    old_q = tl.load(place, mask=inside, other=0.0)
    old_w = tl.load(place + m * TILE, mask=inside, other=0.0)
    age = tl.load(ages + (b // TILE) * (m * TILE) + b % TILE + j * TILE, mask=inside, other=0)
    solve_fallbacks = tl.load(ints + SOLVE_FALLBACKS * padded + b)
    evictions = tl.load(ints + EVICTIONS * padded + b)
    growth_restarts = tl.load(ints + GROWTH_RESTARTS * padded + b)

    new_q = tl.sqrt(qq.to(tl.float64)).to(acc)
    new_w = tl.sqrt(ww.to(tl.float64)).to(acc)
    forget = reset | (grew & (C == 0))
    q = tl.where(is_new, new_q, tl.where(forget, 0.0, old_q))
    w = tl.where(is_new, new_w, old_w)
    valid = (q > 0) & (w > 0) & (q < float("inf")) & (w < float("inf"))
    q = tl.where(valid, q, 0.0)
    rq = tl.where(valid, 1.0 / tl.where(valid, q, 1.0), 0.0)
    rw = tl.where(valid, 1.0 / tl.where(valid, w, 1.0), 0.0)
    new_rq = tl.sum(tl.where(is_new, rq, 0.0), axis=0)
    new_rw = tl.sum(tl.where(is_new, rw, 0.0), axis=0)
    both = valid[:, None] & valid[None, :]
    eye = tl.where(row == col, 1.0, 0.0).to(acc)

    if TILED:
        h = gram_products * (rq[:, None] * rq[None, :])
        e = matrix_products * (rw[:, None] * rq[None, :])
    else:
        gram_row = tl.where(is_new, qq, gram_row) * (new_rq * rq)
        h = _enter(gram + (b // TILE) * (m * m * TILE) + b % TILE, gram_row, gram_row, j, new, m, True)
        e = h
        if C != 0:
            across = tl.where(is_new, wv, across) * (new_rw * rq)
            down = tl.where(is_new, wv, down) * (new_rq * rw)
            e = _enter(matrix + (b // TILE) * (m * m * TILE) + b % TILE, across, down, j, new, m, False)
    rhs = tl.where(is_new, wg if C != 0 else vg, rhs)
    h = tl.where(both, h, eye)
    factors, diagonal = h, q
    n = tl.max(tl.where(valid, j + 1, 0), axis=0)  # columns beyond this are empty
    if C == 0:
        y = tl.where(valid, rhs * rq, 0.0)
        factors, diagonal = factor_ldl(tl.where(row == col, h + ridge, h), n, M)
        y = solve_ldl(factors, diagonal, y)
        y = tl.where(tl.min(diagonal, axis=0) > 0, y, float("nan"))
    else:
        y = tl.where(valid, -rhs * rw, 0.0)
        y = solve_lu(tl.where(both, tl.where(row == col, ridge - e, -e), eye), y, n, M)
    failed = tl.min((tl.abs(y) < float("inf")).to(tl.int32), axis=0) == 0
    y = tl.where(failed, 0.0, y)
    q = tl.where(failed, 0.0, q)
    gamma = tl.where(valid, y * rq, 0.0)
    age = tl.where(is_new, steps, age)

    used = (q > 0) & inside
    count = tl.sum(used.to(tl.int32), axis=0)
    full = count == m
    next_slot = tl.min(tl.where(inside & (used == 0), j, m), axis=0)
    if full:
        if USEFUL and m > 3:
            next_slot = _victim(h, factors, diagonal, y, age, steps, ridge, n, m, M, C)
        else:
            next_slot = tl.argmin(tl.where(inside, age, 2147483647), axis=0)

    tl.debug_barrier()
    tl.store(place, q, mask=inside)
    tl.store(place + m * TILE, w, mask=inside)
    tl.store(ages + (b // TILE) * (m * TILE) + b % TILE + j * TILE, age, mask=inside)
    tl.store(ints + SLOT * padded + b, next_slot)
    tl.store(ints + COUNT * padded + b, count)
    tl.store(ints + EVICTIONS * padded + b, evictions + full.to(tl.int32))
    tl.store(ints + SOLVE_FALLBACKS * padded + b, solve_fallbacks + failed.to(tl.int32))
    tl.store(ints + GROWTH_RESTARTS * padded + b, growth_restarts + (grew & (C == 0)).to(tl.int32))
    return gamma, full


@triton.jit
def _forget(norms, ints, b, padded, full, m: tl.constexpr, M: tl.constexpr):
    """The step did not stay finite: no column is kept, and none was evicted."""
    fallbacks = tl.load(ints + STEP_FALLBACKS * padded + b)
    evictions = tl.load(ints + EVICTIONS * padded + b)
    tl.debug_barrier()
    tl.store(ints + STEP_FALLBACKS * padded + b, fallbacks + 1)
    if m > 0:
        j = tl.arange(0, M)
        tl.store(_norms(norms, b, j, m), tl.zeros((M,), norms.dtype.element_ty), mask=j < m)
        tl.store(ints + EVICTIONS * padded + b, evictions - full.to(tl.int32))
        tl.store(ints + SLOT * padded + b, 0)
        tl.store(ints + COUNT * padded + b, 0)


@triton.jit
def _all_products(
    history_f, history_g, column_stride, used, n, acc: tl.constexpr, C: tl.constexpr, ES: tl.constexpr, NB: tl.constexpr
):
    """W_i.dG_j and dG_i.dG_j of a tiny sample."""
    i = tl.arange(0, NB)
    j = tl.arange(0, used.shape[0])
    place = j[:, None] * column_stride + (i * ES)[None, :]
    inside = used[:, None] & (i < n)[None, :]
    v = widen(tl.load(history_g + place, mask=inside, other=0), acc)
    gram = tl.sum(v[:, None, :] * v[None, :, :], axis=2)
    if C == 0:
        return gram, gram
    else:
        w = widen(tl.load(history_f + place, mask=inside, other=0), acc) - C * v
        return tl.sum(w[:, None, :] * v[None, :, :], axis=2), gram


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
        q = tl.load(_norms(norms, b, j, m), mask=j < m, other=0.0)
        used = (q > 0) & (j != tl.where(entering, slot, -1))
        history_f, history_g, stride = _history(history, b, B, tiles, N, m, TILED)
        scales_f = scales + b * m * blocks
        scales_g = scales + (B.to(tl.int64) + b) * m * blocks
        ff, gg, qq, ww, wg, vg, wv, rhs, across, down, gram_row = reduce(
            f, x, f_prev, x_prev, history_f, history_g, scales_f, scales_g, blocks, unit, stride, used, slot, entering,
            0, N, C, ES, SCALED, M, BLOCK,
        )  # fmt: skip
    else:
        ff, gg = squared_norms(f, x, 0, N, acc, BLOCK)
    outcome, steps, unit = judge(ints, reals, settings, running, b, padded, max_iter, ff, gg, KEEP_BEST)
    tl.debug_barrier()
    spill_and_rest(x, x_prev, saved, outcome, 0, N, BLOCK)
    if (outcome & GOING) != 0:
        tl.debug_barrier()
        if m > 0:
            products = across[:, None], across[:, None]
            if TILED:
                products = _all_products(
                    history_f, history_g, stride, used | (j == tl.where(entering, slot, -1)), N, acc, C, ES, BLOCK
                )
            gamma, full = _decide(
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
            _forget(norms, ints, b, padded, full, m, M)


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
        q = tl.load(_norms(norms, b, j, m), mask=j < m, other=0.0)
        used = (q > 0) & (j != tl.where(entering, slot, -1))
        history_f, history_g, stride = _history(history, b, B, B, N, m, False)
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
    outcome, steps, new_unit = judge(ints, reals, settings, running, b, padded, max_iter, ff, gg, KEEP_BEST)
    if m > 0:
        if (outcome & GOING) != 0:
            j = tl.arange(0, M)
            entering = (has_previous != 0) & (unit > 0)
            q = tl.load(_norms(norms, b, j, m), mask=j < m, other=0.0)
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
            gamma, full = _decide(
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
            history_f, history_g, stride = _history(history, b, B, B, N, m, False)
            finite = mix(
                f, x, x_prev, history_f + offset, history_g + offset, scales + b * m * blocks + first_block,
                scales + (B.to(tl.int64) + b) * m * blocks + first_block, blocks,
                tl.load(gammas + b * m + j, mask=j < m, other=0.0), beta, stride, begin, end, MIXED, 1, SCALED, M, BLOCK,
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
            _forget(norms, ints, b, padded, (outcome & FULL) != 0, m, M)
