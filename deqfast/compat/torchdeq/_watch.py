"""What is measured and kept between two evaluations: residuals, the best image, when to stop.

On a CPU in numpy, on the memory that the kernels write their norms to, for such an operation takes a third of the time
of torch's; on a device in torch, without waiting for it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...ops.layout import Layout


class Watch:
    """Residuals of every evaluation, read from ``now`` (2, B) after each.

    Attributes:
        rows: copies of them, one an evaluation.
    """

    def __init__(self, now: Tensor, mode: int) -> None:
        self._mode = mode

    def take(self) -> None:
        """Record the newest evaluation."""
        raise NotImplementedError

    def better(self) -> Any:
        """(B,) bool: which samples have never been as good as now. True: every one; False: none."""
        raise NotImplementedError

    def within(self, tol: float) -> bool:
        """Whether every finite sample is below ``tol`` now."""
        raise NotImplementedError

    def stalled(self, tol: float, window: int) -> bool:
        """Near ``tol``, and no sample made progress to speak of in so many evaluations."""
        return False

    def measured(self) -> Tensor:
        """(T, 2, B): everything recorded."""
        raise NotImplementedError


class HostWatch(Watch):
    """On a CPU."""

    def __init__(self, now: Tensor, mode: int) -> None:
        super().__init__(now, mode)
        self._now = now.numpy()
        self._row = self._now[mode]
        self._low = np.full_like(self._row, math.inf)
        self._better = np.empty(self._row.shape, dtype=np.bool_)
        self._slowest = 0
        self.rows: list[Any] = []

    def take(self) -> None:
        """Record the newest evaluation."""
        self.rows.append(self._now.copy())

    def better(self) -> Any:
        """(B,) bool tensor, or True for every sample, or False for none."""
        np.less(self._row, self._low, out=self._better)
        np.fmin(self._low, self._row, out=self._low)
        if self._better.all():
            return True
        return torch.from_numpy(self._better) if self._better.any() else False

    def within(self, tol: float) -> bool:
        """Whether every finite sample is below ``tol`` now: looks at the one that was not, first."""
        if self._row.item(self._slowest) >= tol:
            return False
        row = self._row
        at = int(row.argmax())
        if not math.isfinite(row.item(at)):
            row = np.where(np.isfinite(row), row, -1.0)
            at = int(row.argmax())
        self._slowest = at
        return bool(row.item(at) < tol)

    def stalled(self, tol: float, window: int) -> bool:
        """Near ``tol``, and no sample made progress to speak of in so many evaluations."""
        if len(self.rows) <= window or not self._row.item(self._slowest) < 3 * tol or not self._row.max() < 3 * tol:
            return False
        last = np.stack([row[self._mode] for row in self.rows[-window:]])
        return bool((last.max(0) < 1.3 * last.min(0)).all())

    def measured(self) -> Tensor:
        """(T, 2, B): everything recorded."""
        return torch.from_numpy(np.stack(self.rows))


class DeviceWatch(Watch):
    """On a device. Only ``within`` waits for it."""

    def __init__(self, now: Tensor, mode: int) -> None:
        super().__init__(now, mode)
        self._now, self._row = now, now[mode]
        self._low = torch.full_like(self._row, math.inf)
        self.rows: list[Tensor] = []

    def take(self) -> None:
        """Record the newest evaluation."""
        self.rows.append(self._now.clone())

    def better(self) -> Any:
        """(B,) bool."""
        better = self._row < self._low
        self._low = torch.fmin(self._low, self._row)
        return better

    def within(self, tol: float) -> bool:
        """Whether every finite sample is below ``tol`` now."""
        return bool(((self._row < tol) | ~torch.isfinite(self._row)).all())

    def measured(self) -> Tensor:
        """(T, 2, B): everything recorded."""
        return torch.stack(self.rows)


class Kept:
    """The tensors of every sample's best evaluation.

    Where every sample is better than ever, which is nearly always while a solve converges, they are held as they came
    and not copied. That is safe for one evaluation: the next one replaces them, or copies what is still wanted.

    Args:
        layout: of the state.
        start: leaves for samples that never have a finite residual.
        lasting: what is handed over lasts until the next time; else it may lie in memory that f uses again.
    """

    def __init__(self, layout: Layout, start: list[Tensor], lasting: bool) -> None:
        self._layout, self._start = layout, start
        self._lasting = lasting
        self._leaves: list[Tensor] = start
        self._own = False  # whether the leaves are nobody else's
        self._seen: list[Tensor] = []  # f's newest output, kept alive so that its address is not taken by another
        self._places: list[int] = []
        self._versions: list[int] = []
        self._times = 0
        self._reused = False

    def take(self, leaves: list[Tensor], better: Any, z: list[Tensor]) -> None:
        """Take ``leaves`` for samples that are ``better``; ``z`` is what f was given."""
        if not self._lasting:
            self._look(leaves, z)
        if better is False:
            better = None
        if better is True:
            if self._lasting or (self._times > 2 and not self._reused):
                self._leaves, self._own = leaves, False
            else:
                self._leaves, self._own = [t.clone() for t in leaves], True
        elif better is None:
            if not self._own:
                self._leaves, self._own = [t.clone() for t in self._leaves], True
        else:
            self._leaves = [
                torch.where(better.view(-1, *([1] * (t.dim() - 1))), t.to(old.dtype), old)
                for t, old in zip(leaves, self._widened(), strict=True)
            ]
            self._own = True

    def _widened(self) -> list[Tensor]:
        return [t.to(leaf.dtype) for t, leaf in zip(self._leaves, self._layout.leaves, strict=True)]

    def _look(self, leaves: list[Tensor], z: list[Tensor]) -> None:
        """Whether f returns memory that it had returned before, or what it was given."""
        self._times += 1
        places = [t.untyped_storage().data_ptr() for t in leaves]
        if not self._reused:
            given = [t.untyped_storage().data_ptr() for t in z]
            self._reused = not set(places).isdisjoint(self._places + given) or any(
                _version(t) != v for t, v in zip(self._seen, self._versions, strict=True)
            )
        self._seen, self._places = leaves, places
        self._versions = [_version(t) for t in leaves]

    def copy(self) -> Any:
        """The state with these leaves, in memory of its own."""
        return self._layout.unflatten([t.clone() for t in self._widened()])


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version
