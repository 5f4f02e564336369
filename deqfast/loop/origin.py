"""Samples whose solution is 0: ||f(z) - z|| / ||f(z)|| does not tell how close to it they are, it stays as it is.

When ||f(z)|| has fallen below the dtype's rounding times the largest that the sample has had, 0 is as good an answer as
any: its next iterate is 0, its history is forgotten, and what it was is measured anew. If f(0) = 0 that converges at
once; anything else goes on from there, and is owed its own digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.codes import Int, Real
from ..ops.workspace import Workspace
from ..status import Status

EVERY = 16  # evaluations from one look to the next


class Origin:
    """Looks at a solve from time to time, the first time after ``EVERY`` evaluations.

    Attributes:
        largest: (B,) ||f(z)||, the largest so far; given where the solve has been looked at before.
    """

    def __init__(self, ws: Workspace, largest: Tensor | None = None) -> None:
        self._ws = ws
        # The unit is about the inverse of what a number of the sample was at its first evaluation.
        start = ws.layout.numbers().sqrt() / ws.real_row(Real.UNIT)
        self.largest = start if largest is None else start.copy_(largest)
        self._looks = ws.layout.device.type == "cpu"
        self._eps = torch.finfo(ws.layout.dtype).eps

    def take(self, ws: Workspace, which: Tensor) -> None:
        """Look from now on at a workspace that holds some of the samples."""
        self._ws = ws
        self.largest = self.largest.index_select(0, which)

    def look(self) -> bool:
        """Send samples to 0 that have come to it, after a step; whether there may have been any."""
        ws = self._ws
        with torch.no_grad():
            moved, relative = ws.real_row(Real.NORM), ws.real_row(Real.RESIDUAL)
            size = torch.where(relative > 0, moved / relative, 0.0).nan_to_num(posinf=0.0)
            running = ws.int_row(Int.STATUS) == int(Status.RUNNING)
            # A residual of 0 says nothing of the size: that sample is at its solution, and runs for the sake of others.
            arrived = running & (size < self._eps * self.largest) & (relative != 0)
            self.largest = torch.maximum(self.largest, size).masked_fill(arrived, 0)
            if self._looks and not bool(arrived.any()):
                return False
            rows = ws.layout.spread(arrived)[:, None]
            for x in ws.layout.rows(ws.x[ws.cur]):
                x.masked_fill_(rows, 0)
            ws.forget(arrived)
        return True
