"""``stop="all"``: samples stop together, at the first evaluation at which every finite one is within its tolerance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.codes import At, Int, Real
from ..ops.lag import Lag
from ..ops.workspace import Stopping, Workspace
from ..status import Status


def never(rule: Stopping) -> Stopping:
    """The rule by which no sample stops before the limit, not even one with f(z) == z."""
    return rule._replace(rtol=0.0, atol=-1.0)


class Together:
    """Looks at every evaluation of a workspace whose kernels stop nobody.

    Args:
        ws: made with ``never(rule)``.
        rule: when a sample is within tolerance.
        made: evaluations made so far.
    """

    def __init__(self, ws: Workspace, rule: Stopping, made: int) -> None:
        self.ws, self.rule = ws, rule
        layout = ws.layout
        self._lag = Lag(layout.B, layout.device, rule.max_iter, made)
        self._waits = layout.device.type == "cpu"
        self._short = -1  # on a CPU: a sample that was not within tolerance at the last full look
        if self._waits:
            self._numbers = ws.ints.numpy(), ws.reals.numpy()

    def over(self) -> bool:
        """Whether everybody has stopped at the last evaluation, as nobody knew when it was made."""
        return False

    def look(self, known: int) -> int:
        """Stop everybody if it is time; the samples still running, as far as the host knows. After ``cur`` flipped.

        ``known``: how many the kernels have said to run.
        """
        if self._far():
            return max(1, known)
        with torch.no_grad():
            running = self.ws.int_row(Int.STATUS) == int(Status.RUNNING)
            short = running & ~self.within()
            if self._waits:
                self._short = int(short.to(torch.uint8).argmax())
            count = torch.where(short.any(), running.sum(), 0).to(torch.int32)
            if not self._waits or int(count) == 0:
                self._stop(running & (count == 0))
            return self._lag.read(count)

    def _far(self) -> bool:
        """Whether one sample that runs is seen to be far from tolerance, which is enough to know that all go on."""
        if self._short < 0:
            return False
        ints, reals = self._numbers
        at = self._short
        if ints.item(int(Int.STATUS), at) != int(Status.RUNNING):
            return False
        moved, relative = reals.item(int(Real.NORM), at), reals.item(int(Real.RESIDUAL), at)
        if not 0 < relative < math.inf:
            return False
        return bool(moved > 2 * (self.rule.atol + self.rule.rtol * moved / relative))

    def within(self) -> Tensor:
        """(B,) bool: samples within tolerance at the newest evaluation."""
        relative, moved = self.ws.real_row(Real.RESIDUAL), self.ws.real_row(Real.NORM)
        if not self.rule.atol:
            return relative <= self.rule.rtol
        size = torch.where(relative > 0, moved / relative, 0.0)
        return (moved <= self.rule.atol + self.rule.rtol * size) & torch.isfinite(relative)

    def _stop(self, which: Tensor) -> None:
        """These have converged at the iterate that was evaluated last; and those that had to stop there, if within."""
        ws = self.ws
        late = (ws.int_row(Int.STATUS) > int(Status.CONVERGED)) & (ws.int_row(Int.BEST_AT) == int(At.CURRENT))
        late = late & self.within()  # out of evaluations: their answer is that iterate already
        layout = ws.layout
        rows = layout.spread(which)[:, None]
        for now, before in zip(layout.rows(ws.x[ws.cur]), layout.rows(ws.x[1 - ws.cur]), strict=True):
            now.copy_(torch.where(rows, before, now))
        ws.int_row(Int.STATUS).masked_fill_(which | late, int(Status.CONVERGED))
        ws.int_row(Int.BEST_AT).masked_fill_(which, int(At.CURRENT))
        best = ws.real_row(Real.BEST)
        best.copy_(torch.where(which, ws.real_row(Real.RESIDUAL), best))
