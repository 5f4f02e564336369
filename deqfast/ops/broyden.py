"""Broyden's memory: the steps, their squared norms, and for large samples their Gram matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import pool
from .layout import Layout
from .workspace import Shapes, Stopping, Workspace


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

    method: BroydenMethod
    norms: Tensor  # ||s_j||^2
    gram: Tensor  # s_i . s_j, i >= j

    def __init__(self, layout: Layout, stopping: Stopping, method: BroydenMethod) -> None:
        super().__init__(layout, stopping)
        self.method = method
        shapes = self.shapes(layout, method)
        self.history, self.buffer = pool.empty(*shapes.pop("history"), layout.device)
        for name, (shape, dtype) in shapes.items():
            setattr(self, name, torch.empty(shape, dtype=dtype, device=layout.device))

    @classmethod
    def over(
        cls,
        layout: Layout,
        stopping: Stopping,
        method: BroydenMethod,
        iterates: tuple[list[Tensor], list[Tensor], list[Tensor]],
        tensors: Mapping[str, Tensor],
    ) -> BroydenWorkspace:
        """A workspace on memory that somebody else owns, of the right ``shapes``."""
        ws = cls.__new__(cls)
        ws._describe(layout, stopping)
        ws.method = method
        ws._adopt(iterates, tensors)
        return ws

    @staticmethod
    def shapes(layout: Layout, method: BroydenMethod) -> Shapes:
        """Shape and dtype of what the method keeps."""
        memory, acc, B = method.memory, layout.acc, layout.B
        side = memory if layout.N >= BroydenWorkspace.GRAM_MIN_N else 0
        return {"history": ((B, memory, layout.N), acc), "norms": ((B, memory), acc), "gram": ((B, side, side), acc)}
