"""What torchdeq's solvers say of a solve: a dict of tensors, by its keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._watch import Watch

UNKNOWN = 1e8  # what a trace begins with, and the lowest residual of a sample that never had a finite one

ABS, REL = 1, 0  # rows of a measurement, as the kernels keep them
MODES = {"abs": ABS, "rel": REL}


class SolverStat(dict[str, Tensor]):
    """Statistics of a solve of B samples.

    ``abs_lowest`` and ``rel_lowest`` (B,): the lowest ||f(z) - z|| and ||f(z) - z|| / ||f(z)||. ``abs_trace`` and
    ``rel_trace`` (B, T): one a step, beginning with 1e8, and from the stop on the lowest. ``nstep`` (B,): the step of
    the lowest, a float. ``sradius`` (B,): in eval mode, if it was asked for. What is not known is -1.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("abs_lowest", "rel_lowest", "abs_trace", "rel_trace", "nstep", "sradius"):
            if name not in self:
                self[name] = torch.full((1, 1) if name.endswith("trace") else (1,), -1.0)


class Counted(NamedTuple):
    """How a method counts its evaluations.

    Attributes:
        first: the evaluation, from 0, with which its traces begin after the 1e8.
        zero: the step that the evaluation of x0 is.
        beyond: evaluations at most, beside ``max_iter``.
        longer: length of the traces, beside ``max_iter``.
    """

    first: int
    zero: int
    beyond: int
    longer: int


ANDERSON = Counted(first=2, zero=1, beyond=0, longer=-1)
BROYDEN = Counted(first=1, zero=0, beyond=1, longer=1)
PLAIN = Counted(first=0, zero=1, beyond=0, longer=1)


def nothing_known(counted: Counted, max_iter: int, batch: int, like: Tensor) -> SolverStat:
    """Statistics of a solve without an evaluation; ``like``: a tensor of their dtype and device."""
    lowest = like.new_full((batch,), UNKNOWN)
    trace = like.new_full((batch, max(1, max_iter + counted.longer)), UNKNOWN)
    return SolverStat(
        abs_lowest=lowest,
        rel_lowest=lowest.clone(),
        abs_trace=trace,
        rel_trace=trace.clone(),
        nstep=torch.zeros(batch, device=like.device),
    )


def statistics(found: Watch, made: int, counted: Counted, max_iter: int, final: bool) -> SolverStat:
    """Statistics of a solve.

    Args:
        found: what was measured; overwritten. What is not finite counts as no residual.
        made: evaluations, at least 1.
        counted: of the method.
        max_iter: of the solve.
        final: the newest measurement counts, not the lowest.
    """
    length = max(1, max_iter + counted.longer)
    shown = slice(counted.first, counted.first + length)
    lowest, step, traces = found.finish(made, shown, final, UNKNOWN, counted.zero)
    return SolverStat(
        abs_lowest=lowest[ABS],
        rel_lowest=lowest[REL],
        abs_trace=traces[ABS],
        rel_trace=traces[REL],
        nstep=step,
    )


def room(counted: Counted, max_iter: int) -> int:
    """Rows that the statistics of a solve need, beside the first."""
    return max(max_iter + counted.beyond, counted.first + max(1, max_iter + counted.longer) - 1)
