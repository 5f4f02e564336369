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

from ..naming import named
from ..ops.broyden import BroydenMethod, BroydenWorkspace
from ..ops.layout import Layout
from ..ops.workspace import Stopping
from ..options import check_choice, check_int
from .base import Solver

DEFAULT_MEMORY = 100


@named("solver", history_size="memory", max_history="memory", max_rank="memory", LBFGS_thres="memory")
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
            check_int("memory", self.memory, least=2, or_none=True)
        check_choice("scale", self.scale, ("unit", "first_step"))

    def workspace(self, layout: Layout, stopping: Stopping) -> BroydenWorkspace:
        """The memory this solver needs for states of ``layout``."""
        memory, limit = self.memory, stopping.max_iter
        if memory is None:
            memory = max(2, min(limit, DEFAULT_MEMORY)) if limit else DEFAULT_MEMORY
        return BroydenWorkspace(layout, stopping, BroydenMethod(memory, self.scale == "first_step"))
