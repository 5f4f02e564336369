"""Segments: samples that are consecutive rows of one tensor, as the nodes of graphs in a batch of graphs.

Segments of one length are a batch, and views. Of unequal ones those of one length stand together as a ``Group``, which
is solved like a batch of its own: nothing is padded, and a sample has the bits that it has alone. A backend that cannot
promise bits, and whose step is many launches, has coarser groups (``pads``): by powers of two, padded with zeros to the
longest of the group. What differentiates the loop itself or captures it wants one block, ``Padded`` to the longest of
all. No norm and no product sees the zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .samples import FIRST_DIM, Group, LeadingDims, Samples


class Segments(Samples):
    """A sample is some consecutive rows of dim 0, which all tensors share; here all of one length.

    Args:
        bounds: (S + 1,) where each begins, and where the last ends; on the host.
    """

    def __init__(self, bounds: Tensor) -> None:
        self.bounds, self.rows = bounds, int(bounds[-1])
        self.shape = (bounds.numel() - 1,)

    def __repr__(self) -> str:
        return f"segments of {self.bounds.diff().tolist()} rows"

    def check(self, tensors: list[Tensor], name: str) -> None:
        """Dim 0 is there, and has the rows of all segments."""
        for t in tensors:
            if t.dim() == 0 or t.shape[0] != self.rows:
                raise ValueError(
                    f"segments must cover the rows of {name}: they have {self.rows} rows in all, expected a tensor of "
                    f"shape ({self.rows}, ...), got {tuple(t.shape)}"
                )

    def of(self, first: Tensor) -> Samples:
        """They are counted already."""
        return self

    def split(self, t: Tensor) -> Tensor:
        """(S, length, ...)."""
        many = self.shape[0]
        return t.unflatten(0, (many, self.rows // many))

    def join(self, t: Tensor) -> Tensor:
        """The rows, one after the other."""
        return t.flatten(0, 1)

    def resized(self, rows: int) -> Samples:
        """They cannot be: rows are of samples of unequal length."""
        raise ValueError("no row can be left out of a state with segments: a row of dim 0 is no sample there")


class _Placed(Segments):
    """Segments whose rows lie in another order, or with rows of zeros between them.

    Args:
        bounds: as above.
        start: (S,) the row at which each begins there.
        total: rows there.
        device: of the state.
    """

    def __init__(self, bounds: Tensor, start: Tensor, total: int, device: torch.device) -> None:
        super().__init__(bounds)
        place = torch.arange(self.rows) + torch.repeat_interleave(start - bounds[:-1], bounds.diff())
        self.views = bool((place == torch.arange(total)[: self.rows]).all()) and total == self.rows
        self._total = total
        self._place = place.to(device)
        self._from = torch.argsort(place).to(device) if total == self.rows else None

    def split(self, t: Tensor) -> Tensor:
        """The rows where they belong, zeros elsewhere."""
        if self.views:
            return t
        if self._from is not None:
            return t.index_select(0, self._from)
        return t.new_zeros(self._total, *t.shape[1:]).index_copy(0, self._place, t)

    def join(self, t: Tensor) -> Tensor:
        """The rows, one after the other."""
        return t if self.views else t.index_select(0, self._place)


class Padded(_Placed):
    """All padded to the longest, as one block."""

    def __init__(self, bounds: Tensor, device: torch.device) -> None:
        many, self._longest = bounds.numel() - 1, int(bounds.diff().max())
        super().__init__(bounds, torch.arange(many) * self._longest, many * self._longest, device)

    def split(self, t: Tensor) -> Tensor:
        """(S, longest, ...), with zeros where a sample has no row."""
        return super().split(t).unflatten(0, (self.shape[0], self._longest))

    def join(self, t: Tensor) -> Tensor:
        """The rows, one after the other."""
        return super().join(t.flatten(0, 1))


class Grouped(_Placed):
    """Samples of one length next to each other, lengths in the order in which they first appear.

    Args:
        bounds: as above.
        device: of the state.
        pads: by powers of two, and padded; else a group is of one length. A segment without rows is one row of zeros.
    """

    def __init__(self, bounds: Tensor, device: torch.device, pads: bool) -> None:
        lengths = bounds.diff().clamp(min=1)
        kinds = torch.frexp(lengths - 0.5).exponent.to(torch.int64) if pads else lengths
        kind, which = torch.unique(kinds, return_inverse=True)
        many = lengths.numel()
        first = torch.full_like(kind, many).scatter_reduce(0, which, torch.arange(many), "amin")
        longest = torch.zeros_like(kind).scatter_reduce(0, which, lengths, "amax")
        order = torch.argsort(first[which], stable=True)
        placed = longest[which]
        ends = placed[order].cumsum(0)
        start = torch.empty_like(ends)
        start[order] = ends - placed[order]
        super().__init__(bounds, start, int(ends[-1]), device)
        counts = torch.bincount(which, minlength=kind.numel())
        self.groups = tuple(_groups([(int(counts[k]), int(longest[k])) for k in torch.argsort(first).tolist()]))
        self._sorted = bool((order == torch.arange(many)).all())
        rank = torch.empty_like(order)
        rank[order] = torch.arange(many)
        self._rank = rank.to(device)
        self._owner = torch.repeat_interleave(torch.arange(many), placed[order]).to(device)

    def spread(self, t: Tensor) -> Tensor:
        """The number of its sample for every row."""
        return t.index_select(0, self._owner)

    def counted(self, t: Tensor) -> Tensor:
        """In the order of the segments."""
        return t if self._sorted else t.index_select(-1, self._rank)


def _groups(sizes: list[tuple[int, int]]) -> Iterator[Group]:
    first = start = 0
    for count, length in sizes:
        yield Group(first, count, start, length)
        first, start = first + count, start + count * length


def segments_of(given: Any, rows: int, device: torch.device, pads: bool | None) -> Segments:
    """Segments from a (rows,) tensor that says whose each row is, as in PyTorch Geometric's ``batch``, or from offsets.

    ``pads``: see ``Grouped``; None: one block, whatever the lengths.

    Raises:
        TypeError, ValueError: they are not sorted, or do not cover the rows.
    """
    bounds = _bounds(given, rows)
    lengths = bounds.diff()
    if lengths.numel() and bool((lengths == lengths[0]).all()):
        return Segments(bounds)
    return Padded(bounds, device) if pads is None else Grouped(bounds, device, pads)


def _bounds(given: Any, rows: int) -> Tensor:
    if isinstance(given, (list, tuple)) and all(isinstance(n, int) and not isinstance(n, bool) for n in given):
        given = torch.tensor(given, dtype=torch.int64)
    if not isinstance(given, Tensor) or given.dtype not in (torch.int32, torch.int64):
        got = str(given.dtype) if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"segments must be an int tensor: (rows,) sample numbers, or offsets (samples + 1,), got {got}")
    if given.dim() != 1 or not given.numel():
        raise ValueError(f"segments must have one dim and an entry, got shape {tuple(given.shape)}")
    numbers = given.detach().to("cpu", torch.int64)
    if bool((numbers.diff() < 0).any()):
        raise ValueError("segments must be sorted: rows of a sample one after the other, samples in order")
    first, last = int(numbers[0]), int(numbers[-1])
    if not rows:
        raise ValueError("segments are rows of z0, which has none")
    if first == 0 and last == rows:
        return numbers
    if numbers.numel() != rows:
        raise ValueError(
            f"segments must cover the {rows} rows of z0: expected ({rows},) sample numbers, or offsets from 0 to "
            f"{rows}, got {numbers.numel()} numbers from {first} to {last}"
        )
    if first < 0:
        raise ValueError(f"segments must number samples from 0, got {first}")
    return torch.searchsorted(numbers, torch.arange(last + 2))


def samples_of(batch_dims: int, segments: Any, z0: Tensor | None, pads: bool | None) -> Samples:
    """What ``batch_dims`` and ``segments`` ask for; ``z0``: the state's first tensor, which segments are rows of."""
    if segments is not None and z0 is not None:
        rows = z0.shape[0] if z0.dim() else 0
        return segments_of(segments, rows, z0.device, pads)
    return FIRST_DIM if batch_dims == 1 else LeadingDims(batch_dims)
