"""Anderson's memory with the columns in the host's memory, for states whose history does not fit on their device.

The link to the host is slow beside a device's own memory, and a copy is fast only where both ends are dense. So the
columns lie in pieces: of some samples and some numbers of one tensor, each (m, samples, numbers) and dense. The first
columns of a piece are one copy then, however few there are, and a new column is one, or one a sample where they take
other slots.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from . import pool
from .anderson import AndersonMethod, AndersonWorkspace
from .codes import BLOCK
from .layout import Layout
from .workspace import Memory, Stopping

SHARED: tuple[str, ...] = ("cpu", "mps")  # devices whose memory is the host's
PINNED = ("cuda", "xpu")  # devices that copy from and to pinned memory while the host goes on
PARTS = 32  # of a history, that are on the device at a time
LEAST, MOST = 1 << 15, 1 << 20  # numbers of a piece


class Piece(NamedTuple):
    """Some samples and some numbers of one tensor.

    Attributes:
        rows: the samples.
        leaf: the tensor,
        inside: which of its numbers,
        numbers: the same among all numbers of a sample,
        blocks: and among the blocks that share a scale.
        part: which part of a sample it is, of all that it is cut into.
        start: numbers of a column kept before it.
    """

    rows: slice
    leaf: int
    inside: slice
    numbers: slice
    blocks: slice
    part: int
    start: int

    @property
    def shape(self) -> tuple[int, int]:
        """(samples, numbers)."""
        return self.rows.stop - self.rows.start, self.inside.stop - self.inside.start


def cut(layout: Layout, most: int) -> list[Piece]:
    """The state in pieces of about ``most`` numbers, each of whole blocks where a tensor goes on behind it."""
    pieces: list[Piece] = []
    first = block = part = start = 0
    widest = max(1, most // BLOCK) * BLOCK
    for index, leaf in enumerate(layout.leaves):
        rows_of = max(1, most // max(1, leaf.n))
        for a in range(0, leaf.n, widest):
            b = min(a + widest, leaf.n)
            blocks = slice(block + a // BLOCK, block + math.ceil(b / BLOCK))
            for r in range(0, layout.B, rows_of):
                rows = slice(r, min(r + rows_of, layout.B))
                piece = Piece(rows, index, slice(a, b), slice(first + a, first + b), blocks, part, start)
                pieces.append(piece)
                start += math.prod(piece.shape)
            part += 1
        first, block = first + leaf.n, block + math.ceil(leaf.n / BLOCK)
    return pieces


class HostMemory(Memory):
    """Tensors on the device, but for the history: pinned memory of the host, where the device copies from such."""

    def _history(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if self.device.type in PINNED:
            return torch.empty(*shape, dtype=dtype, device="cpu", pin_memory=True), None
        return pool.empty(shape, dtype, torch.device("cpu"))


class HostedWorkspace(AndersonWorkspace):
    """Anderson's workspace whose history, (2, m B N) numbers, is in the host's memory, piece after piece.

    Scales, small matrices, iterates and statistics are on the device, as they always are.
    """

    asked_by = "history_device='cpu'"
    always_keeps: ClassVar[bool] = True

    def __init__(self, layout: Layout, stopping: Stopping, method: AndersonMethod, history_dtype: torch.dtype) -> None:
        super().__init__(layout, stopping, method, history_dtype, HostMemory(layout.device))
        self.history = self.history.view(2, method.m * layout.B * layout.N)
        self.pieces = cut(layout, min(max(layout.B * layout.N // PARTS, LEAST), MOST))
        self.begin()

    def piece(self, which: int, piece: Piece) -> Tensor:
        """(m, samples, numbers) of the columns dF (0) or dG (1), a view."""
        m, (rows, width) = self.method.m, piece.shape
        return self.history[which].narrow(0, m * piece.start, m * rows * width).view(m, rows, width)

    def columns(self, which: int) -> Tensor:
        """(B, m, N) columns as stored, without their scales: a copy."""
        return torch.stack([self._column(which, j) for j in range(self.method.m)], dim=1)

    def _column(self, which: int, slot: int) -> Tensor:
        column = self.history.new_empty(self.layout.B, self.layout.N)
        for piece in self.pieces:
            column[piece.rows, piece.numbers] = self.piece(which, piece)[slot]
        return column

    def rows(self) -> Tensor:
        """(2, B, m, N) columns, a copy."""
        return torch.stack([self.columns(0), self.columns(1)])

    def take_rows(self, rows: Tensor) -> None:
        """Piece by piece."""
        for which in (0, 1):
            for piece in self.pieces:
                self.piece(which, piece).copy_(rows[which][piece.rows, :, piece.numbers].movedim(1, 0))

    def _take_history(self, other: AndersonWorkspace, which: Tensor) -> None:
        """Column by column: their pieces are cut elsewhere."""
        assert isinstance(other, HostedWorkspace)
        chosen = which.to(self.history.device)
        for of in (0, 1):
            for j in range(self.method.m):
                column = other._column(of, j).index_select(0, chosen)
                for piece in self.pieces:
                    self.piece(of, piece)[j] = column[piece.rows, piece.numbers]
        torch.index_select(other.scales, 1, which, out=self.scales)
