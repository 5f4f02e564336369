"""Backends in plain torch: "torch", for any device, and "reference", the oracle of every test.

Both call the formulas of ``formulas/``. "torch" makes few operations and asks for little; "reference" adds up in an
order that depends on N alone and serves those who name it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..anderson import AndersonWorkspace
from ..broyden import BroydenWorkspace
from ..contract import Backend, Binder, BoundStep, JointEnds, register
from ..hosted import HostedWorkspace
from ..joint import JointWorkspace
from ..workspace import Workspace
from . import portable_broyden, reference, streamed
from .joint import PlainEnds


class Torch(Backend):
    """Plain torch in few operations, with sums as matrix products."""

    name = "torch"
    counts_on_host = True
    pads = True
    steps: Mapping[type[Workspace], Binder] = {
        AndersonWorkspace: streamed.step_of,
        HostedWorkspace: streamed.StreamedStep,
        BroydenWorkspace: portable_broyden.BroydenStep,
    }

    def why_not(self, device: torch.device) -> str | None:
        """It serves everywhere."""
        return None

    def takes_residual(self, ws: Workspace) -> bool:
        """Always."""
        return True

    def bind(self, ws: Workspace, evaluations: int = 0) -> BoundStep:
        """The update of this workspace's solver, after so many evaluations."""
        with torch.inference_mode(False):
            return super().bind(ws, evaluations)

    def joint(self, ws: JointWorkspace) -> JointEnds:
        """The ends of a joint step."""
        return PlainEnds(ws)


class Reference(Backend):
    """Plain torch with sums in a fixed order."""

    name = "reference"
    counts_on_host = True
    steps: Mapping[type[Workspace], Binder] = {
        AndersonWorkspace: reference.AndersonStep,
        BroydenWorkspace: reference.BroydenStep,
    }

    def why_not(self, device: torch.device) -> str | None:
        """It serves everywhere."""
        return None

    def takes_residual(self, ws: Workspace) -> bool:
        """Always."""
        return True

    def automatic(self, device: torch.device) -> bool:
        """For tests alone."""
        return False

    def joint(self, ws: JointWorkspace) -> JointEnds:
        """The ends of a joint step."""
        return PlainEnds(ws)


register(Torch())
register(Reference())
