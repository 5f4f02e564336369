"""Plain (damped) fixed-point iteration: Anderson with no history."""

from __future__ import annotations

from dataclasses import dataclass

from ..naming import named
from ..ops.anderson import AndersonMethod, AndersonWorkspace
from ..ops.layout import Layout
from ..ops.workspace import Stopping
from ..options import check_fraction
from .base import Solver


@named("solver")
@dataclass(frozen=True)
class Picard(Solver):
    """x_{k+1} = x_k + damping (f(x_k) - x_k).

    Args:
        damping: in (0, 1]; 1 is plain iteration. The residual reported is that of f, not of the damped map.

    The right choice when one application of f shrinks the error several times; see docs/guide.md.
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        check_fraction("damping", self.damping)

    def workspace(self, layout: Layout, stopping: Stopping) -> AndersonWorkspace:
        """The memory this solver needs for states of ``layout``: no history."""
        return AndersonWorkspace(layout, stopping, AndersonMethod(m=0, mixing=self.damping), layout.acc)
