"""The small dense part of an Anderson step: enter the new column into the matrices, solve for gamma, choose the slot
of the next column. One sample a program; small matrices lie in tiles of 16 samples, the sample innermost.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .columns import New
from .constants import (
    COUNT,
    EVICTIONS,
    GROWTH_RESTARTS,
    LEAST_USEFUL,
    SLOT,
    SOLVE_FALLBACKS,
    STEP_FALLBACKS,
    TILE,
    UNIT,
)
from .dense import factor_ldl, inverse_diagonal, solve_ldl, solve_lu
from .measure import GREW, RESET
from .tiles import widen


class Method(NamedTuple):
    """What of Anderson's options is compiled in: columns, test space, eviction, evaluations a mix, whether it damps,
    whether columns may be turned.
    """

    m: int
    C: float
    EVICT: int
    MIX_EVERY: int
    MIXED: bool
    TURN: bool


# Where the others lie in `numbers`, float64.
MIXING = tl.constexpr(0)
RIDGE = tl.constexpr(1)
LIMIT = tl.constexpr(2)  # of |W . dG|, below which a column is turned


def method_of(options: Any) -> tuple[Method, list[float]]:
    """An ``AndersonMethod`` as the kernels take it: compiled in, and as numbers."""
    compiled = Method(
        options.m, options.test_space, int(options.evict), options.mix_every, options.mixing != 1, options.turn > 0
    )
    return compiled, [options.mixing, options.ridge, options.turn]


class Small(NamedTuple):
    """What Anderson keeps of every sample's columns: two matrices, two norms a column, the step that wrote it."""

    matrix: Any
    gram: Any
    norms: Any
    ages: Any


