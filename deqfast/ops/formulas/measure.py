"""What a new evaluation says about each sample: norms, relative residual, best iterate, status, unit.

    r_k = ||g_k|| / ||f_k||,   a sample has converged when ||g_k|| <= atol + rtol ||f_k||.

Every sample that runs has used as many evaluations as were made, so that "its first" and "its last" are known without
looking at it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...status import Status
from ..codes import DIVERGENCE, STALL_FRACTION, STALL_MIN_STEPS, UNIT_RANGE, At
from ..workspace import Stopping
from .algebra import power_below


class Stats(NamedTuple):
    """What is kept of each sample between evaluations, (B,) each; see ``Int`` and ``Real``."""

    status: Tensor
    steps: Tensor
    best_at: Tensor
    best_step: Tensor
    residual: Tensor
    norm: Tensor
    best: Tensor
    first: Tensor
    unit: Tensor


class Codes:
    """Constants as tensors: a Python number in a ``where`` costs an operation of its own at every step."""

    def __init__(self, acc: torch.dtype, device: torch.device) -> None:
        def code(value: int) -> Tensor:
            return torch.tensor(int(value), dtype=torch.int32, device=device)

        self.running, self.converged = code(Status.RUNNING), code(Status.CONVERGED)
        self.non_finite = code(Status.NON_FINITE)
        self.current, self.saved = code(At.CURRENT), code(At.SAVED)
        self.infinite = torch.tensor(math.inf, dtype=acc, device=device)
        self.one = torch.ones((), dtype=acc, device=device)


class Judged(NamedTuple):
    """For a state of several blocks, each to a tolerance of its own: what takes the place of the norms' verdict."""

    finite: Tensor
    relative: Tensor
    within: Tensor


class Verdict(NamedTuple):
    """What an evaluation decides, (B,) each.

    Attributes:
        stats: the new ones, of the samples that ran; of those that did not, the old ones hold.
        run: samples that ran until now.
        going: those that take another step.
        reset: those of them whose unit is new, so that columns in the old one are dropped.
        spill: those whose best iterate is the one before: it is about to be overwritten.
        from_saved: where the answer of a sample that has stopped is the saved iterate and not this one.
    """

    stats: Stats
    run: Tensor
    going: Tensor
    reset: Tensor
    spill: Tensor
    from_saved: Tensor


def measure(
    stopping: Stopping,
    c: Codes,
    old: Stats,
    g_norm: Tensor,
    f_norm: Tensor,
    made: int,
    N: int,
    judged: Judged | None = None,
) -> Verdict:
    """The verdict on evaluation number ``made`` of samples of ``N`` numbers, from ||g_k|| and ||f_k||."""
    rtol, atol = stopping.rtol, stopping.atol
    acc = old.unit.dtype
    run = old.status == Status.RUNNING
    largest = torch.maximum(g_norm, f_norm)
    finite = largest < math.inf
    if judged is None:
        relative = (g_norm / f_norm).nan_to_num(nan=0.0, posinf=math.inf)  # 0 / 0: at rest at the origin
        within = g_norm <= f_norm * rtol + atol if atol else relative <= rtol
    else:
        finite, relative, within = finite & judged.finite, judged.relative, judged.within
    relative = torch.where(finite, relative, c.infinite).to(acc)

    better = relative < old.best if made > 1 else finite
    if atol or judged is not None:
        within = within & finite
        better = better | within
    live = run & finite
    going = live & ~within
    spill = run & ~better & (old.best_at == At.PREVIOUS)
    best_step = old.best_step.masked_fill(better, made)
    first = relative if made == 1 else old.first
    status = torch.where(finite, torch.where(within, c.converged, c.running), c.non_finite)
    if made == stopping.max_iter:
        status = torch.where(going, _label(relative, first, made - best_step, made).int(), status)
        going = torch.zeros_like(going)
    # CURRENT + 1 is PREVIOUS: of those that go on, this iterate is soon the one before.
    best_at = torch.where(better, going + c.current, torch.where(spill, c.saved, old.best_at))
    from_saved = best_at == c.saved
    if not stopping.keep_best:
        from_saved = from_saved & ~finite

    reset, unit = _unit(c, largest / math.sqrt(N), old.unit, going, made, judged is not None)
    best = torch.where(better, relative, old.best)
    stats = Stats(status, old.steps + 1, best_at, best_step, relative, g_norm.to(acc), best, first, unit)
    return Verdict(stats, run, going, reset, spill, from_saved)


def _label(relative: Tensor, first: Tensor, idle: Tensor, made: int) -> Tensor:
    """What a sample that used up its evaluations is called."""
    stalled = (idle >= STALL_MIN_STEPS) & (idle * STALL_FRACTION >= made)
    label = torch.where(stalled, int(Status.STALLED), int(Status.MAX_ITER))
    return torch.where(relative > DIVERGENCE * first, int(Status.DIVERGED), label)


def _unit(
    c: Codes, rms: Tensor, unit: Tensor, going: Tensor, made: int, may_rest: bool
) -> tuple[Tensor, Tensor]:
    """Whose unit is new, and the units: powers of two that bring a sample to magnitude one.

    ``may_rest``: whether a sample may go on whose residual and value are both 0.
    """
    limit = 120 if unit.dtype == torch.float32 else 1000  # a unit, and its inverse, must be normal numbers
    below = power_below(rms).clamp(2.0 ** (-limit - 1), 2.0 ** (limit - 1))
    new = below.reciprocal().to(unit.dtype)
    if made == 1:
        reset = going & (rms > 0)
        return reset, torch.where(reset, new, c.one)
    scaled = rms * unit
    off = scaled.clamp(1 / UNIT_RANGE, UNIT_RANGE) != scaled
    if may_rest:
        off = off & (rms > 0)
    reset = going & off
    return reset, torch.where(reset, new, unit)


def judge(norms: Tensor, rules: Tensor) -> Judged:
    """The verdict block by block: ``norms`` (blocks, 2, B), how far each moves and how large it is.

    ``rules``: (blocks, 3), rtol, atol and the weight of its residual of each block.
    """
    rtol, atol, weight = rules[:, :, None].unbind(1)
    moved, size = norms.unbind(1)
    relative = torch.where(size > 0, moved / size, torch.where(moved > 0, math.inf, 0.0)) * weight
    within = (moved <= atol + rtol * size).all(0)
    return Judged((norms.amax((0, 1)) < math.inf), relative.amax(0), within)
