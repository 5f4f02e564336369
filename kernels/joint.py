"""The joint map in Triton. What moves, per number: the iterate and what f or its gradient gave are read, the mapped
state is written, at once with the norms of the block: 3s. x is read once more for each norm its step needs first.

A program a chunk; each tensor has launches of its own: `square` where x's step needs a norm (of its gradient, of its
distance from the ball's centre), `map`, and once a step `norms` (a program a sample). Sums are in float64 and added up
in an order that depends on the sizes of a sample alone.
"""

import triton
import triton.language as tl

from .measure import RUNNING, STATUS, total, widen

# Where the numbers of a solve lie in `settings`, float64.
RATE = tl.constexpr(0)
DAMPING = tl.constexpr(1)  # of z, of mu
RADIUS = tl.constexpr(3)
LOW = tl.constexpr(4)
HIGH = tl.constexpr(5)

# Rows of `partials` (B, 4, chunks).
MOVED = tl.constexpr(0)
SIZE = tl.constexpr(1)
GRADIENT = tl.constexpr(2)
DISTANCE = tl.constexpr(3)
ROWS = tl.constexpr(4)

NONE = tl.constexpr(0)
L2 = tl.constexpr(1)
LINF = tl.constexpr(2)

INPUT = tl.constexpr(2)  # x's block

RUN_ARGUMENTS = ["padded"]


@triton.jit
def rate_of(partials, settings, first_input, chunks, NORMALIZE: tl.constexpr, CHUNKS: tl.constexpr):
    """What x's gradient is multiplied with."""
    rate = tl.load(settings + RATE)
    if NORMALIZE:
        norm = tl.sqrt(total(partials + GRADIENT * chunks + first_input, chunks - first_input, CHUNKS))
        rate = tl.where(norm > 0, rate / tl.where(norm > 0, norm, 1.0), 0.0)
    return rate


@triton.jit
def shrink_of(partials, settings, first_input, chunks, CHUNKS: tl.constexpr):
    """What the way from the centre of an L2 ball is multiplied with."""
    norm = tl.sqrt(total(partials + DISTANCE * chunks + first_input, chunks - first_input, CHUNKS))
    radius = tl.load(settings + RADIUS)
    return tl.where(norm > radius, radius / tl.where(norm > radius, norm, 1.0), 1.0)


@triton.jit
def square(t):
    """In float64: no square of a finite float32 overflows or vanishes there."""
    return t.to(tl.float64) * t.to(tl.float64)


@triton.jit
def load_center(center, at, inside, CENTERED: tl.constexpr):
    """The ball's centre there; the origin without one."""
    return tl.load(center + at, mask=inside, other=0.0) if CENTERED else 0.0


@triton.jit
def clamp(t, low, high):
    """``t`` within [low, high]; NaN stays NaN."""
    t = tl.where(t < low, low, t)
    return tl.where(t > high, high, t)


