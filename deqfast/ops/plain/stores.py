"""Where columns lie that are read piece by piece: in a workspace's own memory, or in the host's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..anderson import AndersonWorkspace
from ..hosted import MOST, HostedWorkspace, Piece, cut
from ..lag import Later, capturing
from .link import Link

IN_CACHE = 1 << 16  # numbers of a piece whose columns stay in a CPU's cache while they are worked on


class Store(Protocol):
    """The columns as they are stored, in pieces.

    Attributes:
        pieces: of the state.
    """

    pieces: list[Piece]

    def read(self, kinds: Sequence[int], count: int) -> Iterator[tuple[Piece, list[Tensor]]]:
        """Each piece, and the first ``count`` columns of these kinds (0: dF, 1: dG) in it, (samples, count, numbers).

        They last until the next piece is asked for.
        """

    def put(self, piece: Piece, codes: Sequence[Tensor], slot: Tensor) -> None:
        """Keep (samples, numbers) of dF and dG in each sample's slot."""

    def clear(self, first: int, last: int) -> None:
        """Zero in some slots."""

    def clean(self, used: Tensor) -> None:
        """Zero in those of the first slots that (B, count) ``used`` does not name."""

    def chosen(self, slot: Tensor) -> None:
        """Where the next column goes."""

    def settle(self) -> None:
        """Wait until everything is where others look for it."""


class Near:
    """In the workspace, on the state's device."""

    def __init__(self, ws: AndersonWorkspace) -> None:
        self._history = ws.history
        self.pieces = pieces_of(ws)
        self._rows = torch.arange(ws.layout.B, device=ws.layout.device)

    def read(self, kinds: Sequence[int], count: int) -> Iterator[tuple[Piece, list[Tensor]]]:
        """As views."""
        for piece in self.pieces:
            yield piece, [self._history[kind, piece.rows, :count, piece.numbers] for kind in kinds]

    def put(self, piece: Piece, codes: Sequence[Tensor], slot: Tensor) -> None:
        """Each in the same memory."""
        for columns, new in zip(self._history, codes, strict=True):
            columns[piece.rows, :, piece.numbers][self._rows[: piece.shape[0]], slot[piece.rows]] = new

    def clear(self, first: int, last: int) -> None:
        """Of every piece."""
        self._history[:, :, first:last].zero_()

    def clean(self, used: Tensor) -> None:
        """Of every piece."""
        self._history[:, :, : used.shape[1]].masked_fill_(~used[None, :, :, None], 0)

    def chosen(self, slot: Tensor) -> None:
        """It stays on the device."""

    def settle(self) -> None:
        """It is there."""


class Far:
    """In the host's memory."""

    def __init__(self, ws: HostedWorkspace) -> None:
        """``ws``: that does not keep this object, or a proxy of one that does."""
        self._ws, self.pieces = ws, ws.pieces
        self._link = Link(ws)
        self._slots: tuple[Tensor | None, list[int]] = None, []
        self._coming: tuple[Tensor, Later] | None = None

    def read(self, kinds: Sequence[int], count: int) -> Iterator[tuple[Piece, list[Tensor]]]:
        """Over the link."""
        for piece, columns in self._link.read(kinds, count):
            yield piece, [t.transpose(0, 1) for t in columns]

    def put(self, piece: Piece, codes: Sequence[Tensor], slot: Tensor) -> None:
        """One copy a kind where all samples take the same slot."""
        slots = self._known(slot)[piece.rows]
        for kind, new in enumerate(codes):
            target = self._ws.piece(kind, piece)
            if len(set(slots)) == 1:
                target[slots[0]].copy_(new, non_blocking=True)
                continue
            for row, at in enumerate(slots):
                target[at, row].copy_(new[row], non_blocking=True)

    def _known(self, slot: Tensor) -> list[int]:
        if self._slots[0] is not slot:
            if capturing(slot.device):
                raise RuntimeError(
                    "a CUDA graph cannot hold steps with history_device='cpu': the host takes part in them"
                )
            coming = self._coming
            late = coming[1] if coming is not None and coming[0] is slot else Later(slot)
            self._slots = slot, late.read()
        return self._slots[1]

    def chosen(self, slot: Tensor) -> None:
        """It is on its way to the host while f is evaluated."""
        self._coming = slot, Later(slot)

    def clear(self, first: int, last: int) -> None:
        """On the host."""
        for kind in (0, 1):
            for piece in self.pieces:
                self._ws.piece(kind, piece)[first:last].zero_()

    def clean(self, used: Tensor) -> None:
        """On the host."""
        empty = ~used.cpu().mT[..., None]
        for kind in (0, 1):
            for piece in self.pieces:
                self._ws.piece(kind, piece)[: used.shape[1]].masked_fill_(empty[:, piece.rows], 0)

    def settle(self) -> None:
        """Wait for the copies to the host."""
        Later(self._ws.ints[0, :1]).read()


def pieces_of(ws: AndersonWorkspace) -> list[Piece]:
    """The state in the pieces that its columns are read in."""
    if isinstance(ws, HostedWorkspace):
        return ws.pieces
    return cut(ws.layout, IN_CACHE if ws.layout.device.type == "cpu" else MOST)


def parts_of(pieces: list[Piece]) -> int:
    """In how many parts a sample is cut."""
    return max((piece.part + 1 for piece in pieces), default=0)


def store_of(ws: Any) -> Store:
    """Where the columns of a workspace lie; ``ws``: as above."""
    return Far(ws) if isinstance(ws, HostedWorkspace) else Near(ws)
