"""Samples of unequal length: a workspace for each group of them, with the iterates and statistics of all in one place.

Whoever looks at a solve between two steps sees all samples at once. A step runs group by group, each on a workspace
whose iterates and statistics are views, and whose history is its own.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .codes import TILE
from .contract import Backend, BoundStep, Leaves, Method, Rows, choose
from .layout import Layout
from .shared import Group
from .workspace import Memory, Stopping, Workspace


def pads(backend: str, z0: Any) -> bool:
    """Whether segments of ``z0`` are padded to groups by powers of two, as the backend that will be chosen wants it."""
    first = next((t for t in pytree.tree_leaves(z0) if isinstance(t, Tensor)), None)
    try:
        return first is not None and choose(backend, first.device).pads
    except ValueError:  # the solve will say so, among its other checks
        return False


def workspace_of(method: Method, layout: Layout, stopping: Stopping) -> Workspace:
    """The memory that a solve of states of ``layout`` needs, whatever the lengths of its samples.

    Raises:
        torch.OutOfMemoryError: there is no room; what it would take, and the ways to take less.
    """
    try:
        return GroupedWorkspace(method, layout, stopping) if layout.parts else method.workspace(layout, stopping)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"no room for the history of {method} for {layout.B} samples of {layout.N} numbers: keep fewer columns "
            "(m=, memory=), Anderson's in fewer bits (history_dtype=torch.bfloat16, torch.int8) or, of a state on a "
            f"GPU, in the host's memory (history_device='cpu'), or solve a smaller batch; {error}"
        ) from error


def bind(backend: Backend, ws: Workspace, evaluations: int = 0, group: Group | None = None) -> BoundStep:
    """The update of such a workspace's solver, after so many evaluations; ``group``: ranks that share the solve."""
    if group is not None and group.spread:
        return backend.spread(ws, group.ranks)
    return GroupedStep(backend, ws, evaluations) if isinstance(ws, GroupedWorkspace) else backend.bind(ws, evaluations)


class _Wide(Memory):
    """Rows of statistics that end with room for the last group's tile."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout.device)
        self._width = math.ceil((layout.B + TILE - 1) / TILE) * TILE

    def zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """(rows, width)."""
        return super().zeros(name, (shape[0], self._width), dtype)


class GroupedWorkspace(Workspace):
    """The workspaces of all groups."""

    def __init__(self, method: Method, layout: Layout, stopping: Stopping) -> None:
        super().__init__(layout, stopping, _Wide(layout))
        self.begin()
        self.parts = tuple(method.workspace(part, stopping) for _, part in layout.parts)
        for (group, _), ws in zip(layout.parts, self.parts, strict=True):
            for name in ("ints", "reals"):
                rows: Tensor = getattr(self, name)
                setattr(ws, name, rows[:, group.first : group.first + ws.tiles * TILE])
            x, x_prev, ws.saved = ([group.of(t) for t in leaves] for leaves in (*self.x, self.saved))
            ws.x = x, x_prev

    @property
    def kind(self) -> type[Workspace]:
        """That of its groups."""
        return self.parts[0].kind

    def share(self) -> None:
        """Tell the groups what has been decided for all."""
        for ws in self.parts:
            ws.cur, ws.before, ws.stopping = self.cur, self.before, self.stopping

    def reset(self) -> None:
        """As new: no evaluation made, no column kept."""
        for ws in self.parts:
            ws.reset()
        super().reset()

    def why_no_start(self) -> str | None:
        """What speaks against it is the same for all."""
        return self.parts[0].why_no_start()

    def settle(self) -> None:
        """Of every group."""
        for ws in self.parts:
            ws.settle()

    def forget(self, which: Tensor) -> None:
        """Of every group."""
        for (group, _), ws in zip(self.layout.parts, self.parts, strict=True):
            ws.forget(which[group.samples])

    def changed(self) -> None:
        """Of every group."""
        for ws in self.parts:
            ws.changed()

    def woken(self, which: Tensor) -> None:
        """Of every group."""
        for (group, _), ws in zip(self.layout.parts, self.parts, strict=True):
            ws.woken(which[group.samples])

    def release(self) -> None:
        """Of every group."""
        for ws in self.parts:
            ws.release()

    def own(self) -> dict[str, Tensor]:
        """Every group's, behind its number."""
        return {f"{i}.{name}": t for i, ws in enumerate(self.parts) for name, t in ws.own().items()}


class GroupedStep(BoundStep):
    """The steps of all groups, one after the other."""

    counts_writes: ClassVar[bool] = True  # torch notes versions where views are written to, and nothing is lost by it
    ws: GroupedWorkspace

    def __init__(self, backend: Backend, ws: GroupedWorkspace, evaluations: int) -> None:
        super().__init__(ws)
        ws.share()
        self._steps = [backend.bind(part, evaluations) for part in ws.parts]
        self._groups = [group for group, _ in ws.layout.parts]
        self.exact = all(step.exact for step in self._steps)
        self._running = [part.layout.B for part in ws.parts]
        leaf = ws.layout.leaves[0]
        plain = len(ws.layout.leaves) == 1 and leaf.plain and self.exact and all(s.quick for s in self._steps)
        self._dtype = leaf.dtype
        self._offsets = [group.start * leaf.n * leaf.dtype.itemsize for group in self._groups]
        self.quick = self._quick if plain else None

    def _quick(self, cur: int, f: int, f_prev: int, /) -> int:
        running = self._running
        for i, step in enumerate(self._steps):
            if running[i]:
                self.ws.parts[i].cur = cur
                at = self._offsets[i]
                running[i] = step.quick(cur, f + at, f_prev and f_prev + at)  # type: ignore[misc]
        return sum(running)

    def __call__(self, f: Leaves, f_prev: Leaves | None, f_rows: Rows, f_prev_rows: Rows) -> int:
        """One update of every group in which a sample is known to run."""
        if f_rows is not None or f_prev_rows is not None:
            raise ValueError("f_rows: samples of unequal length cannot be left out")
        if self.quick is not None and self._is_plain(f) and (f_prev is None or self._is_plain(f_prev)):
            return self._quick(self.ws.cur, f[0].data_ptr(), 0 if f_prev is None else f_prev[0].data_ptr())
        for i, (group, step) in enumerate(zip(self._groups, self._steps, strict=True)):
            if self._running[i] or not self.exact:
                self.ws.parts[i].cur = self.ws.cur
                before = None if f_prev is None else [group.of(t) for t in f_prev]
                self._running[i] = step([group.of(t) for t in f], before, None, None)
        return sum(self._running)

    def _is_plain(self, leaves: Leaves) -> bool:
        t = leaves[0]
        return t.dtype is self._dtype and t.is_contiguous() and not t.is_neg()

    def outside(self, f: Leaves, f_rows: Rows, made: int | Tensor) -> Tensor | None:
        """Of every group; None where each says so."""
        self.ws.share()
        found = [
            step.outside([group.of(t) for t in f], None, made)
            for group, step in zip(self._groups, self._steps, strict=True)
        ]
        if all(which is None for which in found):
            return None
        return torch.cat(
            [
                torch.zeros(group.count, dtype=torch.bool, device=self.ws.layout.device) if which is None else which
                for group, which in zip(self._groups, found, strict=True)
            ]
        )

    def failed(self) -> int:
        """Of all groups."""
        return sum(step.failed() for step in self._steps)