@triton.jit(do_not_specialize=RUN_ARGUMENTS)
def square_kernel(
    value,
    v,
    center,
    ints,
    settings,
    partials,
    n,
    first_chunk,
    leaf_chunks,
    chunks,
    chunk_size,
    first_input,
    padded,
    DOUBLE: tl.constexpr,
    AWAY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CENTERED: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Squares over a chunk of x: of its gradient, or of the way from the centre to where the step leads (AWAY)."""
    b = (tl.program_id(0) // leaf_chunks).to(tl.int64)
    chunk = tl.program_id(0) % leaf_chunks
    if tl.load(ints + STATUS * padded + b) != RUNNING:
        return
    acc: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    begin = chunk * chunk_size
    end = tl.minimum(begin + chunk_size, n)
    value += b * n
    v += b * n
    if CENTERED:
        center += b * n
    partials += b * (ROWS * chunks)
    if AWAY:
        rate = rate_of(partials, settings, first_input, chunks, NORMALIZE, CHUNKS).to(acc)
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        t = widen(tl.load(value + at, mask=inside, other=0.0), acc)
        if AWAY:
            t = widen(tl.load(v + at, mask=inside, other=0.0), acc) - rate * t
            t -= load_center(center, at, inside, CENTERED)
        sums += square(t)
    row = DISTANCE if AWAY else GRADIENT
    tl.store(partials + row * chunks + (first_chunk + chunk), tl.sum(sums, axis=0))


@triton.jit(do_not_specialize=RUN_ARGUMENTS)
def map_kernel(
    value,
    v,
    mapped,
    center,
    ints,
    settings,
    partials,
    n,
    first_chunk,
    leaf_chunks,
    chunks,
    chunk_size,
    first_input,
    padded,
    DOUBLE: tl.constexpr,
    BLOCK_OF: tl.constexpr,
    DAMPED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BALL: tl.constexpr,
    BOXED: tl.constexpr,
    CENTERED: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mapped state of one chunk of one tensor, and its part of the block's norms."""
    b = (tl.program_id(0) // leaf_chunks).to(tl.int64)
    chunk = tl.program_id(0) % leaf_chunks
    if tl.load(ints + STATUS * padded + b) != RUNNING:
        return
    acc: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    begin = chunk * chunk_size
    end = tl.minimum(begin + chunk_size, n)
    value += b * n
    v += b * n
    mapped += b * n
    if CENTERED:
        center += b * n
    partials += b * (ROWS * chunks)
    if BLOCK_OF == INPUT:
        rate = rate_of(partials, settings, first_input, chunks, NORMALIZE, CHUNKS).to(acc)
        if BALL == L2:
            shrink = shrink_of(partials, settings, first_input, chunks, CHUNKS).to(acc)
        radius = tl.load(settings + RADIUS).to(acc)
        low, high = tl.load(settings + LOW).to(acc), tl.load(settings + HIGH).to(acc)
    else:
        rate = tl.load(settings + DAMPING + BLOCK_OF).to(acc)
    moved = tl.zeros((BLOCK,), tl.float64)
    size = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        to = widen(tl.load(value + at, mask=inside, other=0.0), acc)
        now = widen(tl.load(v + at, mask=inside, other=0.0), acc)
        if BLOCK_OF == INPUT:
            to = now - rate * to
            middle = load_center(center, at, inside, CENTERED)
            if BALL == L2:
                to = middle + shrink * (to - middle)
            if BALL == LINF:
                to = clamp(to, middle - radius, middle + radius)
            if BOXED:
                to = clamp(to, low, high)
            to = tl.where(inside, to, 0.0)
        new = to
        if DAMPED:
            new = now + rate * (to - now)
        tl.store(mapped + at, new.to(mapped.dtype.element_ty), mask=inside)
        moved += square(to - now)
        size += square(to)
    out = partials + (first_chunk + chunk)
    tl.store(out + MOVED * chunks, tl.sum(moved, axis=0))
    tl.store(out + SIZE * chunks, tl.sum(size, axis=0))


@triton.jit(do_not_specialize=RUN_ARGUMENTS)
def norms_kernel(
    block_norms,
    ints,
    partials,
    cost,
    first_adjoint,
    first_input,
    chunks,
    padded,
    WITH_COST: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Add the chunks up: how far each block of a sample moves and how large it is.

    A cost that is no number makes the first norm of the adjoint none.
    """
    b = tl.program_id(0).to(tl.int64)
    if tl.load(ints + STATUS * padded + b) != RUNNING:
        return
    for which in tl.static_range(2):
        row = partials + (b * ROWS + which) * chunks
        place = block_norms + which * padded + b
        tl.store(place, tl.sqrt(total(row, first_adjoint, CHUNKS)))
        adjoint = tl.sqrt(total(row + first_adjoint, first_input - first_adjoint, CHUNKS))
        if WITH_COST and which == 0:
            given = tl.load(cost + b)
            adjoint += (given - given).to(tl.float64)
        tl.store(place + 2 * padded, adjoint)
        if BLOCKS > 2:
            tl.store(place + 4 * padded, tl.sqrt(total(row + first_input, chunks - first_input, CHUNKS)))
