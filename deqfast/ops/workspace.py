"""The memory an op works on: iterates, history, small matrices, per-sample statistics.

Every backend reads and writes the same tensors in the same layout, so a solve may be saved by one and resumed by
another. Small matrices lie in tiles of 16 samples, the sample index innermost: a vector register on the CPU, or a half
warp on a GPU, then holds the same entry of 16 systems.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from . import pool
from .codes import TILE, Int, Real
from .layout import Layout, widest

_NO_ROOM = ("out of memory", "not enough memory", "allocate memory")  # in the errors of torch's allocators
_BEST_AND_LEAST = slice(int(Real.BEST), int(Real.LEAST) + 1)


class Stopping(NamedTuple):
    """When a sample stops: ||f(z) - z|| <= atol + rtol ||f(z)||, or after max_iter evaluations (0: no limit).

    ``keep_best``: the answer is the iterate with the least residual, not the last one.
    """

    rtol: float
    atol: float = 0.0
    max_iter: int = 0
    keep_best: bool = True


class Memory:
    """Where a workspace's tensors come from: new ones, and for the history what an earlier solve gave back.

    Attributes:
        buffer: what the history lies in, if it is worth keeping for another solve.
    """

    buffer: Tensor | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def iterates(self, layout: Layout) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Two for the iterate and the one before, and one for the best."""
        return layout.empty(), layout.empty(), layout.empty()

    def new(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor of this name, with anything in it."""
        return torch.empty(*shape, dtype=dtype, device=self.device)  # a tuple would take longer to parse

    def zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor of this name, zero before the first step."""
        return torch.zeros(*shape, dtype=dtype, device=self.device)

    def history(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The history, with anything in it.

        Raises:
            torch.OutOfMemoryError: there is no room for it; how much it would take.
        """
        try:
            found, self.buffer = self._history(shape, dtype)
        except RuntimeError as error:
            if not any(sign in str(error).lower() for sign in _NO_ROOM):
                raise
            size = math.prod(shape) * dtype.itemsize / 1e9
            numbers = " x ".join(map(str, shape))
            raise torch.OutOfMemoryError(f"it takes {size:,.1f} GB ({numbers} numbers of {dtype}). {error}") from error
        return found

    def _history(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        return pool.empty(shape, dtype, self.device)


class Workspace:
    """What both solvers need: two iterate buffers, a third for the best iterate, statistics, stopping rule.

    ``x[cur]`` is the iterate that f has just been evaluated at; a step writes the next iterate over ``x[1 - cur]``,
    the one before, and the caller then flips ``cur``. ``saved`` receives an earlier best iterate only when it is about
    to be overwritten.
    """

    uses_previous: ClassVar[bool]  # whether a step reads f at the iterate before
    kept: ClassVar[tuple[str, ...]]  # names of the method's own tensors
    asked_by: ClassVar[str] = ""  # the option that asks for such memory, where it is not every backend's
    makes_products: ClassVar[bool] = False  # whether products of columns can be had of the columns themselves

    parts: tuple[Workspace, ...] = ()  # where samples are of unequal length, that of each group

    method: tuple[Any, ...]
    history: Tensor

    def __init__(self, layout: Layout, stopping: Stopping, memory: Memory) -> None:
        self.layout = layout
        self.stopping = stopping
        self.tiles = math.ceil(layout.B / TILE)
        padded = self.tiles * TILE
        x, x_prev, self.saved = memory.iterates(layout)
        self.x = x, x_prev
        self.cur = 0
        self.before = 0  # evaluations that came before this solve's first one, for whoever counts them
        self.ints = memory.zeros("ints", (16, padded), torch.int32)
        self.reals = memory.zeros("reals", (8, padded), layout.acc)
        self.buffer: Tensor | None = None  # what the history lies in, if it is worth keeping for another solve
        self.own_residual: Tensor | None = None  # the caller's, in place of f(z) - z (Anderson, Type II)
        # A state of several blocks, each to a tolerance of its own: (blocks, 2, padded) in the device's widest dtype,
        # how far each moves and how large it is, measured before the step; and a rule (rtol, atol, weight) a block.
        self.block_norms: Tensor | None = None
        self.block_rules: list[tuple[float, float, float]] = []

    @property
    def kind(self) -> type[Workspace]:
        """Whose step it takes."""
        return type(self)

    def begin(self) -> None:
        """What no zero says of a solve that has made no evaluation."""
        self.reals[_BEST_AND_LEAST].fill_(math.inf)

    def reset(self) -> None:
        """As new: no evaluation made, no column kept."""
        self.cur = 0
        self.ints.zero_()
        self.reals.zero_()
        self.begin()

    def judge_blocks(self, rules: list[tuple[float, float, float]]) -> None:
        """Stop a sample when every block is within its rule; its residual is the largest weighted one of a block."""
        padded = self.ints.shape[1]
        device = self.layout.device
        self.block_norms = torch.zeros(len(rules), 2, padded, dtype=widest(device), device=device)
        self.block_rules = rules

    def take(self, other: Any, which: Tensor) -> None:
        """Become what another workspace, of the same method and stopping rule, holds of some of its samples."""
        self.cur, self.before = other.cur, other.before
        count = which.numel()
        for mine, theirs in ((self.ints, other.ints), (self.reals, other.reals)):
            mine[:, :count] = theirs.index_select(1, which)
        for own, leaves in zip((*self.x, self.saved), (*other.x, other.saved), strict=True):
            for t, leaf in zip(own, leaves, strict=True):
                torch.index_select(leaf, 0, which, out=t)

    def why_no_start(self) -> str | None:
        """Why no other solve can begin with such a history; None: one can."""
        return "its steps say something in a row alone"

    def settle(self) -> None:
        """Everything where every backend looks for it, whatever the last one kept elsewhere."""

    def forget(self, which: Tensor) -> None:
        """What some of the (B,) samples have learned about f no longer counts."""
        raise NotImplementedError

    def woken(self, which: Tensor) -> None:
        """Some samples run again at an iterate where they had stopped: what is of no use to them is forgotten."""

    def changed(self) -> None:
        """F is another map from here on: nothing is to be made of a difference of its outputs and the old one's."""

    def release(self) -> None:
        """Give the history up; statistics and iterates stay, but no further step can be made."""
        if self.buffer is not None:
            self.history = self.history.new_empty(0)
            pool.give(self.buffer)
            self.buffer = None

    def own(self) -> dict[str, Tensor]:
        """The method's tensors by name."""
        return {name: getattr(self, name) for name in self.kept}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a later step reads, by name, as it lies."""
        named = {"ints": self.ints, "reals": self.reals, **self.own(), **self.given()}
        for i in range(len(self.layout.leaves)):
            named[f"x.{i}"] = self.x[self.cur][i]
            named[f"x_prev.{i}"] = self.x[1 - self.cur][i]
            named[f"saved.{i}"] = self.saved[i]
        return named

    def small(self) -> dict[str, Tensor] | None:
        """The method's tensors but for the history, as ``canonical`` has them; None: all are saved as they lie."""
        return None

    def rows(self) -> Tensor:
        """The history as (kinds, B, columns, N), where ``small`` is not None."""
        raise NotImplementedError

    def take_rows(self, rows: Tensor) -> None:
        """Read what ``rows`` gave, written to since, where that is no view of the history."""

    def take_small(self, saved: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Read what is no view in ``small``; the names of that."""
        raise NotImplementedError

    def given(self) -> dict[str, Tensor]:
        """What the caller has given beside z0."""
        return {}

    @property
    def has_products(self) -> bool:
        """Whether products of columns are kept, and not made anew at every step."""
        return False

    @property
    def is_scaled(self) -> bool:
        """Whether numbers of a column that lie together share a scale."""
        return False

    def make_products(self) -> Tensor:
        """Products of the columns, of the numbers that are here, where ``makes_products``; added up they are taken."""
        raise NotImplementedError

    def take_products(self, products: Tensor) -> None:
        """The products of the whole columns."""
        raise NotImplementedError

    def int_row(self, row: Int) -> Tensor:
        """(B,) int32 view."""
        return self.ints[int(row), : self.layout.B]  # torch takes twice as long to read an enum

    def steps(self) -> Tensor:
        """(B,) int32: evaluations that each sample has used in this solve; a view where it can be."""
        used = self.int_row(Int.STEPS)
        return used - self.before if self.before else used

    def real_row(self, row: Real) -> Tensor:
        """(B,) view in the accumulation dtype."""
        return self.reals[int(row), : self.layout.B]


def tile(t: Tensor, tiles: int) -> Tensor:
    """(B, ...) to (tiles, ..., 16), zero-padded."""
    padded = t.new_zeros(tiles * TILE, *t.shape[1:])
    padded[: t.shape[0]] = t
    return padded.view(tiles, TILE, *t.shape[1:]).movedim(1, -1)


def untile(t: Tensor, B: int) -> Tensor:
    """(tiles, ..., 16) to (B, ...), dense: strides decide the order in which torch adds up."""
    return t.movedim(-1, 1).reshape(t.shape[0] * TILE, *t.shape[1:-1])[:B].contiguous()
