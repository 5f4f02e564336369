"""The ops in plain torch: the oracle of every test and the baseline of every benchmark.

One call is one complete solver update after f has been evaluated. Rows that are not running are left as they are, and
every row is computed from itself alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..status import Status
from .anderson import SCALED_DTYPES, AndersonWorkspace
from .broyden import BroydenWorkspace
from .codes import (
    BLOCK,
    DIVERGENCE,
    GROWTH_LIMIT,
    MIN_DENOMINATOR,
    STALL_FRACTION,
    STALL_MIN_STEPS,
    UNIT_RANGE,
    At,
    Evict,
    Int,
    Real,
)
from .workspace import Workspace, tile, untile

CHUNK = 8192  # numbers whose sum torch does not split


class _Rows:
    """x, f, the residual and their differences as (B, N) in the accumulation dtype, and what the norms decided."""

    def __init__(self, ws: Workspace, f: list[Tensor], f_rows: Tensor | None) -> None:
        self.ws = ws
        self.acc = ws.layout.acc
        self.x = self.gather(ws.x[ws.cur])
        self.f = self.gather(f, f_rows)
        self.g = self.f - self.x if ws.own_residual is None else ws.own_residual

    def gather(self, leaves: list[Tensor], rows: Tensor | None = None) -> Tensor:
        joined = torch.cat([r.to(self.acc) for r in self.ws.layout.rows(leaves)], dim=1)
        return joined if rows is None else joined[rows.clamp(min=0).long()]


def _scatter(ws: Workspace, leaves: list[Tensor], rows: Tensor, where: Tensor) -> Tensor:
    """Write (B, N) ``rows`` into ``leaves`` where the mask says; returns which rows stayed finite after rounding."""
    finite = torch.ones(ws.layout.B, dtype=torch.bool, device=rows.device)
    start = 0
    for leaf, t in zip(ws.layout.leaves, leaves, strict=True):
        target = leaf.rows(t)
        rounded = rows[:, start : start + leaf.n].to(target.dtype)
        start += leaf.n
        finite &= torch.isfinite(rounded).all(dim=1)
        target.copy_(torch.where(where[:, None], rounded, target))
    return finite


def _row_norm(t: Tensor) -> Tensor:
    """Euclidean norm of each row in float64: no square of a finite float32 overflows or vanishes there."""
    return _sum(t.double().square()).sqrt()


def _measure(ws: Workspace, r: _Rows) -> tuple[Tensor, Tensor]:
    """Norms, best iterate, status: what both solvers do with a new evaluation before they use it.

    Returns the mask of the samples that go on and the mask of those whose unit was (re)set.
    """
    ints, reals = ws.int_row, ws.real_row
    run = ints(Int.STATUS) == Status.RUNNING
    steps = ints(Int.STEPS)
    steps += run.int()
    g_norm, f_norm = _row_norm(r.g), _row_norm(r.f)
    finite = torch.isfinite(g_norm) & torch.isfinite(f_norm)
    relative = torch.where(f_norm > 0, g_norm / f_norm, torch.where(g_norm > 0, math.inf, 0.0))
    within = g_norm <= ws.stopping.atol + ws.stopping.rtol * f_norm
    if ws.block_norms is not None:
        finite, relative, within = _judge_blocks(ws, finite)
    relative = torch.where(finite, relative, math.inf).to(r.acc)
    reals(Real.RESIDUAL).copy_(torch.where(run, relative, reals(Real.RESIDUAL)))
    first = run & (steps == 1)
    reals(Real.FIRST).copy_(torch.where(first, relative, reals(Real.FIRST)))

    best_at = ints(Int.BEST_AT)
    better = run & finite & ((relative < reals(Real.BEST)) | (best_at == At.NOWHERE))
    converged = run & finite & within
    better |= converged
    spill = run & ~better & (best_at == At.PREVIOUS)
    _scatter(ws, ws.saved, r.gather(ws.x[1 - ws.cur]), spill)
    best_at.copy_(torch.where(better, At.CURRENT, torch.where(spill, At.SAVED, best_at)))
    ints(Int.BEST_STEP).copy_(torch.where(better, steps, ints(Int.BEST_STEP)))
    reals(Real.BEST).copy_(torch.where(better, relative, reals(Real.BEST)))

    last = run & (steps == ws.stopping.max_iter) if ws.stopping.max_iter else torch.zeros_like(run)
    status = torch.where(run & ~finite, Status.NON_FINITE, ints(Int.STATUS))
    status = torch.where(converged, Status.CONVERGED, status)
    idle = steps - ints(Int.BEST_STEP)
    stalled = (idle >= STALL_MIN_STEPS) & (idle * STALL_FRACTION >= steps)
    label = torch.where(stalled, Status.STALLED, Status.MAX_ITER)
    label = torch.where(relative > DIVERGENCE * reals(Real.FIRST), Status.DIVERGED, label)
    status = torch.where(last & finite & ~converged, label, status)
    ints(Int.STATUS).copy_(status)

    going = run & (status == Status.RUNNING)
    stopped = run & ~going
    current, saved = r.x, r.gather(ws.saved)
    use_saved = (best_at == At.SAVED) & (ws.stopping.keep_best | ~finite)
    answer = torch.where(use_saved[:, None], saved, current)
    for buffer in ws.x:
        _scatter(ws, buffer, answer, stopped)

    unit = reals(Real.UNIT)
    rms = torch.maximum(g_norm, f_norm) / math.sqrt(ws.layout.N)
    scaled = rms * unit.double()
    reset = going & (rms > 0) & ~((scaled >= 1 / UNIT_RANGE) & (scaled <= UNIT_RANGE))
    limit = 120 if r.acc == torch.float32 else 1000  # a unit, and its inverse, must be normal numbers
    new_unit = torch.exp2(1.0 - torch.frexp(rms).exponent.clamp(-limit, limit).double()).to(r.acc)
    ints(Int.RESCALES).add_((reset & (unit > 0)).int())
    unit.copy_(torch.where(reset, new_unit, torch.where(going & (unit == 0), 1.0, unit)))
    reals(Real.NORM).copy_(torch.where(run, g_norm.to(r.acc), reals(Real.NORM)))
    return going, reset


def _judge_blocks(ws: Workspace, finite: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert ws.block_norms is not None
    norms = ws.block_norms[:, :, : ws.layout.B]
    rtol, atol, weight = norms.new_tensor(ws.block_rules).unbind(1)
    moved, size = norms.unbind(1)
    relative = torch.where(size > 0, moved / size, torch.where(moved > 0, math.inf, 0.0)) * weight[:, None]
    within = (moved <= atol[:, None] + rtol[:, None] * size).all(0)
    return finite & torch.isfinite(norms).all(1).all(0), relative.amax(0), within


def _finish(ws: Workspace, x_new: Tensor, picard: Tensor, going: Tensor) -> Tensor:
    """Write the next iterate; a row that is not finite takes the Picard step. Returns the rows that did."""
    finite = _scatter(ws, ws.x[1 - ws.cur], x_new, going)
    failed = going & ~finite
    _scatter(ws, ws.x[1 - ws.cur], picard, failed)
    best_at = ws.int_row(Int.BEST_AT)
    best_at.copy_(torch.where(going & (best_at == At.CURRENT), At.PREVIOUS, best_at))
    return failed


def _block_bounds(ws: Workspace) -> list[tuple[int, int]]:
    bounds, start = [], 0
    for leaf in ws.layout.leaves:
        bounds += [(start + i, min(start + i + BLOCK, start + leaf.n)) for i in range(0, leaf.n, BLOCK)]
        start += leaf.n
    return bounds


def encode(ws: AndersonWorkspace, column: Tensor) -> tuple[Tensor, Tensor]:
    """Round (B, N) to the history dtype; returns the codes and the (B, blocks) power-of-two scales."""
    dtype = ws.history.dtype
    if dtype not in SCALED_DTYPES:
        return column.to(dtype), ws.scales.new_empty(column.shape[0], 0)
    codes = torch.empty(column.shape, dtype=dtype, device=column.device)
    scales = []
    for a, b in _block_bounds(ws):
        part = column[:, a:b].double()
        exponent = torch.frexp(part.abs().amax(dim=1)).exponent.double()
        scale = torch.exp2(exponent - 7 if dtype == torch.int8 else exponent)
        part = part / scale[:, None]
        codes[:, a:b] = (part.round().clamp(-127, 127) if dtype == torch.int8 else part).to(dtype)
        scales.append(scale.float())
    return codes, torch.stack(scales, dim=1)


def decode(ws: AndersonWorkspace, which: int) -> Tensor:
    """(B, m, N) columns in the accumulation dtype, as stored (rounded)."""
    columns = ws.columns(which).to(ws.layout.acc)
    if ws.history.dtype in SCALED_DTYPES:
        for i, (a, b) in enumerate(_block_bounds(ws)):
            columns[..., a:b] *= ws.scales[which][..., i, None].to(columns.dtype)
    return columns


def anderson_step(
    ws: AndersonWorkspace,
    f: list[Tensor],
    f_prev: list[Tensor] | None,
    f_rows: Tensor | None = None,
    f_prev_rows: Tensor | None = None,
) -> int:
    """One Anderson update; returns how many samples are still running.

    ``f_prev`` is f at the previous iterate, None when there is none. ``f_rows`` maps samples to rows of ``f`` when
    converged samples have been dropped from it (-1: dropped).
    """
    r = _Rows(ws, f, f_rows)
    B, m = ws.layout.B, ws.method.m
    ints, reals = ws.int_row, ws.real_row
    last_norm = reals(Real.NORM).clone()
    going, reset = _measure(ws, r)
    if m == 0:
        _finish(ws, r.x + ws.method.mixing * r.g if ws.method.mixing != 1 else r.f, r.f, going)
        return int((ints(Int.STATUS) == Status.RUNNING).sum())

    unit = reals(Real.UNIT)[:, None]
    q, w = untile(ws.norms, B).unbind(1)
    ages = untile(ws.ages, B)
    steps, slot = ints(Int.STEPS), ints(Int.SLOT).long()
    q = torch.where(reset[:, None], 0, q)
    index = torch.arange(B, device=q.device)
    is_new = torch.zeros(B, m, dtype=torch.bool, device=q.device)
    g = r.g * unit
    if f_prev is not None:
        x_prev = r.gather(ws.x[1 - ws.cur])
        d_f = (r.f - r.gather(f_prev, f_prev_rows)) * unit
        adding = going & ~reset
        where = index[adding]
        columns = [d_f]
        if ws.own_residual is None:
            columns.append(d_f - (r.x - x_prev) * unit)
        else:
            assert ws.own_columns is not None and ws.own_previous is not None
            ws.own_columns[where, slot[where]] = ((r.g - ws.own_previous) * unit)[adding]
        for which, column in enumerate(columns):
            codes, scales = encode(ws, column)
            stored = ws.columns(which)
            stored[where, slot[where]] = codes[adding]
            if not ws.keeps_products:
                ws.history[which].copy_(tile(stored, ws.tiles))
            ws.scales[which, where, slot[where]] = scales[adding]
        is_new[where, slot[where]] = True
    columns_f = decode(ws, 0)
    columns_g = decode(ws, 1) if ws.own_columns is None else ws.own_columns
    valid = (q > 0) | is_new
    columns_f = torch.where(valid[..., None], columns_f, 0)
    columns_g = torch.where(valid[..., None], columns_g, 0)
    if ws.method.test_space == 0:
        test = -columns_g
        grew = going & (steps > 1) & ~reset & (reals(Real.NORM) > GROWTH_LIMIT * last_norm)
        ints(Int.GROWTH_RESTARTS).add_(grew.int())
        valid &= ~grew[:, None] | is_new
    else:
        test = columns_f - ws.method.test_space * columns_g

    new_g = (columns_g * is_new[..., None]).sum(1)
    new_w = (test * is_new[..., None]).sum(1)
    new_q_norm = _sum(new_g.square()).sqrt()
    new_w_norm = _sum(new_w.square()).sqrt()
    q = torch.where(is_new, new_q_norm[:, None], q)
    w = torch.where(is_new, new_w_norm[:, None], w)
    usable = (q > 0) & (w > 0) & torch.isfinite(q) & torch.isfinite(w)
    q = torch.where(valid & usable, q, 0)
    valid = q > 0
    safe_q, safe_w = torch.where(valid, q, 1), torch.where(valid, w, 1)
    if ws.keeps_products:
        gram_row = _products(columns_g, new_g) / (new_q_norm[:, None] * safe_q)
        row = _products(columns_g, new_w) / (new_w_norm[:, None] * safe_q)
        col = _products(test, new_g) / (new_q_norm[:, None] * safe_w)
        new_row, new_col = is_new[:, :, None], is_new[:, None, :]
        gram = untile(ws.gram, B)
        gram = gram.tril() + gram.tril(-1).mT
        gram = torch.where(new_row, gram_row[:, None, :], torch.where(new_col, gram_row[:, :, None], gram))
        matrix = untile(ws.matrix, B) if ws.method.test_space else gram
        matrix = torch.where(new_row, row[:, None, :], torch.where(new_col, col[:, :, None], matrix))
    else:
        every_g = columns_g[:, None]
        gram = (columns_g[:, :, None] * every_g).sum(3) / (safe_q[:, :, None] * safe_q[:, None])
        matrix = (test[:, :, None] * every_g).sum(3) / (safe_w[:, :, None] * safe_q[:, None])
    both = valid[:, :, None] & valid[:, None, :]
    eye = torch.eye(m, dtype=r.acc, device=q.device)
    gram = torch.where(both, gram, eye)
    rhs = torch.where(valid, -_products(test, g) / safe_w, 0)
    ages = torch.where(is_new, steps[:, None], ages)

    if ws.method.test_space == 0:
        factor, info = torch.linalg.cholesky_ex(gram + ws.method.ridge * eye)
        y = torch.cholesky_solve(rhs[..., None], factor)[..., 0]
        solved = (info == 0) & torch.isfinite(y).all(1)
    else:
        y, info = torch.linalg.solve_ex(torch.where(both, ws.method.ridge * eye - matrix, eye), rhs)
        solved = (info == 0) & torch.isfinite(y).all(1)
    failed = going & ~solved
    ints(Int.SOLVE_FALLBACKS).add_(failed.int())
    y = torch.where(failed[:, None], 0, y)
    gamma = torch.where(valid, y / safe_q, 0)

    weighted = columns_f if ws.method.mixing == 1 else columns_f - (1 - ws.method.mixing) * columns_g
    base = r.f if ws.method.mixing == 1 else r.x + ws.method.mixing * r.g
    x_new = base - _combine(gamma, weighted) / torch.where(unit > 0, unit, 1)
    overflowed = _finish(ws, x_new, r.f, going)
    ints(Int.STEP_FALLBACKS).add_(overflowed.int())
    q = torch.where((failed | overflowed)[:, None], 0, q)

    _write(ws.norms, torch.stack([q, w], dim=1), going, ws.tiles)
    _write(ws.ages, ages, going, ws.tiles)
    if ws.keeps_products:
        _write(ws.gram, gram, going, ws.tiles)
        if ws.method.test_space:
            _write(ws.matrix, matrix, going, ws.tiles)
    _choose_slot(ws, q > 0, gram, y, ages, going)
    return int((ints(Int.STATUS) == Status.RUNNING).sum())


def _sum(t: Tensor) -> Tensor:
    """(B, N) to (B,), in an order that depends on N alone: torch may split one long row over threads."""
    if t.shape[1] <= CHUNK:
        return t.sum(dim=1)
    whole = t.shape[1] // CHUNK * CHUNK
    chunks = t[:, :whole].reshape(t.shape[0], -1, CHUNK).sum(dim=2)
    return chunks.sum(dim=1) + t[:, whole:].sum(dim=1)


def _products(columns: Tensor, v: Tensor) -> Tensor:
    """(B, m) dot products of (B, m, N) with (B, N); not as matrix products, whose order of summation depends on B."""
    return torch.stack([_sum(column * v) for column in columns.unbind(1)], dim=1)


def _combine(weights: Tensor, columns: Tensor) -> Tensor:
    """(B, N) sum of (B, m, N) columns with (B, m) weights."""
    total = torch.zeros_like(columns[:, 0])
    for weight, column in zip(weights.unbind(1), columns.unbind(1), strict=True):
        total += weight[:, None] * column
    return total


def _write(target: Tensor, value: Tensor, where: Tensor, tiles: int) -> None:
    B = where.shape[0]
    mask = where.view(B, *([1] * (value.dim() - 1)))
    target.copy_(tile(torch.where(mask, value, untile(target, B)), tiles))


def _choose_slot(ws: AndersonWorkspace, used: Tensor, gram: Tensor, y: Tensor, ages: Tensor, going: Tensor) -> None:
    """The slot of the next column: an empty one, else the least useful or the oldest."""
    m, row = ws.method.m, ws.int_row
    full = used.all(1)
    if ws.method.evict == Evict.LEAST_USEFUL and m > 3:
        eye = torch.eye(m, dtype=gram.dtype, device=gram.device)
        inverse = torch.linalg.inv_ex(gram + ws.method.ridge * eye).inverse
        loss = y.square() / inverse.diagonal(dim1=1, dim2=2)
        newest = ages > (row(Int.STEPS) - max(2, m // 3))[:, None]
        victim = torch.where(newest, math.inf, loss).argmin(dim=1)
    else:
        victim = ages.argmin(dim=1)
    slot = torch.where(full, victim, (~used).int().argmax(dim=1))
    row(Int.EVICTIONS).add_((going & full).int())
    row(Int.COUNT).copy_(torch.where(going, used.sum(1), row(Int.COUNT)))
    row(Int.SLOT).copy_(torch.where(going, slot, row(Int.SLOT)))


def broyden_step(ws: BroydenWorkspace, f: list[Tensor], f_rows: Tensor | None = None) -> int:
    """One "good" Broyden update with one history vector a step; returns how many samples are still running."""
    r = _Rows(ws, f, f_rows)
    B = ws.layout.B
    ints, reals = ws.int_row, ws.real_row
    going, reset = _measure(ws, r)
    unit = reals(Real.UNIT)[:, None]
    g = r.g * unit
    scale = reals(Real.SCALE)
    count = torch.where(reset, 0, ints(Int.COUNT)).long()
    scale_now = torch.where(scale > 0, scale, 1)
    if ws.method.scale_first:
        first = going & (count == 1) & (scale == 0)
        s = torch.where(first[:, None], ws.history[:, 0], 0)
        s_norm = torch.where(first, ws.norms[:, 0], 1)
        s_dot_g = _sum(s * g)
        y_norm = s_norm - 2 * s_dot_g + _sum(g.square())
        measured = ((s_norm - s_dot_g) / y_norm).clamp(0.2, 5.0)
        measured = torch.where(torch.isfinite(measured), measured, 1)
        scale.copy_(torch.where(first, measured, scale))
        scale_now = torch.where(first, measured, scale_now)
        count = torch.where(first, 0, count)
    full = going & (count == ws.method.memory)
    ints(Int.FULL_RESTARTS).add_(full.int())
    count = torch.where(full, 0, count)

    plain = scale_now[:, None] * g
    z = plain.clone()
    denominator = torch.ones_like(scale)
    for j in range(int(count.max()) if B else 0):
        s_j = torch.where((j < count)[:, None], ws.history[:, j], 0)
        ratio = _sum(s_j * z) / torch.where(j < count, ws.norms[:, j], 1)
        last = count == j + 1
        denominator = torch.where(last, 1 - ratio, denominator)
        if j + 1 < ws.method.memory:
            s_next = torch.where((j + 1 < count)[:, None], ws.history[:, j + 1], 0)
            z = z + ratio[:, None] * s_next
    step = z / denominator[:, None]
    bad = going & ~((denominator.abs() >= MIN_DENOMINATOR) & torch.isfinite(step).all(1))
    ints(Int.DENOMINATOR_RESTARTS).add_(bad.int())
    count = torch.where(bad, 0, count)
    step = torch.where(bad[:, None], plain, step)

    overflowed = _finish(ws, r.x + step / torch.where(unit > 0, unit, 1), r.f, going)
    ints(Int.STEP_FALLBACKS).add_(overflowed.int())
    keep = going & ~overflowed
    where = torch.arange(B, device=g.device)[keep]
    ws.history[where, count[keep]] = step[keep]
    norms = _sum(step.square())
    ws.norms[where, count[keep]] = norms[keep]
    if ws.gram.shape[1]:
        products = _products(torch.where(torch.isfinite(ws.history), ws.history, 0), step)
        ws.gram[where, count[keep]] = products[keep]
    new_count = torch.where(overflowed, 0, count + 1).int()
    ints(Int.COUNT).copy_(torch.where(going, new_count, ints(Int.COUNT)))
    return int((ints(Int.STATUS) == Status.RUNNING).sum())
