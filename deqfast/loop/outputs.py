"""What f returns, on its way into the solver's step.

F's output is read where it lies and kept, uncopied, until the next step needs it as the previous value. That is safe
only while nobody writes to it, so every step looks at storage and version: an output buffer that f uses again, an
iterate returned as is, or one changed in place is copied from then on.

There are two ways in. ``careful`` takes whatever f may return. ``quick`` takes one contiguous tensor that needs no
copy, and declines where it might: at small sizes the checks around a step cost more than the step, and these are the
same ones for the common case. Both accept the same outputs, to the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ranges
from ..ops.contract import BoundStep
from ..ops.workspace import Workspace


def version(t: Tensor) -> int:
    """What torch counts of the writes to ``t``; -1 where it does not count."""
    return -1 if t.is_inference() else t._version


def storages(leaves: list[Tensor]) -> list[int]:
    """Addresses of the memory that the tensors are views of."""
    return [t.untyped_storage().data_ptr() for t in leaves]


class Outputs:
    """Feeds f's outputs to a bound step.

    Attributes:
        start: the start of the solve until the first step has been made, then empty.
        copies_z: whether f was seen to write into the iterate it is given, so that it gets copies.
        copies_f: whether f was seen to use its output again, so that outputs are copied.
        previous, previous_rows: f at the previous iterate as the next step will read it, and its rows.
        newest: what the last careful step read, in memory that holds it still.
        plain: whether the next step may take the quick way.
    """

    def __init__(self, ws: Workspace, bound: BoundStep, uses_previous: bool, start: list[Tensor]) -> None:
        self.ws = ws
        self.uses_previous = uses_previous
        self.start = start
        self.copies_z = self.copies_f = False
        self.newest: list[Tensor] = []
        self._copies: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._forget()
        layout = ws.layout
        first = layout.leaves[0]
        self._single = layout.single and layout.samples.views
        self._shape, self._dtype = layout.shapes[0], first.dtype
        self._device_index = -1 if layout.device.type == "cpu" else layout.device.index
        self.bind(bound)

    def bind(self, bound: BoundStep) -> None:
        """Feed this step from now on."""
        self._bound = bound
        self._step: Any = ranges.around(ranges.STEP, bound)
        # Called only where ``look`` has seen that it is there.
        self._quick: Any = bound.quick and ranges.around(ranges.STEP, bound.quick)
        self._x_storages = storages([*self.ws.x[0], *self.ws.x[1]])
        self.note_versions()
        self.look()

    def end(self, bound: BoundStep) -> None:
        """No more steps: ``bound`` says so to whoever tries."""
        self._bound = self._step = bound
        self._quick, self.plain = None, False

    def _forget(self) -> None:
        self.previous: list[Tensor] | None = None
        self.previous_rows: Tensor | None = None
        self._origin: list[Tensor] = []  # what f returned last, kept alive so that its address is not reused
        self._origin_versions: list[int] = []
        self._origin_storages: list[int] = []

    def hold(self, previous: list[Tensor] | None, rows: Tensor | None = None, settled: bool = True) -> None:
        """Take ``previous`` for what f returned last; ``settled``: it is known that f leaves it alone."""
        self._forget()
        self.previous, self.previous_rows = previous, rows
        if settled and previous:
            self._origin = previous
            self._origin_versions = [version(t) for t in previous]
            self._origin_storages = storages(previous)
        self.note_versions()
        self.look()

    def take(self, ws: Workspace, bound: BoundStep, which: Tensor) -> None:
        """Feed the step of a workspace that holds some of the samples; f's previous output is read where it lies."""
        self.ws, self._shape = ws, ws.layout.shapes[0]
        rows = self.previous_rows
        if self.previous is not None:
            self.previous_rows = which.to(torch.int32) if rows is None else rows.index_select(0, which)
        self.start = [t.index_select(0, which) for t in self.start]
        self.newest, self._copies = [], ([], [])
        self.bind(bound)

    def look(self) -> None:
        """Whether the next step may take the quick way."""
        self.plain = (
            self._quick is not None
            and self._single
            and not self.start  # the first step settles whether f leaves its input and output alone
            and not (self.copies_f or self.copies_z)
            and (not self.uses_previous or (bool(self._origin) and self._previous_is_plain()))
        )

    def _previous_is_plain(self) -> bool:
        if self.previous is None:
            return True
        t = self.previous[0]
        return self.previous_rows is None and t.dtype is self._dtype and t.is_contiguous() and not t.is_neg()

    def quick(self, fz: Tensor) -> int | None:
        """Step with one contiguous tensor; samples still running. None, with nothing done, where it needs more care."""
        ws = self.ws
        cur = ws.cur
        if (
            fz.dtype is not self._dtype
            or fz.shape != self._shape
            or fz.requires_grad
            or (not fz.is_cpu if self._device_index < 0 else fz.get_device() != self._device_index)
            or not fz.is_contiguous()
            or fz.is_inference()
            or fz.is_neg()
            or ws.x[cur][0]._version != self._x_versions[cur][0]
        ):
            return None
        if not self.uses_previous:
            return None if fz.untyped_storage().data_ptr() in self._x_storages else self._quick(cur, fz.data_ptr(), 0)
        storage = fz.untyped_storage().data_ptr()
        if (
            storage == self._origin_storages[0]
            or storage in self._x_storages
            or self._origin[0]._version != self._origin_versions[0]
        ):
            return None
        running: int = self._quick(cur, fz.data_ptr(), self.previous[0].data_ptr() if self.previous else 0)
        self.previous = self._origin = [fz]
        self._origin_versions = [fz._version]
        self._origin_storages = [storage]
        return running

    def careful(self, leaves: list[Tensor], rows: Tensor | None, turn: int) -> int:
        """Step with checked leaves; samples still running.

        ``rows`` maps samples to rows of the leaves, -1 for dropped samples; ``turn``: evaluations made before this one.
        """
        leaves = [t.detach() if t.requires_grad else t for t in leaves]
        if self.z_changed():
            leaves = self._undo_change_of_z(leaves, turn)
        previous = self.previous
        if self.uses_previous:
            leaves, previous = self._settle(leaves, previous, turn)
        elif any(s in self._x_storages for s in storages(leaves)):
            leaves = [t.clone() for t in leaves]  # a view of z: rows that stop are overwritten while others read it
        running: int = self._step(leaves, previous, rows, self.previous_rows)
        self.newest = leaves
        if self.uses_previous:
            self.previous, self.previous_rows = leaves, rows
        if self._bound.counts_writes:
            self.note_versions()
        self.start = []
        self.look()
        return running

    def _settle(
        self, leaves: list[Tensor], previous: list[Tensor] | None, turn: int
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """The output of f in memory that will still hold it at the next step, and the previous one if it still does."""
        where = storages(leaves)
        origin, versions = self._origin, self._origin_versions
        reused = any(s in self._x_storages for s in where) or any(t.is_inference() for t in leaves)
        if origin:
            changed = any(version(t) != v for t, v in zip(origin, versions, strict=True))
            seen = not set(where).isdisjoint(self._origin_storages)
            if (changed or seen) and previous is origin:
                previous = None  # overwritten while it was held: one column is lost, none is wrong
            reused = reused or changed or seen
        self.copies_f = self.copies_f or reused
        self._origin = leaves
        self._origin_storages = where
        self._origin_versions = [version(t) for t in leaves]
        if self.copies_f or not origin:
            leaves = self._copy(leaves, turn)
        return leaves, previous

    def _copy(self, leaves: list[Tensor], turn: int) -> list[Tensor]:
        buffers = self._copies[turn & 1]
        layout = self.ws.layout
        if not buffers:
            with torch.inference_mode(False):  # the next step may be made in another mode
                buffers += layout.empty()
        rows = leaves[0].shape[0]
        if rows < layout.B:
            buffers = [b[:rows] for b in buffers]
        return [b.copy_(t) for b, t in zip(buffers, leaves, strict=True)]

    def note_versions(self) -> None:
        """Take the iterates for as they should be."""
        self._x_versions = [[version(t) for t in buffer] for buffer in self.ws.x]

    def z_changed(self) -> bool:
        """Whether somebody wrote to the iterate since."""
        cur = self.ws.cur
        return any(version(x) != v for x, v in zip(self.ws.x[cur], self._x_versions[cur], strict=True))

    def restore_z(self) -> None:
        """Put the start back into an iterate that f has written to, and hand out copies from now on."""
        for x, t in zip(self.ws.x[self.ws.cur], self.start, strict=True):
            x.copy_(t)
        self.note_versions()
        self.copies_z = True

    def _undo_change_of_z(self, leaves: list[Tensor], turn: int) -> list[Tensor]:
        """Mend that f wrote into its iterate: keep f's output, restore the iterate."""
        if not self.start:
            raise RuntimeError(
                f"f changed its input z in place at evaluation {turn + 1}, after it had left it alone before; "
                "return a new tensor from f, or clone z inside it"
            )
        leaves = [t.clone() for t in leaves]
        self.restore_z()
        return leaves
