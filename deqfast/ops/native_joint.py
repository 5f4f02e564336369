"""The joint map in C++ on CPU tensors and in CUDA on CUDA tensors; see ``native``.

f, p and q are read where they lie, dense, narrower or through strides. On a GPU the launches are not waited for.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import native
from .workspace import Int

if TYPE_CHECKING:
    from .joint import JointWorkspace, Map


def bind_map(ws: JointWorkspace) -> Map:
    """The map on this workspace; the closure keeps the workspace alive for the plan."""
    core, options, C = ws.core, ws.options, native._C
    layout = core.layout
    C.cpu_isa()  # a wrong DEQFAST_CPU_ISA is said here, before f is evaluated
    assert core.block_norms is not None
    plan = C.JointPlan()
    plan.bind(
        B=layout.B,
        dtype=native._code(layout.dtype),
        parts=[
            (
                part.block,
                part.leaf.n,
                *(ws.value(i, which).data_ptr() for which in (0, 1)),
                *(mapped[i].data_ptr() for mapped in ws.mapped),
                0 if part.center is None else part.center.data_ptr(),
            )
            for i, part in enumerate(ws.parts)
        ],
        status=core.int_row(Int.STATUS).data_ptr(),
        block_norms=core.block_norms.data_ptr(),
        n_blocks=core.block_norms.shape[0],
        padded=core.ints.shape[1],
        threads=torch.get_num_threads(),
    )
    ball = {None: C.Ball.none, "l2": C.Ball.l2, "linf": C.Ball.linf}[options.ball]
    plan.method(*options.damping, options.normalize, ball, options.radius, options.low, options.high)
    memory: Tensor | None = None
    if native.EMULATED or layout.device.type == "cuda":
        plan.on_device(layout.device.index or 0)
        memory = torch.zeros(plan.device_bytes(), dtype=torch.uint8, device=layout.device)
        plan.use(memory.data_ptr())
    stream = native._stream_of(layout.device)

    def step(values: list[Tensor], step_size: float) -> None:
        alive = [
            native._place(functools.partial(plan.source, i), t, part.leaf)
            for i, (t, part) in enumerate(zip(values, ws.parts, strict=True))
        ]
        plan.step(core.cur, step_size, 0 if stream is None else stream())
        del alive

    step.memory = memory  # type: ignore[attr-defined]  # as long as the plan
    return step
