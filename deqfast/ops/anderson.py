"""Anderson's memory: columns, their small matrices, and the numbers of the method.

Picard is Anderson with no columns.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import pool
from .codes import BLOCK, TILE, TINY, Evict
from .layout import Layout
from .workspace import Stopping, Workspace, untile

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

    def __init__(self, layout: Layout, stopping: Stopping, method: AndersonMethod, history_dtype: torch.dtype) -> None:
        super().__init__(layout, stopping)
        self.method = method
        m = method.m
        device, acc, tiles = layout.device, layout.acc, self.tiles
        self.keeps_products = keeps_products(layout, history_dtype)
        self.history, self.buffer = pool.empty(history_shape(layout, m, history_dtype), history_dtype, device)
        blocks = sum(math.ceil(leaf.n / BLOCK) for leaf in layout.leaves) if history_dtype in SCALED_DTYPES else 0
        self.scales = torch.empty(2, layout.B, m, blocks, dtype=torch.float32, device=device)
        kept = m if self.keeps_products else 0
        side = kept if method.test_space else 0  # Type II needs the Gram matrix alone
        self.matrix = torch.empty(tiles, side, side, TILE, dtype=acc, device=device)  # normalised W^T dG
        self.gram = torch.empty(tiles, kept, kept, TILE, dtype=acc, device=device)  # normalised dG^T dG, lower triangle
        self.norms = torch.zeros(tiles, 2, m, TILE, dtype=acc, device=device)  # ||dG_j||, ||W_j||
        self.ages = torch.zeros(tiles, m, TILE, dtype=torch.int32, device=device)  # step that wrote the column
        # With a residual of the caller's own: the one before, and its differences (B, m, any) instead of history[1].
        self.own_previous: Tensor | None = None
        self.own_columns: Tensor | None = None

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
        names = ["history", "scales", "matrix", "gram", "norms", "ages"]
        if self.own_residual is not None:
            names += ["own_residual", "own_columns"]
        return super().tensors() | {name: getattr(self, name) for name in names}

    def expected(self, saved: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each saved tensor; a residual of the caller's own has any size."""
        expected = super().expected(saved)
        if "own_residual" in saved:
            rows, acc = saved["own_residual"].shape[1:], self.layout.acc
            expected["own_residual"] = ((self.layout.B, *rows), acc)
            expected["own_columns"] = ((self.layout.B, self.method.m, *rows), acc)
        return expected
