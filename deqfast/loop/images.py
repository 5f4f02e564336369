"""``returns="image"``: f at the iterate that would be returned, kept while the solve goes on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.codes import Int
from ..ops.layout import Layout
from ..ops.recheck import rows_seen
from ..status import Status
from .state import SolverState


class Images:
    """f at every sample's best iterate; one masked copy an evaluation, and no evaluation more."""

    def __init__(self, state: SolverState) -> None:
        self._state = state
        self.leaves = state.layout.empty()

    def look(self, fz: list[Tensor], rows: Tensor | None) -> None:
        """Take f's newest output for those whose best iterate it was evaluated at, as ``state.step`` has judged.

        A sample that converged earlier is one of them: its iterate does not move, and f is evaluated there again.
        """
        ws, layout = self._state.ws, self._state.layout
        better = ws.int_row(Int.BEST_STEP) == self._state.nfe
        better = better | (ws.int_row(Int.STATUS) == int(Status.CONVERGED))
        take(layout, self.leaves, better, fz, rows)


def take(layout: Layout, into: list[Tensor], which: Tensor, fz: list[Tensor], rows: Tensor | None) -> None:
    """F's output into the leaves of some samples, of those that f saw; ``rows`` says where they are in it."""
    values, seen = rows_seen(layout, fz, rows)
    which = which if seen is None else which & seen
    which = layout.spread(which)
    for target, value in zip(layout.rows(into), values, strict=True):
        target.copy_(torch.where(which[:, None], value.to(target.dtype), target))
