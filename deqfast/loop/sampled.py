"""``states=``: what would have come back after so many evaluations, taken while the solve goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..ops.codes import Int
from ..status import Status
from .images import Images, take
from .state import SolverState


class Sampled:
    """Copies of the answer at some evaluations.

    Args:
        state: the solve.
        wanted: evaluations, counted from 1.
        returns: as in ``fixed_point``.
        images: f at the best iterates, for ``returns="image"``.

    Attributes:
        found: the states so far, in the order of their evaluations.
    """

    def __init__(self, state: SolverState, wanted: Sequence[int], returns: str, images: Images | None) -> None:
        self._state, self._returns, self._images = state, returns, images
        self._pending = sorted(wanted, reverse=True)
        self.found: list[Any] = []

    def look(self, leaves: list[Tensor], rows: Tensor | None) -> None:
        """After an evaluation, with f's ``leaves`` and where its samples are in them."""
        while self._pending and self._pending[-1] <= self._state.nfe:
            self._pending.pop()
            self.found.append(self._now(leaves, rows))

    def end(self, leaves: list[Tensor]) -> list[Any]:
        """All of them; what was to come later is a copy of the answer at the end."""
        self.found += [self._copy(leaves) for _ in self._pending]
        self._pending = []
        return self.found

    def _copy(self, leaves: list[Tensor]) -> Any:
        return self._state.layout.unflatten([t.clone() for t in leaves])

    def _now(self, leaves: list[Tensor], rows: Tensor | None) -> Any:
        state = self._state
        if self._images is not None:
            return self._copy(self._images.leaves)
        if self._returns != "next":
            return self._copy(state.answer(self._returns)[0])
        moved = [t.clone() for t in state.ws.x[state.ws.cur]]
        take(state.layout, moved, state.ws.int_row(Int.STATUS) == int(Status.CONVERGED), leaves, rows)
        return state.layout.unflatten(moved)
