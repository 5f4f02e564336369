"""Solves that take over the columns of an earlier one: of a map that has changed a little they still say how it bends.

The ops tell a first evaluation from later ones, and a first one uses no column. So a solve that has some goes on
counting: its first evaluation comes after ``Workspace.before`` others, and its limit is so much higher. Whoever looks
sees the evaluations of this solve alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..ops import contract, grouped
from ..ops.anderson import AndersonWorkspace
from ..ops.codes import Int, Real
from ..ops.shared import Group
from ..ops.workspace import Stopping
from .consensus import together_on
from .recordable import Recordable
from .together import Together, never

_KEPT = (Int.SLOT, Int.COUNT), (Real.UNIT,)


class Inheriting(Recordable):
    """The part of ``SolverState`` for histories that outlive their solve."""

    options: contract.Method
    _backend: contract.Backend
    _stopping: Stopping
    _together: Together | None
    _group: Group | None

    def take_over(self, other: Inheriting) -> None:
        """Begin with copies of the columns of another solve, before the first evaluation of this one.

        Raises:
            TypeError, ValueError: ``other`` is no such solve, naming what differs; this state is as before.
        """
        pairs = self._check(other)
        if not other.made or not self.layout.N:
            return
        before = max(ws.method.m for ws, _ in pairs)  # so that no backend takes a slot for one it has not come to yet
        with torch.inference_mode(False), torch.no_grad():
            for ws, old in pairs:  # in the order of their statistics: one may end in the tile of the next
                _begin(ws, old, before)
            self.ws.cur = 0
            self.ws.before = 0  # of this one
            self._count_from(before)
        self.bound = grouped.bind(self._backend, self.ws, self.made)
        self._outputs.bind(self.bound)

    def _check(self, other: Any) -> list[tuple[AndersonWorkspace, AndersonWorkspace]]:
        """The two workspaces, of each group where samples are of unequal length."""
        if not isinstance(other, Inheriting):
            raise TypeError(f"history must be a SolverState, got {type(other).__name__}")
        reason = self.ws.why_no_start()
        if reason is not None:
            raise ValueError(f"history cannot be that of {self.options}: {reason}")
        pairs = {
            "solver": (other.options, self.options),
            "layout": (repr(other.layout), repr(self.layout)),
            "device": (other.layout.device, self.layout.device),
        }
        for name, (theirs, own) in pairs.items():
            if theirs != own:
                raise ValueError(
                    f"history must be of a solve like this one: its {name} is {theirs}, this one's is {own}"
                )
        found = []
        for ws, old in zip(self.ws.parts or [self.ws], other.ws.parts or [other.ws], strict=True):
            assert isinstance(ws, AndersonWorkspace)
            if not isinstance(old, AndersonWorkspace) or old.history.shape != ws.history.shape:
                raise ValueError("history is of a solve that has given its columns back")
            if old.own_residual is not None:
                raise ValueError("history is of a solve with residuals of your own, whose columns are not of f(z) - z")
            found.append((ws, old))
        return found

    def _own_rule(self) -> Stopping:
        """The rule with the limit of this solve alone."""
        return _moved(self._stopping, -self.ws.before)

    def _count_from(self, before: int) -> None:
        """Let so many evaluations come before this solve's first one."""
        ws, rule = self.ws, _moved(self._stopping, before - self.ws.before)
        ws.before, self._stopping = before, rule
        ws.stopping = rule if self._together is None else never(rule)
        if self._together is not None:
            self._together = together_on(ws, rule, self.made, self._group)


def _moved(rule: Stopping, by: int) -> Stopping:
    return rule._replace(max_iter=min(rule.max_iter + by, 2**31 - 1)) if rule.max_iter else rule


def _begin(ws: AndersonWorkspace, old: AndersonWorkspace, before: int) -> None:
    """As after so many evaluations: the columns of ``old``, and the start that the workspace has."""
    start = [t.clone() for t in ws.x[ws.cur]]
    every = torch.arange(ws.layout.B, device=ws.layout.device)
    ws.take(old, every)
    ws.cur = 0
    for leaves in (*ws.x, ws.saved):
        for x, t in zip(leaves, start, strict=True):
            x.copy_(t)
    ws.ages.add_((before - ws.ints[int(Int.STEPS)]).view(ws.tiles, 1, -1)).clamp_(min=0)
    _clear(ws, before)
    ws.woken(torch.ones_like(every, dtype=torch.bool))


def _clear(ws: AndersonWorkspace, before: int) -> None:
    """Statistics as after so many evaluations that nothing is known of but the columns, their unit and the start."""
    ints, reals = (
        {row: t[int(row)].clone() for row in rows} for rows, t in zip(_KEPT, (ws.ints, ws.reals), strict=True)
    )
    ws.ints.zero_()
    ws.reals.zero_()
    ws.begin()
    for rows, t in ((ints, ws.ints), (reals, ws.reals)):
        for row, values in rows.items():
            t[int(row)] = values
    ws.ints[int(Int.STEPS)] = before
    ws.reals[int(Real.NORM)] = math.inf  # nothing has grown
