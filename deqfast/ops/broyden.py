"""Broyden's memory: the steps, their squared norms, and for large samples their Gram matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import pool
from .layout import Layout
from .workspace import Stopping, Workspace


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

    def __init__(self, layout: Layout, stopping: Stopping, method: BroydenMethod) -> None:
        super().__init__(layout, stopping)
        self.method = method
        memory = method.memory
        acc, device, B = layout.acc, layout.device, layout.B
        self.history, self.buffer = pool.empty((B, memory, layout.N), acc, device)
        self.norms = torch.empty(B, memory, dtype=acc, device=device)  # ||s_j||^2
        side = memory if layout.N >= self.GRAM_MIN_N else 0
        self.gram = torch.empty(B, side, side, dtype=acc, device=device)  # s_i . s_j, i >= j

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a later step reads, by name."""
        return super().tensors() | {name: getattr(self, name) for name in ("history", "norms", "gram")}
