"""``returns="image"``: f at the iterate that would be returned, kept while the solve goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.codes import Int
from ..ops.layout import Layout
from ..ops.recheck import rows_seen
from ..status import Status
from .outputs import storages, version
from .state import SolverState

_CONVERGED = int(Status.CONVERGED)


class Images:
    """f at every sample's best iterate, and no evaluation more.

    On a CPU f's output is held as it came while every sample is at its best, which is nearly always; elsewhere, and
    where f sees some of the samples only, a masked copy an evaluation takes it.

    Args:
        state: the solve, at its start: that is what samples have of which f is never finite.
        compacted: f may see some of the samples only.
    """

    def __init__(self, state: SolverState, compacted: bool) -> None:
        ws = state.ws
        self._state = state
        self._leaves = [t.clone() for t in ws.x[ws.cur]]
        self._kept: Kept | None = None
        if state.layout.device.type == "cpu" and not compacted:
            self._kept = Kept(state.layout, self._leaves, False, [*ws.x[0], *ws.x[1]], _lost)
            self._numbers = ws.ints.numpy()[:, : state.layout.B]

    def look(self, fz: list[Tensor], rows: Tensor | None) -> None:
        """Take f's newest output for those whose best iterate it was evaluated at, as ``state.step`` has judged.

        A sample that converged earlier is one of them: its iterate does not move, and f is evaluated there again.
        """
        state = self._state
        if self._kept is not None:
            ints = self._numbers
            better = ints[Int.BEST_STEP] == state.nfe
            if not _all(better):
                better |= ints[Int.STATUS] == _CONVERGED
            self._kept.take(fz, some_or_all(better))
            return
        better = state.ws.int_row(Int.BEST_STEP) == state.nfe
        better = better | (state.ws.int_row(Int.STATUS) == _CONVERGED)
        take(state.layout, self._leaves, better, fz, rows)

    @property
    def leaves(self) -> list[Tensor]:
        """They, in the memory order of the state."""
        return self._leaves if self._kept is None else self._kept.own()


def _all(which: np.ndarray[Any, Any]) -> bool:
    return b"\0" not in which.tobytes()  # a tenth of what .all() takes


def some_or_all(which: np.ndarray[Any, Any]) -> Tensor | bool:
    """(B,) bool as a tensor, or True for every sample, or False for none."""
    found = which.tobytes()
    if b"\0" not in found:
        return True
    return torch.from_numpy(which) if b"\1" in found else False


def _lost() -> list[Tensor]:
    raise RuntimeError(
        'f wrote to an output that it had returned earlier, after it had left them alone, so that returns="image" has '
        "lost it; return a new tensor from f, or clone it there"
    )


def take(layout: Layout, into: list[Tensor], which: Tensor, fz: list[Tensor], rows: Tensor | None) -> None:
    """F's output into the leaves of some samples, of those that f saw; ``rows`` says where they are in it.

    No leaf: f has not been evaluated, for there is no sample.
    """
    if not fz:
        return
    values, seen = rows_seen(layout, fz, rows)
    which = which if seen is None else which & seen
    which = layout.spread(which)
    for target, value in zip(layout.rows(into), values, strict=True):
        target.copy_(torch.where(which[:, None], value.to(target.dtype), target))


class Kept:
    """The tensors of every sample's best evaluation.

    Where every sample is better than ever, which is nearly always while a solve converges, they are held as they came
    and not copied. That is safe for one evaluation: the next one replaces them, or copies what is still wanted.

    Args:
        layout: of the state.
        start: leaves for samples that never have a finite residual.
        lasting: what is handed over lasts until the next time; else it may lie in memory that f uses again.
        given: what f is given, or may be a view of.
        instead: leaves for what f has overwritten; that is noticed, and from then on copies are made.
    """

    def __init__(
        self,
        layout: Layout,
        start: list[Tensor],
        lasting: bool,
        given: list[Tensor],
        instead: Callable[[], list[Tensor]],
    ) -> None:
        self._layout, self._instead = layout, instead
        self._leaves: list[Tensor] = start
        self._own = False  # whether the leaves are nobody else's
        self._lasting = lasting
        self._given = set(storages(given))
        self._first: list[Tensor] = []  # f's first output, kept alive so that its address is not taken by another
        self._versions: list[int] = []
        self._copies = 0 if lasting else 2  # of outputs of f before it is known that it leaves them alone

    def take(self, leaves: list[Tensor], better: Any) -> None:
        """Take ``leaves`` for samples that are ``better``: (B,) bool, True for all, False for none."""
        if self._copies > 0:
            self._settle(leaves)
        if better is True:
            self._own = self._copies != 0
            self._leaves = [t.clone() for t in leaves] if self._own else leaves
            if not (self._own or self._lasting):
                self._versions = [version(t) for t in leaves]
            return
        if not (self._own or self._lasting) and self._overwritten(leaves):
            self._copies = -1
            self._leaves = self._instead()
        if better is not False:
            better = self._layout.spread(better)
            which = [better.view(-1, *([1] * (t.dim() - 1))) for t in leaves]
            triples = zip(which, leaves, self._widened(), strict=True)
            self._leaves, self._own = [torch.where(w, t.to(old.dtype), old) for w, t, old in triples], True
        elif not self._own:
            self._leaves, self._own = [t.clone() for t in self._leaves], True

    def _settle(self, leaves: list[Tensor]) -> None:
        """After two outputs of f: whether it returns memory that it had returned before, or what it was given."""
        places = set(storages(leaves))
        if not (self._given | set(storages(self._first))).isdisjoint(places):
            self._copies = -1
        elif self._first:
            self._copies, self._first = 0, []
        else:
            self._first = leaves

    def _overwritten(self, leaves: list[Tensor]) -> bool:
        """Whether f has written over what is held, or the solver over what f returned of it."""
        if not self._versions:  # it is the start
            return False
        held = set(storages(self._leaves))
        changed = [version(t) for t in self._leaves] != self._versions
        return changed or not held.isdisjoint(self._given | set(storages(leaves)))

    def _widened(self) -> list[Tensor]:
        return [t.to(leaf.dtype) for t, leaf in zip(self._leaves, self._layout.leaves, strict=True)]

    def own(self) -> list[Tensor]:
        """Copies, in the memory order of the state."""
        copies = self._layout.empty()
        for into, t in zip(copies, self._leaves, strict=True):
            into.copy_(t)
        return copies

    def copy(self) -> Any:
        """The state with these leaves, in memory of its own."""
        return self._layout.unflatten(self.own())
