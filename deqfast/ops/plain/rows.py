"""A workspace as the rows that the formulas work on, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codes import At, Int, Real
from ..formulas.measure import Codes, Stats, Verdict, judge, measure
from ..workspace import Workspace

STATS_INTS = list(Int)[: Int.BEST_STEP + 1]  # the first rows, in the order of ``Stats``
STATS_REALS = list(Real)[: Real.LARGEST + 1]
EVENTS = list(Int)[Int.SOLVE_FALLBACKS :]
WORTH_A_LOOK = 1 << 13  # numbers of a batch whose masked copy costs a CPU more than to look whether it is needed


def _join(parts: list[Tensor], acc: torch.dtype) -> Tensor:
    """(B, N) contiguous numbers in the accumulation dtype; of one leaf that is that without a copy."""
    if len(parts) > 1:
        return torch.cat([part.to(acc) for part in parts], dim=1)
    return parts[0].to(acc).contiguous()  # sums of other layouts have other bits


def gather(ws: Workspace, leaves: list[Tensor], rows: Tensor | None = None) -> Tensor:
    """(B, N) numbers of f's output in the accumulation dtype; ``rows``: where the samples are."""
    layout = ws.layout
    plain = layout.single and layout.leaves[0].plain and leaves[0].dim() == 2
    joined = _join(leaves if plain else layout.rows(leaves), layout.acc)
    return joined if rows is None else joined.index_select(0, rows.clamp(min=0))


def _write(targets: list[Tensor], rows: Tensor, where: Tensor | None, other: Tensor | None) -> None:
    start = 0
    for target in targets:
        end = start + target.shape[1]
        part = rows if len(targets) == 1 else rows[:, start:end]
        if where is None:
            if part is not target:
                target.copy_(part)
        else:
            rest = target if other is None else other[:, start:end]
            if part.dtype == rest.dtype == target.dtype:
                torch.where(where[:, None], part, rest, out=target)
            else:
                target.copy_(torch.where(where[:, None], part.to(target.dtype), rest.to(target.dtype)))
        start = end


class Iterates:
    """The iterates of a workspace as rows; the views are made once a solve.

    Attributes:
        looks: whether to look at a mask before a masked copy. Only on a CPU, where that is no wait.
    """

    def __init__(self, ws: Workspace) -> None:
        layout = ws.layout
        self._acc = layout.acc
        self._x = tuple(layout.rows(buffer) for buffer in ws.x)
        self._saved = layout.rows(ws.saved)
        self.looks = layout.device.type == "cpu" and layout.B * layout.N >= WORTH_A_LOOK
        self._ws = ws
        self._spare: Tensor | None = None

    def now(self) -> Tensor:
        """x_k, (B, N)."""
        return _join(self._x[self._ws.cur], self._acc)

    def before(self) -> Tensor:
        """x_{k-1}, (B, N)."""
        return _join(self._x[1 - self._ws.cur], self._acc)

    def target(self) -> Tensor:
        """(B, N) of the accumulation dtype for the next iterate: where ``write`` puts it if that will do."""
        targets = self._x[1 - self._ws.cur]
        if len(targets) == 1 and targets[0].dtype == self._acc and targets[0].is_contiguous():
            return targets[0]
        if self._spare is None:
            self._spare = torch.empty_like(self.now())
        return self._spare

    def write(self, x: Tensor, where: Tensor, other: Tensor | None) -> None:
        """The next iterate: ``x`` where the mask says, elsewhere ``other``; None: the mask says so everywhere."""
        _write(self._x[1 - self._ws.cur], x, None if other is None else where, other)

    def overwrite(self, x: Tensor, where: Tensor) -> None:
        """This iterate, where the mask says."""
        _write(self._x[self._ws.cur], x, where, None)

    def save(self, verdict: Verdict) -> None:
        """The best iterates that are about to be overwritten, one tensor after the other."""
        if verdict.worse is None or verdict.spill is None or (self.looks and not bool(verdict.worse.any())):
            return
        for saved, x in zip(self._saved, self._x[1 - self._ws.cur], strict=True):
            torch.where(verdict.spill[:, None], x, saved, out=saved)

    def answers(self, x: Tensor, verdict: Verdict) -> Tensor:
        """What samples that stop return; saves the best iterates that are about to be overwritten."""
        worse, from_saved = verdict.worse, verdict.from_saved
        if worse is None or from_saved is None or (self.looks and not bool(worse.any())):
            return x
        _write(self._saved, self.before(), verdict.spill, None)
        if verdict.calm:
            return x  # nobody stops now
        return torch.where(from_saved[:, None], _join(self._saved, self._acc), x)


