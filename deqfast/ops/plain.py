"""Backends in plain torch: "reference", the oracle of every test."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import reference
from .anderson import AndersonWorkspace
from .broyden import BroydenWorkspace
from .contract import Backend, Binder, BoundStep, JointEnds, Leaves, Rows, register
from .joint import JointWorkspace, joint_map
from .joint_finish import joint_finish
from .workspace import Workspace


class _Step(BoundStep):
    def __init__(self, ws: Workspace, evaluations: int) -> None:
        super().__init__(ws)
        self._device = ws.layout.device.type


class AndersonStep(_Step):
    """The oracle of Anderson's step."""

    ws: AndersonWorkspace

    def __call__(self, f: Leaves, f_prev: Leaves | None, f_rows: Rows, f_prev_rows: Rows) -> int:
        """One update."""
        with torch.no_grad(), torch.autocast(self._device, enabled=False):
            return reference.anderson_step(self.ws, f, f_prev, f_rows, f_prev_rows)


class BroydenStep(_Step):
    """The oracle of Broyden's step."""

    ws: BroydenWorkspace

    def __call__(self, f: Leaves, f_prev: Leaves | None, f_rows: Rows, f_prev_rows: Rows) -> int:
        """One update."""
        with torch.no_grad(), torch.autocast(self._device, enabled=False):
            return reference.broyden_step(self.ws, f, f_rows)


class PlainEnds(JointEnds):
    """The oracle of the joint map and the finish."""

    def map(self, values: Leaves, step_size: float, cost: Tensor | None) -> None:
        """The map."""
        joint_map(self.ws, values, step_size, cost)

    def finish(self, cost: Tensor | None, made: int) -> None:
        """The end of a step."""
        joint_finish(self.ws, cost, made)


class Reference(Backend):
    """Plain torch with sums in a fixed order."""

    name = "reference"
    own_residual = True
    steps: Mapping[type[Workspace], Binder] = {AndersonWorkspace: AndersonStep, BroydenWorkspace: BroydenStep}

    def why_not(self, device: torch.device) -> str | None:
        """It serves everywhere."""
        return None

    def joint(self, ws: JointWorkspace) -> JointEnds:
        """The ends of a joint step."""
        return PlainEnds(ws)


register(Reference())
