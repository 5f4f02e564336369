"""Backends in plain torch: "reference", the oracle of every test."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..anderson import AndersonWorkspace
from ..broyden import BroydenWorkspace
from ..contract import Backend, Binder, JointEnds, register
from ..joint import JointWorkspace
from ..workspace import Workspace
from . import reference
from .joint import PlainEnds


class Reference(Backend):
    """Plain torch with sums in a fixed order."""

    name = "reference"
    own_residual = True
    steps: Mapping[type[Workspace], Binder] = {
        AndersonWorkspace: reference.AndersonStep,
        BroydenWorkspace: reference.BroydenStep,
    }

    def why_not(self, device: torch.device) -> str | None:
        """It serves everywhere."""
        return None

    def joint(self, ws: JointWorkspace) -> JointEnds:
        """The ends of a joint step."""
        return PlainEnds(ws)


register(Reference())