class Statistics:
    """The rows of ``ints`` and ``reals`` that every solver keeps, as views made once a solve."""

    def __init__(self, ws: Workspace, evaluations: int, wide: torch.dtype, looks: bool) -> None:
        """``wide``: dtype of the norms that ``measure`` will be given; ``looks``: see there."""
        self.ws = ws
        self.made = evaluations
        self.looks = looks
        layout = ws.layout
        self.codes = Codes(ws.stopping, layout, wide)
        self.stats = Stats(*(ws.int_row(row) for row in STATS_INTS), *(ws.real_row(row) for row in STATS_REALS))
        B, ints = layout.B, len(STATS_INTS)
        self._newest = ws.reals[Real.RESIDUAL : Real.NORM + 1, :B]
        self._best = ws.reals[Real.BEST : Real.LEAST + 1, :B]
        self._ints, self._reals = ws.ints[:ints, :B], ws.reals[: len(STATS_REALS), :B]
        self._views: dict[tuple[int, int], Tensor] = {}
        if ws.block_norms is not None:
            self._rules = ws.block_norms.new_tensor(ws.block_rules)

    def measure(self, g_norm: Tensor, f_norm: Tensor) -> Verdict:
        """The verdict on a new evaluation; not yet written down."""
        ws = self.ws
        self.made += 1
        judged = None
        if ws.block_norms is not None:
            judged = judge(ws.block_norms[:, :, : ws.layout.B], self._rules)
        return measure(ws.stopping, self.codes, self.stats, g_norm, f_norm, self.made, judged, self.looks)

    def write(self, verdict: Verdict, more: dict[Int, Tensor] | None = None) -> None:
        """Write the verdict down, of the samples that ran; and more rows of those that go on."""
        if verdict.improved:
            self._write_improved(verdict)
            for row, value in (more or {}).items():
                self.ws.int_row(row).copy_(value)
            return
        new, run = verdict.stats, verdict.run
        ints, reals = new[: len(STATS_INTS)], new[len(STATS_INTS) :]
        torch.where(run, torch.stack(reals), self._reals, out=self._reals)
        if not more:
            torch.where(run, torch.stack(ints), self._ints, out=self._ints)
            return
        last = max(more)
        rows = list(Int)[len(STATS_INTS) : last + 1]
        values = [*ints, *(more[row].int() if row in more else self.ws.int_row(row) for row in rows)]
        masks = torch.stack([run] * len(ints) + [verdict.going] * len(rows))
        target = self._rows_of(0, last)
        torch.where(masks, torch.stack(values), target, out=target)

    def _write_improved(self, verdict: Verdict) -> None:
        stats = self.stats
        newest = torch.stack([verdict.stats.residual, verdict.stats.norm])
        self._newest.copy_(newest)
        self._best.copy_(newest)
        torch.maximum(stats.largest, verdict.stats.norm, out=stats.largest)
        stats.best_step.fill_(self.made)
        stats.best_at.fill_(At.PREVIOUS)
        stats.steps.add_(1)

    def _rows_of(self, first: int, last: int) -> Tensor:
        """A view of rows of ``ints``, made once."""
        if (first, last) not in self._views:
            self._views[first, last] = self.ws.ints[first : last + 1, : self.ws.layout.B]
        return self._views[first, last]

    def of_any_solver(self, verdict: Verdict, overflowed: Tensor | None) -> dict[Int, Tensor]:
        """What every solver counts, given who took f's value because the next iterate ``overflowed``; None: nobody."""
        events = {} if overflowed is None else {Int.STEP_FALLBACKS: overflowed}
        if self.made > 1 and not verdict.calm:  # the first unit replaces none
            events[Int.RESCALES] = verdict.reset
        return events

    def count(self, events: dict[Int, Tensor]) -> None:
        """Count what happened to samples."""
        if not events:
            return
        if len(events) == 1:
            ((row, mask),) = events.items()
            self._rows_of(row, row)[0].add_(mask)
            return
        first, last = min(events), max(events)
        masks = [events.get(row, self.codes.nobody) for row in EVENTS[first - EVENTS[0] : last - EVENTS[0] + 1]]
        self._rows_of(first, last).add_(torch.stack(masks))