@triton.jit
def norms_of(norms, b, j, m: tl.constexpr):
    """Where the sample's ||dG_j|| lie; its ||W_j|| lie m * TILE further."""
    return norms + (b // TILE) * (2 * m * TILE) + b % TILE + j * TILE


@triton.jit
def new_column(sample, norms, has_previous, M: tl.constexpr, method: tl.constexpr):
    """The column that this evaluation brings, unless the sample's unit has to change; before it is judged."""
    m: tl.constexpr = method.m
    unit = tl.load(sample.reals + UNIT * sample.padded)
    slot = tl.load(sample.ints + SLOT * sample.padded)
    adding = (has_previous != 0) & (unit > 0)
    j = tl.arange(0, M)
    place = norms_of(norms, sample.b, j, m)
    q = tl.load(place, mask=j < m, other=0.0)
    space = tl.full((M,), method.C, unit.dtype)
    if method.TURN:
        w = tl.load(place + m * TILE, mask=j < m, other=0.0)
        space = tl.where(w < 0, 0.0, space)
    return New(unit, adding, slot, (q > 0) & (j != tl.where(adding, slot, -1)), space)


@triton.jit
def turns(numbers, wv, qq, TURN: tl.constexpr):
    """Whether a new column takes -dF for W, from W.dG and dG.dG; see deqfast/ops/formulas/anderson.py."""
    limit = tl.load(numbers + LIMIT).to(qq.dtype) if TURN else qq * 0.0
    return tl.abs(wv) < limit * (wv + 2.0 * qq)


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
def _use(h, factors, diagonal, y, age, steps, ridge, n, m: tl.constexpr, M: tl.constexpr, C: tl.constexpr):
    """How useful each column is, the newest infinitely."""
    j = tl.arange(0, M)
    if C != 0:
        factors, diagonal = factor_ldl(tl.where(j[:, None] == j[None, :], h + ridge, h), n, M)
    loss = y * y / inverse_diagonal(factors, diagonal)
    NEWEST: tl.constexpr = m // 3 if m // 3 > 2 else 2
    return tl.where((j < m) & (age <= steps - NEWEST), loss, float("inf"))


@triton.jit
def decide(
    sample,
    small,
    products,
    matrices,
    outcome,
    steps,
    slot,
    has_previous,
    numbers,
    M: tl.constexpr,
    TILED: tl.constexpr,
    method: tl.constexpr,
):
    """Enter the new column into the small matrices, solve them for gamma, choose the slot of the next column.

    ``products`` are those of the new column (see ``columns.Products``); of tiny samples (TILED) all products come in
    the two ``matrices``. Returns gamma and how many columns are evicted.
    """
    b, ints, padded, norms = sample.b, sample.ints, sample.padded, small.norms
    m: tl.constexpr = method.m
    C: tl.constexpr = method.C
    acc = norms.dtype.element_ty
    ridge = tl.load(numbers + RIDGE).to(acc)
    qq, ww = products.qq, products.ww
    j = tl.arange(0, M)
    row, col = j[:, None], j[None, :]
    inside = j < m
    reset, grew = (outcome & RESET) != 0, (outcome & GREW) != 0
    turned = turns(numbers, products.wv, qq, method.TURN)
    twice = tl.where(turned, 2.0, 0.0).to(acc)  # dF = W + 2 dG
    ww += twice * (2.0 * products.wv + 2.0 * qq)
    wv = products.wv + twice * qq
    wg = products.wg + twice * products.vg
    adding = (has_previous != 0) & (reset == 0)
    new = tl.where(adding, slot, -1)
    is_new = j == new
    place = norms_of(norms, b, j, m)
    old_q = tl.load(place, mask=inside, other=0.0)
    old_w = tl.load(place + m * TILE, mask=inside, other=0.0)
    age = tl.load(small.ages + (b // TILE) * (m * TILE) + b % TILE + j * TILE, mask=inside, other=0)
    solve_fallbacks = tl.load(ints + SOLVE_FALLBACKS * padded)
    evictions = tl.load(ints + EVICTIONS * padded)
    growth_restarts = tl.load(ints + GROWTH_RESTARTS * padded)

    new_q = tl.sqrt(qq.to(tl.float64)).to(acc)
    new_w = tl.sqrt(ww.to(tl.float64)).to(acc)
    new_w = tl.where(turned, -new_w, new_w)
    grew = grew & ((C == 0) | (tl.max(((old_q > 0) & (old_w < 0)).to(tl.int32), axis=0) > 0))
    emptied = reset | grew
    q = tl.where(is_new, new_q, tl.where(emptied, 0.0, old_q))
    w = tl.where(is_new, new_w, old_w)
    size = tl.abs(w)
    valid = (q > 0) & (size > 0) & (q < float("inf")) & (size < float("inf"))
    q = tl.where(valid, q, 0.0)
    rq = tl.where(valid, 1.0 / tl.where(valid, q, 1.0), 0.0)
    rw = tl.where(valid, 1.0 / tl.where(valid, w, 1.0), 0.0)
    new_rq = tl.sum(tl.where(is_new, rq, 0.0), axis=0)
    new_rw = tl.sum(tl.where(is_new, rw, 0.0), axis=0)
    both = valid[:, None] & valid[None, :]
    eye = tl.where(row == col, 1.0, 0.0).to(acc)

    if TILED:
        h = matrices[1] * (rq[:, None] * rq[None, :])
        e = matrices[0] * (rw[:, None] * rq[None, :])
    else:
        gram_row = tl.where(is_new, qq, products.gram) * (new_rq * rq)
        h = _enter(small.gram + (b // TILE) * (m * m * TILE) + b % TILE, gram_row, gram_row, j, new, m, True)
        e = h
        if C != 0:
            across = tl.where(is_new, wv, products.across + twice * products.gram) * (new_rw * rq)
            down = tl.where(is_new, wv, products.down) * (new_rq * rw)
            e = _enter(small.matrix + (b // TILE) * (m * m * TILE) + b % TILE, across, down, j, new, m, False)
    rhs = tl.where(is_new, wg if C != 0 else products.vg, products.rhs)
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
    mixes = steps % method.MIX_EVERY == 0
    failed = mixes & (tl.min((tl.abs(y) < float("inf")).to(tl.int32), axis=0) == 0)
    y = tl.where(mixes & (failed == 0), y, 0.0)
    q = tl.where(failed, 0.0, q)
    gamma = tl.where(valid, y * rq, 0.0)
    age = tl.where(is_new, steps, age)

    used = (q > 0) & inside
    count = tl.sum(used.to(tl.int32), axis=0)
    full = count == m
    evicted = full.to(tl.int32)
    next_slot = tl.min(tl.where(inside & (used == 0), j, m), axis=0)
    wanted = tl.where(mixes, method.MIX_EVERY, 1)  # columns for which the mix leaves room
    if m - count < wanted:
        if method.EVICT == LEAST_USEFUL and m > 3:
            use = _use(h, factors, diagonal, y, age, steps, ridge, n, m, M, C)
        else:
            use = age.to(acc)
        if full:
            next_slot = tl.argmin(tl.where(inside, use, float("inf")), axis=0)  # used until it is overwritten
        for _ in tl.static_range(1, method.MIX_EVERY):
            if m - count + full.to(tl.int32) < wanted:
                gone = tl.argmin(tl.where((q > 0) & (j != next_slot), use, float("inf")), axis=0)
                q = tl.where(j == gone, 0.0, q)
                count -= 1
                evicted += 1

    tl.debug_barrier()
    tl.store(place, q, mask=inside)
    tl.store(place + m * TILE, w, mask=inside)
    tl.store(small.ages + (b // TILE) * (m * TILE) + b % TILE + j * TILE, age, mask=inside)
    tl.store(ints + SLOT * padded, next_slot)
    tl.store(ints + COUNT * padded, count)
    tl.store(ints + EVICTIONS * padded, evictions + evicted)
    tl.store(ints + SOLVE_FALLBACKS * padded, solve_fallbacks + failed.to(tl.int32))
    tl.store(ints + GROWTH_RESTARTS * padded, growth_restarts + grew.to(tl.int32))
    return gamma, evicted


@triton.jit
def forget(sample, norms, evicted, m: tl.constexpr, M: tl.constexpr):
    """The step did not stay finite: no column is kept, and none was evicted."""
    fallbacks = tl.load(sample.ints + STEP_FALLBACKS * sample.padded)
    evictions = tl.load(sample.ints + EVICTIONS * sample.padded)
    tl.debug_barrier()
    tl.store(sample.ints + STEP_FALLBACKS * sample.padded, fallbacks + 1)
    if m > 0:
        j = tl.arange(0, M)
        tl.store(norms_of(norms, sample.b, j, m), tl.zeros((M,), norms.dtype.element_ty), mask=j < m)
        tl.store(sample.ints + EVICTIONS * sample.padded, evictions - evicted)
        tl.store(sample.ints + SLOT * sample.padded, 0)
        tl.store(sample.ints + COUNT * sample.padded, 0)


@triton.jit
def all_products(columns, used, space, n, acc: tl.constexpr, C: tl.constexpr, NB: tl.constexpr):
    """W_i.dG_j and dG_i.dG_j of a tiny sample."""
    i = tl.arange(0, NB)
    j = tl.arange(0, used.shape[0])
    place = j[:, None] * columns.stride + (i * TILE)[None, :]
    inside = used[:, None] & (i < n)[None, :]
    v = widen(tl.load(columns.g + place, mask=inside, other=0), acc)
    gram = tl.sum(v[:, None, :] * v[None, :, :], axis=2)
    if C == 0:
        return gram, gram
    else:
        w = widen(tl.load(columns.f + place, mask=inside, other=0), acc) - space[:, None] * v
        return tl.sum(w[:, None, :] * v[None, :, :], axis=2), gram
