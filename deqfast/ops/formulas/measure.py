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
from ..codes import DIVERGENCE, FALLEN, FAR, GONE, GROWN, STALL_FRACTION, STALL_MIN_STEPS, UNIT_RANGE, At
from ..layout import Layout
from ..workspace import Stopping
from .algebra import but_not, power_below


class Stats(NamedTuple):
    """What is kept of each sample between evaluations, (B,) each; see ``Int`` and ``Real``."""

    status: Tensor
    steps: Tensor
    best_at: Tensor
    best_step: Tensor
    residual: Tensor
    norm: Tensor
    best: Tensor
    least: Tensor
    first: Tensor
    unit: Tensor
    largest: Tensor


class Codes:
    """Constants as tensors, made once a solve: a Python number in an operation costs two more at every step."""

    def __init__(self, stopping: Stopping, layout: Layout, wide: torch.dtype) -> None:
        B, N, acc, device = layout.B, max(1, layout.N), layout.acc, layout.device

        def number(value: float, dtype: torch.dtype) -> Tensor:
            return torch.tensor(value, dtype=dtype, device=device)

        status, at = Status, At
        self.running, self.non_finite = (number(int(s), torch.int32) for s in (status.RUNNING, status.NON_FINITE))
        self.current, self.previous, self.saved = (
            number(int(a), torch.int32) for a in (at.CURRENT, at.PREVIOUS, at.SAVED)
        )
        self.step = number(1, torch.int32)
        self.infinite, self.one, self.zero = (number(value, acc) for value in (math.inf, 1, 0))
        self.rtol, self.atol = number(stopping.rtol, wide), number(stopping.atol, wide)
        self.epsilon = torch.finfo(acc).eps
        self.root = number(math.sqrt(N), wide)
        self.smallest, self.greatest = math.sqrt(N) / UNIT_RANGE, math.sqrt(N) * UNIT_RANGE
        self.nobody = torch.zeros(B, dtype=torch.bool, device=device)


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
        worse: those that ran and have a better iterate than this one. None: nobody, as for the next two.
        spill: those whose best iterate is the one before: it is about to be overwritten.
        from_saved: where the answer of a sample that stops now is the saved iterate and not this one.
        calm: known on the host: every sample that ran goes on, in its unit, with finite f and g.
    """

    stats: Stats
    run: Tensor
    going: Tensor
    reset: Tensor
    worse: Tensor | None
    spill: Tensor | None
    from_saved: Tensor | None
    calm: bool = False

    @property
    def improved(self) -> bool:
        """Calm, all samples are running, and none has a better iterate than this one."""
        return self.calm and self.worse is None


def measure(
    stopping: Stopping,
    c: Codes,
    old: Stats,
    g_norm: Tensor,
    f_norm: Tensor,
    made: int,
    judged: Judged | None = None,
    looks: bool = False,
) -> Verdict:
    """The verdict on evaluation number ``made``, from ||g_k|| and ||f_k||.

    ``looks``: whether to look at what may not be needed: where that is no wait.
    """
    if looks and judged is None:
        calm = _calm(stopping, c, old, g_norm, f_norm, made)
        if calm is not None:
            return calm
    atol = stopping.atol
    acc = old.unit.dtype
    run = old.status == c.running
    largest = torch.maximum(g_norm, f_norm)
    finite = largest < c.infinite
    if judged is None:
        relative = (g_norm / f_norm).nan_to_num(nan=0.0, posinf=math.inf)  # 0 / 0: at rest at the origin
        relative = torch.where(finite, relative, c.infinite)
        within = finite & (g_norm <= f_norm * c.rtol + c.atol) if atol else relative <= c.rtol
    else:
        finite = finite & judged.finite
        relative, within = torch.where(finite, judged.relative, c.infinite), finite & judged.within
    relative, norm = relative.to(acc), g_norm.to(acc)

    score = norm if judged is None else relative
    better = score < old.least if made > 1 else finite
    if not (looks and not bool((run & within).any())):  # those that have stopped stay within
        if made > 1 and judged is None:
            within = but_not(within, has_run_away(c, old, g_norm, f_norm))
        better = better | within
    best_step = old.best_step.masked_fill(better, made)
    first = (largest if judged is None else relative).to(acc) if made == 1 else old.first
    high = norm if made == 1 else torch.maximum(old.largest, norm)
    status = torch.where(finite, within, c.non_finite)  # as numbers: RUNNING is 0 and CONVERGED 1
    going = but_not(run, status)
    if made == stopping.max_iter:
        grown = (best_step == 1) & (norm > DIVERGENCE * old.least) & (judged is None and made > 1)
        status = torch.where(going, label(score, first, made - best_step, made, grown).int(), status)
        going = torch.zeros_like(going)
    worse = spill = from_saved = None
    elsewhere = old.best_at
    if made > 1:
        # A sample that runs has a best iterate; if this one is not better, it is saved, or will be now.
        worse, elsewhere = but_not(run, better), c.saved
        from_saved, spill = worse, worse & (old.best_at == c.previous)
        if not stopping.keep_best:
            from_saved = but_not(from_saved, finite)
    best_at = torch.where(better, torch.where(going, c.previous, c.current), elsewhere)
    reset, unit = _unit(c, largest / c.root, old.unit, going, made, judged is not None or atol < 0)
    best = torch.where(better, relative, old.best)
    least = torch.where(better, score, old.least)
    stats = Stats(status, old.steps + c.step, best_at, best_step, relative, norm, best, least, first, unit, high)
    return Verdict(stats, run, going, reset, worse, spill, from_saved)


def _calm(stopping: Stopping, c: Codes, old: Stats, g_norm: Tensor, f_norm: Tensor, made: int) -> Verdict | None:
    """The same verdict where nothing happens to any sample that runs, as at most evaluations; None: something may."""
    if made == 1 or made == stopping.max_iter:
        return None
    run = old.status == c.running
    everybody = bool(run.all())
    relative = g_norm / f_norm
    above = g_norm - (f_norm * c.rtol + c.atol) if stopping.atol else relative - c.rtol
    scaled = torch.maximum(g_norm, f_norm) * old.unit
    if not everybody:
        above, scaled = torch.where(run, above, c.one), torch.where(run, scaled, c.root)
    if not above.amin().item() > 0:
        return None
    lowest, highest = scaled.aminmax()
    if not (lowest.item() > c.smallest and highest.item() < c.greatest):
        return None
    relative, norm = relative.to(old.unit.dtype), g_norm.to(old.unit.dtype)
    worse = norm >= old.least
    if everybody and not bool(worse.any()):
        stats = old._replace(residual=relative, norm=norm, best=relative, least=norm)
        return Verdict(stats, run, run, c.nobody, None, None, None, calm=True)
    worse = run & worse
    stats = old._replace(
        residual=relative,
        norm=norm,
        best=torch.where(worse, old.best, relative),
        least=torch.where(worse, old.least, norm),
        best_at=torch.where(worse, c.saved, c.previous),
        best_step=torch.where(worse, old.best_step, made),
        steps=old.steps + c.step,
        largest=torch.maximum(old.largest, norm),
    )
    return Verdict(stats, run, run, c.nobody, worse, worse & (old.best_at == c.previous), worse, calm=True)


def has_run_away(c: Codes, old: Stats, g_norm: Tensor, f_norm: Tensor) -> Tensor:
    """Whose ||f|| is ``GROWN`` times its first size, while ||g|| has hardly fallen or is small beside ||f|| alone.

    There ||g|| / ||f|| gets small because ||f|| gets large: z + a bounded step has no fixed point at all.
    """
    rounding = c.epsilon * f_norm
    hardly = (FALLEN * g_norm > old.largest) | (rounding > old.largest) | (f_norm > GONE * old.first)
    far = (g_norm > FAR * c.rtol * old.first + c.atol) & (g_norm > rounding)
    return (f_norm > GROWN * old.first) & (old.first > 0) & (hardly | far)


def label(score: Tensor, first: Tensor, idle: Tensor, made: int, grown: Tensor) -> Tensor:
    """What a sample that used up its evaluations is called.

    ``grown``: whose ||g|| has never been below its first value and ended far above it.
    """
    stalled = (idle >= STALL_MIN_STEPS) & (idle * STALL_FRACTION >= made)
    found = torch.where(stalled, int(Status.STALLED), int(Status.MAX_ITER))
    return torch.where(grown | (score > DIVERGENCE * first) & (first > 0), int(Status.DIVERGED), found)


def _unit(c: Codes, rms: Tensor, unit: Tensor, going: Tensor, made: int, may_rest: bool) -> tuple[Tensor, Tensor]:
    """Whose unit is new, and the units: powers of two that bring a sample to magnitude one.

    ``may_rest``: whether a sample may go on whose residual and value are both 0.
    """
    limit = 120 if unit.dtype == torch.float32 else 1000  # a unit, and its inverse, must be normal numbers
    below = power_below(rms).clamp(2.0 ** (-limit - 1), 2.0 ** (limit - 1))
    new = below.reciprocal().to(unit.dtype)
    if made == 1:
        reset = going & (rms > c.zero)
        return reset, torch.where(reset, new, c.one)
    scaled = rms * unit
    off = scaled.clamp(1 / UNIT_RANGE, UNIT_RANGE) != scaled
    if may_rest:
        off = off & (rms > c.zero)
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
