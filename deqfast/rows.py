"""How many rows of a batch f sees: the schedule by which a batch shrinks, and the count of what that spared."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RUNG = 4  # one part in so many is left out from one size to the next
TRUST = 0.25  # of the rows of a last look: what has to be wasted before a batch shrinks that will need one


def trial_stride(size: int) -> int:
    """One row of a smaller batch in so many is tried: a quarter of them, of few rows all."""
    return 4 if size >= 32 else 1


class Schedule:
    """The sizes of a batch that shrinks while its samples finish.

    Sizes are the rungs of one ladder for each batch, a quarter apart, so that f meets few shapes, and the same ones
    from solve to solve. The batch shrinks once the rows that were evaluated for nothing since it last did have paid for
    what shrinking costs, for nobody knows how much longer the rest will take. ``python -m bench.rows --sweep`` compares
    other ladders and other prices.

    Args:
        batch: rows of the whole batch.
        confirms: a batch that has shrunk is evaluated whole once more at the end.
        price: evaluations of the smaller batch that shrinking costs.
        rung: a size of the ladder is smaller than the one before by one part in so many.
        trust: how much of the whole batch has to be wasted first, where the end confirms.

    Attributes:
        size: rows that the newest evaluation was to see.
    """

    def __init__(
        self, batch: int, *, confirms: bool, price: float = 0.0, rung: int = RUNG, trust: float = TRUST
    ) -> None:
        self.size = batch
        self._once = trust * batch if confirms else 0.0
        self._price, self._rung = price, rung
        self._wasted = 0

    def next(self, alive: int) -> int:
        """Rows for the next evaluation, ``alive`` of which run; asked once an evaluation."""
        size = self.size
        while size > 1:
            smaller = size - max(1, size // self._rung)
            if smaller < alive:
                break
            size = smaller
        if size < self.size and self._wasted >= self._once + self._price * size:
            self.size, self._wasted, self._once = size, 0, 0.0
        self._wasted += self.size - alive
        return self.size


def needed(steps: Tensor, evaluations: int, *, trial: bool = True, confirms: bool = True, **schedule: float) -> int:
    """Rows that f would see in a solve whose rows run for so many ``steps`` (rows,), with a schedule.

    Args:
        steps: of each row of the batch, int.
        evaluations: of the slowest.
        trial: some rows of the first smaller batch are tried.
        confirms: the whole batch is evaluated once more at the end.
        schedule: other options of ``Schedule``.
    """
    batch = steps.numel()
    ended = torch.bincount(steps.clamp(0, evaluations).cpu().long(), minlength=evaluations + 1)
    sizes = Schedule(batch, confirms=confirms, **schedule)  # type: ignore[arg-type]
    seen, alive = 0, batch
    for gone in ended[:evaluations].tolist():
        alive -= gone
        before, size = sizes.size, sizes.next(alive)
        seen += size
        if trial and before == batch != size:
            seen += math.ceil(size / trial_stride(size))
    return seen + (batch if confirms and sizes.size < batch else 0)


@dataclass(frozen=True)
class RowCount:
    """Rows of dim 0 that a map was evaluated at in a solve with ``compact``.

    Attributes:
        seen: in all evaluations together, with those of a trial and of the last look.
        plain: in a solve that leaves nobody out.
        whole: why the batch stayed whole, or was made whole again; None: nothing spoke against leaving rows out.
    """

    seen: int
    plain: int
    whole: str | None = None

    @property
    def spared(self) -> float:
        """Which part of the rows was spared; below 0 where a trial and the last look cost more than they gained."""
        return 1 - self.seen / self.plain if self.plain else 0.0
