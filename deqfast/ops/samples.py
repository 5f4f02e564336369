"""What a sample is: which numbers of a caller's tensors belong together, and the (B, ...) form that every op works on.

    batch_dims=1    a row of dim 0 (``FIRST_DIM``, the default)
    batch_dims=0    the whole state is one sample: a vector of unknowns, the nodes of one graph
    batch_dims=2    every token of (B, T, ...) is one
    segments        rows of one tensor, sample after sample, of unequal length: a batch of graphs

Views wherever memory allows it. Samples of unequal length are padded with zeros to the longest, which no norm and no
product sees; that costs two gathers an evaluation, and the memory of the longest for each.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Samples:
    """A way to count samples.

    Attributes:
        shape: how many there are, as a caller counts them.
        views: whether ``split`` and ``join`` of dense tensors are views.
    """

    shape: tuple[int, ...]
    views: bool = True

    def check(self, tensors: list[Tensor], name: str) -> None:
        """Raise ValueError unless the tensors have the dimensions that count samples, and share them."""
        raise NotImplementedError

    def of(self, first: Tensor) -> Samples:
        """The samples of a state whose first tensor this is."""
        raise NotImplementedError

    def split(self, t: Tensor) -> Tensor:
        """A caller's tensor as (B, ...)."""
        raise NotImplementedError

    def join(self, t: Tensor) -> Tensor:
        """The inverse of ``split``."""
        raise NotImplementedError

    def resized(self, rows: int) -> Samples:
        """The same way to count, for tensors of so many rows of dim 0.

        Raises:
            ValueError: samples are no rows of dim 0.
        """
        raise NotImplementedError


class FirstDim(Samples):
    """A sample is a row of dim 0; ``shape`` is the layout's to know."""

    def __reduce__(self) -> str:
        return "FIRST_DIM"  # there is one

    def check(self, tensors: list[Tensor], name: str) -> None:
        """Dim 0 is there and shared."""
        for t in tensors:
            if t.dim() == 0:
                raise ValueError(
                    f"{name} must have a batch dimension (dim 0), got a 0-dimensional tensor; with batch_dims=0 the "
                    "whole state is one sample"
                )
            if t.shape[0] != tensors[0].shape[0]:
                raise ValueError(
                    f"tensors of {name} must share dim 0 (the batch), got {tensors[0].shape[0]} and {t.shape[0]}"
                )

    def of(self, first: Tensor) -> Samples:
        """The same for every state."""
        return self

    def split(self, t: Tensor) -> Tensor:
        """It is in that form."""
        return t

    def join(self, t: Tensor) -> Tensor:
        """It is in that form."""
        return t

    def resized(self, rows: int) -> Samples:
        """The same for every number of rows."""
        return self


FIRST_DIM = FirstDim()


class LeadingDims(Samples):
    """A sample for every index of the first ``count`` dims; of none: one."""

    def __init__(self, count: int, shape: tuple[int, ...] = ()) -> None:
        self.count, self.shape = count, shape
        self.inner = math.prod(shape[1:])  # samples a row of dim 0

    def __repr__(self) -> str:
        return f"batch_dims={self.count}"

    def check(self, tensors: list[Tensor], name: str) -> None:
        """The dims are there and shared."""
        count, first = self.count, tensors[0]
        for t in tensors:
            if t.dim() < count:
                raise ValueError(
                    f"batch_dims={count} needs tensors of at least {count} dims in {name}, got one of shape "
                    f"{tuple(t.shape)}; the most it can be there is {t.dim()}"
                )
            if t.shape[:count] != first.shape[:count]:
                raise ValueError(
                    f"tensors of {name} must share their first {count} dims with batch_dims={count}, got shapes "
                    f"{tuple(first.shape)} and {tuple(t.shape)}: expected ({', '.join(map(str, first.shape[:count]))}, "
                    "...) of each"
                )

    def of(self, first: Tensor) -> Samples:
        """With the sizes of those dims."""
        return LeadingDims(self.count, tuple(first.shape[: self.count]))

    def split(self, t: Tensor) -> Tensor:
        """The dims as one."""
        return t.flatten(0, self.count - 1) if self.count else t.unsqueeze(0)

    def join(self, t: Tensor) -> Tensor:
        """That one as the dims; dim 0 may have lost rows."""
        if not self.count:
            return t.squeeze(0)
        first = t.shape[0] // self.inner if self.inner else self.shape[0]
        return t.unflatten(0, (first, *self.shape[1:]))

    def resized(self, rows: int) -> Samples:
        """All samples of so many rows."""
        if not self.count:
            raise ValueError("no row can be left out: with batch_dims=0 the whole state is one sample")
        return LeadingDims(self.count, (rows, *self.shape[1:]))


class Segments(Samples):
    """A sample is some consecutive rows of dim 0, which all tensors share.

    Args:
        bounds: (S + 1,) where each begins, and where the last ends; on the host.
        device: of the state.
    """

    def __init__(self, bounds: Tensor, device: torch.device) -> None:
        lengths = bounds.diff()
        self.rows = int(bounds[-1])
        self.shape = (lengths.numel(),)
        self.longest = int(lengths.max()) if lengths.numel() else 0
        self.views = bool((lengths == self.longest).all())
        self._place: Any = None
        if not self.views:
            start = torch.repeat_interleave(torch.arange(lengths.numel()) * self.longest - bounds[:-1], lengths)
            self._place = (torch.arange(self.rows) + start).to(device)
        self._bounds = bounds

    def __repr__(self) -> str:
        return f"segments of {self._bounds.diff().tolist()} rows"

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
        """(S, longest, ...), with zeros where a sample has no row."""
        many = self.shape[0]
        if self.views:
            return t.unflatten(0, (many, self.longest))
        padded = t.new_zeros(many * self.longest, *t.shape[1:])
        return padded.index_copy(0, self._place, t).unflatten(0, (many, self.longest))

    def join(self, t: Tensor) -> Tensor:
        """The rows, one after the other."""
        rows = t.flatten(0, 1)
        return rows if self.views else rows.index_select(0, self._place)

    def resized(self, rows: int) -> Samples:
        """They cannot be: rows are of samples of unequal length."""
        raise ValueError("no row can be left out of a state with segments: a row of dim 0 is no sample there")


def segments_of(given: Any, rows: int, device: torch.device) -> Segments:
    """Segments from a (rows,) tensor that says whose each row is, as in PyTorch Geometric's ``batch``, or from offsets.

    Raises:
        TypeError, ValueError: they are not sorted, or do not cover the rows.
    """
    if isinstance(given, (list, tuple)) and all(isinstance(n, int) for n in given):
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
    if first == 0 and last == rows and rows:
        return Segments(numbers, device)
    if numbers.numel() != rows:
        raise ValueError(
            f"segments must cover the {rows} rows of z0: expected ({rows},) sample numbers, or offsets from 0 to "
            f"{rows}, got {numbers.numel()} numbers from {first} to {last}"
        )
    if first < 0:
        raise ValueError(f"segments must number samples from 0, got {first}")
    return Segments(torch.searchsorted(numbers, torch.arange(last + 2)), device)


def samples_of(batch_dims: int, segments: Any, z0: Tensor | None) -> Samples:
    """What ``batch_dims`` and ``segments`` ask for; ``z0``: the state's first tensor, which segments are rows of."""
    if segments is not None and z0 is not None:
        rows = z0.shape[0] if z0.dim() else 0
        return segments_of(segments, rows, z0.device)
    return FIRST_DIM if batch_dims == 1 else LeadingDims(batch_dims)
