"""F(x) = 0 to SciPy's stopping rules for a batch of independent systems, each of which stops by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..solvers.base import Solver
from ._roots import HOPELESS, PATIENCE, Found, Rule, first_scale, other_scales, secant_scale


class Many:
    """A batch of systems.

    Args:
        F: tensor to tensor, (B, N), row by row.
        solver: makes the steps.
        rule: when a row stops; its norm is of rows.
        limit: iterations.
        scale: s of every row, or None.
        tell: called after every iteration with x, F and |F|.
    """

    def __init__(
        self,
        F: Callable[[Tensor], Tensor],
        solver: Solver,
        rule: Rule,
        limit: int,
        scale: float | None = None,
        tell: Callable[[Tensor, Tensor, Any], None] | None = None,
    ) -> None:
        self._F, self._solver, self._rule, self._tell = F, solver, rule, tell
        self._limit = limit if rule.iter is None else rule.iter
        self._scale = scale
        self.iterations = 0
        self._done: Tensor
        self._first: Any

    def solve(self, x: Tensor, fx: Tensor) -> Found:
        """The roots near the rows of x, where F is fx."""
        self._first = self._rule.norm(fx)
        self._done = torch.as_tensor(self._rule.met(self._first, self._first, x, None))
        self.x, self.fx = x.clone(), fx.clone()
        if self._limit and not bool(self._done.all()):
            self._search()
        return Found(self.x, self.fx, self._done, self.iterations)

    def _search(self) -> None:
        start = self.x.clone(), self.fx.clone()
        x, fx = start
        others: list[Tensor] = []
        if self._scale is None:
            x, fx, scale = self._probe(x, fx)
            others = list(other_scales(scale, *start))
        else:
            scale = torch.full_like(fx[:, :1].abs(), self._scale)
        while True:
            x, fx = self._run(x, fx, scale, PATIENCE if others else self._limit)
            rest = ~self._done
            if not others or self.iterations >= self._limit or not bool(rest.any()):
                break
            scale = others.pop(0)
            closer = torch.linalg.vector_norm(fx, dim=1) <= torch.linalg.vector_norm(start[1], dim=1)
            keep = (closer & torch.isfinite(x).all(1))[:, None]
            x, fx = torch.where(keep, x, start[0]), torch.where(keep, fx, start[1])
        self.x[rest], self.fx[rest] = x[rest], fx[rest]

    def _run(self, x: Tensor, fx: Tensor, scale: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        """So many iterations from x, where F is fx; the last x, and F there."""
        if bool(self._done.all()):
            return x, fx
        state = self._solver.init(x, rtol=0.0, atol=0.0)
        out = [torch.empty_like(x), torch.empty_like(x)]
        scale = scale.masked_fill(self._done[:, None], 0.0)
        before, size = x, torch.linalg.vector_norm(fx, dim=1)
        for k in range(min(iterations, self._limit - self.iterations)):
            # Where s is 0 the sample is at a fixed point, and the solver leaves it alone.
            if state.step(torch.addcmul(state.z, fx, scale, out=out[k & 1])):
                break
            x = state.z
            fx = self._F(x)
            new = self._look(x, fx, before)
            if new is not None:
                scale.masked_fill_(new[:, None], 0.0)
                if bool(self._done.all()):
                    break
            before = x
            if k % HOPELESS == HOPELESS - 1:
                now = torch.linalg.vector_norm(fx, dim=1)
                if not bool((~self._done & (now < 0.5 * size)).any()):
                    break
                size = now
        state.release()
        return x, fx

    def _probe(self, x: Tensor, fx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A first step; where to go on from, F there, and the scale that it says."""
        new = x + fx * first_scale(x, fx)
        found = self._F(new)
        self._look(new, found, x)
        scale = secant_scale(new - x, found - fx)[:, None]
        better = found.norm(dim=1, keepdim=True) <= fx.norm(dim=1, keepdim=True)
        return torch.where(better, new, x), torch.where(better, found, fx), scale

    def _look(self, x: Tensor, fx: Tensor, before: Tensor) -> Tensor | None:
        """Keep the rows that are good enough now; which they are, None if none is."""
        self.iterations += 1
        rule = self._rule
        norm = rule.norm(fx)
        if self._tell is not None:
            self._tell(x, fx, norm)
        new = rule.met(norm, self._first, x, x - before if rule.moves else None) & ~self._done
        if not bool(new.any()):
            return None
        self.x[new], self.fx[new] = x[new], fx[new]
        self._done |= new
        return new
