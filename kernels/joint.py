"""The joint map in Triton. What moves, per number: the iterate and what f or its gradient gave are read, the mapped
state is written, at once with the norms of the block: 3s. x is read once more for each norm its step needs first.

A program a chunk; each tensor has launches of its own: `square` where x's step needs a norm (of its gradient, of its
distance from the ball's centre), `map`, and once a step `norms` (a program a sample). Sums are in float64 and added up
in an order that depends on the sizes of a sample alone.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import RUN, chunk_of, has_status, sample_of
from .constants import INPUT, L2, LINF, RUNNING
from .tiles import total, widen

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


class Tensors(NamedTuple):
    """One tensor of the state, rows of n numbers: what f or its gradient gave, the iterate, the mapped state, and the
    centre of a ball around it (None: the origin).
    """

    value: Any
    v: Any
    mapped: Any
    center: Any


class Sums(NamedTuple):
    """The numbers of a solve, sums over chunks, and the chunks that the blocks of mu and of x begin with."""

    settings: Any
    partials: Any
    first_adjoint: Any
    first_input: Any


class Step(NamedTuple):
    """How the tensors of one block move: which block it is, whether damped; of x, how its step is made."""

    BLOCK_OF: int
    DAMPED: bool
    NORMALIZE: bool
    BALL: int
    BOXED: bool


@triton.jit
def rate_of(partials, sums, chunks, NORMALIZE: tl.constexpr, CHUNKS: tl.constexpr):
    """What x's gradient is multiplied with."""
    rate = tl.load(sums.settings + RATE)
    if NORMALIZE:
        first = sums.first_input
        norm = tl.sqrt(total(partials + GRADIENT * chunks + first, chunks - first, CHUNKS))
        rate = tl.where(norm > 0, rate / tl.where(norm > 0, norm, 1.0), 0.0)
    return rate


@triton.jit
def shrink_of(partials, sums, chunks, CHUNKS: tl.constexpr):
    """What the way from the centre of an L2 ball is multiplied with."""
    first = sums.first_input
    norm = tl.sqrt(total(partials + DISTANCE * chunks + first, chunks - first, CHUNKS))
    radius = tl.load(sums.settings + RADIUS)
    return tl.where(norm > radius, radius / tl.where(norm > radius, norm, 1.0), 1.0)


@triton.jit
def square(t):
    """In float64: no square of a finite float32 overflows or vanishes there."""
    return t.to(tl.float64) * t.to(tl.float64)


@triton.jit
def load_center(center, at, inside):
    """The ball's centre there; the origin without one."""
    if center is None:
        return 0.0
    else:
        return tl.load(center + at, mask=inside, other=0.0)


@triton.jit
def clamp(t, low, high):
    """``t`` within [low, high]; NaN stays NaN."""
    t = tl.where(t < low, low, t)
    return tl.where(t > high, high, t)


@triton.jit(do_not_specialize=RUN)
def square_kernel(
    tensors,
    statistics,
    sums,
    chunks,
    padded,
    AWAY: tl.constexpr,
    step: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Squares over a chunk of x: of its gradient, or of the way from the centre to where the step leads (AWAY)."""
    b, begin, end, chunk = chunk_of(chunks)
    if has_status(sample_of(statistics, b, padded), RUNNING) == 0:
        return
    acc = statistics.reals.dtype.element_ty
    row = b * chunks.n
    partials = sums.partials + b * (ROWS * chunks.total)
    if AWAY:
        rate = rate_of(partials, sums, chunks.total, step.NORMALIZE, CHUNKS).to(acc)
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        t = widen(tl.load(tensors.value + row + at, mask=inside, other=0.0), acc)
        if AWAY:
            t = widen(tl.load(tensors.v + row + at, mask=inside, other=0.0), acc) - rate * t
            t -= load_center(tensors.center, row + at, inside)
        squares += square(t)
    which = DISTANCE if AWAY else GRADIENT
    tl.store(partials + which * chunks.total + chunk, tl.sum(squares, axis=0))


@triton.jit(do_not_specialize=RUN)
def map_kernel(
    tensors,
    statistics,
    sums,
    chunks,
    padded,
    step: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mapped state of one chunk of one tensor, and its part of the block's norms."""
    b, begin, end, chunk = chunk_of(chunks)
    if has_status(sample_of(statistics, b, padded), RUNNING) == 0:
        return
    acc = statistics.reals.dtype.element_ty
    row = b * chunks.n
    settings, mapped = sums.settings, tensors.mapped + row
    partials = sums.partials + b * (ROWS * chunks.total)
    if step.BLOCK_OF == INPUT:
        rate = rate_of(partials, sums, chunks.total, step.NORMALIZE, CHUNKS).to(acc)
        if step.BALL == L2:
            shrink = shrink_of(partials, sums, chunks.total, CHUNKS).to(acc)
        radius = tl.load(settings + RADIUS).to(acc)
        low, high = tl.load(settings + LOW).to(acc), tl.load(settings + HIGH).to(acc)
    else:
        rate = tl.load(settings + DAMPING + step.BLOCK_OF).to(acc)
    moved = tl.zeros((BLOCK,), tl.float64)
    size = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        to = widen(tl.load(tensors.value + row + at, mask=inside, other=0.0), acc)
        now = widen(tl.load(tensors.v + row + at, mask=inside, other=0.0), acc)
        if step.BLOCK_OF == INPUT:
            to = now - rate * to
            middle = load_center(tensors.center, row + at, inside)
            if step.BALL == L2:
                to = middle + shrink * (to - middle)
            if step.BALL == LINF:
                to = clamp(to, middle - radius, middle + radius)
            if step.BOXED:
                to = clamp(to, low, high)
            to = tl.where(inside, to, 0.0)
        new = to
        if step.DAMPED:
            new = now + rate * (to - now)
        tl.store(mapped + at, new.to(mapped.dtype.element_ty), mask=inside)
        moved += square(to - now)
        size += square(to)
    out = partials + chunk
    tl.store(out + MOVED * chunks.total, tl.sum(moved, axis=0))
    tl.store(out + SIZE * chunks.total, tl.sum(size, axis=0))


@triton.jit(do_not_specialize=RUN)
def norms_kernel(
    block_norms,
    statistics,
    sums,
    cost,
    chunks,
    padded,
    BLOCKS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Add the chunks up: how far each block of a sample moves and how large it is.

    A cost (None: there is none) that is no number makes the first norm of the adjoint none.
    """
    b = tl.program_id(0).to(tl.int64)
    if has_status(sample_of(statistics, b, padded), RUNNING) == 0:
        return
    first_adjoint, first_input = sums.first_adjoint, sums.first_input
    for which in tl.static_range(2):
        row = sums.partials + (b * ROWS + which) * chunks
        place = block_norms + which * padded + b
        tl.store(place, tl.sqrt(total(row, first_adjoint, CHUNKS)))
        adjoint = tl.sqrt(total(row + first_adjoint, first_input - first_adjoint, CHUNKS))
        if cost is not None:
            if which == 0:
                given = tl.load(cost + b)
                adjoint += (given - given).to(tl.float64)
        tl.store(place + 2 * padded, adjoint)
        if BLOCKS > 2:
            tl.store(place + 4 * padded, tl.sqrt(total(row + first_input, chunks - first_input, CHUNKS)))
