"""The joint map and the finish by the Triton kernels; see ``triton``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .triton import _dense, bound, doubles, load, share

if TYPE_CHECKING:
    from .joint import Finish, JointWorkspace, Map, Part

INPUT = 2  # x's block
BALLS = {None: "NO_BALL", "l2": "L2", "linf": "LINF"}  # names in kernels/constants.py
RETURNS = {"best": "RETURN_BEST", "last": "RETURN_LAST", "cost": "RETURN_COST"}


def bind_ends(ws: JointWorkspace) -> tuple[Map, Finish]:
    """The map and the finish on this workspace."""
    plan = _JointPlan(ws)
    return plan.step, _FinishPlan(plan).step


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
        self.squares: list[Callable[..., None]] = []  # launches that measure before the map
        self.map: Callable[..., None]


class _JointPlan:
    """What a solve allocates beside its workspace, once, and its launches."""

    def __init__(self, ws: JointWorkspace) -> None:
        self.ws = ws
        core, options, layout = ws.core, ws.options, ws.core.layout
        self.kernels = load("joint")
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
            self._bind(t, tile)
        assert core.block_norms is not None
        self.norms = bound(self.kernels.norms_kernel, layout.B, 1, BLOCKS=core.block_norms.shape[0], CHUNKS=tile)

    def _bind(self, t: _Tensor, tile: int) -> None:
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

    def here(self) -> Any:
        """A context of launches on the device of the tensors."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def step(self, values: list[Tensor], step_size: float, cost: Tensor | None) -> None:
        """Launch one map."""
        core = self.ws.core
        if not core.layout.B:
            return
        with self.here():
            if step_size != self.rate:
                self.sums.settings[0].fill_(step_size)
                self.rate = step_size
            rows = [
                self.kernels.Tensors(
                    _dense(values[t.index], t.part.leaf), t.v[core.cur], t.mapped[core.cur], t.part.center
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

    def _launch(self, kernel: Callable[..., None], t: _Tensor, tensors: Any) -> None:
        kernel(tensors, self.statistics, self.sums, t.chunks, self.padded)


class _FinishPlan:
    """The launches of the end of a step."""

    def __init__(self, plan: _JointPlan) -> None:
        self.plan, self.ws = plan, plan.ws
        core, record = self.ws.core, self.ws.record
        self.kernels = load("joint_finish")
        assert core.block_norms is not None
        lanes = 128
        self.kept = self.kernels.Kept(
            record.best_cost, record.best_norms, record.saved_cost, record.saved_norms, record.least, record.taken
        )
        self.record = bound(
            self.kernels.record_kernel, math.ceil(core.layout.B / lanes), 4,
            RETURNS=constant(RETURNS[record.returns]), GUARDED=record.safeguard,
            ROWS=2 * core.block_norms.shape[0], BLOCK=lanes,
        )  # fmt: skip
        self.copies = [self._bind(t) for t in plan.tensors if record.kept or t.part.index is None]

    def _bind(self, t: _Tensor) -> Callable[[int, int], None]:
        core, record, leaf = self.ws.core, self.ws.record, t.part.leaf
        extra = self.ws.plain_saved[t.index], None if record.kept is None else record.kept[t.index]
        saved, kept = (None if tensor is None else leaf.rows(tensor) for tensor in extra)
        buffers = [
            self.kernels.Buffers(t.v[cur], t.mapped[cur], t.v[1 - cur], saved, kept) for cur in (0, 1)
        ]
        grid = core.layout.B * t.chunks.own
        launch = bound(self.kernels.copy_kernel, grid, 4, KEEP_BEST=core.keep_best, BLOCK=1024)
        statistics, padded = self.plan.statistics, self.plan.padded
        return lambda cur, made: launch(buffers[cur], statistics, record.taken, t.chunks, padded, made)

    def step(self, cost: Tensor | None, made: int) -> None:
        """Launch the end of one step."""
        core = self.ws.core
        if not core.layout.B:
            return
        with self.plan.here():
            self.record(
                self.plan.statistics, cost, core.block_norms, core.norms, self.kept, core.layout.B, self.plan.padded,
                made, 2 * core.m,
            )  # fmt: skip
            for copy in self.copies:
                copy(core.cur, made)
