"""Anderson's memory: columns, their small matrices, and the numbers of the method.

Picard is Anderson with no columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import pool
from .codes import BLOCK, TILE, TINY, Evict
from .layout import Layout
from .workspace import Shapes, Stopping, Workspace, tiles_of, untile

HISTORY_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8)
SCALED_DTYPES = (torch.float16, torch.int8)


class AndersonMethod(NamedTuple):
    """The numbers of the method, handed on whole from the solver's options to every backend.

    ``m``: columns. ``test_space``: W = dF - c dG with c = 1 (Type I) or 2 (mixed); 0: Type II, W = -dG.
    """

    m: int
    test_space: float = 0.0
    mixing: float = 1.0
    ridge: float = 0.0
    evict: Evict = Evict.OLDEST


def keeps_products(layout: Layout, history_dtype: torch.dtype) -> bool:
    """Whether Anderson keeps small matrices; if not, its history lies in tiles as they do."""
    return layout.N > TINY or len(layout.leaves) > 1 or history_dtype in SCALED_DTYPES


def history_shape(layout: Layout, m: int, history_dtype: torch.dtype) -> tuple[int, ...]:
    """The shape of Anderson's history for ``m`` columns."""
    if keeps_products(layout, history_dtype):
        return 2, layout.B, m, layout.N
    return 2, math.ceil(layout.B / TILE), m, layout.N, TILE


class AndersonWorkspace(Workspace):
    """History (2, B, m, N) of differences of f and of the residual, and their small matrices.

    Columns are stored in units of the sample (times ``Real.UNIT``, a power of two), rounded to ``history.dtype``;
    float16 and int8 carry a power-of-two scale per block of 1024 numbers. A column whose residual difference has norm
    0 in ``norms`` is empty. The history of tiny samples lies in tiles too, (2, tiles, m, N, 16), and their matrices are
    formed anew at every step: reading and writing them would cost more than that.
    """

    uses_previous = True
    kept = ("history", "scales", "matrix", "gram", "norms", "ages")

    method: AndersonMethod
    scales: Tensor
    matrix: Tensor  # normalised W^T dG
    gram: Tensor  # normalised dG^T dG, lower triangle
    norms: Tensor  # ||dG_j||, ||W_j||
    ages: Tensor  # step that wrote the column

    def __init__(self, layout: Layout, stopping: Stopping, method: AndersonMethod, history_dtype: torch.dtype) -> None:
        super().__init__(layout, stopping)
        self._describe_method(method, history_dtype)
        shapes = self.shapes(layout, method, history_dtype)
        self.history, self.buffer = pool.empty(*shapes.pop("history"), layout.device)
        for name, (shape, dtype) in shapes.items():
            make = torch.zeros if name in ("norms", "ages") else torch.empty
            setattr(self, name, make(shape, dtype=dtype, device=layout.device))

    def _describe_method(self, method: AndersonMethod, history_dtype: torch.dtype) -> None:
        self.method = method
        self.keeps_products = keeps_products(self.layout, history_dtype)
        # With a residual of the caller's own: the one before, and its differences (B, m, any) instead of history[1].
        self.own_previous: Tensor | None = None
        self.own_columns: Tensor | None = None

    @classmethod
    def over(
        cls,
        layout: Layout,
        stopping: Stopping,
        method: AndersonMethod,
        iterates: tuple[list[Tensor], list[Tensor], list[Tensor]],
        tensors: Mapping[str, Tensor],
    ) -> AndersonWorkspace:
        """A workspace on memory that somebody else owns, of the right ``shapes``."""
        ws = cls.__new__(cls)
        ws._describe(layout, stopping)
        ws._describe_method(method, tensors["history"].dtype)
        ws._adopt(iterates, tensors)
        return ws

    @staticmethod
    def shapes(layout: Layout, method: AndersonMethod, history_dtype: torch.dtype) -> Shapes:
        """Shape and dtype of what the method keeps."""
        m, acc, tiles = method.m, layout.acc, tiles_of(layout)
        blocks = sum(math.ceil(leaf.n / BLOCK) for leaf in layout.leaves) if history_dtype in SCALED_DTYPES else 0
        kept = m if keeps_products(layout, history_dtype) else 0
        side = kept if method.test_space else 0  # Type II needs the Gram matrix alone
        return {
            "history": (history_shape(layout, m, history_dtype), history_dtype),
            "scales": ((2, layout.B, m, blocks), torch.float32),
            "matrix": ((tiles, side, side, TILE), acc),
            "gram": ((tiles, kept, kept, TILE), acc),
            "norms": ((tiles, 2, m, TILE), acc),
            "ages": ((tiles, m, TILE), torch.int32),
        }

    def reset(self) -> None:
        """As new: no evaluation made, no column kept."""
        super().reset()
        self.norms.zero_()
        self.ages.zero_()

    def columns(self, which: int) -> Tensor:
        """(B, m, N) columns as stored, without their scales: a view, or for tiny samples a copy."""
        return self.history[which] if self.keeps_products else untile(self.history[which], self.layout.B)

    def set_residual(self, rows: Tensor) -> None:
        """Measure convergence and solve for the weights with (B, any) ``rows`` at the next step."""
        if self.own_residual is None:
            self.own_columns = rows.new_empty(rows.shape[0], self.method.m, rows.shape[1])
        self.own_previous = self.own_residual
        self.own_residual = rows

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a later step reads, by name."""
        if self.own_residual is None or self.own_columns is None:
            return super().tensors()
        return {**super().tensors(), "own_residual": self.own_residual, "own_columns": self.own_columns}

    def expected(self, saved: Mapping[str, Tensor]) -> Shapes:
        """Shape and dtype of each saved tensor; a residual of the caller's own has any size."""
        expected = super().expected(saved)
        if "own_residual" in saved:
            rows, acc = saved["own_residual"].shape[1:], self.layout.acc
            expected["own_residual"] = ((self.layout.B, *rows), acc)
            expected["own_columns"] = ((self.layout.B, self.method.m, *rows), acc)
        return expected
