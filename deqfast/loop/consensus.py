"""Samples of several ranks that stop together."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..ops.codes import Int
from ..ops.shared import Group
from ..ops.workspace import Stopping, Workspace
from ..status import Status
from .together import Together


class Consensus(Together):
    """Samples of all ranks stop together: at the first evaluation at which every finite one, anywhere, is within.

    ``Group.overlapped``: the sum over ranks is on its way while f is evaluated once more. The last such evaluation is
    in vain, and not counted.
    """

    def __init__(self, ws: Workspace, rule: Stopping, made: int, group: Group) -> None:
        super().__init__(ws, rule, made)
        self._ranks, self._overlapped, self._made = group.ranks, group.overlapped, made
        self._count = torch.zeros(1, dtype=torch.int32, device=ws.layout.device)
        self._wait: Callable[[], object] | None = None

    def look(self, known: int) -> int:
        """Tell the others whether a sample here is short of its tolerance; 0 if all stop, else ``over`` has to say."""
        ws = self.ws
        self._made += 1
        if self._made < self.rule.max_iter and self._far():
            self._count.fill_(1)
        else:
            with torch.no_grad():
                running = ws.int_row(Int.STATUS) == int(Status.RUNNING)
                if self._made == self.rule.max_iter:
                    self._stop(torch.zeros_like(running))
                    return 0
                short = running & ~self.within()
                if self._waits:
                    self._short = int(short.to(torch.uint8).argmax()) if len(short) else -1
                self._count.copy_(short.any())
        self._wait = self._ranks.begin(self._count)
        return 1 if self._overlapped or not self.over() else 0

    def over(self) -> bool:
        """Before the next step: whether nobody was short at the last evaluation; then everybody has stopped there."""
        if self._wait is None:
            return False
        self._wait()
        self._wait = None
        if int(self._count):
            return False
        with torch.no_grad():
            self._stop(self.ws.int_row(Int.STATUS) == int(Status.RUNNING))
        return True


def together_on(ws: Workspace, rule: Stopping, made: int, group: Group | None) -> Together:
    """Who looks whether samples stop, where they do so together."""
    return Together(ws, rule, made) if group is None or group.spread else Consensus(ws, rule, made, group)
