"""What is measured between two evaluations: residuals, when to stop.

On a CPU in numpy, on the memory that the kernels write their norms to, for such an operation takes a third of the time
of torch's; on a device in torch, without waiting for it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...loop.images import some_or_all


class Watch:
    """Residuals of every evaluation, read from ``now`` (2, B) after each.

    Args:
        now: the newest ones, in memory that stays.
        mode: the row that counts.
        room: evaluations at most.

    Attributes:
        all: (room + 1, 2, B), evaluation k in row k; row 0 is nobody's.
        lowest: (2, B) least so far, infinite before the first finite one.
        made: evaluations recorded.
    """

    def __init__(self, now: Tensor, mode: int, room: int) -> None:
        self._mode = mode
        self.all = now.new_empty(room + 1, *now.shape)
        self.lowest = torch.full_like(now, math.inf)
        self.made = 0

    def take(self) -> None:
        """Record the newest evaluation."""
        raise NotImplementedError

    def better(self) -> Any:
        """(B,) bool: which samples were never as good as at the newest evaluation. True: all of them; False: none."""
        raise NotImplementedError

    def within(self, tol: float) -> bool:
        """Whether every finite sample is below ``tol`` now."""
        raise NotImplementedError

    def stalled(self, tol: float, window: int) -> bool:
        """Near ``tol``, and no sample made progress to speak of in so many evaluations."""
        return False

    def finish(self, made: int, shown: slice, final: bool, unknown: float, zero: int) -> tuple[Tensor, Tensor, Tensor]:
        """What is told of a solve; no more can be recorded.

        Args:
            made: evaluations that count.
            shown: those of the traces, the first in place of ``unknown``.
            final: the newest residual counts, not the lowest.
            unknown: what a residual is that was never finite.
            zero: the step that the first evaluation is.

        Returns:
            (2, B) lowest residuals, (B,) float32 steps of those of the row that counts, (2, B, T) traces.
        """
        rows, mode = self.all, self._mode
        if final:
            lowest = rows[made].clone()
            step = torch.full_like(lowest[mode], made - 1 + zero, dtype=torch.float32)
        else:
            lowest = self.lowest
            step = (rows[1 : made + 1, mode] == lowest[mode]).to(torch.uint8).argmax(0).to(torch.float32) + zero
            lowest.masked_fill_(lowest == math.inf, unknown)
        rows[made + 1 :] = lowest
        rows[shown.start] = unknown
        return lowest, step, rows[shown].permute(1, 2, 0).contiguous()


class HostWatch(Watch):
    """On a CPU."""

    def __init__(self, now: Tensor, mode: int, room: int) -> None:
        super().__init__(now, mode, room)
        self._now, self._all, self._lowest = now.numpy(), self.all.numpy(), self.lowest.numpy()
        self._row, self._low = self._now[mode], self._lowest[mode]
        self._better = np.empty(self._row.shape, dtype=np.bool_)
        self._slowest = 0

    def take(self) -> None:
        """Record the newest evaluation."""
        self.made += 1
        self._all[self.made] = self._now
        np.less(self._row, self._low, out=self._better)
        np.fmin(self._lowest, self._now, out=self._lowest)

    def better(self) -> Any:
        """(B,) bool tensor, or True for every sample, or False for none."""
        return some_or_all(self._better)

    def within(self, tol: float) -> bool:
        """Whether every finite sample is below ``tol`` now: looks at the one that was not, first."""
        row = self._row
        if row.item(self._slowest) >= tol:
            return False
        at = int(row.argmax())
        if not math.isfinite(row.item(at)):
            row = np.where(np.isfinite(row), row, -1.0)
            at = int(row.argmax())
        self._slowest = at
        return bool(row.item(at) < tol)

    def stalled(self, tol: float, window: int) -> bool:
        """Near ``tol``, and no sample made progress to speak of in so many evaluations."""
        if self.made <= window or not self._row.item(self._slowest) < 3 * tol or not self._row.max() < 3 * tol:
            return False
        last = self._all[self.made - window + 1 : self.made + 1, self._mode]
        return bool((last.max(0) < 1.3 * last.min(0)).all())

    def finish(self, made: int, shown: slice, final: bool, unknown: float, zero: int) -> tuple[Tensor, Tensor, Tensor]:
        """What is told of a solve; no more can be recorded."""
        if final:
            return super().finish(made, shown, final, unknown, zero)
        rows, lowest = self._all, self._lowest
        step = (rows[1 : made + 1, self._mode] == self._low).argmax(0).astype(np.float32)
        step += zero
        lowest[lowest == math.inf] = unknown
        rows[made + 1 :] = lowest
        rows[shown.start] = unknown
        traces = np.ascontiguousarray(rows[shown].transpose(1, 2, 0))
        return self.lowest, torch.from_numpy(step), torch.from_numpy(traces)


class DeviceWatch(Watch):
    """On a device. Only ``within`` waits for it."""

    def __init__(self, now: Tensor, mode: int, room: int) -> None:
        super().__init__(now, mode, room)
        self._now = now
        self._better = now[0]

    def take(self) -> None:
        """Record the newest evaluation."""
        self.made += 1
        self.all[self.made] = self._now
        self._better = self._now[self._mode] < self.lowest[self._mode]
        torch.fmin(self.lowest, self._now, out=self.lowest)

    def better(self) -> Any:
        """(B,) bool."""
        return self._better

    def within(self, tol: float) -> bool:
        """Whether every finite sample is below ``tol`` now."""
        row = self._now[self._mode]
        return bool(((row < tol) | ~torch.isfinite(row)).all())
