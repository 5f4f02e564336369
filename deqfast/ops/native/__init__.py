"""C++ kernels on CPU tensors and CUDA kernels on CUDA tensors, by the extension module."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..anderson import AndersonWorkspace
from ..broyden import BroydenWorkspace
from ..contract import Backend, Binder, BoundStep, JointEnds, register
from ..joint import JointWorkspace
from ..ranks import Ranks
from ..workspace import Workspace
from .extension import EMULATED, why_not
from .joint import NativeEnds
from .plan import NativeStep
from .spread import SpreadStep


class Native(Backend):
    """The kernels of ``deqfast._C``."""

    name = "native"
    steps: Mapping[type[Workspace], Binder] = {AndersonWorkspace: NativeStep, BroydenWorkspace: NativeStep}

    def why_not(self, device: torch.device) -> str | None:
        """Whether the module was built, and for this device."""
        return why_not(device)

    def takes_residual(self, ws: Workspace) -> bool:
        """On a CPU, of samples whose small matrices are kept: all but the smallest."""
        kept = isinstance(ws, AndersonWorkspace) and ws.keeps_products
        return kept and ws.layout.device.type == "cpu" and not EMULATED

    def spread(self, ws: Workspace, ranks: Ranks) -> BoundStep:
        """On a CPU."""
        if ws.layout.device.type != "cpu" or EMULATED:
            raise ValueError(f"group: samples on {ws.layout.device} cannot be spread over ranks, those of a CPU can")
        return SpreadStep(ws, ranks)

    def joint(self, ws: JointWorkspace) -> JointEnds:
        """The ends of a joint step."""
        return NativeEnds(ws)


register(Native())
