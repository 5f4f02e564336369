"""One row: the tolerance that reaches the target, what it took, and what came out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .case import Case, Map, Recorded
from .contenders import Contender
from .precise import Precise, flat_gradient
from .tally import tally

_TIGHTER, _LOOSER = 8, 3  # tries
_ENOUGH = 0.7  # of the target, that nobody is asked to come nearer to


@dataclass
class Row:
    """One solver's numbers.

    Attributes:
        name: of the solver.
        old: it is the caller's own.
        rtol: what it was asked for; None where it cannot be asked.
        reached: its residual is at most the target.
        evaluations: of f in the forward solve.
        products: vjps of the backward pass; None without one.
        residual: the worst sample's ||f(z) - z|| / ||f(z)||, by an evaluation of its own.
        error: the worst sample's ||z - z*|| / ||z||, z* the reference; None where that did not get there.
        gradient_error: ||g - g*|| / ||g*|| over all params; None without a gradient.
        operations: dispatched in the forward solve, those of f left out.
        memory: bytes at the peak of the forward solve, beside what was there.
        seconds: forward solves, one a round.
        step_seconds: forward and backward, one a round; empty without a gradient.
        trace: the worst sample's residual at every evaluation.
        failed: what it raised, where it could not solve.
    """

    name: str
    old: bool = False
    rtol: float | None = None
    reached: bool = False
    evaluations: int = 0
    products: int | None = None
    residual: float = float("inf")
    error: float | None = None
    gradient_error: float | None = None
    operations: int = 0
    memory: int | None = None
    seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    trace: list[float] = field(default_factory=list)
    failed: str = ""


class _Try(NamedTuple):
    """A solve at one tolerance."""

    z: Any
    rtol: float
    residual: float
    evaluations: int
    trace: list[float]


class Measured:
    """A contender at the loosest tolerance, of those tried, that reaches the target.

    Attributes:
        row: its numbers, but for times and errors.
        z: what it returned.
    """

    def __init__(self, case: Case, contender: Contender, precise: Precise, target: float | None, limit: int) -> None:
        self._case, self._contender, self._limit = case, contender, limit
        self.row = Row(contender.name, contender.old)
        self.z: Any = case.z0
        self._rtol = target or 0.0
        self._gradient: Tensor | None = None
        try:
            self._find(precise, target)
        except Exception as error:
            if contender.old and not contender.tunable:
                raise  # the caller's own code
            self.row.failed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    def _find(self, precise: Precise, target: float | None) -> None:
        row, rtol = self.row, self._rtol
        for _ in range(_TIGHTER):
            found = self._try(precise, rtol)
            if found.residual < row.residual or not row.trace:
                self._take(found)
            if target is None or found.residual <= target:
                break
            if not self._contender.tunable or found.evaluations >= self._limit:
                break
            rtol *= min(0.7, max(0.1, 0.9 * target / found.residual))
        row.reached = target is None or row.residual <= target
        if target and row.reached and self._contender.tunable:
            self._loosen(precise, target)

    def _loosen(self, precise: Precise, target: float) -> None:
        """Who returns f of what he judged is more exact than he was asked, and may be asked for less."""
        rtol = self._rtol
        for _ in range(_LOOSER):
            if self.row.residual > _ENOUGH * target:
                break
            rtol *= min(4.0, 0.9 * target / max(self.row.residual, target / 100))
            found = self._try(precise, rtol)
            if found.residual > target:
                break
            if found.evaluations < self.row.evaluations:
                self._take(found)

    def _try(self, precise: Precise, rtol: float) -> _Try:
        recorded = Recorded(self._case, residuals=True)
        with torch.no_grad():
            z = self._contender.solve(recorded, rtol, self._limit)
        return _Try(z, rtol, precise.residual(z), recorded.evaluations, recorded.trace)

    def _take(self, found: _Try) -> None:
        row = self.row
        self.z, self._rtol = found.z, found.rtol
        row.residual, row.evaluations, row.trace = found.residual, found.evaluations, found.trace
        row.rtol = found.rtol if self._contender.tunable else None

    def solve(self, f: Map | None = None) -> Any:
        """The forward solve alone."""
        with torch.no_grad():
            return self._contender.solve(f or self._case.f, self._rtol, self._limit)

    def gradient(self, f: Map | None = None) -> Tensor | None:
        """Forward and backward: the flat gradient; None where the solver has none."""
        if not self._case.params or self._contender.attached is None:
            return None
        with torch.enable_grad():
            z = self._contender.attached(f or self._case.f, self._rtol, self._limit)
            loss = self._case.loss(z)
            return flat_gradient(loss, self._case.params) if loss.requires_grad else None

    def finish(self, device: torch.device) -> None:
        """Count operations and memory, and the products of the backward pass."""
        if self.row.failed:
            return
        self.row.operations, self.row.memory = tally(self._case, self.solve, device)
        recorded = Recorded(self._case)
        try:
            self._gradient = self.gradient(recorded)
        except Exception as error:
            self.row.failed = f"no gradient: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return
        if self._gradient is not None:
            self.row.products = recorded.products

    @property
    def has_gradient(self) -> bool:
        """Whether it made one."""
        return self._gradient is not None

    def judge(self, z: Any | None, gradient: Tensor | None) -> None:
        """Compare with the reference's; None: it was not exact enough."""
        row = self.row
        if z is not None:
            row.error = self._case.relative(self.z, z)
        if gradient is not None and self._gradient is not None:
            size = float(gradient.norm())
            row.gradient_error = float((self._gradient - gradient).norm()) / (size or 1.0)
