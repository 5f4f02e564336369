"""The whole step of a joint solve: the map, the accelerated step, the finish."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .codes import BLOCKS
from .contract import Backend
from .joint import JointWorkspace, measure_block

Project = Callable[[list[Tensor]], list[Tensor]]


class JointStep:
    """One joint solve's step on a backend; flips ``core.cur``.

    ``project``: a projection of the caller's own, of the mapped x's tensors; without the projection of ``options``.
    """

    def __init__(self, ws: JointWorkspace, backend: Backend, project: Project | None = None) -> None:
        self.ws, self.project = ws, project
        self.ends, self.bound = backend.joint(ws), backend.bind(ws.core)
        self.inputs = [i for i, part in enumerate(ws.parts) if BLOCKS[part.block] == "x"]
        self.accelerated = tuple(ws.accelerated(mapped) for mapped in ws.mapped)
        self.made = 0

    def __call__(self, values: list[Tensor], step_size: float, cost: Tensor | None = None) -> int:
        """One step; how many samples still run.

        Args:
            values: f, p and q as one list in the order of the workspace's parts.
            step_size: a_x.
            cost: (B,), if there is one; a sample stops where it is no number.
        """
        core = self.ws.core
        if core.layout.B == 0:
            return 0
        cost = None if cost is None else cost.resolve_neg().contiguous()  # kernels read its memory
        with torch.no_grad():
            self.ends.map(values, step_size, cost)
            if self.project is not None:
                mapped = self.ws.mapped[core.cur]
                for i, t in zip(self.inputs, self.project([mapped[i] for i in self.inputs]), strict=True):
                    mapped[i].copy_(t)
                measure_block(self.ws, self.inputs)
            previous = self.accelerated[1 - core.cur] if self.made else None
            running = self.bound(self.accelerated[core.cur], previous, None, None)
            self.made += 1
            self.ends.finish(cost, self.made)
        core.cur ^= 1
        return running
