"""What a solve lets those do who capture its steps in a graph and replay them."""

from __future__ import annotations

from torch import Tensor

from ..ops import contract
from ..ops.layout import Layout
from ..ops.workspace import Workspace
from .outputs import Outputs


class Recordable:
    """The part of ``SolverState`` for recordings: other solves in the same memory, steps that somebody else made."""

    ws: Workspace
    layout: Layout
    bound: contract.BoundStep
    nfe: int
    _outputs: Outputs
    _running: int

    @property
    def made(self) -> int:
        """Evaluations as steps count them: with those that a history was taken over from."""
        return self.nfe + self.ws.before

    @property
    def previous(self) -> list[Tensor] | None:
        """What f returned at the previous iterate, as the next step will read it."""
        return self._outputs.previous

    @property
    def replay(self) -> contract.Replay:
        """What graphs need of the steps that were captured."""
        assert self.bound.replay is not None
        return self.bound.replay

    def restart(self, start: list[Tensor]) -> None:
        """Begin another solve in the same memory; what was learned about f stays."""
        self.ws.reset()
        self.replay.renew()
        for x, t in zip(self.ws.x[0], start, strict=True):
            x.copy_(t)
        self.nfe, self._running = 0, self.layout.B
        self._outputs.start = start
        self._outputs.hold(None)

    def resume(self, nfe: int, previous: list[Tensor] | None) -> None:
        """Go on as after ``nfe`` evaluations whose iterate is in memory already, with f at the one before."""
        self.replay.rewind(nfe)
        self.ws.cur = nfe & 1
        self.nfe, self._running = nfe, self.layout.B
        self._outputs.start = []
        self._outputs.hold(previous)

    def finish(self, nfe: int) -> None:
        """Take note that every sample has stopped: its answer is in both iterates."""
        self.nfe, self._running = nfe, 0
        self._outputs.start = []
