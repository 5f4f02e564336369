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
    """Copies of what there is after some evaluations.

    Args:
        state: the solve.
        at: evaluations, counted from 1, in ascending order.
        of: what is copied, in the words of ``returns`` of ``fixed_point``.
        images: f at the best iterates, for ``of="image"``.

    Attributes:
        found: the states so far, in the order of their evaluations.
    """

    def __init__(self, state: SolverState, at: Sequence[int], of: str, images: Images | None) -> None:
        self.at = tuple(at)
        self._state, self._of, self._images = state, of, images if of == "image" else None
        self._pending = sorted(at, reverse=True)
        self.found: list[Any] = []

    def look(self, leaves: list[Tensor], rows: Tensor | None) -> None:
        """After an evaluation, with f's ``leaves`` and where its samples are in them."""
        while self._pending and self._pending[-1] <= self._state.nfe:
            self._pending.pop()
            self.found.append(self._now(leaves, rows))

    def close(self, leaves: list[Tensor], rows: Tensor | None) -> None:
        """The solve has ended: what was to come later is as it is now."""
        self.found += [self._now(leaves, rows) for _ in self._pending]
        self._pending = []

    def end(self, leaves: list[Tensor]) -> list[Any]:
        """All of them; what was to come later is a copy of these leaves, the answer at the end."""
        self.found += [self._copy(leaves) for _ in self._pending]
        self._pending = []
        return self.found

    def _copy(self, leaves: list[Tensor]) -> Any:
        return self._state.layout.unflatten([t.clone() for t in leaves])

    def _now(self, leaves: list[Tensor], rows: Tensor | None) -> Any:
        state = self._state
        if self._images is not None:
            return self._copy(self._images.leaves)
        if self._of != "next":
            return self._copy(state.answer(self._of)[0])
        moved = [t.clone() for t in state.ws.x[state.ws.cur]]
        take(state.layout, moved, state.ws.int_row(Int.STATUS) == int(Status.CONVERGED), leaves, rows)
        return state.layout.unflatten(moved)
