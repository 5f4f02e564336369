"""Numbers of a sample, a tile at a time: reading f and the iterate, writing the next one; and sums over chunks.

Around a step an earlier best iterate is saved, a stopped sample put to rest, a step that is not finite replaced.
"""

import triton
import triton.language as tl

from .measure import GOING, SPILL, USE_SAVED


@triton.jit
def widen(t, acc: tl.constexpr):
    """``t`` in the accumulation dtype; 16 bits become 64 by way of 32, for which alone there are instructions."""
    if acc == tl.float64 and t.dtype.primitive_bitwidth < 32:
        return t.to(tl.float32).to(acc)
    else:
        return t.to(acc)


@triton.jit
def residual_tile(f, x, at, inside, acc: tl.constexpr):
    """f and f(x) - x there, in the accumulation dtype."""
    f_tile = widen(tl.load(f + at, mask=inside, other=0.0), acc)
    return f_tile, f_tile - widen(tl.load(x + at, mask=inside, other=0.0), acc)


@triton.jit
def spill_and_rest(iterates, outcome, begin, end, BLOCK: tl.constexpr):
    """Keep the best iterate before it is overwritten; of a stopped sample, put the answer into both buffers."""
    x, x_prev, saved = iterates.x, iterates.x_prev, iterates.saved
    spill, use_saved = (outcome & SPILL) != 0, (outcome & USE_SAVED) != 0
    going = (outcome & GOING) != 0
    if spill | (going == 0):
        for start in range(begin, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < end
            earlier = tl.load(x_prev + at, mask=inside, other=0.0)
            kept = tl.where(spill, earlier, tl.load(saved + at, mask=inside, other=0.0))
            answer = tl.where(use_saved, kept, tl.load(x + at, mask=inside, other=0.0))
            tl.debug_barrier()
            tl.store(saved + at, kept, mask=at < tl.where(spill, end, begin))
            tl.store(x + at, answer, mask=at < tl.where(going, begin, end))
            tl.store(x_prev + at, answer, mask=at < tl.where(going, begin, end))


@triton.jit
def outcome_of(handed, iterates, b, begin, end, BLOCK: tl.constexpr):
    """What was decided of sample b (0: it had stopped before), after its part of `spill_and_rest`."""
    outcome = tl.load(handed.outcomes + b)
    if outcome != 0:
        spill_and_rest(iterates, outcome, begin, end, BLOCK)
    return outcome


@triton.jit
def write_tile(x_prev, at, inside, value):
    """Round ``value`` into the next iterate; 1 where what was written is not finite."""
    new = value.to(x_prev.dtype.element_ty)
    tl.store(x_prev + at, new, mask=inside)
    finite = tl.abs(new.to(value.dtype)) < float("inf")
    return (inside & (finite == 0)).to(tl.int32)


@triton.jit
def squared_norms(f, x, begin, end, acc: tl.constexpr, BLOCK: tl.constexpr):
    """||f||^2 and ||f - x||^2 over [begin, end), in float64."""
    ff = tl.zeros((BLOCK,), tl.float64)
    gg = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        f_tile, g = residual_tile(f, x, at, at < end, acc)
        ff += f_tile.to(tl.float64) * f_tile.to(tl.float64)
        gg += g.to(tl.float64) * g.to(tl.float64)
    return tl.sum(ff, axis=0), tl.sum(gg, axis=0)


@triton.jit
def damp(f, x, x_prev, beta, begin, end, acc: tl.constexpr, MIXED: tl.constexpr, BLOCK: tl.constexpr):
    """Write x + beta (f - x), or f where beta is 1 (not MIXED); whether all of it is finite."""
    infinite = tl.zeros((BLOCK,), tl.int32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        value, g = residual_tile(f, x, at, inside, acc)
        if MIXED:
            value = widen(tl.load(x + at, mask=inside, other=0.0), acc) + beta * g
        infinite |= write_tile(x_prev, at, inside, value)
    return tl.max(infinite, axis=0) == 0


@triton.jit
def take_f(f, x_prev, n, BLOCK: tl.constexpr):
    """The Picard step: x' = f."""
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(f + at, mask=at < n, other=0.0)
        tl.store(x_prev + at, value.to(x_prev.dtype.element_ty), mask=at < n)


@triton.jit
def any_flag(flags, chunks, CHUNKS: tl.constexpr):
    """Whether any of the sample's chunks was marked."""
    found = tl.zeros((CHUNKS,), tl.int32)
    for start in range(0, chunks, CHUNKS):
        at = start + tl.arange(0, CHUNKS)
        found = tl.maximum(found, tl.load(flags + at, mask=at < chunks, other=0))
    return tl.max(found, axis=0) > 0


@triton.jit
def total(partials, chunks, CHUNKS: tl.constexpr):
    """The sum of a product over the sample's chunks, in order."""
    sums = tl.zeros((CHUNKS,), tl.float64)
    for start in range(0, chunks, CHUNKS):
        at = start + tl.arange(0, CHUNKS)
        sums += tl.load(partials + at, mask=at < chunks, other=0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def totals(partials, used, chunks, M: tl.constexpr, CHUNKS: tl.constexpr):
    """The same for M products, one after the other in memory; 0 where not ``used``."""
    sums = tl.zeros((M, CHUNKS), tl.float64)
    product = tl.arange(0, M)[:, None]
    for start in range(0, chunks, CHUNKS):
        at = start + tl.arange(0, CHUNKS)[None, :]
        sums += tl.load(partials + product * chunks + at, mask=used[:, None] & (at < chunks), other=0.0)
    return tl.sum(sums, axis=1)
