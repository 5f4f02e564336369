"""F(x) = 0 to SciPy's stopping rules: the loop, over one system or a batch of them.

Steps are those of f(x) = x + s F(x), one s a system: 1 / -s is the first guess of the Jacobian. Where the caller gives
none the first is SciPy's, 0.5 max(||x||, 1) / ||F(x)||, for one evaluation, and what that says of F the final one:
||dx|| / ||dF|| with the sign of -dx.dF. (-dx.dF / dF.dF, the slope along the step, nearly vanishes where F is
indefinite, and fails more of such systems.) A search that finds no lower ||F|| for a while begins anew with another s,
smaller ones and SciPy's: that of the start may not suit what comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..loop.state import SolverState
from ..options import check_callable, check_number
from ..solvers.base import Solver

DEFAULT_F_TOL = torch.finfo(torch.float64).eps ** (1 / 3)
CAUTION = 0.7  # of the first slope: later ones may be steeper
GROWTH = 1e3  # a step after which ||F|| is this many times what it was is taken back, if asked for
CAREFUL = 1.0  # the same in the last search
PATIENCE = 50  # iterations without a lower ||F|| before a search begins anew,
SHRINK = 0.3  # with an s of that size at first
HALVINGS = 12
HOPELESS = 500  # iterations without a lower ||F|| after which it is given up


def max_norm(v: Tensor) -> Any:
    """The largest |v_i|, of each row of two dims."""
    return v.abs().amax(-1)  # several times as fast as vector_norm


@dataclass(frozen=True)
class Rule:
    """When to stop: |F| <= f_tol, |F| <= f_rtol |F(x0)|, |dx| <= x_tol and |dx| <= x_rtol |x| all hold, or F = 0.

    None: the default of f_tol, no condition for the others. ``iter``: so many iterations, whatever the residual.
    """

    f_tol: float | None = None
    f_rtol: float | None = None
    x_tol: float | None = None
    x_rtol: float | None = None
    norm: Callable[[Tensor], Any] = max_norm
    iter: int | None = None

    def __post_init__(self) -> None:
        for name in ("f_tol", "f_rtol", "x_tol", "x_rtol"):
            value = getattr(self, name)
            if value is not None and (check_number(name, value) < 0 or math.isnan(value)):
                raise ValueError(f"{name} must not be negative, got {value}")
        check_callable("tol_norm", self.norm)
        if self.f_tol is None:
            object.__setattr__(self, "f_tol", DEFAULT_F_TOL)

    @property
    def moves(self) -> bool:
        """Whether the size of a step counts."""
        return any(tol is not None and tol < math.inf for tol in (self.x_tol, self.x_rtol))

    def met(self, size: Any, first: Any, x: Tensor, dx: Tensor | None) -> Any:
        """Whether |F| = ``size`` at ``x``, reached by the step ``dx`` (None: by none), is good enough."""
        if self.iter is not None:
            return size == 0
        found = size <= self.f_tol
        if self.f_rtol is not None and self.f_rtol < math.inf:
            found = found & (size <= self.f_rtol * first)
        if self.moves:
            if dx is None:
                return size == 0
            step = self.norm(dx)
            if self.x_tol is not None:
                found = found & (step <= self.x_tol)
            if self.x_rtol is not None and self.x_rtol < math.inf:
                found = found & (step <= self.x_rtol * self.norm(x))
        return found | (size == 0)


@dataclass
class Found:
    """The end of a solve: x, F there, whether it met the rule, iterations."""

    x: Tensor
    fx: Tensor
    success: Any
    iterations: int


class Roots:
    """One system.

    Args:
        F: tensor to tensor, (N,).
        solver: makes the steps.
        rule: when to stop.
        limit: iterations.
        scale: s, or None.
        search: take back steps after which ||F|| has grown by more than ``GROWTH``, or is not finite; once lost, begin
            again and take back every step after which it has grown.
        tell: called after every iteration with x, F and |F|.
    """

    def __init__(
        self,
        F: Callable[[Tensor], Tensor],
        solver: Solver,
        rule: Rule,
        limit: int,
        scale: float | None = None,
        search: bool = True,
        tell: Callable[[Tensor, Tensor, Any], None] | None = None,
    ) -> None:
        self._F, self._solver, self._rule, self._limit = F, solver, rule, limit
        self._scale, self._search, self._tell = scale, search, tell
        self._state: SolverState | None = None
        self._buffers: list[Tensor] = []
        self.iterations = 0
        self._growth = GROWTH
        self._others: list[float] = []  # what s can be tried yet
        self._size = self._least = math.inf  # ||F|| at the newest iterate, and the least
        self._least_at = 0

    def solve(self, x: Tensor, fx: Tensor) -> Found:
        """The root near x, where F is fx."""
        rule = self._rule
        self._start = x, fx = x, fx.clone()  # F may use its output again
        first = float(rule.norm(fx))
        if rule.met(first, first, x, None):
            return Found(x, fx, True, 0)
        limit = self._limit if rule.iter is None else rule.iter
        self._size = self._least = _norm(fx)
        while self.iterations < limit:
            self.iterations += 1
            before, fx_before = x, fx
            x, fx = self._advance(x, fx)
            norm = float(rule.norm(fx))
            if self._tell is not None:
                self._tell(x, fx, norm)
            if rule.met(norm, first, x, x - before if rule.moves else None):
                return Found(x.clone(), fx, True, self.iterations)
            if self._scale is None:
                self._scale = float(secant_scale(x - before, fx - fx_before))
                self._others = [
                    float(s) for s in other_scales(fx.new_tensor(self._scale, dtype=torch.float64), *self._start)
                ]
                if not self._size <= self._least:  # on from where it is better
                    x, fx, self._size = before, fx_before, self._least
            elif self._size < self._least:
                self._least, self._least_at = self._size, self.iterations
            elif self._lost() and self._begins_anew():
                x, fx = (x.clone(), fx) if self._size <= _norm(self._start[1]) else self._start
                self._size = self._least = _norm(fx)
            elif self._stuck() or self.iterations - self._least_at >= HOPELESS:
                break
        return Found(x.clone(), fx, False, self.iterations)

    def _lost(self) -> bool:
        return self.iterations - self._least_at >= PATIENCE or self._stuck()

    def _stuck(self) -> bool:
        """F is not finite, or x + s F is x in the numbers there are."""
        return not math.isfinite(self._size) or (self._state is not None and self._state.done)

    def _begins_anew(self) -> bool:
        """The search got lost: begin with other steps, if that has not been tried."""
        if self._others:
            self._scale = self._others.pop(0)
        elif self._search and self._growth > CAREFUL:
            self._growth = CAREFUL
        else:
            return False
        self.end()
        self._state, self._least_at = None, self.iterations
        return True

    @property
    def scale(self) -> float:
        """The s of the steps, 1 where there was none."""
        return 1.0 if self._scale is None else self._scale

    def end(self) -> None:
        """Give the history back."""
        if self._state is not None:
            self._state.release()

    def _advance(self, x: Tensor, fx: Tensor) -> tuple[Tensor, Tensor]:
        """The next iterate, and F there."""
        new = self._next(x, fx)
        found = self._F(new)
        grown = _norm(found)
        if self._search and not grown <= self._growth * self._size:
            new, found, grown = self._take_back(x, new, found, grown)
        self._size = grown
        return new, found

    def _next(self, x: Tensor, fx: Tensor) -> Tensor:
        """The iterate after x."""
        if self._scale is None:
            return x + fx * first_scale(x, fx)
        if self._state is None:
            self._state = self._solver.init(x, rtol=0.0, atol=0.0, batch_dims=0)
            self._buffers = [torch.empty_like(x), torch.empty_like(x)]
        out = self._buffers[self.iterations & 1]
        self._state.step(torch.add(self._state.z, fx, alpha=self._scale, out=out))
        return self._state.z

    def _take_back(self, before: Tensor, x: Tensor, fx: Tensor, grown: float) -> tuple[Tensor, Tensor, float]:
        """Where a part of the step leads to no growth; the step itself where no part does. History begins anew."""
        dx = x - before
        if not torch.isfinite(dx).all():
            return x, fx, grown
        fx = fx.clone()
        for k in range(1, HALVINGS):
            trial = torch.add(before, dx, alpha=0.5**k)
            found = self._F(trial)
            norm = _norm(found)
            if norm <= self._size:
                self.end()
                self._state = None
                return trial, found, norm
        return x, fx, grown


def _norm(v: Tensor) -> float:
    return float(torch.linalg.vector_norm(v))


def first_scale(x: Tensor, fx: Tensor) -> Tensor:
    """SciPy's first guess, of each row: 0.5 max(||x||, 1) / ||F||."""
    size = torch.linalg.vector_norm(fx, dim=-1, keepdim=True)
    return torch.where(size > 0, 0.5 * torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1) / size, 1.0)


def other_scales(scale: Tensor, x: Tensor, fx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What to begin anew with, one after the other, where ``scale`` of each row has led nowhere from x."""
    return SHRINK * scale, first_scale(x, fx), SHRINK**2 * scale


def secant_scale(dx: Tensor, df: Tensor) -> Tensor:
    """``CAUTION`` ||dx|| / ||dF|| of each row with the sign of -dx.dF; 1 where that is 0 or not finite."""
    product = (dx.conj() * df).real.sum(-1) if dx.is_complex() else (dx * df).sum(-1)
    found = CAUTION * torch.linalg.vector_norm(dx, dim=-1) / torch.linalg.vector_norm(df, dim=-1)
    return torch.where(torch.isfinite(found) & (found != 0), torch.where(product > 0, -found, found), 1.0)
