"""Plain (damped) fixed-point iteration: Anderson with no history."""

from __future__ import annotations

from dataclasses import dataclass

from .ops.layout import Layout
from .ops.workspace import AndersonWorkspace
from .state import Solver, check_number


@dataclass(frozen=True)
class Picard(Solver):
    """x_{k+1} = x_k + damping (f(x_k) - x_k).

    Args:
        damping: in (0, 1]; 1 is plain iteration. The residual reported is that of f, not of the damped map.

    The right choice when one application of f shrinks the error several times; see docs/guide.md.
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        check_number("damping", self.damping)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be in (0, 1], got {self.damping}")

    def workspace(
        self, layout: Layout, *, rtol: float, atol: float, max_iter: int, keep_best: bool
    ) -> AndersonWorkspace:
        """The memory this solver needs for states of ``layout``: no history."""
        return AndersonWorkspace(
            layout,
            m=0,
            test_space=0.0,
            mixing=self.damping,
            ridge=0.0,
            history_dtype=layout.acc,
            evict_least_useful=False,
            rtol=rtol,
            atol=atol,
            max_iter=max_iter,
            keep_best=keep_best,
        )
