"""Gradients through a joint solve: the envelope, and the implicit function theorem on the joint map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import compiled
from ..gradients import adjoint
from ..gradients.implicit import Implicit
from ..gradients.linear import LinearOptions
from ..naming import named
from ..ops.layout import Layout
from ..ops.workspace import Stopping
from ..options import DEFAULT_RTOL, stopping
from ..solvers.anderson import Anderson
from ..solvers.base import Solver
from ..solvers.choose import choose_solver
from .problem import Problem, gradients
from .solution import JointSolution


@named()
@dataclass(frozen=True)
class Envelope:
    """Gradients of a joint solve at a fixed x: those of an outer loss that is the inner one.

    At the optimal x the inner loss does not change with x, so the gradient that flows through x is zero (the envelope
    theorem). The backward solve starts at mu, which is its answer up to the tolerance of the joint solve.

    Args:
        solver: of the backward solve; default that of the joint solve, for ``Picard`` ``Anderson(m=20)``.
        rtol: relative tolerance of the backward solve, sample by sample; default that of mu in the joint solve, where
            that is 0 the default of the dtype.
        max_iter: vjps at most; default that of the joint solve.

    Source: Gurumurthy, Bai, Manchester and Kolter, Joint Inference and Input Optimization in Equilibrium Networks,
    NeurIPS 2021.
    """

    solver: str | Solver | None = None
    rtol: float | None = None
    max_iter: int | None = None

    def __post_init__(self) -> None:
        if self.solver is not None:
            choose_solver(self.solver)
        stopping(self.rtol, 0.0, self.max_iter, torch.float32)


def attach_envelope(problem: Problem, solution: JointSolution, envelope: Envelope) -> Any:
    """Z with its gradient at a fixed x; the backward solve starts at mu, scaled to the incoming gradient.

    For an outer loss that is a multiple of the inner one, sample by sample, that start is the answer.
    """
    options = _options(problem, envelope, problem.rules[1][0], _scaled_adjoint(problem, solution))
    x, evaluate = pytree.tree_map(torch.Tensor.detach, solution.x), compiled.eager(problem.f)

    def f(z: Any, *args: Any) -> Any:
        return evaluate(z, x, *args)

    leaves = problem.z_layout.tensors(solution.z)
    return problem.z_layout.unflatten(adjoint.attach(f, problem.args, problem.z_layout, leaves, options))


def _scaled_adjoint(problem: Problem, solution: JointSolution) -> Callable[[list[Tensor]], Any]:
    mu, loss = problem.z_layout.tensors(solution.mu), compiled.eager(problem.loss)
    z = [t.detach() for t in problem.z_layout.tensors(solution.z)]
    x = pytree.tree_map(torch.Tensor.detach, solution.x)

    def inner_gradient() -> list[Tensor]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in z]
            cost = loss(problem.z_layout.unflatten(leaves), x, *pytree.tree_map(_detached, problem.args))
            if not cost.requires_grad:
                return [torch.zeros_like(t) for t in z]
            found = torch.autograd.grad(cost.sum(), leaves, allow_unused=True)
        return [torch.zeros_like(t) if gradient is None else gradient for t, gradient in zip(z, found, strict=True)]

    def start(g: list[Tensor]) -> Any:
        known = inner_gradient()
        dots = torch.stack([_dot(problem.z_layout, g, known), _dot(problem.z_layout, known, known)])
        if problem.group is not None and problem.group.spread:
            problem.group.ranks.add(dots)
        inner, size = dots
        scale = torch.where(size > 0, inner / size, 0.0)
        scale = torch.where(torch.isfinite(scale), scale, 0.0)
        return problem.z_layout.unflatten([t * scale.view(-1, *([1] * (t.dim() - 1))).to(t.dtype) for t in mu])

    return start


def _detached(t: Any) -> Any:
    return t.detach() if isinstance(t, Tensor) else t


def _dot(layout: Layout, a: list[Tensor], b: list[Tensor]) -> Tensor:
    pairs = zip(layout.rows(a), layout.rows(b), strict=True)
    return torch.stack([(s.double() * t.double()).sum(1) for s, t in pairs]).sum(0)


def attach_implicit(problem: Problem, solution: JointSolution, gradient: Implicit) -> tuple[Any, Any, Any]:
    """(z, mu, x) with the gradients of the joint map's fixed point.

    That is the same for every step of x, but the residual of the backward solve is not: measured with the small last
    step of a schedule, it would be met at once. So the largest step that was made is taken.
    """
    many = len(problem.z_layout.leaves)
    f, loss = compiled.eager(problem.f), compiled.eager(problem.loss)
    rate = problem.largest_step or problem.step_size(0)

    def joint_map(v: Any, *args: Any) -> Any:
        with torch.enable_grad():  # the map is made of derivatives, whoever evaluates it
            v = [t if t.requires_grad else t.detach().requires_grad_() for t in v]
            z, mu, x = v[:many], v[many : 2 * many], v[2 * many :]
            trees = problem.z_layout.unflatten(z), problem.x_tree(x)
            fz = problem.z_layout.tensors(f(*trees, *args))
            cost = loss(*trees, *args)
            p_q = gradients(fz, mu, cost, [*z, *x], create_graph=True)
            rates: list[Any] = [rate] * len(x) if problem._rates is None else problem._rates
            stepped = [t - r * q for t, r, q in zip(x, rates, p_q[many:], strict=True)]
            return [*fz, *p_q[:many], *problem.feasible(stepped)]

    of_z = problem.z_layout
    leaves = [*of_z.tensors(solution.z), *of_z.tensors(solution.mu)]
    leaves += problem.x_layout.tensors(solution.x) if problem.has_x else []
    options = _options(problem, gradient, min(rule[0] for rule in problem.rules), gradient.u0)
    found = adjoint.attach(joint_map, problem.args, problem.layout, leaves, options)
    return (
        problem.z_layout.unflatten(found[:many]),
        problem.z_layout.unflatten(found[many : 2 * many]),
        problem.x_tree(found[2 * many :]),
    )


def _options(problem: Problem, gradient: Envelope | Implicit, forward_rtol: float, u0: Any) -> LinearOptions:
    forward = problem.options.solver if isinstance(problem.options.solver, Anderson) else Anderson(m=20)
    solver = forward if gradient.solver is None else choose_solver(gradient.solver)
    default = forward_rtol if forward_rtol > 0 else DEFAULT_RTOL[problem.layout.dtype]
    rtol = default if gradient.rtol is None else gradient.rtol
    max_iter = problem.options.max_iter if gradient.max_iter is None else gradient.max_iter
    return LinearOptions(solver, Stopping(rtol, max_iter=max_iter), problem.options.backend, u0, group=problem.group)
