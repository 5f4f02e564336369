"""The memory an op works on: iterates, history, small matrices, per-sample statistics.

Every backend reads and writes the same tensors in the same layout, so a solve may be saved by one and resumed by
another. Small matrices lie in tiles of 16 samples, the sample index innermost: a vector register on the CPU, or a half
warp on a GPU, then holds the same entry of 16 systems.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

from . import pool
from .layout import Layout

TILE = 16
TINY = 8  # numbers a sample up to which the small matrices are larger than the history they are made of
BLOCK = 1024  # history numbers that share one scale (float16, int8)

HISTORY_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8)
SCALED_DTYPES = (torch.float16, torch.int8)


class Int(IntEnum):
    """Rows of ``Workspace.ints``: one int32 per sample."""

    STATUS = 0
    STEPS = 1
    BEST_AT = 2
    BEST_STEP = 3
    SLOT = 4  # Anderson: where the next column goes
    COUNT = 5  # columns in use
    SOLVE_FALLBACKS = 6  # Picard step because the small solve failed
    STEP_FALLBACKS = 7  # Picard step because the mixed iterate was not finite
    GROWTH_RESTARTS = 8  # Type II: the residual grew by more than 1.5
    RESCALES = 9  # history dropped because the magnitude left the range of its unit
    EVICTIONS = 10
    FULL_RESTARTS = 11  # Broyden: memory full
    DENOMINATOR_RESTARTS = 12  # Broyden: |1 - c/||s||^2| too small, or not finite


class Real(IntEnum):
    """Rows of ``Workspace.reals``: one number of the accumulation dtype per sample."""

    RESIDUAL = 0  # ||f(z) - z|| / ||f(z)|| at the newest evaluation
    NORM = 1  # ||f(z) - z|| at the newest evaluation
    BEST = 2  # least RESIDUAL so far, infinite before the first finite one
    FIRST = 3  # RESIDUAL at the first evaluation
    UNIT = 4  # power of two that brings the sample to magnitude one; 0 before the first evaluation
    SCALE = 5  # Broyden: H0 = SCALE * I; 0 while not measured


class At(IntEnum):
    """Where the best iterate of a sample is: a value of ``Int.BEST_AT``."""

    NOWHERE = 0
    CURRENT = 1
    PREVIOUS = 2
    SAVED = 3


class Workspace:
    """What both solvers need: two iterate buffers, a third for the best iterate, statistics, stopping rule.

    ``x[cur]`` is the iterate that f has just been evaluated at; a step writes the next iterate over ``x[1 - cur]``,
    the one before, and the caller then flips ``cur``. ``saved`` receives an earlier best iterate only when it is about
    to be overwritten.
    """

    def __init__(self, layout: Layout, *, rtol: float, atol: float, max_iter: int, keep_best: bool) -> None:
        self.layout = layout
        self.rtol = rtol
        self.atol = atol
        self.max_iter = max_iter  # 0: no limit
        self.keep_best = keep_best
        self.tiles = math.ceil(layout.B / TILE)
        padded = self.tiles * TILE
        self.x = (layout.empty(), layout.empty())
        self.cur = 0
        self.saved = layout.empty()
        device = layout.device
        self.ints = torch.zeros(16, padded, dtype=torch.int32, device=device)
        self.reals = torch.zeros(8, padded, dtype=layout.acc, device=device)
        self.reals.select(0, Real.BEST).fill_(math.inf)
        self.history: Tensor
        self.buffer: Tensor | None = None  # what the history lies in, if it is worth keeping for another solve
        self.own_residual: Tensor | None = None  # the caller's, in place of f(z) - z (Anderson, Type II)
        # A state of several blocks, each to a tolerance of its own: (blocks, 2, padded) float64, how far each block
        # moves and how large it is, measured before the step; and a rule (rtol, atol, weight of its residual) a block.
        self.block_norms: Tensor | None = None
        self.block_rules: list[tuple[float, float, float]] = []

    def reset(self) -> None:
        """As new: no evaluation made, no column kept."""
        self.cur = 0
        self.ints.zero_()
        self.reals.zero_()
        self.reals.select(0, Real.BEST).fill_(math.inf)

    def judge_blocks(self, rules: list[tuple[float, float, float]]) -> None:
        """Stop a sample when every block is within its rule; its residual is the largest weighted one of a block."""
        padded = self.ints.shape[1]
        self.block_norms = torch.zeros(len(rules), 2, padded, dtype=torch.float64, device=self.layout.device)
        self.block_rules = rules

    def release(self) -> None:
        """Give the history up; statistics and iterates stay, but no further step can be made."""
        if self.buffer is not None:
            self.history = self.history.new_empty(0)
            pool.give(self.buffer)
            self.buffer = None

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a later step reads, by name, for saving."""
        named = {"ints": self.ints, "reals": self.reals}
        for i in range(len(self.layout.leaves)):
            named[f"x.{i}"] = self.x[self.cur][i]
            named[f"x_prev.{i}"] = self.x[1 - self.cur][i]
            named[f"saved.{i}"] = self.saved[i]
        return named

    def int_row(self, row: Int) -> Tensor:
        """(B,) int32 view."""
        return self.ints.select(0, row).narrow(0, 0, self.layout.B)

    def real_row(self, row: Real) -> Tensor:
        """(B,) view in the accumulation dtype."""
        return self.reals.select(0, row).narrow(0, 0, self.layout.B)


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

    def __init__(
        self,
        layout: Layout,
        *,
        m: int,
        test_space: float,
        mixing: float,
        ridge: float,
        history_dtype: torch.dtype,
        evict_least_useful: bool,
        rtol: float,
        atol: float,
        max_iter: int,
        keep_best: bool,
    ) -> None:
        super().__init__(layout, rtol=rtol, atol=atol, max_iter=max_iter, keep_best=keep_best)
        self.m = m
        self.test_space = test_space  # W = dF - c dG with c = 1 (Type I) or 2 (mixed); 0: Type II, W = -dG
        self.mixing = mixing
        self.ridge = ridge
        self.evict_least_useful = evict_least_useful
        device, acc, tiles = layout.device, layout.acc, self.tiles
        self.keeps_products = keeps_products(layout, history_dtype)
        self.history, self.buffer = pool.empty(history_shape(layout, m, history_dtype), history_dtype, device)
        blocks = sum(math.ceil(leaf.n / BLOCK) for leaf in layout.leaves) if history_dtype in SCALED_DTYPES else 0
        self.scales = torch.empty(2, layout.B, m, blocks, dtype=torch.float32, device=device)
        kept = m if self.keeps_products else 0
        side = kept if test_space else 0  # Type II needs the Gram matrix alone
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
            self.own_columns = rows.new_empty(rows.shape[0], self.m, rows.shape[1])
        self.own_previous = self.own_residual
        self.own_residual = rows

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a later step reads, by name."""
        names = ["history", "scales", "matrix", "gram", "norms", "ages"]
        if self.own_residual is not None:
            names += ["own_residual", "own_columns"]
        return super().tensors() | {name: getattr(self, name) for name in names}


class BroydenWorkspace(Workspace):
    """Steps (B, memory, N) and their squared norms; above ``GRAM_MIN_N`` numbers a sample also their Gram matrix.

    While z fits in cache the chain z_{j+1} = z_j + s_{j+1} c_j / ||s_j||^2 reads every step once. Beyond that the Gram
    form (independent dots, a small recursion, one combination) reads them twice but streams.
    """

    GRAM_MIN_N = 1 << 16

    def __init__(
        self,
        layout: Layout,
        *,
        memory: int,
        scale_first: bool,
        rtol: float,
        atol: float,
        max_iter: int,
        keep_best: bool,
    ) -> None:
        super().__init__(layout, rtol=rtol, atol=atol, max_iter=max_iter, keep_best=keep_best)
        self.memory = memory
        self.scale_first = scale_first
        acc, device, B = layout.acc, layout.device, layout.B
        self.history, self.buffer = pool.empty((B, memory, layout.N), acc, device)
        self.norms = torch.empty(B, memory, dtype=acc, device=device)  # ||s_j||^2
        side = memory if layout.N >= self.GRAM_MIN_N else 0
        self.gram = torch.empty(B, side, side, dtype=acc, device=device)  # s_i . s_j, i >= j

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a later step reads, by name."""
        return super().tensors() | {name: getattr(self, name) for name in ("history", "norms", "gram")}


def tile(t: Tensor, tiles: int) -> Tensor:
    """(B, ...) to (tiles, ..., 16), zero-padded."""
    padded = t.new_zeros(tiles * TILE, *t.shape[1:])
    padded[: t.shape[0]] = t
    return padded.view(tiles, TILE, *t.shape[1:]).movedim(1, -1)


def untile(t: Tensor, B: int) -> Tensor:
    """(tiles, ..., 16) to (B, ...), dense: strides decide the order in which torch adds up."""
    return t.movedim(-1, 1).reshape(t.shape[0] * TILE, *t.shape[1:-1])[:B].contiguous()
