"""The way of columns from the host's memory to a device: copies run ahead of whoever works on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..hosted import PINNED, HostedWorkspace, Piece


def streams_of(device_type: str) -> Any:
    """The module of torch with the streams of such a device; None: copies are made when they are asked for."""
    return getattr(torch, device_type) if device_type in PINNED else None


class Link:
    """Two places on the device for the columns of a piece: one is worked on while the other is filled."""

    def __init__(self, ws: HostedWorkspace) -> None:
        """``ws``: that does not keep this object, or a proxy of one that does."""
        self._ws = ws
        device = ws.layout.device
        most = max((math.prod(piece.shape) for piece in ws.pieces), default=0) * ws.method.m
        self._streams = streams_of(device.type)
        places = 1 if self._streams is None else 2
        self._places = torch.empty(places, 2, most, dtype=ws.history.dtype, device=device)
        self._device = device
        if self._streams is not None:
            self._stream = self._streams.Stream(device)
            self._places.record_stream(self._stream)

    def read(self, kinds: Sequence[int], count: int) -> Iterator[tuple[Piece, list[Tensor]]]:
        """Each piece, and the first ``count`` columns of these kinds in it, (count, samples, numbers) on the device.

        They last until the next piece is asked for.
        """
        if self._streams is None:
            for piece in self._ws.pieces:
                yield piece, self._copy(piece, kinds, count, 0)
            return
        yield from self._ahead(kinds, count)

    def _ahead(self, kinds: Sequence[int], count: int) -> Iterator[tuple[Piece, list[Tensor]]]:
        pieces, streams = self._ws.pieces, self._streams
        current = streams.current_stream(self._device)
        free: list[Any] = [current.record_event()] * 2  # behind the columns that were written last
        arriving: list[tuple[list[Tensor], Any]] = []
        for i in range(len(pieces) + 1):
            if i < len(pieces):
                with streams.stream(self._stream):
                    self._stream.wait_event(free[i % 2])
                    arriving.append((self._copy(pieces[i], kinds, count, i % 2), self._stream.record_event()))
            if i:
                columns, arrived = arriving.pop(0)
                current.wait_event(arrived)
                yield pieces[i - 1], columns
                free[(i - 1) % 2] = current.record_event()

    def _copy(self, piece: Piece, kinds: Sequence[int], count: int, place: int) -> list[Tensor]:
        found = []
        for kind in kinds:
            columns = self._ws.piece(kind, piece)[:count]
            target = self._places[place, kind, : columns.numel()].view(columns.shape)
            found.append(target.copy_(columns, non_blocking=True))
        return found
