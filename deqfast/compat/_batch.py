"""A loop whose stopping rule is the norm over a whole batch: what is evaluated, measured and kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..solvers.base import Solver


class Measured:
    """Norms over the batch of one evaluation: ||f(x) - x||, ||f(x)||, and f(x)."""

    __slots__ = ("fx", "moved", "size")

    def __init__(self, fx: Tensor, moved: float, size: float) -> None:
        self.fx, self.moved, self.size = fx, moved, size


class Batch:
    """A solve in which no sample stops by itself.

    Args:
        f: callable on tensors shaped like x0.
        x0: (B, ...).
        solver: makes the steps.
        scale: at least 1; steps are those of x + scale (f(x) - x).
        mask: (B,) bool or None: rows that are solved for. f sees the others at x0.
        measure_moves: measure steps too.

    Attributes:
        x: the iterate that was evaluated last: its rows that are solved for.
        evaluations: of f.
        moves: relative sizes of the steps made, if they are measured.
    """

    def __init__(
        self,
        f: Callable[[Tensor], Any],
        x0: Tensor,
        solver: Solver,
        scale: float = 1.0,
        mask: Tensor | None = None,
        measure_moves: bool = False,
    ) -> None:
        if not isinstance(x0, Tensor):
            raise TypeError(f"x0 must be a tensor, got {type(x0).__name__}")
        self._f, self._scale, self._measures_moves = f, scale, measure_moves
        self._x0 = x0.detach()
        self._rows: Tensor | None = None
        if mask is not None:
            mask = torch.as_tensor(mask, device=x0.device)
            if mask.dtype != torch.bool or mask.shape != x0.shape[:1]:
                got = f"{mask.dtype} of shape {tuple(mask.shape)}"
                raise ValueError(f"mask must be bool of shape {tuple(x0.shape[:1])}, a row of x0 each, got {got}")
            self._rows = mask.nonzero()[:, 0]
        start = self._x0 if self._rows is None else self._x0[self._rows]
        self._state = solver.init(start, rtol=0.0, atol=0.0, stop="all", batch_dims=1)
        self.evaluations = 0
        self.x = start
        self.moves: list[float] = []
        self._fx: Tensor = start

    def evaluate(self) -> Measured:
        """Evaluate f at the iterate, and its norms; samples that are not finite are left out of them."""
        with torch.no_grad():
            before, self.x = self.x, self._state.z
            fx = self._f(self.whole(self.x) if self._rows is not None else self.x)
            if not isinstance(fx, Tensor) or fx.shape != self._x0.shape:
                got = tuple(fx.shape) if isinstance(fx, Tensor) else type(fx).__name__
                raise ValueError(f"f(x) must have the shape of x0, expected {tuple(self._x0.shape)}, got {got}")
            self._fx = fx = fx if self._rows is None else fx[self._rows]
            self.evaluations += 1
            moved = fx - self.x
            both = torch.stack((_norm(moved), _norm(fx)))
            norms: list[float] = both.tolist()
            if not math.isfinite(norms[0]):
                finite = moved.flatten(1).isfinite().all(1)
                moved, kept = moved[finite], fx[finite]
                norms = [float(_norm(moved)), float(_norm(kept))] if len(kept) else [math.inf, math.inf]
            if self._measures_moves and self.evaluations > 1:
                step, size = float(_norm(self.x - before)), float(_norm(before))
                self.moves.append(step / size if size else step / 1e-9)
        return Measured(fx, *norms)

    def step(self) -> None:
        """Move on from the last evaluation."""
        fx = self._fx
        if self._scale > 1:
            fx = torch.lerp(self.x, fx, self._scale)
        self._state.step(fx)

    def end(self) -> None:
        """Give the history back."""
        self._state.release()

    def whole(self, rows: Tensor, others: float | None = None) -> Tensor:
        """A tensor shaped like x0 with these rows; ``others``: what the rest is, x0 by default."""
        if self._rows is None:
            return rows.clone()
        base = self._x0.clone() if others is None else torch.full_like(self._x0, others)
        return base.index_copy_(0, self._rows, rows)


def _norm(v: Tensor) -> Tensor:
    wide = torch.float32 if v.dtype in (torch.float16, torch.bfloat16) else None
    return torch.linalg.vector_norm(v, dtype=wide)


class Best:
    """Traces of the residuals, and the iterate with the lowest.

    Args:
        mode: "abs" or "rel", by which it is the lowest.
        first: the first step that is looked at.
        offset: added to ||f(x)|| in the relative residual.
        keep_x: whether the iterate is kept; ``keep_f``: and f there.
    """

    def __init__(self, mode: str, first: int, offset: float, keep_x: bool = True, keep_f: bool = False) -> None:
        self.mode, self.first, self.offset = mode, first, offset
        self._keep_x, self._keep_f = keep_x, keep_f
        self.traces: dict[str, list[float]] = {"abs": [], "rel": []}
        self.least = {"abs": math.inf, "rel": math.inf}
        self.newest = math.inf
        self.step = 0
        self.x: Tensor
        self.fx: Tensor
        self._live = False

    @property
    def lowest(self) -> float:
        """The lowest residual so far."""
        return self.least[self.mode]

    @property
    def trace(self) -> list[float]:
        """Of the residual that counts."""
        return self.traces[self.mode]

    def look(self, step: int, found: Measured, x: Tensor) -> None:
        """Take an evaluation; ``x`` is overwritten by the second step from here, and copied before if it is needed."""
        if step < self.first:
            return
        values = {"abs": found.moved, "rel": found.moved / (found.size + self.offset)}
        if math.isinf(found.size):
            values["rel"] = math.inf
        for mode, value in values.items():
            self.traces[mode].append(value)
        self.newest = values[self.mode]
        if self.newest < self.lowest or step == self.first:
            self.step, self._live = step, self._keep_x
            if self._keep_x:
                self.x = x
            if self._keep_f:
                self.fx = found.fx.clone()
        elif self._live:
            self.x, self._live = self.x.clone(), False
        for mode, value in values.items():
            self.least[mode] = min(self.least[mode], value)

    def fill(self, length: int) -> None:
        """Traces of this length, with the lowest residual at their ends."""
        for mode, trace in self.traces.items():
            trace += [self.least[mode]] * (length - len(trace))

    def stalled(self, eps: float, window: int) -> bool:
        """Near ``eps``, and hardly any progress in the last steps."""
        last = self.trace[-window:]
        return self.newest < 3 * eps and len(self.trace) > window and max(last) < 1.3 * min(last)
