"""Broyden's memory: the steps, their squared norms, and for large samples their Gram matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .codes import Int
from .layout import Layout
from .workspace import Memory, Stopping, Workspace


class BroydenMethod(NamedTuple):
    """The numbers of the method: steps kept, and whether H0 is measured on the first step."""

    memory: int
    scale_first: bool = False


class BroydenWorkspace(Workspace):
    """Steps (B, memory, N) and their squared norms; above ``GRAM_MIN_N`` numbers a sample also their Gram matrix.

    While z fits in cache the chain z_{j+1} = z_j + s_{j+1} c_j / ||s_j||^2 reads every step once. Beyond that the Gram
    form (independent dots, a small recursion, one combination) reads them twice but streams.
    """

    GRAM_MIN_N = 1 << 16

    uses_previous = False
    kept = ("history", "norms", "gram")
    makes_products = True

    method: BroydenMethod

    def __init__(self, layout: Layout, stopping: Stopping, method: BroydenMethod, memory: Memory | None = None) -> None:
        fresh = memory is None
        memory = Memory(layout.device) if memory is None else memory
        super().__init__(layout, stopping, memory)
        self.method = method
        columns, acc, B = method.memory, layout.acc, layout.B
        self.history = memory.history((B, columns, layout.N), acc)
        self.buffer = memory.buffer
        side = columns if layout.N >= self.GRAM_MIN_N or layout.spread_n else 0
        self.norms = memory.new("norms", (B, columns), acc)  # ||s_j||^2
        self.gram = memory.new("gram", (B, side, side), acc)  # s_i . s_j, i >= j
        if fresh:
            self.begin()

    def take(self, other: BroydenWorkspace, which: Tensor) -> None:
        """And the steps of those samples."""
        super().take(other, which)
        for name in self.kept:
            torch.index_select(getattr(other, name), 0, which, out=getattr(self, name))

    def small(self) -> dict[str, Tensor]:
        """Norms and products."""
        k = self.method.memory
        gram = self.gram if self.has_products else self.norms.new_zeros(self.layout.B, k, k)
        return {"norms": self.norms[:, None], "gram": gram}

    def rows(self) -> Tensor:
        """(1, B, memory, N) steps."""
        return self.history[None]

    def take_small(self, saved: Mapping[str, Tensor]) -> tuple[str, ...]:
        """All are views, but for products that are not kept."""
        return () if self.has_products else ("gram",)

    @property
    def has_products(self) -> bool:
        """In the Gram form."""
        return self.gram.shape[1] > 0

    def make_products(self) -> Tensor:
        """(B, memory, memory) double."""
        kept = torch.arange(self.method.memory, device=self.norms.device) < self.int_row(Int.COUNT)[:, None]
        steps = self.history.double().masked_fill(~kept[:, :, None], 0)  # the others may be anything
        return torch.bmm(steps, steps.mT)

    def take_products(self, products: Tensor) -> None:
        """Into the Gram matrix."""
        self.gram.copy_(products)

    def forget(self, which: Tensor) -> None:
        """No steps from here: those of some of the (B,) samples no longer count."""
        self.int_row(Int.COUNT).masked_fill_(which, 0)

    def changed(self) -> None:
        """No update is made of the last step: one of infinite norm takes part in none. Gram forms forget all."""
        count = self.int_row(Int.COUNT)
        if self.gram.shape[1]:
            count.zero_()
            return
        last = torch.arange(self.method.memory, device=count.device) == count[:, None] - 1
        self.norms.masked_fill_(last, math.inf)
