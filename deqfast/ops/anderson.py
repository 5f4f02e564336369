"""Anderson's memory: columns, their small matrices, and the numbers of the method.

Picard is Anderson with no columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from .codes import BLOCK, TILE, TINY, Evict, Int
from .layout import Layout
from .workspace import Memory, Stopping, Workspace, tile, untile

HISTORY_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8)
SCALED_DTYPES = (torch.float16, torch.int8)


def newest_kept(m: int) -> int:
    """How many of m columns are the newest, which a full history does not give up as least useful."""
    return max(2, m // 3)


def most_given_up(m: int) -> int:
    """How many of m columns may be given up at once, and so the largest ``mix_every``."""
    return max(1, m - newest_kept(m))


class AndersonMethod(NamedTuple):
    """The numbers of the method, handed on whole from the solver's options to every backend.

    ``m``: columns. ``test_space``: W = dF - c dG with c = 1 (Type I) or 2 (mixed); 0: Type II, W = -dG. ``mix_every``:
    evaluations from one mix to the next; those between take the plain step. ``turn``: of the mixed test space, |W . dG|
    below so much of dX . dG + ||dG||^2 takes -dF for W; 0: never.
    """

    m: int
    test_space: float = 0.0
    mixing: float = 1.0
    ridge: float = 0.0
    evict: Evict = Evict.OLDEST
    mix_every: int = 1
    turn: float = 0.0


class Loose(Protocol):
    """Memory that a backend keeps in a form of its own between steps."""

    def settle(self) -> None:
        """Write it into the workspace."""

    def forget(self, which: Tensor) -> None:
        """The columns of some of the (B,) samples no longer count."""


def check_numbers(method: AndersonMethod) -> None:
    """Raise ValueError for numbers that a kernel cannot work with."""
    most = most_given_up(max(1, method.m))
    if not 1 <= method.mix_every <= most:
        raise ValueError(f"mix_every: expected 1 to {most}, got {method.mix_every}")
    if method.turn and (method.test_space != 2 or not 0 < method.turn < 1):
        raise ValueError(f"turn: expected 0, or a number below 1 with test_space 2, got {method.turn}")


class AndersonWorkspace(Workspace):
    """History (2, B, m, N) of differences of f and of the residual, and their small matrices.

    Columns are stored in units of the sample (times ``Real.UNIT``, a power of two), rounded to ``history.dtype``;
    float16 and int8 carry a power-of-two scale per block of 1024 numbers. A column whose residual difference has norm
    0 in ``norms`` is empty. The history of tiny samples lies in tiles too, (2, tiles, m, N, 16), and they have no
    matrices.
    """

    uses_previous = True
    kept = ("history", "scales", "matrix", "gram", "norms", "ages")
    always_keeps: ClassVar[bool] = False  # the products of tiny samples too

    method: AndersonMethod

    def __init__(
        self,
        layout: Layout,
        stopping: Stopping,
        method: AndersonMethod,
        history_dtype: torch.dtype,
        memory: Memory | None = None,
    ) -> None:
        fresh = memory is None
        memory = Memory(layout.device) if memory is None else memory
        super().__init__(layout, stopping, memory)
        self.method = method
        m, acc, tiles, scaled = method.m, layout.acc, self.tiles, history_dtype in SCALED_DTYPES
        # The products of tiny samples are not kept: reading and writing them would cost more than forming them anew.
        large = layout.N > TINY or len(layout.leaves) > 1
        self.keeps_products = large or scaled or layout.spread_n > 0 or self.always_keeps
        shape = (2, layout.B, m, layout.N) if self.keeps_products else (2, tiles, m, layout.N, TILE)
        self.history = memory.history(shape, history_dtype)
        self.buffer = memory.buffer
        blocks = sum(math.ceil(leaf.n / BLOCK) for leaf in layout.leaves) if scaled else 0
        kept = m if self.keeps_products else 0
        side = kept if method.test_space else 0  # Type II needs the Gram matrix alone
        self.scales = memory.new("scales", (2, layout.B, m, blocks), torch.float32)
        self.matrix = memory.new("matrix", (tiles, side, side, TILE), acc)  # normalised W^T dG
        self.gram = memory.new("gram", (tiles, kept, kept, TILE), acc)  # normalised dG^T dG, lower triangle
        self.norms = memory.zeros("norms", (tiles, 2, m, TILE), acc)  # ||dG_j||, ||W_j||
        self.ages = memory.zeros("ages", (tiles, m, TILE), torch.int32)  # step that wrote the column
        self.loose: Loose | None = None  # what a backend keeps in a form of its own while nobody looks
        # With a residual of the caller's own: the one before, and its differences (B, m, any) instead of history[1].
        self.own_previous: Tensor | None = None
        self.own_columns: Tensor | None = None
        if fresh:
            self.begin()

    def reset(self) -> None:
        """As new: no evaluation made, no column kept."""
        super().reset()
        self.loose = None
        self.norms.zero_()
        self.ages.zero_()

    def release(self) -> None:
        """Give the history up; statistics and iterates stay, but no further step can be made."""
        self.loose = None
        super().release()

    def forget(self, which: Tensor) -> None:
        """Plain steps from here: the columns of some of the (B,) samples no longer count."""
        if self.loose is not None:
            self.loose.forget(which)
        elif self.method.m:
            mask = torch.nn.functional.pad(which, (0, self.ints.shape[1] - which.shape[0]))
            self.norms.masked_fill_(mask.view(self.tiles, 1, 1, -1), 0)

    def woken(self, which: Tensor) -> None:
        """The column that the stopping evaluation may have begun, or all where mixes are to come in turn."""
        if not self.method.m:
            return
        if self.method.mix_every > 1:  # the mixes that left room came at other evaluations
            self.forget(which)
            return
        self.settle()
        slots = torch.arange(self.method.m, device=which.device)
        begun = which[:, None] & (slots == self.int_row(Int.SLOT)[:, None])
        self.norms[:, 0].masked_fill_(tile(begun, self.tiles), 0)

    def take(self, other: AndersonWorkspace, which: Tensor) -> None:
        """And the columns of those samples."""
        super().take(other, which)
        other.settle()
        self.settle()
        self._take_history(other, which)
        for name in self.kept[2:]:
            into = getattr(self, name)
            into.copy_(tile(untile(getattr(other, name), other.layout.B)[which], self.tiles))
        if other.own_residual is not None and other.own_columns is not None:
            self.own_residual = other.own_residual.index_select(0, which)
            self.own_columns = other.own_columns.index_select(0, which)

    def _take_history(self, other: AndersonWorkspace, which: Tensor) -> None:
        if self.keeps_products:
            for name in ("history", "scales"):
                torch.index_select(getattr(other, name), 1, which, out=getattr(self, name))
            return
        for into, columns in zip(self.history, other.history, strict=True):  # there are no scales
            into.copy_(tile(untile(columns, other.layout.B)[which], self.tiles))

    def why_no_start(self) -> str | None:
        """None where columns are kept that do not come in turns."""
        if not self.method.m:
            return "it keeps none"
        return "mix_every=1 is needed, for its mixes come in turn" if self.method.mix_every > 1 else None

    def columns(self, which: int) -> Tensor:
        """(B, m, N) columns as stored, without their scales: a view, or for tiny samples a copy."""
        return self.history[which] if self.keeps_products else untile(self.history[which], self.layout.B)

    def set_residual(self, rows: Tensor) -> None:
        """Measure convergence and solve for the weights with (B, any) ``rows`` at the next step."""
        if self.own_residual is None:
            self.own_columns = rows.new_empty(rows.shape[0], self.method.m, rows.shape[1])
        self.own_previous = self.own_residual
        self.own_residual = rows

    def settle(self) -> None:
        """Everything where every backend looks for it; a backend that keeps it elsewhere takes it up again."""
        if self.loose is not None:
            self.loose.settle()
            self.loose = None

    def own(self) -> dict[str, Tensor]:
        """The method's tensors by name."""
        self.settle()
        return super().own()

    def small(self) -> dict[str, Tensor]:
        """Norms, ages, products and scales."""
        B, m = self.layout.B, self.method.m
        found = {name: untile(getattr(self, name), B) for name in ("norms", "ages", "matrix", "gram")}
        if not self.keeps_products:
            side = m if self.method.test_space else 0
            found |= {"matrix": self.norms.new_zeros(B, side, side), "gram": self.norms.new_zeros(B, m, m)}
        return {**found, "scales": self.scales}

    def rows(self) -> Tensor:
        """(2, B, m, N) columns."""
        return self.history if self.keeps_products else torch.stack([self.columns(0), self.columns(1)])

    def take_small(self, saved: Mapping[str, Tensor]) -> tuple[str, ...]:
        """What lies in tiles."""
        tiled = "norms", "ages", "matrix", "gram"
        for name in tiled if self.keeps_products else tiled[:2]:
            getattr(self, name).copy_(tile(saved[name], self.tiles))
        return tiled

    def take_rows(self, rows: Tensor) -> None:
        """Of samples whose products are not kept the history lies in tiles."""
        if not self.keeps_products:
            for columns, found in zip(self.history, rows, strict=True):
                columns.copy_(tile(found, self.tiles))

    def given(self) -> dict[str, Tensor]:
        """A residual of the caller's own, and its columns."""
        if self.own_residual is None or self.own_columns is None:
            return {}
        return {"own_residual": self.own_residual, "own_columns": self.own_columns}

    @property
    def has_products(self) -> bool:
        """Not of tiny samples."""
        return self.keeps_products

    @property
    def is_scaled(self) -> bool:
        """In float16 and int8."""
        return self.history.dtype in SCALED_DTYPES
