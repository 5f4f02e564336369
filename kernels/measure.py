"""What both solvers do with a new evaluation before they use it: stopping, best iterate, unit.

Every thread of a program reads the per-sample numbers and one of them writes, so that all reads of a place come before
a barrier and all writes after it.
"""

import triton
import triton.language as tl

from .constants import (
    BEST,
    BEST_AT,
    BEST_STEP,
    CONVERGED,
    CURRENT,
    DIVERGED,
    DIVERGENCE,
    FALLEN,
    FAR,
    FIRST,
    GONE,
    GROWN,
    GROWTH_LIMIT,
    LARGEST,
    LEAST,
    MAX_ITER,
    NON_FINITE,
    NORM,
    NOWHERE,
    PREVIOUS,
    RESCALES,
    RESIDUAL,
    RUNNING,
    SAVED,
    STALL_FRACTION,
    STALL_MIN_STEPS,
    STALLED,
    STATUS,
    STEPS,
    UNIT,
    UNIT_RANGE,
)

# What was decided for a sample, as bits.
GOING = tl.constexpr(1)  # not stopped by this evaluation
RESET = tl.constexpr(2)  # the unit was set or changed: no history, no new column
SPILL = tl.constexpr(4)  # x_prev holds the best iterate and is about to be overwritten
USE_SAVED = tl.constexpr(8)  # the answer of a stopped sample lies in `saved`, else in x
GREW = tl.constexpr(16)  # the residual grew by more than GROWTH_LIMIT
BAD = tl.constexpr(64)  # Broyden: the denominator vanished, the step is a plain one
EVICTED = tl.constexpr(128)  # times the columns given up
JUDGED = tl.constexpr(128)  # the sample was running when the step began

# Where the numbers of a solve lie in `settings`, float64: arguments of a launch would be rounded to float32.
RTOL = tl.constexpr(0)
ATOL = tl.constexpr(1)
ROOT_N = tl.constexpr(2)
RULES = tl.constexpr(3)  # rtol, atol and weight of each block of a state that is judged by its blocks


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
def has_run_away(f_norm, g_norm, first, largest, settings, EPSILON: tl.constexpr):
    """Whose ||g|| is small because ||f|| has become large."""
    rounding = EPSILON * f_norm
    hardly = (FALLEN * g_norm > largest) | (rounding > largest) | (f_norm > GONE * first)
    allowed = FAR * tl.load(settings + RTOL) * first + tl.load(settings + ATOL)
    return (first > 0) & (f_norm > GROWN * first) & (hardly | ((g_norm > allowed) & (g_norm > rounding)))


