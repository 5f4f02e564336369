"""The joint map and the finish in plain torch, for both backends, with norms in the dtype of ``block_norms``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...status import Status
from ..codes import BLOCKS, Int, Real
from ..contract import JointEnds, Leaves
from ..formulas.joint import damped, gradient_step, project_rows, safeguarded, take_note
from ..joint import JointWorkspace, note, store_norms

MU, X = BLOCKS.index("mu"), BLOCKS.index("x")


def joint_map(ws: JointWorkspace, values: Leaves, step_size: float, cost: Tensor | None = None) -> None:
    """The map: ``mapped`` and ``block_norms`` of running samples."""
    core, options, norms = ws.core, ws.options, ws.core.block_norms
    assert norms is not None
    acc = core.layout.acc
    running = core.int_row(Int.STATUS) == Status.RUNNING
    now = [part.leaf.rows(ws.value(i)).to(acc) for i, part in enumerate(ws.parts)]
    towards = [part.leaf.rows(t).to(acc) for part, t in zip(ws.parts, values, strict=True)]
    inputs = [i for i, part in enumerate(ws.parts) if part.block == X]
    if inputs:
        x, q = [now[i] for i in inputs], [towards[i] for i in inputs]
        stepped = gradient_step(x, q, step_size, options.normalize, norms.dtype)
        inside = project_rows(options, [ws.parts[i].center for i in inputs], stepped, norms.dtype)
        for i, t in zip(inputs, inside, strict=True):
            towards[i] = t
    for part, v, f, mapped in zip(ws.parts, now, towards, ws.mapped[core.cur], strict=True):
        target = part.leaf.rows(mapped)
        moved = f if part.block == X else damped(v, f, options.damping[part.block])
        target.copy_(torch.where(running[:, None], moved.to(target.dtype), target))
    for block in range(norms.shape[0]):
        some = [i for i, part in enumerate(ws.parts) if part.block == block]
        store_norms(norms, block, running, [towards[i] - now[i] for i in some], [towards[i] for i in some])
    if cost is not None:
        norms[MU, 0, : core.layout.B] += torch.where(running, cost * 0, 0.0)


def joint_finish(ws: JointWorkspace, cost: Tensor | None, made: int) -> None:
    """The finish, before ``core.cur`` is flipped. ``made``: evaluations, this one included."""
    core, record, norms = ws.core, ws.record, ws.core.block_norms
    assert norms is not None
    steps, status = core.int_row(Int.STEPS), core.int_row(Int.STATUS)
    residual = core.real_row(Real.RESIDUAL)
    # A sample that was measured just now has used as many evaluations as were made.
    now, is_number = steps == made, status != Status.NON_FINITE
    measured, better = now & is_number, core.int_row(Int.BEST_STEP) == made
    best = core.real_row(Real.BEST)
    take = take_note(record.returns, measured, better, residual, best, cost, record.best_cost)
    note(record.best_cost, record.best_norms, take, cost, norms)
    if record.saved_norms is not None and record.saved_cost is not None:
        note(record.saved_cost, record.saved_norms, better, cost, norms)
        saved_cost = None if cost is None else record.saved_cost
        note(record.best_cost, record.best_norms, now & ~is_number, saved_cost, record.saved_norms)
    record.taken.copy_(take)
    if record.kept is not None:
        for i, kept in enumerate(record.kept):
            kept.copy_(_where(take, ws.value(i), kept))
    if record.safeguard:
        grown, least = safeguarded(measured, residual, record.least)
        record.least.copy_(least)
        core.forget(grown)
    _move_plain(ws, now, better, status)


def _move_plain(ws: JointWorkspace, was_running: Tensor, best: Tensor, status: Tensor) -> None:
    """Tensors that are not accelerated: a running sample's to their mapped value, a stopped one's to its answer."""
    core = ws.core
    # A sample whose first evaluation is no number has nothing saved: it stays where it began.
    from_saved = ~best if core.stopping.keep_best else status == Status.NON_FINITE
    from_saved = from_saved & (core.int_row(Int.BEST_STEP) > 0)
    for i, part in enumerate(ws.parts):
        if part.index is not None:
            continue
        x, saved = ws.value(i), ws.plain_saved[i]
        assert saved is not None
        answer = _where(from_saved, saved, x)
        moved = _where(status == Status.RUNNING, ws.mapped[core.cur][i], answer)
        ws.value(i, 1 - core.cur).copy_(_where(was_running, moved, x))
        saved.copy_(_where(best, x, saved))


def _where(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(mask.view(-1, *([1] * (a.dim() - 1))), a, b)


class PlainEnds(JointEnds):
    """What comes before and after the accelerated step."""

    def map(self, values: Leaves, step_size: float, cost: Tensor | None) -> None:
        """The map."""
        joint_map(self.ws, values, step_size, cost)

    def finish(self, cost: Tensor | None, made: int) -> None:
        """The end of a step."""
        joint_finish(self.ws, cost, made)
