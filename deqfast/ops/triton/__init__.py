"""Triton kernels, for GPUs without native kernels, and for CPU tensors in tests."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..anderson import AndersonWorkspace
from ..broyden import BroydenWorkspace
from ..contract import Backend, Binder, JointEnds, register
from ..joint import JointWorkspace
from ..workspace import Workspace
from .joint import TritonEnds
from .plan import anderson_step, broyden_step, why_not


class Triton(Backend):
    """The kernels of ``deqfast.kernels``."""

    name = "triton"
    steps: Mapping[type[Workspace], Binder] = {AndersonWorkspace: anderson_step, BroydenWorkspace: broyden_step}

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