@triton.jit
def judge(sample, stopping, max_iter, ff, gg, rule: tl.constexpr):
    """Take up the squared norms of f and the residual: returns the outcome's bits, the step and the unit.

    A state of several blocks stops when each is within its rule; ``block_norms`` (blocks, 2, padded) holds how far each
    moves and how large it is, and the residual is the largest weighted one.
    """
    ints, reals, settings, padded = sample.ints, sample.reals, stopping.settings, sample.padded
    acc = reals.dtype.element_ty
    LIMIT: tl.constexpr = 120 if acc == tl.float32 else 1000  # a unit, and its inverse, must be normal numbers
    EPSILON: tl.constexpr = 2.0**-23 if acc == tl.float32 else 2.0**-52
    BLOCKS: tl.constexpr = rule.BLOCKS
    f_norm, g_norm = tl.sqrt(ff), tl.sqrt(gg)
    steps = tl.load(ints + STEPS * padded) + 1
    best_at = tl.load(ints + BEST_AT * padded)
    best_step = tl.load(ints + BEST_STEP * padded)
    rescales = tl.load(ints + RESCALES * padded)
    previous_norm = tl.load(reals + NORM * padded)
    best = tl.load(reals + BEST * padded)
    least = tl.load(reals + LEAST * padded)
    first = tl.load(reals + FIRST * padded)
    largest = tl.load(reals + LARGEST * padded)
    unit = tl.load(reals + UNIT * padded)
    tl.debug_barrier()

    finite = (f_norm < float("inf")) & (g_norm < float("inf"))
    relative = ratio(g_norm, f_norm)
    within = g_norm <= tl.load(settings + ATOL) + tl.load(settings + RTOL) * f_norm
    if BLOCKS > 0:
        norms = stopping.block_norms + sample.b
        relative = tl.where(finite, 0.0, relative)
        within = finite
        for i in tl.static_range(BLOCKS):
            moved = tl.load(norms + 2 * i * padded)
            size = tl.load(norms + (2 * i + 1) * padded)
            of_block = settings + RULES + 3 * i
            finite = finite & (moved < float("inf")) & (size < float("inf"))
            within = within & (moved <= tl.load(of_block + 1) + tl.load(of_block) * size)
            relative = tl.maximum(relative, ratio(moved, size) * tl.load(of_block + 2))
    relative = tl.where(finite, relative, float("inf")).to(acc)
    norm = g_norm.to(acc)
    first = tl.where(steps == 1, relative if BLOCKS > 0 else tl.maximum(f_norm, g_norm).to(acc), first)
    largest = tl.where(steps == 1, norm, tl.maximum(largest, norm))

    score = relative if BLOCKS > 0 else norm
    ran_away = (
        (steps > 1)
        & (BLOCKS == 0)
        & has_run_away(f_norm, g_norm, first.to(tl.float64), largest.to(tl.float64), settings, EPSILON)
    )
    converged = finite & within & (ran_away == 0)
    better = finite & (converged | (best_at == NOWHERE) | (score < least))
    spill = (better == 0) & (best_at == PREVIOUS)
    best_at = tl.where(better, CURRENT, tl.where(spill, SAVED, best_at))
    best_step = tl.where(better, steps, best_step)
    best = tl.where(better, relative, best)
    least = tl.where(better, score, least)

    idle = steps - best_step
    label = tl.where((idle >= STALL_MIN_STEPS) & (idle * STALL_FRACTION >= steps), STALLED, MAX_ITER)
    grown = (BLOCKS == 0) & (best_step == 1) & (g_norm > DIVERGENCE * least.to(tl.float64))
    label = tl.where(grown | ((first > 0) & (score > DIVERGENCE * first)), DIVERGED, label)
    status = tl.where((max_iter > 0) & (steps == max_iter), label, RUNNING)
    status = tl.where(finite, tl.where(converged, CONVERGED, status), NON_FINITE)
    going = status == RUNNING
    use_saved = (best_at == SAVED) & (rule.KEEP_BEST | (finite == 0))

    fresh, reset = new_unit(tl.maximum(f_norm, g_norm), tl.load(settings + ROOT_N), unit, LIMIT)
    reset = reset & going
    rescales += (reset & (unit > 0)).to(tl.int32)
    grew = going & (reset == 0) & (steps > 1) & (norm > GROWTH_LIMIT * previous_norm)
    unit = tl.where(going, fresh, unit)

    tl.store(ints + STATUS * padded, status)
    tl.store(ints + STEPS * padded, steps)
    tl.store(ints + BEST_AT * padded, tl.where(going & (best_at == CURRENT), PREVIOUS, best_at))
    tl.store(ints + BEST_STEP * padded, best_step)
    tl.store(ints + RESCALES * padded, rescales)
    tl.store(reals + RESIDUAL * padded, relative)
    tl.store(reals + NORM * padded, norm)
    tl.store(reals + BEST * padded, best)
    tl.store(reals + LEAST * padded, least)
    tl.store(reals + LARGEST * padded, largest)
    tl.store(reals + FIRST * padded, first)
    tl.store(reals + UNIT * padded, unit)
    if going == 0:
        tl.atomic_add(stopping.running, -1)
    outcome = JUDGED | tl.where(going, GOING, 0) | tl.where(reset, RESET, 0) | tl.where(spill, SPILL, 0)
    return outcome | tl.where(use_saved, USE_SAVED, 0) | tl.where(grew, GREW, 0), steps, unit
