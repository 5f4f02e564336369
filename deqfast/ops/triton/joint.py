"""The joint map and the finish by the Triton kernels; see ``triton``."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from typing import Any

import torch
from torch import Tensor

from ..contract import JointEnds
from ..joint import JointWorkspace, Part
from .plan import COMPILER, _dense

INPUT = 2  # x's block
BALLS = {None: 0, "l2": 1, "linf": 2}
RETURNS = {"best": 0, "last": 1, "cost": 2}


class TritonEnds(JointEnds):
    """The map and the finish on this workspace."""

    def __init__(self, ws: JointWorkspace) -> None:
        super().__init__(ws)
        self._map = _JointPlan(ws)
        self._finish = _FinishPlan(self._map)

    def map(self, values: list[Tensor], step_size: float, cost: Tensor | None) -> None:
        """Launch one map."""
        self._map.step(values, step_size, cost)

    def finish(self, cost: Tensor | None, made: int) -> None:
        """Launch the end of one step."""
        self._finish.step(cost, made)


class _Tensor:
    """A tensor of the state with numbers in it: its rows in every buffer, and its launches."""

    def __init__(self, ws: JointWorkspace, index: int, first_chunk: int, chunk: int) -> None:
        self.index = index
        self.part: Part = ws.parts[index]
        self.n = self.part.leaf.n
        self.first_chunk, self.chunks = first_chunk, math.ceil(self.n / chunk)
        self.v = tuple(self.part.leaf.rows(ws.value(index, which)) for which in (0, 1))
        self.mapped = tuple(self.part.leaf.rows(buffer[index]) for buffer in ws.mapped)
        self.squares: list[Any] = []  # launches that measure before the map
        self.map: Any = None


class _JointPlan:
    """What a solve allocates beside its workspace, once, and its launches."""

    def __init__(self, ws: JointWorkspace) -> None:
        self.ws = ws
        core, options, layout = ws.core, ws.options, ws.core.layout
        shapes: Any = importlib.import_module("deqfast.kernels.shapes")
        self.kernels: Any = importlib.import_module("deqfast.kernels.joint")
        self.device = layout.device
        numbers = [1.0, *options.damping, options.radius, options.low, options.high]
        self.settings = torch.empty(len(numbers), dtype=torch.float64, device=self.device)
        for setting, value in zip(self.settings.unbind(), numbers, strict=True):
            setting.fill_(value)  # a copy of host memory would wait for the device
        self.rate = 1.0
        self.chunk = shapes.chunk_size([part.leaf.n for part in ws.parts])
        self.tensors: list[_Tensor] = []
        self.first = [0, 0, 0]  # chunk that each block begins with
        chunks = 0
        for i, part in enumerate(ws.parts):
            if part.leaf.n:
                self.tensors.append(_Tensor(ws, i, chunks, self.chunk))
                chunks += self.tensors[-1].chunks
            for block in range(part.block + 1, 3):
                self.first[block] = chunks
        self.chunks = chunks
        self.partials = torch.zeros(layout.B, 4, chunks, dtype=torch.float64, device=self.device)
        chunk_tile = {"CHUNKS": shapes.chunk_tile(chunks, 1)}
        for t in self.tensors:
            self._bind(t, chunk_tile)
        assert core.block_norms is not None
        self.norms = functools.partial(
            self.kernels.norms_kernel[(layout.B,)],
            BLOCKS=core.block_norms.shape[0], **chunk_tile, num_warps=1, **COMPILER,
        )  # fmt: skip

    def _bind(self, t: _Tensor, chunk_tile: dict[str, int]) -> None:
        options, layout = self.ws.options, self.ws.core.layout
        grid = (layout.B * t.chunks,)
        shared = {
            "DOUBLE": layout.acc == torch.float64,
            "NORMALIZE": options.normalize,
            "CENTERED": t.part.center is not None,
            **chunk_tile, "BLOCK": 1024, "num_warps": 4, **COMPILER,
        }  # fmt: skip
        inputs = t.part.block == INPUT
        if inputs:
            wanted = [False] * options.normalize + [True] * (options.ball == "l2")
            kernel = self.kernels.square_kernel[grid]
            t.squares = [functools.partial(kernel, **shared, AWAY=away) for away in wanted]
        t.map = functools.partial(
            self.kernels.map_kernel[grid], **shared,
            BLOCK_OF=t.part.block, BALL=BALLS[options.ball] if inputs else 0,
            BOXED=inputs and (options.low > -math.inf or options.high < math.inf),
            DAMPED=not inputs and options.damping[t.part.block] != 1,
        )  # fmt: skip

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
                self.settings[0].fill_(step_size)
                self.rate = step_size
            rows = [_dense(values[t.index], t.part.leaf) for t in self.tensors]
            for phase in range(max((len(t.squares) for t in self.tensors), default=0)):
                for t, value in zip(self.tensors, rows, strict=True):
                    if t.squares:
                        self._launch(t.squares[phase], t, value)
            for t, value in zip(self.tensors, rows, strict=True):
                self._launch(t.map, t, value, t.mapped[self.ws.core.cur])
            self.norms(
                core.block_norms, core.ints, self.partials, core.block_norms if cost is None else cost, self.first[1],
                self.first[2], self.chunks, core.ints.shape[1], WITH_COST=cost is not None,
            )  # fmt: skip

    def _launch(self, kernel: Any, t: _Tensor, value: Tensor, *target: Tensor) -> None:
        core = self.ws.core
        center = self.settings if t.part.center is None else t.part.center
        kernel(
            value, t.v[core.cur], *target, center, core.ints, self.settings, self.partials, t.n, t.first_chunk,
            t.chunks, self.chunks, self.chunk, self.first[INPUT], core.ints.shape[1],
        )  # fmt: skip


class _FinishPlan:
    """The launches of the end of a step."""

    def __init__(self, plan: _JointPlan) -> None:
        self.plan, self.ws = plan, plan.ws
        core, record = self.ws.core, self.ws.record
        kernels: Any = importlib.import_module("deqfast.kernels.joint_finish")
        assert core.block_norms is not None
        B, block = core.layout.B, 128
        # What is not there is not read: any tensor of its dtype will do.
        saved = [record.best_cost if record.saved_cost is None else record.saved_cost]
        saved += [record.best_norms if record.saved_norms is None else record.saved_norms]
        launch = functools.partial(
            kernels.record_kernel[(math.ceil(B / block),)],
            RETURNS=RETURNS[record.returns], GUARDED=record.safeguard,
            ROWS=2 * core.block_norms.shape[0], BLOCK=block, num_warps=4, **COMPILER,
        )  # fmt: skip
        self.record = lambda cost, made: launch(
            core.ints, core.reals, record.best_cost if cost is None else cost, record.best_cost, saved[0],
            core.block_norms, record.best_norms, saved[1], record.least, core.norms, record.taken, B,
            core.ints.shape[1], made, 2 * core.method.m, WITH_COST=cost is not None,
        )  # fmt: skip
        self.copies = [self._bind(kernels, t) for t in plan.tensors if record.kept or t.part.index is None]

    def _bind(self, kernels: Any, t: _Tensor) -> Any:
        core, record = self.ws.core, self.ws.record
        saved, kept = self.ws.plain_saved[t.index], None if record.kept is None else record.kept[t.index]
        rows = [t.v[0] if tensor is None else t.part.leaf.rows(tensor) for tensor in (saved, kept)]
        launch = functools.partial(
            kernels.copy_kernel[(core.layout.B * t.chunks,)],
            MOVES=t.part.index is None, KEPT=kept is not None, KEEP_BEST=core.stopping.keep_best,
            BLOCK=1024, num_warps=4, **COMPILER,
        )  # fmt: skip
        return lambda cur, made: launch(
            t.v[cur], t.mapped[cur], t.v[1 - cur], *rows, core.ints, record.taken, t.n, t.chunks, self.plan.chunk,
            core.ints.shape[1], made,
        )  # fmt: skip

    def step(self, cost: Tensor | None, made: int) -> None:
        """Launch the end of one step."""
        if not self.ws.core.layout.B:
            return
        with self.plan.here():
            self.record(cost, made)
            for copy in self.copies:
                copy(self.ws.core.cur, made)
