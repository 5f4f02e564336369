"""The joint map and the finish in C++ on CPU tensors and in CUDA on CUDA tensors.

f, p and q are read where they lie, dense, narrower or through strides. On a GPU the launches are not waited for.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import JointEnds, Leaves
from ..joint import JointWorkspace
from .extension import _C, CODES, EMULATED, array, stream_of
from .source import place


class NativeEnds(JointEnds):
    """The ends of a joint step on this workspace."""

    def __init__(self, ws: JointWorkspace) -> None:
        super().__init__(ws)
        core, record, parts = ws.core, ws.record, ws.parts
        layout = core.layout
        _C.cpu_isa()  # a wrong DEQFAST_CPU_ISA is said here, before f is evaluated
        assert core.block_norms is not None
        self.plan = _C.JointPlan(
            B=layout.B,
            dtype=CODES[layout.dtype],
            tensors=_C.JointTensors(
                block=[part.block for part in parts],
                numbers=[part.leaf.n for part in parts],
                x=[array(ws.value(i, 0)) for i in range(len(parts))],
                x_next=[array(ws.value(i, 1)) for i in range(len(parts))],
                mapped=[array(t) for t in ws.mapped[0]],
                mapped_next=[array(t) for t in ws.mapped[1]],
                center=[_perhaps(part.center) for part in parts],
                saved=[_perhaps(t) for t in ws.plain_saved],
                kept=[_perhaps(None if record.kept is None else record.kept[i]) for i in range(len(parts))],
            ),
            ints=array(core.ints),
            reals=array(core.reals),
            block_norms=array(core.block_norms),
            n_blocks=core.block_norms.shape[0],
            threads=torch.get_num_threads(),
            numbers=self._numbers(),
            record=_C.JointRecord(
                returns=_RETURNS[record.returns],
                safeguard=record.safeguard,
                keep_best=core.stopping.keep_best,
                best_cost=array(record.best_cost),
                best_norms=array(record.best_norms),
                saved_cost=_perhaps(record.saved_cost),
                saved_norms=_perhaps(record.saved_norms),
                least=array(record.least),
                taken=array(record.taken),
                column_norms=array(core.norms),
                columns=2 * core.method.m,
            ),
            device=(layout.device.index or 0) if EMULATED or layout.device.type == "cuda" else -1,
            allocate=self._allocate,
        )
        self._stream = stream_of(layout.device)

    def _numbers(self) -> JointNumbers:
        o = self.ws.options
        return JointNumbers(*o.damping, o.normalize, _BALLS[o.ball], o.radius, o.low, o.high)

    def _allocate(self, size: int) -> int:
        self._memory = torch.zeros(size, dtype=torch.uint8, device=self.ws.core.layout.device)
        return self._memory.data_ptr()

    def _now(self) -> int:
        return 0 if self._stream is None else self._stream()

    def map(self, values: Leaves, step_size: float, cost: Tensor | None) -> None:
        """The map."""
        alive = [
            place(functools.partial(self.plan.source, i), t, part.leaf)
            for i, (t, part) in enumerate(zip(values, self.ws.parts, strict=True))
        ]
        self.plan.step(cur=self.ws.core.cur, step_size=step_size, cost=_address(cost), stream=self._now())
        del alive

    def finish(self, cost: Tensor | None, made: int) -> None:
        """The end of a step."""
        self.plan.finish(cur=self.ws.core.cur, made=made, cost=_address(cost), stream=self._now())


class JointNumbers(NamedTuple):
    """The joint map's own numbers, field by field as in csrc/bindings/joint_plan.h."""

    damping_z: float
    damping_mu: float
    normalize: bool
    ball: int
    radius: float
    low: float
    high: float


_BALLS = {None: 0, "l2": 1, "linf": 2}
_RETURNS = {} if _C is None else {name: _C.Returns.__members__[name] for name in ("best", "last", "cost")}


def _perhaps(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else array(t)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
