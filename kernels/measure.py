"""What both solvers do with a new evaluation before they use it: stopping, best iterate, unit; and what happens around
a step: an earlier best iterate is saved, a stopped sample put to rest, a step that is not finite replaced.

Every thread of a program reads the per-sample numbers and one of them writes, so that all reads of a place come before
a barrier and all writes after it.
"""

import triton
import triton.language as tl

from deqfast.ops.codes import At, Int, Real
from deqfast.status import Status

STATUS = tl.constexpr(int(Int.STATUS))
STEPS = tl.constexpr(int(Int.STEPS))
BEST_AT = tl.constexpr(int(Int.BEST_AT))
BEST_STEP = tl.constexpr(int(Int.BEST_STEP))
SLOT = tl.constexpr(int(Int.SLOT))
COUNT = tl.constexpr(int(Int.COUNT))
SOLVE_FALLBACKS = tl.constexpr(int(Int.SOLVE_FALLBACKS))
STEP_FALLBACKS = tl.constexpr(int(Int.STEP_FALLBACKS))
GROWTH_RESTARTS = tl.constexpr(int(Int.GROWTH_RESTARTS))
RESCALES = tl.constexpr(int(Int.RESCALES))
EVICTIONS = tl.constexpr(int(Int.EVICTIONS))
FULL_RESTARTS = tl.constexpr(int(Int.FULL_RESTARTS))
DENOMINATOR_RESTARTS = tl.constexpr(int(Int.DENOMINATOR_RESTARTS))

RESIDUAL = tl.constexpr(int(Real.RESIDUAL))
NORM = tl.constexpr(int(Real.NORM))
BEST = tl.constexpr(int(Real.BEST))
FIRST = tl.constexpr(int(Real.FIRST))
UNIT = tl.constexpr(int(Real.UNIT))
SCALE = tl.constexpr(int(Real.SCALE))

RUNNING = tl.constexpr(int(Status.RUNNING))
CONVERGED = tl.constexpr(int(Status.CONVERGED))
MAX_ITER = tl.constexpr(int(Status.MAX_ITER))
DIVERGED = tl.constexpr(int(Status.DIVERGED))
NON_FINITE = tl.constexpr(int(Status.NON_FINITE))
STALLED = tl.constexpr(int(Status.STALLED))

NOWHERE = tl.constexpr(int(At.NOWHERE))
CURRENT = tl.constexpr(int(At.CURRENT))
PREVIOUS = tl.constexpr(int(At.PREVIOUS))
SAVED = tl.constexpr(int(At.SAVED))

# What was decided for a sample, as bits.
GOING = tl.constexpr(1)  # not stopped by this evaluation
RESET = tl.constexpr(2)  # the unit was set or changed: no history, no new column
SPILL = tl.constexpr(4)  # x_prev holds the best iterate and is about to be overwritten
USE_SAVED = tl.constexpr(8)  # the answer of a stopped sample lies in `saved`, else in x
GREW = tl.constexpr(16)  # the residual grew by more than GROWTH_LIMIT
FULL = tl.constexpr(32)  # a column was marked for eviction
BAD = tl.constexpr(64)  # Broyden: the denominator vanished, the step is a plain one
JUDGED = tl.constexpr(128)  # the sample was running when the step began

# Where the numbers of a solve lie in `settings`, float64: arguments of a launch would be rounded to float32.
RTOL = tl.constexpr(0)
ATOL = tl.constexpr(1)
ROOT_N = tl.constexpr(2)
MIXING = tl.constexpr(3)
RIDGE = tl.constexpr(4)
RULES = tl.constexpr(5)  # rtol, atol and weight of each block of a state that is judged by its blocks

UNIT_RANGE = tl.constexpr(2.0**40)
GROWTH_LIMIT = tl.constexpr(1.5)
DIVERGENCE = tl.constexpr(10.0)
STALL_FRACTION = tl.constexpr(3)
STALL_MIN_STEPS = tl.constexpr(10)


@triton.jit
def exponent(value):
    """That of ``frexp`` for a positive finite float64, not below -1022."""
    bits = value.to(tl.int64, bitcast=True)
    return ((bits >> 52) & 0x7FF) - 1022


