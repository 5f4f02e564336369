"""What a sample is: which numbers of a caller's tensors belong together, and the (B, ...) form that every op works on.

    batch_dims=1    a row of dim 0 (``FIRST_DIM``, the default)
    batch_dims=0    the whole state is one sample: a vector of unknowns, the nodes of one graph
    batch_dims=2    every token of (B, T, ...) is one
    segments        rows of one tensor, sample after sample, of unequal length: a batch of graphs (``segments.py``)

Views wherever memory allows it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Consecutive samples of one length, and their rows: one sample after the other."""

    first: int
    count: int
    start: int
    length: int

    @property
    def samples(self) -> slice:
        """Which they are."""
        return slice(self.first, self.first + self.count)

    def of(self, rows: Tensor) -> Tensor:
        """(count, length, ...) view of what is theirs."""
        return rows[self.start : self.start + self.count * self.length].unflatten(0, (self.count, self.length))


class Samples:
    """A way to count samples.

    Attributes:
        shape: how many there are, as a caller counts them.
        views: whether ``split`` and ``join`` of dense tensors are views.
        groups: samples of one length each, where lengths differ; then ``split`` gives the rows of one group after the
            other, and not (B, ...).
    """

    shape: tuple[int, ...]
    views: bool = True
    groups: tuple[Group, ...] = ()

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

    def spread(self, t: Tensor) -> Tensor:
        """(B,) numbers, one a sample, as one for each row of what ``split`` gives."""
        return t

    def counted(self, t: Tensor) -> Tensor:
        """(..., B) numbers, one a sample, in the shape and order in which a caller counts samples."""
        return t.view((*t.shape[:-1], *self.shape))

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

    def counted(self, t: Tensor) -> Tensor:
        """They are."""
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
