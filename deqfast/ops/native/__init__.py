"""C++ kernels on CPU tensors and CUDA kernels on CUDA tensors, by the extension module."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..anderson import AndersonWorkspace
from ..broyden import BroydenWorkspace
from ..contract import Backend, Binder, JointEnds, register
from ..joint import JointWorkspace
from ..workspace import Workspace
from .extension import why_not
from .joint import NativeEnds
from .plan import NativeStep


class Native(Backend):
    """The kernels of ``deqfast._C``."""

    name = "native"
    steps: Mapping[type[Workspace], Binder] = {AndersonWorkspace: NativeStep, BroydenWorkspace: NativeStep}

    def why_not(self, device: torch.device) -> str | None:
        """Whether the module was built, and for this device."""
        return why_not(device)

    def joint(self, ws: JointWorkspace) -> JointEnds:
        """The ends of a joint step."""
        return NativeEnds(ws)


register(Native())
