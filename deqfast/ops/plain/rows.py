"""A workspace as the rows that the formulas work on, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codes import Int, Real
from ..formulas.measure import Codes, Stats, Verdict, judge, measure
from ..workspace import Workspace

STATS_INTS = list(Int)[: Int.BEST_STEP + 1]  # the first rows, in the order of ``Stats``
STATS_REALS = list(Real)[: Real.UNIT + 1]
EVENTS = list(Int)[Int.SOLVE_FALLBACKS :]


def gather(ws: Workspace, leaves: list[Tensor], rows: Tensor | None = None) -> Tensor:
    """(B, N) numbers in the accumulation dtype, of one leaf without a copy; ``rows``: where the samples are."""
    acc = ws.layout.acc
    parts = [r if r.dtype == acc else r.to(acc) for r in ws.layout.rows(leaves)]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return joined if rows is None else joined.index_select(0, rows.clamp(min=0))


def scatter(ws: Workspace, leaves: list[Tensor], rows: Tensor, where: Tensor | None = None) -> None:
    """Write (B, N) ``rows`` into ``leaves``, where the mask says."""
    start = 0
    for leaf, t in zip(ws.layout.leaves, leaves, strict=True):
        target = leaf.rows(t)
        part = rows if leaf.n == rows.shape[1] else rows[:, start : start + leaf.n]
        start += leaf.n
        if where is None:
            target.copy_(part)
        elif part.dtype == target.dtype:
            torch.where(where[:, None], part, target, out=target)
        else:
            target.copy_(torch.where(where[:, None], part.to(target.dtype), target))


class Statistics:
    """The rows of ``ints`` and ``reals`` that every solver keeps, as views made once a solve."""

    def __init__(self, ws: Workspace, evaluations: int) -> None:
        self.ws = ws
        self.made = evaluations
        self.codes = Codes(ws.layout.acc, ws.layout.device)
        self.stats = Stats(*(ws.int_row(row) for row in STATS_INTS), *(ws.real_row(row) for row in STATS_REALS))
        B = ws.layout.B
        self._ints, self._reals = ws.ints[: len(STATS_INTS), :B], ws.reals[: len(STATS_REALS), :B]
        self._events = ws.ints[EVENTS[0] : EVENTS[-1] + 1, :B]
        self._none = torch.zeros(B, dtype=torch.bool, device=ws.layout.device)
        if ws.block_norms is not None:
            self._rules = ws.block_norms.new_tensor(ws.block_rules)

    def measure(self, g_norm: Tensor, f_norm: Tensor) -> Verdict:
        """The verdict on a new evaluation; not yet written down."""
        ws = self.ws
        self.made += 1
        judged = None
        if ws.block_norms is not None:
            norms = ws.block_norms[:, :, : ws.layout.B]
            judged = judge(norms, self._rules)
        return measure(ws.stopping, self.codes, self.stats, g_norm, f_norm, self.made, ws.layout.N, judged)

    def write(self, verdict: Verdict) -> None:
        """Write the verdict down, of the samples that ran."""
        new, run = verdict.stats, verdict.run
        ints, reals = new[: len(STATS_INTS)], new[len(STATS_INTS) :]
        torch.where(run, torch.stack(ints), self._ints, out=self._ints)
        torch.where(run, torch.stack(reals), self._reals, out=self._reals)

    def count(self, events: dict[Int, Tensor]) -> None:
        """Count what happened to samples."""
        if events:
            first, last = min(events), max(events)
            masks = [events.get(row, self._none) for row in EVENTS[first - EVENTS[0] : last - EVENTS[0] + 1]]
            self._events[first - EVENTS[0] : last - EVENTS[0] + 1].add_(torch.stack(masks))

    def keep(self, rows: slice, new: list[Tensor], going: Tensor) -> None:
        """Write rows of ``ints`` of the samples that go on."""
        target = self.ws.ints[rows, : self.ws.layout.B]
        torch.where(going, torch.stack(new), target, out=target)

    def answers(self, x: Tensor, verdict: Verdict) -> Tensor:
        """(B, N) what a sample that stopped returns; saves the best iterates that are about to be overwritten."""
        ws = self.ws
        scatter(ws, ws.saved, gather(ws, ws.x[1 - ws.cur]), verdict.spill)
        return torch.where(verdict.from_saved[:, None], gather(ws, ws.saved), x)
