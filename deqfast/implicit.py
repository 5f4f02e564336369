"""Gradients through a fixed point: which way, and its options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import adjoint, compiled, transformed, transforms
from .broyden import Broyden
from .choose import choose_solver
from .linear import LinearOptions
from .ops.layout import Layout
from .solution import Solution
from .state import DEFAULT_RTOL, Solver, check_number, check_stopping

_MODES = "an Implicit, Phantom, OneStep or Unroll, None for Implicit(), or 'none' for no gradient"


@dataclass
class Problem:
    """One call of ``fixed_point``, as the loop and the gradients see it."""

    f: Callable[..., Any]
    args: tuple[Any, ...]
    layout: Layout
    solver: Solver
    rtol: float
    max_iter: int
    backend: str
    transformed: bool = False  # a torch.func transform or a forward-mode level surrounds the call
    mode: str = "loop"
    copy_z: bool = False  # f writes into the z that it is given

    @property
    def differentiated(self) -> bool:
        """Whether somebody may ask for a derivative."""
        return torch.is_grad_enabled() or (self.transformed and transforms.forward_mode())


class Gradient:
    """How gradients of a solution are made: an immutable value, shared freely between solves and threads."""

    solves = False  # True: ``solve`` replaces the whole solve, else ``attach`` follows it

    def attach(self, problem: Problem, z: Any) -> Any:
        """The solution ``z``, with its gradient."""
        raise NotImplementedError

    def solve(
        self,
        problem: Problem,
        z0: Any,
        *,
        atol: float,
        returns: str,
        compact: Any,
        trace: bool,
        callback: Any,
        throw: bool,
        progress: bool,
    ) -> Solution:
        """The whole ``Solution``, with its gradient."""
        raise NotImplementedError


@dataclass(frozen=True)
class Implicit(Gradient):
    """Gradients by the implicit function theorem: the backward solves u = J^T u + g with a solver of its own.

    The memory is that of one evaluation of f, whatever the solver did; the cost is one more evaluation in forward (not
    counted in ``nfe``) and one vjp an iteration in backward. Gradients are those of the solution, so they are as good
    as both solves: a forward that stopped early, or a backward that did, gives approximate ones, the second with a
    ``GradientWarning``. Differentiable twice. Works in torch.func.grad, vjp and jvp and in forward mode, where the
    tangent solves v = J v + t.

    Args:
        solver: of the backward solve; default that of the forward solve (Broyden with ``scale="first_step"``).
        rtol: relative tolerance per sample, so that the scale of the loss does not matter; default that of the forward
            solve, under autocast at least the default of its dtype (2e-2 for bfloat16, 4e-3 for float16).
        max_iter: vjps at most; default that of the forward solve.
        u0: start of the backward solve, shaped like z; default the incoming gradient. A good one saves iterations: the
            adjoint of a similar problem, for example.

    Source: Bai, Kolter and Koltun, Deep Equilibrium Models, NeurIPS 2019.
    """

    solver: str | Solver | None = None
    rtol: float | None = None
    max_iter: int | None = None
    u0: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.solver is not None:
            choose_solver(self.solver)
        check_stopping(self.rtol, 0.0, self.max_iter, torch.float32)

    def attach(self, problem: Problem, z: Any) -> Any:
        """``z`` as a fresh tensor whose backward solves for its gradient."""
        layout = problem.layout
        leaves = [z] if layout.single else pytree.tree_leaves(z)
        options = self._options(problem)
        if problem.transformed:
            return layout.unflatten(transformed.attach(problem.f, problem.args, layout, leaves, options))
        f = compiled.eager(problem.f)
        return layout.unflatten(adjoint.attach(f, problem.args, layout, leaves, options, copy_z=problem.copy_z))

    def _options(self, problem: Problem) -> LinearOptions:
        solver = problem.solver if self.solver is None else choose_solver(self.solver)
        if self.solver is None and isinstance(solver, Broyden) and solver.scale == "unit":
            solver = replace(solver, scale="first_step")
        rtol = problem.rtol if self.rtol is None else self.rtol
        device = problem.layout.device.type
        if self.rtol is None and torch.is_autocast_enabled(device):
            rtol = max(rtol, DEFAULT_RTOL[torch.get_autocast_dtype(device)])
        max_iter = problem.max_iter if self.max_iter is None else self.max_iter
        return LinearOptions(solver, rtol, max_iter, problem.backend, self.u0, problem.mode)


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
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise TypeError(f"steps must be an int, got {type(self.steps).__name__}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        check_number("damping", self.damping)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be in (0, 1], got {self.damping}")

    def attach(self, problem: Problem, z: Any) -> Any:
        """The iterate after the applications, with their graph."""
        layout = problem.layout
        z = layout.unflatten([t.detach() for t in pytree.tree_leaves(z)])
        for _ in range(self.steps):
            given = pytree.tree_map(torch.clone, z) if problem.copy_z else z
            fz = layout.flatten(problem.f(given, *problem.args), "f(z)")
            z = layout.unflatten([self._mix(a, b) for a, b in zip(pytree.tree_leaves(z), fz, strict=True)])
        return z

    def _mix(self, z: Tensor, fz: Tensor) -> Tensor:
        fz = fz.to(z.dtype)
        return fz if self.damping == 1 else z + self.damping * (fz - z)


@dataclass(frozen=True)
class OneStep(Gradient):
    """Gradients of one application of f at the solution: ``Phantom(steps=1)``.

    Ignores how the solution reacts to itself (J = 0 in the implicit formula); nearly free. Source: Fung et al., JFB:
    Jacobian-Free Backpropagation for Implicit Networks, AAAI 2022.
    """

    def attach(self, problem: Problem, z: Any) -> Any:
        """f(z), with its graph."""
        return Phantom(steps=1).attach(problem, z)


def choose_gradient(backward: Any) -> Gradient | None:
    """The way that ``backward`` asks for; None: no gradient.

    Raises:
        ValueError, TypeError: neither a known name nor gradient options.
    """
    if backward is None:
        return Implicit()
    if isinstance(backward, Gradient):
        return backward
    if isinstance(backward, str):
        if backward == "none":
            return None
        raise ValueError(f"backward must be {_MODES}, got {backward!r}")
    got = f"the class {backward.__name__}" if isinstance(backward, type) else type(backward).__name__
    raise TypeError(f"backward must be {_MODES}, got {got}")
