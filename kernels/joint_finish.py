"""The end of a joint step in Triton: `record`, a lane a sample, and for each tensor with rows to be copied `copy`, a
program a chunk. The formulas are in deqfast/ops/joint_finish.py. Nothing is added up.
"""

import triton
import triton.language as tl

from deqfast.ops.codes import TILE
from deqfast.ops.joint_finish import COST_SLACK, SAFEGUARD

from .measure import BEST, BEST_STEP, NON_FINITE, RESIDUAL, RUNNING, STATUS, STEPS

SLACK = tl.constexpr(COST_SLACK)
GROWTH = tl.constexpr(SAFEGUARD)
LANES = tl.constexpr(TILE)

RETURN_BEST = tl.constexpr(0)
RETURN_LAST = tl.constexpr(1)
RETURN_COST = tl.constexpr(2)

RUN_ARGUMENTS = ["B", "padded", "made", "columns"]


@triton.jit
def copy_rows(source, target, at, padded, where, ROWS: tl.constexpr):
    """The samples' numbers in every row of `source`."""
    for row in tl.static_range(ROWS):
        place = row * padded + at
        tl.store(target + place, tl.load(source + place, mask=where), mask=where)


@triton.jit(do_not_specialize=RUN_ARGUMENTS)
def record_kernel(
    ints,
    reals,
    cost,
    best_cost,
    saved_cost,
    block_norms,
    best_norms,
    saved_norms,
    least,
    column_norms,
    taken,
    B,
    padded,
    made,
    columns,
    RETURNS: tl.constexpr,
    WITH_COST: tl.constexpr,
    GUARDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bring the records of the samples up to date, and say whose iterate would be returned now."""
    b = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = b < B
    at_end = tl.load(ints + STEPS * padded + b, mask=inside, other=-1) == made
    finite = tl.load(ints + STATUS * padded + b, mask=inside, other=NON_FINITE) != NON_FINITE
    better = (tl.load(ints + BEST_STEP * padded + b, mask=inside, other=-1) == made) & inside
    measured = at_end & finite & inside
    residual = tl.load(reals + RESIDUAL * padded + b, mask=inside, other=0.0)
    take = measured if RETURNS == RETURN_LAST else better
    if WITH_COST:
        given = tl.load(cost + b, mask=inside, other=0.0)
        if RETURNS == RETURN_COST:
            lower = given < tl.load(best_cost + b, mask=inside, other=0.0)
            take = take | (measured & lower & (residual < SLACK * tl.load(reals + BEST * padded + b, mask=inside)))
        tl.store(best_cost + b, given, mask=take)
    copy_rows(block_norms, best_norms, b, padded, take, ROWS)
    if RETURNS == RETURN_LAST:
        copy_rows(block_norms, saved_norms, b, padded, better, ROWS)
        lost = at_end & inside & (finite == 0)
        copy_rows(saved_norms, best_norms, b, padded, lost, ROWS)
        if WITH_COST:
            tl.store(saved_cost + b, given, mask=better)
            tl.store(best_cost + b, tl.load(saved_cost + b, mask=lost), mask=lost)
    if GUARDED:
        before = tl.load(least + b, mask=inside, other=0.0)
        grown = measured & (residual > GROWTH * before)
        tl.store(least + b, tl.where(grown | (residual < before), residual, before), mask=measured)
        place = column_norms + (b // LANES) * columns * LANES + b % LANES
        for column in range(columns):
            tl.store(place + column * LANES, tl.zeros((BLOCK,), column_norms.dtype.element_ty), mask=grown)
    tl.store(taken + b, take.to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=RUN_ARGUMENTS)
def copy_kernel(
    x,
    mapped,
    next_x,
    saved,
    kept,
    ints,
    taken,
    n,
    chunks,
    chunk_size,
    padded,
    made,
    MOVES: tl.constexpr,
    KEPT: tl.constexpr,
    KEEP_BEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A chunk of one tensor: the next iterate where it is not accelerated (MOVES), the one to be returned (KEPT)."""
    b = (tl.program_id(0) // chunks).to(tl.int64)
    begin = (tl.program_id(0) % chunks) * chunk_size
    end = tl.minimum(begin + chunk_size, n)
    status = tl.load(ints + STATUS * padded + b)
    best_step = tl.load(ints + BEST_STEP * padded + b)
    was_running = tl.load(ints + STEPS * padded + b) == made
    take = tl.load(taken + b) != 0
    best = best_step == made
    if KEEP_BEST:
        from_saved = best == 0
    else:
        from_saved = status == NON_FINITE
    # A sample whose first evaluation is no number has nothing saved: it stays where it began.
    from_saved = from_saved & (best_step > 0) & was_running & (status != RUNNING)
    from_mapped = was_running & (status == RUNNING)
    saves = was_running & best
    for start in range(begin, end, BLOCK):
        at = b * n + start + tl.arange(0, BLOCK)
        inside = start + tl.arange(0, BLOCK) < end
        now = tl.load(x + at, mask=inside)
        if KEPT:
            if take:
                tl.store(kept + at, now, mask=inside)
        if MOVES:
            to = now
            if from_mapped:
                to = tl.load(mapped + at, mask=inside)
            if from_saved:
                to = tl.load(saved + at, mask=inside)
            tl.store(next_x + at, to, mask=inside)
            if saves:
                tl.store(saved + at, now, mask=inside)
