"""``returns="image"``: f at the iterate that would be returned, kept while the solve goes on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.codes import Int
from ..status import Status
from .state import SolverState


class Images:
    """f at every sample's best iterate; one masked copy an evaluation, and no evaluation more."""

    def __init__(self, state: SolverState) -> None:
        self._state = state
        self.leaves = state.layout.empty()

    def keep(self, fz: list[Tensor], rows: Tensor | None) -> None:
        """Take f's newest output for those whose best iterate it was evaluated at, as ``state.step`` has judged.

        A sample that converged earlier is one of them: its iterate does not move, and f is evaluated there again.
        """
        ws, layout = self._state.ws, self._state.layout
        better = ws.int_row(Int.BEST_STEP) == self._state.nfe
        better = better | (ws.int_row(Int.STATUS) == int(Status.CONVERGED))
        values = layout.rows(fz)
        if rows is not None:
            better = better & (rows >= 0)
            values = [value.index_select(0, rows.clamp(min=0)) for value in values]
        for kept, value in zip(layout.rows(self.leaves), values, strict=True):
            kept.copy_(torch.where(better[:, None], value.to(kept.dtype), kept))
