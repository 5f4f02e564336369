"""Own loops whose batch shrinks: the solver's state of some samples, and the results of those that leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import compiled
from ..ops.codes import Int, Real
from ..ops.grouped import workspace_of
from ..ops.layout import Layout
from ..ops.shared import Group, refuse
from ..ops.workspace import Workspace
from ..options import check_choice
from ..solution import Solution
from ..status import Status
from .answer import answer, at_the_limit
from .history import Inheriting
from .origin import Origin
from .together import Together


class Keeping(Inheriting):
    """The part of ``SolverState`` for batches that shrink."""

    _showing: bool
    _shown: list[Any]
    _origin: Origin | None
    _limit: int | None  # evaluations, of a state whose kernels know of none
    _group: Group | None

    @compiled.skip
    def keep(self, rows: Tensor | Sequence[int] | Sequence[bool], returns: str = "best") -> Solution:
        """Go on with these samples alone; from here on f sees, and ``step`` takes, only them.

        They take their iterates, history, statistics and events along, so that they end as they would have without,
        where f treats samples independently. For a moment there is memory for both batches. Waits for the device.

        Args:
            rows: which rows of dim 0 stay: a (rows,) bool mask, or distinct indices, in the order they are to have.
            returns: which z of the others: "best" or "last" as in ``fixed_point``, or "next", where the solver would
                step from the newest; a converged sample stays where it is, for f there is not kept.

        Returns:
            A ``Solution`` of the samples that leave, in their order. Those that were still running are ``STOPPED``.

        Raises:
            TypeError, ValueError: ``rows`` are no rows of the state, or it has ``segments`` or ``batch_dims=0``; the
                state is as before.
            RuntimeError: called by a ``callback`` of ``fixed_point``, whose f and args go on with all samples.
        """
        if self._showing:
            raise RuntimeError("a callback of fixed_point cannot drop samples: compact=True does, or your own loop")
        check_choice("returns", returns, ("best", "last", "next"))
        refuse(self._group, "a smaller batch")
        self.layout.samples.resized(0)  # refuses what has no rows
        stay, leave = _parts(rows, self.layout.batch_shape[0], self.layout.device)
        with torch.inference_mode(False), torch.no_grad():  # the next step may be made in another mode
            left = self._conclude(leave, returns)
            if leave.numel() or not torch.equal(stay, torch.arange(stay.numel(), device=stay.device)):
                self._take(stay)
        return left

    def _take(self, stay: Tensor) -> None:
        """The workspace of these rows in place of the one that there is."""
        which, old = self._samples(stay), self.ws
        layout = self.layout.resized(stay.numel())
        ws: Workspace = workspace_of(self.options, layout, old.stopping)
        ws.take(old, which)
        bound = self._backend.bind(ws, self.made)
        self.layout, self.ws, self.bound = layout, ws, bound
        self._shown = [layout.unflatten(x) for x in ws.x] if layout.single else []
        self._outputs.take(ws, bound, which)
        if self._origin is not None:
            self._origin.take(ws, which)
        if self._together is not None:
            self._together = Together(ws, self._stopping, self.made)
        self._running = self._running and int((ws.int_row(Int.STATUS) == int(Status.RUNNING)).sum())
        old.release()

    def _samples(self, rows: Tensor) -> Tensor:
        """Which samples lie in these rows of dim 0."""
        inner = self.layout.B // max(1, self.layout.batch_shape[0])
        return (rows[:, None] * inner + torch.arange(inner, device=rows.device)).flatten()

    @property
    def paused(self) -> bool:
        """Whether ``max_iter`` of a resumable state is what keeps it from going on."""
        return self._limit is not None and self.nfe >= self._limit

    @property
    def some_run(self) -> bool:
        """Whether there may be samples whose iterate has moved on from the one that f was evaluated at last."""
        return bool((self._running or self.paused) and self.nfe)

    def at_limit(self) -> Tensor:
        """(B,) int32 statuses if every sample that runs had to stop here."""
        return at_the_limit(self.ws, self.made, self._together)

    def _conclude(self, leave: Tensor, returns: str) -> Solution:
        """The solution that samples in these rows have reached."""
        return self._found(self._samples(leave), self.layout.resized(leave.numel()), returns)

    def _found(self, which: Tensor | None, layout: Layout, returns: str) -> Solution:
        """The solution that these samples, or all, have reached, ``layout`` theirs; copies."""
        ws = self.ws

        def chosen(t: Tensor, dim: int = 0) -> Tensor:
            return t.clone() if which is None else t.index_select(dim, which)

        if returns == "next":
            leaves, residual = ws.x[ws.cur], ws.real_row(Real.RESIDUAL)
        else:
            leaves, residual = answer(ws, returns, self.some_run)
        residual = chosen(residual)
        counters = chosen(ws.ints[:, : self.layout.B], 1)
        status = counters[int(Int.STATUS)].clone()
        if self.layout.total == 0:
            status.fill_(int(Status.CONVERGED))
            residual.zero_()
        elif not self.nfe:
            residual.fill_(torch.nan)
        if self.paused and self.nfe:
            status.copy_(chosen(self.at_limit()))
        status.masked_fill_(status == int(Status.RUNNING), int(Status.STOPPED))
        return Solution(
            z=layout.unflatten([t.clone() for t in leaves] if which is None else self.layout.select(leaves, which)),
            converged=layout.counted(status == int(Status.CONVERGED)),
            steps=layout.counted(chosen(ws.steps())),
            residual=layout.counted(residual),
            evaluations=self.nfe,
            status=layout.counted(status),
            trace=None,
            backend=self._backend.name,
            counters=counters,
        )


def _parts(rows: Any, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of the rows that stay, in their order, and of those that leave.

    Raises:
        TypeError, ValueError: ``rows`` is neither a mask of so many rows nor distinct indices of them.
    """
    given = rows if isinstance(rows, Tensor) else torch.as_tensor(rows)
    given = given.detach().to(device)
    if not given.numel() and given.dtype.is_floating_point:  # an empty list
        given = given.long()
    integral = not (given.dtype.is_floating_point or given.dtype.is_complex)
    if not integral:
        raise TypeError(f"rows must be a bool mask or int indices of dim 0, got {given.dtype}")
    mask = given.dtype == torch.bool
    if given.dim() != 1 or (mask and given.shape[0] != count):
        expected = f"({count},) bools" if mask else "a tensor of one dim"
        hint = "; of a mask of samples, .any(1) says which rows have one" if mask and given.dim() > 1 else ""
        raise ValueError(f"rows must be of dim 0, expected {expected}, got shape {tuple(given.shape)}{hint}")
    if mask:
        return given.nonzero()[:, 0], (~given).nonzero()[:, 0]
    stay = given.long()
    inside = (stay >= 0) & (stay < count)
    if not bool(inside.all()):
        raise ValueError(f"rows must be from 0 to {count - 1}, got {int(stay[~inside][0])}")
    left = torch.ones(count, dtype=torch.bool, device=device)
    left[stay] = False
    leave = left.nonzero()[:, 0]
    if leave.numel() + stay.numel() != count:
        raise ValueError("rows must be distinct")
    return stay, leave
