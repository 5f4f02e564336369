"""Gradients of a few applications of f from the solution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..naming import named
from ..options import check_fraction, check_int
from ..problem import Problem
from .base import Gradient


@named()
@dataclass(frozen=True)
class Phantom(Gradient):
    """Gradients of K damped applications of f from the solution, by ordinary autograd; returns the last iterate.

    Args:
        steps: K, at least 1. The memory and the backward cost are those of K evaluations of f.
        damping: in (0, 1]: z + damping (f(z) - z).

    Approximate on purpose: the Neumann series of the implicit gradient, cut after K terms. It costs less, and helps
    training when f is far from a contraction. Source: Geng et al., On Training Implicit Models, NeurIPS 2021.
    """

    steps: int = 5
    damping: float = 1.0

    def __post_init__(self) -> None:
        check_int("steps", self.steps)
        check_fraction("damping", self.damping)

    def attach(self, problem: Problem, z: Any) -> Any:
        """The iterate after the applications, with their graph."""
        layout = problem.layout
        leaves = [t.detach() for t in layout.tensors(z)]
        for _ in range(self.steps):
            given = layout.unflatten([t.clone() for t in leaves] if problem.copy_z else leaves)
            fz = layout.flatten(problem.f(given, *problem.args), "f(z)")
            leaves = [self._mix(a, b) for a, b in zip(leaves, fz, strict=True)]
        return layout.unflatten(leaves)

    def _mix(self, z: Tensor, fz: Tensor) -> Tensor:
        fz = fz.to(z.dtype)
        return fz if self.damping == 1 else z + self.damping * (fz - z)


@named()
@dataclass(frozen=True)
class OneStep(Gradient):
    """Gradients of one application of f at the solution: ``Phantom(steps=1)``.

    Ignores how the solution reacts to itself (J = 0 in the implicit formula); nearly free. Source: Fung et al., JFB:
    Jacobian-Free Backpropagation for Implicit Networks, AAAI 2022.
    """

    def attach(self, problem: Problem, z: Any) -> Any:
        """f(z), with its graph."""
        return Phantom(steps=1).attach(problem, z)