@triton.jit
def power_of_two(power):
    """2**power in float64 for an int64 of a normal number."""
    return ((power + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def inverse(unit):
    """1 / unit for a power of two, exactly; 0 becomes 1."""
    whole = tl.where(unit > 0, unit, 1.0).to(tl.float64)
    return (1.0 / whole).to(unit.dtype)


@triton.jit
def new_unit(norm, root_n, unit, LIMIT: tl.constexpr):
    """The sample's unit, and whether it had to be set or changed."""
    rms = norm / root_n
    scaled = rms * unit.to(tl.float64)
    fits = (scaled >= 1.0 / UNIT_RANGE) & (scaled <= UNIT_RANGE)
    reset = (rms > 0) & (rms < float("inf")) & (fits == 0)
    power = tl.minimum(tl.maximum(exponent(rms), -LIMIT), LIMIT)
    fresh = tl.where(reset, power_of_two(1 - power), tl.where(unit == 0, 1.0, unit.to(tl.float64)))
    return fresh.to(unit.dtype), reset


@triton.jit
def ratio(moved, size):
    """moved / size; 0 / 0 is 0."""
    return tl.where(size > 0, moved / tl.where(size > 0, size, 1.0), tl.where(moved > 0, float("inf"), 0.0))


@triton.jit
def judge(
    ints,
    reals,
    settings,
    running,
    b,
    padded,
    max_iter,
    ff,
    gg,
    KEEP_BEST: tl.constexpr,
    block_norms=None,
    BLOCKS: tl.constexpr = 0,
):
    """Take up the squared norms of f and the residual: returns the outcome's bits, the step and the unit.

    A state of several BLOCKS stops when each is within its rule; ``block_norms`` (BLOCKS, 2, padded) holds how far each
    moves and how large it is, and the residual is the largest weighted one.
    """
    acc = reals.dtype.element_ty
    LIMIT: tl.constexpr = 120 if acc == tl.float32 else 1000  # a unit, and its inverse, must be normal numbers
    f_norm, g_norm = tl.sqrt(ff), tl.sqrt(gg)
    steps = tl.load(ints + STEPS * padded + b) + 1
    best_at = tl.load(ints + BEST_AT * padded + b)
    best_step = tl.load(ints + BEST_STEP * padded + b)
    rescales = tl.load(ints + RESCALES * padded + b)
    previous_norm = tl.load(reals + NORM * padded + b)
    best = tl.load(reals + BEST * padded + b)
    first = tl.load(reals + FIRST * padded + b)
    unit = tl.load(reals + UNIT * padded + b)
    tl.debug_barrier()

    finite = (f_norm < float("inf")) & (g_norm < float("inf"))
    relative = ratio(g_norm, f_norm)
    within = g_norm <= tl.load(settings + ATOL) + tl.load(settings + RTOL) * f_norm
    if BLOCKS > 0:
        relative = tl.where(finite, 0.0, relative)
        within = finite
        for i in tl.static_range(BLOCKS):
            moved = tl.load(block_norms + 2 * i * padded + b)
            size = tl.load(block_norms + (2 * i + 1) * padded + b)
            rule = settings + RULES + 3 * i
            finite = finite & (moved < float("inf")) & (size < float("inf"))
            within = within & (moved <= tl.load(rule + 1) + tl.load(rule) * size)
            relative = tl.maximum(relative, ratio(moved, size) * tl.load(rule + 2))
    relative = tl.where(finite, relative, float("inf")).to(acc)
    norm = g_norm.to(acc)
    first = tl.where(steps == 1, relative, first)

    converged = finite & within
    better = finite & (converged | (best_at == NOWHERE) | (relative < best))
    spill = (better == 0) & (best_at == PREVIOUS)
    best_at = tl.where(better, CURRENT, tl.where(spill, SAVED, best_at))
    best_step = tl.where(better, steps, best_step)
    best = tl.where(better, relative, best)

    idle = steps - best_step
    label = tl.where((idle >= STALL_MIN_STEPS) & (idle * STALL_FRACTION >= steps), STALLED, MAX_ITER)
    label = tl.where(relative > DIVERGENCE * first, DIVERGED, label)
    status = tl.where((max_iter > 0) & (steps == max_iter), label, RUNNING)
    status = tl.where(finite, tl.where(converged, CONVERGED, status), NON_FINITE)
    going = status == RUNNING
    use_saved = (best_at == SAVED) & (KEEP_BEST | (finite == 0))

    fresh, reset = new_unit(tl.maximum(f_norm, g_norm), tl.load(settings + ROOT_N), unit, LIMIT)
    reset = reset & going
    rescales += (reset & (unit > 0)).to(tl.int32)
    grew = going & (reset == 0) & (steps > 1) & (norm > GROWTH_LIMIT * previous_norm)
    unit = tl.where(going, fresh, unit)

    tl.store(ints + STATUS * padded + b, status)
    tl.store(ints + STEPS * padded + b, steps)
    tl.store(ints + BEST_AT * padded + b, tl.where(going & (best_at == CURRENT), PREVIOUS, best_at))
    tl.store(ints + BEST_STEP * padded + b, best_step)
    tl.store(ints + RESCALES * padded + b, rescales)
    tl.store(reals + RESIDUAL * padded + b, relative)
    tl.store(reals + NORM * padded + b, norm)
    tl.store(reals + BEST * padded + b, best)
    tl.store(reals + FIRST * padded + b, first)
    tl.store(reals + UNIT * padded + b, unit)
    if going == 0:
        tl.atomic_add(running, -1)
    outcome = JUDGED | tl.where(going, GOING, 0) | tl.where(reset, RESET, 0) | tl.where(spill, SPILL, 0)
    return outcome | tl.where(use_saved, USE_SAVED, 0) | tl.where(grew, GREW, 0), steps, unit


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
def spill_and_rest(x, x_prev, saved, outcome, begin, end, BLOCK: tl.constexpr):
    """Keep the best iterate before it is overwritten; of a stopped sample, put the answer into both buffers."""
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


@triton.jit
def row_of(rows, b, HAS_ROWS: tl.constexpr):
    """The row of f's output that belongs to sample b; a dropped sample never gets here."""
    if HAS_ROWS:
        return tl.load(rows + b).to(tl.int64)
    else:
        return b
