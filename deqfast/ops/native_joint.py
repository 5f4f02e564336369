"""The joint map and the finish in C++ on CPU tensors and in CUDA on CUDA tensors; see ``native``.

f, p and q are read where they lie, dense, narrower or through strides. On a GPU the launches are not waited for.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import native

if TYPE_CHECKING:
    from .joint import Finish, JointWorkspace, Map


def bind_ends(ws: JointWorkspace) -> tuple[Map, Finish]:
    """The map and the finish on this workspace; the closures keep it alive for the plan."""
    core, options, record, C = ws.core, ws.options, ws.record, native._C
    layout = core.layout
    C.cpu_isa()  # a wrong DEQFAST_CPU_ISA is said here, before f is evaluated
    assert core.block_norms is not None
    plan = C.JointPlan()
    plan.bind(
        B=layout.B,
        dtype=native.CODES[layout.dtype],
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
    ball = {None: C.Ball.none, "l2": C.Ball.l2, "linf": C.Ball.linf}[options.ball]
    plan.method(*options.damping, options.normalize, ball, options.radius, options.low, options.high)
    plan.record(
        returns=getattr(C.Returns, record.returns),
        safeguard=record.safeguard,
        keep_best=core.keep_best,
        best_cost=record.best_cost.data_ptr(),
        best_norms=record.best_norms.data_ptr(),
        saved_cost=_address(record.saved_cost),
        saved_norms=_address(record.saved_norms),
        least=record.least.data_ptr(),
        taken=record.taken.data_ptr(),
        column_norms=core.norms.data_ptr(),
        columns=2 * core.m,
    )
    memory: Tensor | None = None
    if native.EMULATED or layout.device.type == "cuda":
        plan.on_device(layout.device.index or 0)
        memory = torch.zeros(plan.device_bytes(), dtype=torch.uint8, device=layout.device)
        plan.use(memory.data_ptr())
    stream = native._stream_of(layout.device)

    def now() -> int:
        return 0 if stream is None else stream()

    def to_mapped(values: list[Tensor], step_size: float, cost: Tensor | None) -> None:
        alive = [
            native._place(functools.partial(plan.source, i), t, part.leaf)
            for i, (t, part) in enumerate(zip(values, ws.parts, strict=True))
        ]
        plan.step(core.cur, step_size, _address(cost), now())
        del alive

    def finish(cost: Tensor | None, made: int) -> None:
        plan.finish(core.cur, made, _address(cost), now())

    to_mapped.alive = finish.alive = memory, ws  # type: ignore[attr-defined]  # as long as the plan
    return to_mapped, finish


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
