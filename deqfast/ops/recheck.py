"""Looking again at samples that have stopped: does what f gives them now still say that they have converged?

A sample that converged is frozen, and f goes on being evaluated at it. Where f treats samples independently its output
there is the same as before. Where f couples them it is not: what was a solution given the others of that evaluation
need not be one given those of the newest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..status import Status
from .codes import At, Int, Real
from .formulas.sums import norm_of_parts
from .layout import Layout, widest
from .workspace import Stopping, Workspace

SLACK = 0.125  # of the tolerance, for f's own rounding,
NOISE = 2.0  # and so many units in the last place of ||f(z)||
SAME = 1e-5  # relative difference of two residuals that comes of the order of their sums


def noise(ws: Workspace) -> float:
    """What f's own rounding may make of a residual, relative to ||f(z)||."""
    return NOISE * torch.finfo(ws.layout.dtype).eps


def rows_seen(layout: Layout, f: list[Tensor], f_rows: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    """F's output as rows a sample, and which samples f saw (None: all); the rows of the others mean nothing."""
    values = layout.rows(f)
    if f_rows is None:
        return values, None
    return [rows.index_select(0, f_rows.clamp(min=0)) for rows in values], f_rows >= 0


def still_within(moved: Tensor, size: Tensor, rtol: Any, atol: Any, rounding: float, slack: float = SLACK) -> Tensor:
    """Whether what was within its tolerance still is, f's own rounding allowed for; what is no number is not."""
    allowed = (atol + rtol * size) * (1 + slack) + rounding * size
    return (moved <= allowed) & torch.isfinite(moved + size)


def apart(ws: Workspace, some: list[Tensor], others: list[Tensor], which: Tensor) -> float | None:
    """How far two outputs of f at the same samples are apart, relative to their size, at most; None: as good as equal.

    That is no farther than a verdict allows f for its own rounding: f may round differently in a smaller batch. What is
    no number has to be none in both. Waits for the device.

    Args:
        ws: whose tolerance it is.
        some: leaves of so many samples.
        others: the same of another evaluation.
        which: bool for each of them: it counts.
    """
    layout, rule = ws.layout, ws.stopping
    dtype = widest(layout.device)
    mine, theirs = ([t.to(dtype) for t in layout.rows(leaves)] for leaves in (some, others))
    moved, size = (
        norm_of_parts(parts, dtype) for parts in ([a - b for a, b in zip(mine, theirs, strict=True)], theirs)
    )
    allowed = SLACK * (rule.atol + rule.rtol * size) + noise(ws) * size
    same = torch.where(torch.isfinite(size), moved <= allowed, ~torch.isfinite(moved)) | ~which
    if bool(same.all()):
        return None
    relative = (moved / size)[~same].nan_to_num(nan=math.inf)
    return float(relative.max())


def outside(
    ws: Workspace,
    f: list[Tensor],
    f_rows: Tensor | None,
    made: int | Tensor,
    rule: Stopping | None = None,
    add: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """(B,) bool: samples that converged before evaluation ``made`` and are not within their tolerance at its output.

    The residuals of those that are within become those of this evaluation. Samples that f did not see are left alone.

    Args:
        ws: before ``cur`` is flipped.
        f: f at ``x[cur]``.
        f_rows: where the samples are in ``f``, -1: not there.
        made: evaluations made, this one included.
        rule: what their tolerance is, where that is not ``ws.stopping``.
        add: adds up a tensor over ranks, where samples are spread over them.
    """
    if ws.parts:
        return _of_groups(ws, f, made, ws.stopping if rule is None else rule)
    layout, stopping = ws.layout, ws.stopping if rule is None else rule
    earlier = (ws.int_row(Int.STATUS) == int(Status.CONVERGED)) & (ws.int_row(Int.STEPS) < made)
    values, seen = rows_seen(layout, f, f_rows)
    earlier = earlier if seen is None else earlier & seen
    values = [v.to(layout.acc) for v in values]
    if ws.own_residual is None:
        moved = [v - x.to(layout.acc) for v, x in zip(values, layout.rows(ws.x[ws.cur]), strict=True)]
    else:
        moved = [ws.own_residual]
    largest = values[0].new_ones(layout.B)
    if layout.N:
        largest = torch.stack([v.abs().amax(1) for v in values if v.shape[1]]).amax(0)
        largest = torch.where(largest > 0, largest, 1.0)  # divided by it, no square overflows or vanishes
    g_norm, f_norm = (norm_of_parts([v / largest[:, None] for v in parts], layout.acc) for parts in (moved, values))
    if add is not None:
        squares = (torch.stack([g_norm, f_norm]).double() * largest).square()
        add(squares)
        (g_norm, f_norm), largest = squares.sqrt().to(layout.acc), torch.ones_like(largest)
    within = still_within(g_norm, f_norm, stopping.rtol, stopping.atol / largest, noise(ws))
    relative = (g_norm / f_norm).nan_to_num(nan=0.0, posinf=math.inf)
    known = ws.real_row(Real.RESIDUAL)
    new = earlier & within & ~((relative - known).abs() <= SAME * known)
    for row, value in ((Real.RESIDUAL, relative), (Real.BEST, relative), (Real.NORM, g_norm * largest)):
        target = ws.real_row(row)
        target.copy_(torch.where(new, value, target))
    return earlier & ~within


def _of_groups(ws: Workspace, f: list[Tensor], made: int | Tensor, rule: Stopping) -> Tensor:
    found = []
    for (group, _), part in zip(ws.layout.parts, ws.parts, strict=True):
        part.cur = ws.cur
        found.append(outside(part, [group.of(t) for t in f], None, made, rule))
    return torch.cat(found)


def wake(ws: Workspace, which: Tensor, made: int, stopped: Tensor | None = None) -> None:
    """Let samples run again, as if evaluation ``made`` were yet to be judged: what they found no longer counts.

    ``stopped``: those of them that had stopped; None: all.
    """
    _overwrite(ws.int_row(Int.STATUS), which, int(Status.RUNNING))
    _overwrite(ws.int_row(Int.STEPS), which, made - 1)
    _overwrite(ws.int_row(Int.BEST_AT), which, int(At.NOWHERE))
    for row in (Real.BEST, Real.LEAST):
        _overwrite(ws.real_row(row), which, math.inf)
    for row in (Real.FIRST, Real.LARGEST):
        _overwrite(ws.real_row(row), which, 0)
    stopped = which if stopped is None else stopped
    ws.int_row(Int.WOKEN).add_(stopped)
    ws.woken(stopped)


def begin(ws: Workspace, which: Tensor | None = None) -> None:
    """The evaluation that was just judged counts as the first of these samples, None: of all, for what has run away."""
    norm, first = ws.real_row(Real.NORM), ws.real_row(Real.FIRST)
    size = torch.maximum(norm, (norm / ws.real_row(Real.RESIDUAL)).nan_to_num(nan=0.0, posinf=0.0))
    first.copy_(size if which is None else torch.where(which, size, first))


def refuse(ws: Workspace, which: Tensor) -> None:
    """What was called converged, and cannot run on, is not."""
    _overwrite(ws.int_row(Int.STATUS), which, int(Status.MAX_ITER))


def _overwrite(row: Tensor, where: Tensor, value: float) -> None:
    row.masked_fill_(where, value)
