"""What a joint solve returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..status import Status


@dataclass
class JointSolution:
    """Outcome of ``joint_solve`` for a batch of B samples.

    Attributes:
        z, x, mu: equilibrium, optimised input (feasible) and adjoint, structured like z0, x0 and z0.
        cost: (B,) loss at the returned (z, x), before the last projection of x; a number, without a gradient: call the
            loss on z and x for one.
        residual: (B,) of "z", "mu" and "x", each relative to the size of its block, of exactly this iterate. That of x
            is the length of its step.
        converged, steps, status: (B,) as in ``Solution``; a sample converges when every block is within its tolerance.
        nfe: evaluations of f and loss, with one backward pass each.
        trace: (nfe, B) residuals by block if asked for, NaN once a sample has stopped; else None.
        backend: the backend that ran the updates.
    """

    z: Any
    x: Any
    mu: Any
    cost: Tensor
    residual: dict[str, Tensor]
    converged: Tensor
    steps: Tensor
    status: Tensor
    nfe: int
    trace: dict[str, Tensor] | None
    backend: str

    def summary(self) -> str:
        """One line: how many samples ended how, evaluations, mean cost."""
        counts = torch.bincount(self.status.flatten().long().cpu(), minlength=len(Status)).tolist()
        parts = [f"{n} {Status(i).name.lower()}" for i, n in enumerate(counts) if n]
        cost = float(self.cost.mean()) if self.cost.numel() else 0.0
        return f"{', '.join(parts) or 'no samples'}; {self.nfe} evaluations, mean cost {cost:.4g}"
