"""Triton kernels, for GPUs without native kernels, and for CPU tensors in tests."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..anderson import AndersonWorkspace
from ..broyden import BroydenWorkspace
from ..contract import Backend, Binder, JointEnds, register
from ..joint import JointWorkspace
from ..workspace import Workspace
from .anderson import AndersonStep
from .available import why_not
from .broyden import BroydenStep
from .joint import TritonEnds


class Triton(Backend):
    """The kernels of ``deqfast.kernels``."""

    name = "triton"
    steps: Mapping[type[Workspace], Binder] = {AndersonWorkspace: AndersonStep, BroydenWorkspace: BroydenStep}

    def why_not(self, device: torch.device) -> str | None:
        """Whether Triton is there, and for this device."""
        return why_not(device)

    def automatic(self, device: torch.device) -> bool:
        """Not on a CPU: its interpreter is for tests."""
        return device.type != "cpu"

    def joint(self, ws: JointWorkspace) -> JointEnds:
        """The ends of a joint step."""
        return TritonEnds(ws)


register(Triton())
