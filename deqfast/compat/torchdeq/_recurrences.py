"""torchdeq's own recurrences in plain torch, for ``faithful=True``: its ridge, its tau, its memory, nobody frozen.

Flat samples (B, N). Anderson's ridge is added to the Gram matrix of the residuals as it is, so that it means another
thing at every scale; Broyden's memory, when it is full, is written over from its beginning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.layout import Layout

_TINY = 1e-9  # added to ||f(z)||


class Recurrence:
    """A ``Stepper`` whose next iterate a subclass gives."""

    def __init__(self, x0: Any, layout: Layout) -> None:
        self._layout = layout
        self._x = torch.cat([t.clone() for t in layout.rows([t.detach() for t in layout.tensors(x0)])], dim=1)
        self._before = self._x
        self._made = 0
        self.measured = torch.zeros(2, layout.B, dtype=layout.acc, device=layout.device)

    @property
    def z(self) -> Any:
        """The iterate to evaluate f at."""
        return self._layout.unflatten(self._leaves(self._x))

    def step(self, fz: Any) -> bool:
        """Take f there; False: samples are stopped by others."""
        layout = self._layout
        fx = torch.cat([t.to(self._x.dtype) for t in layout.rows(layout.flatten(fz, "f(z)"))], dim=1)
        moved = fx - self._x
        norm = torch.linalg.vector_norm(moved, dim=1, dtype=layout.acc)
        torch.div(norm, torch.linalg.vector_norm(fx, dim=1, dtype=layout.acc) + _TINY, out=self.measured[0])
        self.measured[1] = norm
        self._before = self._x
        self._x = self.next(self._x, fx, moved)
        self._made += 1
        return False

    def next(self, x: Tensor, fx: Tensor, moved: Tensor) -> Tensor:
        """The iterate after x, where f is fx."""
        raise NotImplementedError

    def given(self) -> list[Tensor]:
        """Every iterate has memory of its own."""
        return []

    def evaluated(self) -> list[Tensor]:
        """Leaves of the iterate that was evaluated last."""
        return self._leaves(self._before)

    def moved(self) -> list[Tensor]:
        """Leaves of the iterate after it."""
        return self._leaves(self._x)

    def best(self) -> list[Tensor] | None:
        """Not kept."""
        return None

    def evaluations(self) -> int:
        """Evaluations made."""
        return self._made

    def release(self) -> None:
        """Nothing is given back."""

    def _leaves(self, rows: Tensor) -> list[Tensor]:
        found = []
        for part, leaf in zip(
            rows.split([leaf.n for leaf in self._layout.leaves], 1), self._layout.leaves, strict=True
        ):
            t = leaf.empty(self._layout.device)
            leaf.rows(t).copy_(part)
            found.append(t)
        return found


class Plain(Recurrence):
    """x + tau (f(x) - x)."""

    def __init__(self, x0: Any, layout: Layout, tau: float) -> None:
        super().__init__(x0, layout)
        self._tau = tau

    def next(self, x: Tensor, fx: Tensor, moved: Tensor) -> Tensor:
        """The damped image."""
        return self._tau * fx + (1 - self._tau) * x


class Anderson(Recurrence):
    """sum_i a_i (tau f(x_i) + (1 - tau) x_i) over the last m; (G G^T + lam I) a ~ 1, sum a = 1, G = f(X) - X."""

    def __init__(self, x0: Any, layout: Layout, m: int, lam: float, tau: float) -> None:
        super().__init__(x0, layout)
        self._lam, self._tau, self._m = lam, tau, m
        size = layout.B, m, layout.N
        self._X, self._F = self._x.new_zeros(size), self._x.new_zeros(size)

    def next(self, x: Tensor, fx: Tensor, moved: Tensor) -> Tensor:
        """The mixed iterate; f(x) after the first evaluation."""
        slot = self._made % self._m
        self._X[:, slot], self._F[:, slot] = x, fx
        if self._made == 0:
            return fx
        n = min(self._made + 1, self._m)
        X, F = self._X[:, :n], self._F[:, :n]
        G = F - X
        gram = G @ G.mT + self._lam * torch.eye(n, dtype=G.dtype, device=G.device)
        weights = torch.linalg.solve(gram, gram.new_ones(gram.shape[0], n))
        weights = (weights / weights.sum(1, keepdim=True))[:, None]
        return (weights @ (self._tau * F + (1 - self._tau) * X))[:, 0]


class Broyden(Recurrence):
    """Good Broyden from H0 = -I, as -I + U V^T with a memory of its own for U and V."""

    def __init__(self, x0: Any, layout: Layout, memory: int) -> None:
        super().__init__(x0, layout)
        self._memory = memory
        size = layout.B, memory, layout.N
        self._U, self._V = self._x.new_zeros(size), self._x.new_zeros(size)
        self._last: tuple[Tensor, Tensor] | None = None

    def next(self, x: Tensor, fx: Tensor, moved: Tensor) -> Tensor:
        """X - H (f(x) - x), H updated by the step that led to x."""
        if self._last is not None:
            step, change = x - self._last[0], moved - self._last[1]
            known = self._made - 1
            left = -step + self._through(step, self._U[:, :known], self._V[:, :known])
            right = -change + self._through(change, self._V[:, :known], self._U[:, :known])
            new = (step - right) / (left * change).sum(1, keepdim=True)
            slot = known % self._memory
            self._V[:, slot] = left.masked_fill(left.isnan(), 0.0)
            self._U[:, slot] = new.masked_fill(new.isnan(), 0.0)
        self._last = x, moved
        kept = self._made
        return x + moved - self._through(moved, self._V[:, :kept], self._U[:, :kept])

    @staticmethod
    def _through(v: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """B^T (A v), of each sample."""
        return (B.mT @ (A @ v[:, :, None]))[:, :, 0]
