"""The joint map and the finish by the Triton kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..contract import JointEnds, Leaves
from ..joint import JointWorkspace, Part
from .launch import Launch, bound, dense, doubles, load, on, share

INPUT = 2  # x's block
BALLS = {None: "NO_BALL", "l2": "L2", "linf": "LINF"}  # names in kernels/constants.py
LANES = 128  # samples that a program records
RETURNS = {"best": "RETURN_BEST", "last": "RETURN_LAST", "cost": "RETURN_COST"}


def constant(name: str) -> int:
    """A number that the kernels know by this name."""
    return int(getattr(load("constants"), name).value)


class _Tensor:
    """A tensor of the state with numbers in it: its rows in every buffer, its chunks, and its launches."""

    def __init__(self, ws: JointWorkspace, index: int, chunks: Any) -> None:
        self.index, self.chunks = index, chunks
        self.part: Part = ws.parts[index]
        self.v = tuple(self.part.leaf.rows(ws.value(index, which)) for which in (0, 1))
        self.mapped = tuple(self.part.leaf.rows(buffer[index]) for buffer in ws.mapped)
        self.squares: list[Launch] = []  # launches that measure before the map
        self.map: Launch
        self.copy: Launch | None = None  # at the end of a step, where rows are to be copied
        self.buffers: list[Any] = []  # its tensors, by core.cur


class TritonEnds(JointEnds):
    """What a solve allocates beside its workspace, once, and the launches of map and finish."""

    def __init__(self, ws: JointWorkspace) -> None:
        super().__init__(ws)
        core, options, layout = ws.core, ws.options, ws.core.layout
        self.kernels, self.ends = load("joint"), load("joint_finish")
        self.device = layout.device
        self.padded = core.ints.shape[1]
        self.statistics = load("arguments").Statistics(core.ints, core.reals)
        self.rate = 1.0
        some = [i for i, part in enumerate(ws.parts) if part.leaf.n]
        chunks = share([ws.parts[i].leaf.n for i in some])
        self.tensors = [_Tensor(ws, i, own) for i, own in zip(some, chunks, strict=True)]
        self.total = sum(own.own for own in chunks)
        first = [sum(t.chunks.own for t in self.tensors if t.part.block < block) for block in (1, INPUT)]
        self.sums = self.kernels.Sums(
            doubles([self.rate, *options.damping, options.radius, options.low, options.high], self.device),
            torch.zeros(layout.B, 4, self.total, dtype=torch.float64, device=self.device),
            *first,
        )
        tile = load("shapes").chunk_tile(self.total, 1)
        for t in self.tensors:
            self._bind_map(t, tile)
            self._bind_copy(t)
        assert core.block_norms is not None
        blocks = core.block_norms.shape[0]
        self.norms = bound(self.kernels.norms_kernel, layout.B, 1, BLOCKS=blocks, CHUNKS=tile)
        record = ws.record
        self.kept = self.ends.Kept(
            record.best_cost, record.best_norms, record.saved_cost, record.saved_norms, record.least, record.taken
        )
        self.record = bound(
            self.ends.record_kernel, math.ceil(layout.B / LANES), 4,
            RETURNS=constant(RETURNS[record.returns]), GUARDED=record.safeguard, ROWS=2 * blocks, BLOCK=LANES,
        )  # fmt: skip

    def _bind_map(self, t: _Tensor, tile: int) -> None:
        options, grid, inputs = self.ws.options, self.ws.core.layout.B * t.chunks.own, t.part.block == INPUT
        step = self.kernels.Step(
            BLOCK_OF=t.part.block,
            DAMPED=not inputs and options.damping[t.part.block] != 1,
            NORMALIZE=inputs and options.normalize,
            BALL=constant(BALLS[options.ball] if inputs else BALLS[None]),
            BOXED=inputs and (options.low > -math.inf or options.high < math.inf),
        )
        walk = {"step": step, "CHUNKS": tile, "BLOCK": 1024}
        if inputs:
            wanted = [False] * options.normalize + [True] * (options.ball == "l2")
            t.squares = [bound(self.kernels.square_kernel, grid, 4, AWAY=away, **walk) for away in wanted]
        t.map = bound(self.kernels.map_kernel, grid, 4, **walk)

    def _bind_copy(self, t: _Tensor) -> None:
        core, leaf = self.ws.core, t.part.leaf
        saved, record = self.ws.plain_saved[t.index], self.ws.record
        kept = None if record.kept is None else record.kept[t.index]
        if saved is None and kept is None:
            return
        rows = [None if tensor is None else leaf.rows(tensor) for tensor in (saved, kept)]
        t.buffers = [self.ends.Buffers(t.v[cur], t.mapped[cur], t.v[1 - cur], *rows) for cur in (0, 1)]
        grid, keep_best = core.layout.B * t.chunks.own, core.stopping.keep_best
        t.copy = bound(self.ends.copy_kernel, grid, 4, KEEP_BEST=keep_best, BLOCK=1024)

    def map(self, values: Leaves, step_size: float, cost: Tensor | None) -> None:
        """Launch one map."""
        core = self.ws.core
        if not core.layout.B:
            return
        with on(self.device):
            if step_size != self.rate:
                self.sums.settings[0].fill_(step_size)
                self.rate = step_size
            rows = [
                self.kernels.Tensors(
                    dense(values[t.index], t.part.leaf), t.v[core.cur], t.mapped[core.cur], t.part.center
                )
                for t in self.tensors
            ]
            for phase in range(max((len(t.squares) for t in self.tensors), default=0)):
                for t, tensors in zip(self.tensors, rows, strict=True):
                    if t.squares:
                        self._launch(t.squares[phase], t, tensors)
            for t, tensors in zip(self.tensors, rows, strict=True):
                self._launch(t.map, t, tensors)
            self.norms(core.block_norms, self.statistics, self.sums, cost, self.total, self.padded)

    def _launch(self, kernel: Launch, t: _Tensor, tensors: Any) -> None:
        kernel(tensors, self.statistics, self.sums, t.chunks, self.padded)

    def finish(self, cost: Tensor | None, made: int) -> None:
        """Launch the end of one step."""
        core = self.ws.core
        if not core.layout.B:
            return
        with on(self.device):
            self.record(
                self.statistics, cost, core.block_norms, core.norms, self.kept, core.layout.B, self.padded, made,
                2 * core.method.m,
            )  # fmt: skip
            for t in self.tensors:
                if t.copy is not None:
                    buffers = t.buffers[core.cur]
                    t.copy(buffers, self.statistics, self.kept.taken, t.chunks, self.padded, made)
