"""The end of a joint step in Triton: `record`, a lane a sample, and for each tensor with rows to be copied `copy`, a
program a chunk. The formulas are in deqfast/ops/formulas/joint.py. Nothing is added up.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import RUN, chunk_of, sample_of
from .constants import (
    BEST,
    BEST_STEP,
    COST_SLACK,
    NON_FINITE,
    RESIDUAL,
    RETURN_COST,
    RETURN_LAST,
    RUNNING,
    SAFEGUARD,
    STATUS,
    STEPS,
    TILE,
)


class Kept(NamedTuple):
    """What is recorded of the iterate to be returned (see ``Record`` in deqfast/ops); None where nothing is."""

    best_cost: Any
    best_norms: Any
    saved_cost: Any
    saved_norms: Any
    least: Any
    taken: Any


class Buffers(NamedTuple):
    """One tensor of the state: iterate, mapped state, next iterate, best iterate (None: an accelerated tensor), and the
    iterate to be returned (None: not kept apart).
    """

    x: Any
    mapped: Any
    next_x: Any
    saved: Any
    kept: Any


@triton.jit
def copy_rows(source, target, at, padded, where, ROWS: tl.constexpr):
    """The samples' numbers in every row of `source`."""
    for row in tl.static_range(ROWS):
        place = row * padded + at
        tl.store(target + place, tl.load(source + place, mask=where), mask=where)


@triton.jit(do_not_specialize=RUN)
def record_kernel(
    statistics,
    cost,
    block_norms,
    column_norms,
    record,
    B,
    padded,
    made,
    columns,
    RETURNS: tl.constexpr,
    GUARDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bring the records of the samples up to date, and say whose iterate would be returned now."""
    b = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = b < B
    ints, reals = statistics.ints + b, statistics.reals + b
    at_end = tl.load(ints + STEPS * padded, mask=inside, other=-1) == made
    finite = tl.load(ints + STATUS * padded, mask=inside, other=NON_FINITE) != NON_FINITE
    better = (tl.load(ints + BEST_STEP * padded, mask=inside, other=-1) == made) & inside
    measured = at_end & finite & inside
    residual = tl.load(reals + RESIDUAL * padded, mask=inside, other=0.0)
    take = measured if RETURNS == RETURN_LAST else better
    if cost is not None:
        given = tl.load(cost + b, mask=inside, other=0.0)
        if RETURNS == RETURN_COST:
            lower = given < tl.load(record.best_cost + b, mask=inside, other=0.0)
            take = take | (measured & lower & (residual < COST_SLACK * tl.load(reals + BEST * padded, mask=inside)))
        tl.store(record.best_cost + b, given, mask=take)
    copy_rows(block_norms, record.best_norms, b, padded, take, ROWS)
    if RETURNS == RETURN_LAST:
        copy_rows(block_norms, record.saved_norms, b, padded, better, ROWS)
        lost = at_end & inside & (finite == 0)
        copy_rows(record.saved_norms, record.best_norms, b, padded, lost, ROWS)
        if cost is not None:
            tl.store(record.saved_cost + b, given, mask=better)
            tl.store(record.best_cost + b, tl.load(record.saved_cost + b, mask=lost), mask=lost)
    if GUARDED:
        before = tl.load(record.least + b, mask=inside, other=0.0)
        grown = measured & (residual > SAFEGUARD * before)
        tl.store(record.least + b, tl.where(grown | (residual < before), residual, before), mask=measured)
        place = column_norms + (b // TILE) * columns * TILE + b % TILE
        for column in range(columns):
            tl.store(place + column * TILE, tl.zeros((BLOCK,), column_norms.dtype.element_ty), mask=grown)
    tl.store(record.taken + b, take.to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=RUN)
def copy_kernel(
    buffers,
    statistics,
    taken,
    chunks,
    padded,
    made,
    KEEP_BEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A chunk of one tensor: the next iterate where it is not accelerated, the one to be returned where it is kept."""
    b, begin, end, _ = chunk_of(chunks)
    sample = sample_of(statistics, b, padded)
    status = tl.load(sample.ints + STATUS * padded)
    best_step = tl.load(sample.ints + BEST_STEP * padded)
    was_running = tl.load(sample.ints + STEPS * padded) == made
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
        at = b * chunks.n + start + tl.arange(0, BLOCK)
        inside = start + tl.arange(0, BLOCK) < end
        now = tl.load(buffers.x + at, mask=inside)
        if buffers.kept is not None:
            if take:
                tl.store(buffers.kept + at, now, mask=inside)
        if buffers.saved is not None:
            to = now
            if from_mapped:
                to = tl.load(buffers.mapped + at, mask=inside)
            if from_saved:
                to = tl.load(buffers.saved + at, mask=inside)
            tl.store(buffers.next_x + at, to, mask=inside)
            if saves:
                tl.store(buffers.saved + at, now, mask=inside)
