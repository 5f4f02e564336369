"""Broyden's "good" method with one history vector a step: options, and the workspace they ask for.

For F = -g and H0 = I, with the steps s_j kept and z_0 = g_k:

    c_j = s_j^T z_j,   z_{j+1} = z_j + s_{j+1} c_j / ||s_j||^2   for j < k-1,
    s_k = z_{k-1} / (1 - s_{k-1}^T z_{k-1} / ||s_{k-1}||^2).

The inverse of the rank-one updated Jacobian is applied through the steps alone, so that a step costs one vector of
memory instead of two, and no matrix is ever formed or factored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .ops.layout import Layout
from .ops.workspace import BroydenWorkspace
from .state import Solver

DEFAULT_MEMORY = 100


@dataclass(frozen=True)
class Broyden(Solver):
    """Broyden's method, limited memory.

    Args:
        memory: steps kept, at least 2. When it is full the sample forgets them all and starts again. Default
            min(max_iter, 100).
        scale: H0. "unit": the identity, for forward solves. "first_step": a multiple of it measured on the first
            step (s.y / y.y, within [0.2, 5]), which suits adjoint and other linear solves.

    Source: C. T. Kelley, Iterative Methods for Linear and Nonlinear Equations, SIAM 1995, ch. 7.
    Not for: long solves of large states, where its memory grows by one vector a step; see ``Anderson``.
    """

    memory: int | None = None
    scale: Literal["unit", "first_step"] = "unit"

    def __post_init__(self) -> None:
        if self.memory is not None:
            if isinstance(self.memory, bool) or not isinstance(self.memory, int):
                raise TypeError(f"memory must be an int or None, got {type(self.memory).__name__}")
            if self.memory < 2:
                raise ValueError(f"memory must be at least 2, got {self.memory}")
        if self.scale not in ("unit", "first_step"):
            raise ValueError(f"scale must be 'unit' or 'first_step', got {self.scale!r}")

    def workspace(
        self, layout: Layout, *, rtol: float, atol: float, max_iter: int, keep_best: bool
    ) -> BroydenWorkspace:
        """The memory this solver needs for states of ``layout``."""
        memory = self.memory
        if memory is None:
            memory = max(2, min(max_iter, DEFAULT_MEMORY)) if max_iter else DEFAULT_MEMORY
        return BroydenWorkspace(
            layout,
            memory=memory,
            scale_first=self.scale == "first_step",
            rtol=rtol,
            atol=atol,
            max_iter=max_iter,
            keep_best=keep_best,
        )
