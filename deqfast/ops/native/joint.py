"""The joint map and the finish in C++ on CPU tensors and in CUDA on CUDA tensors.

f, p and q are read where they lie, dense, narrower or through strides. On a GPU the launches are not waited for.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..contract import JointEnds, Leaves
from ..joint import JointWorkspace
from .extension import _C, CODES, EMULATED, stream_of
from .source import place


class NativeEnds(JointEnds):
    """The ends of a joint step on this workspace."""

    def __init__(self, ws: JointWorkspace) -> None:
        super().__init__(ws)
        core, options, record = ws.core, ws.options, ws.record
        layout = core.layout
        _C.cpu_isa()  # a wrong DEQFAST_CPU_ISA is said here, before f is evaluated
        assert core.block_norms is not None
        self.plan = plan = _C.JointPlan()
        plan.bind(
            B=layout.B,
            dtype=CODES[layout.dtype],
            parts=[
                (
                    part.block,
                    part.leaf.n,
                    *(ws.value(i, which).data_ptr() for which in (0, 1)),
                    *(mapped[i].data_ptr() for mapped in ws.mapped),
                    _address(part.center),
                    _address(ws.plain_saved[i]),
                    _address(None if record.kept is None else record.kept[i]),
                )
                for i, part in enumerate(ws.parts)
            ],
            ints=core.ints.data_ptr(),
            reals=core.reals.data_ptr(),
            block_norms=core.block_norms.data_ptr(),
            n_blocks=core.block_norms.shape[0],
            padded=core.ints.shape[1],
            threads=torch.get_num_threads(),
        )
        ball = {None: _C.Ball.none, "l2": _C.Ball.l2, "linf": _C.Ball.linf}[options.ball]
        plan.method(*options.damping, options.normalize, ball, options.radius, options.low, options.high)
        plan.record(
            returns=getattr(_C.Returns, record.returns),
            safeguard=record.safeguard,
            keep_best=core.stopping.keep_best,
            best_cost=record.best_cost.data_ptr(),
            best_norms=record.best_norms.data_ptr(),
            saved_cost=_address(record.saved_cost),
            saved_norms=_address(record.saved_norms),
            least=record.least.data_ptr(),
            taken=record.taken.data_ptr(),
            column_norms=core.norms.data_ptr(),
            columns=2 * core.method.m,
        )
        if EMULATED or layout.device.type == "cuda":
            plan.on_device(layout.device.index or 0)
            self._memory = torch.zeros(plan.device_bytes(), dtype=torch.uint8, device=layout.device)
            plan.use(self._memory.data_ptr())
        self._stream = stream_of(layout.device)

    def _now(self) -> int:
        return 0 if self._stream is None else self._stream()

    def map(self, values: Leaves, step_size: float, cost: Tensor | None) -> None:
        """The map."""
        alive = [
            place(functools.partial(self.plan.source, i), t, part.leaf)
            for i, (t, part) in enumerate(zip(values, self.ws.parts, strict=True))
        ]
        self.plan.step(self.ws.core.cur, step_size, _address(cost), self._now())
        del alive

    def finish(self, cost: Tensor | None, made: int) -> None:
        """The end of a step."""
        self.plan.finish(self.ws.core.cur, made, _address(cost), self._now())


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
