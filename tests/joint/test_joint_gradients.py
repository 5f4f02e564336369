"""Gradients of joint solves: the closed form, finite differences, unrolling, and what the backward solve costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from quadratics import F64, LinearQuadratic
from torch import Tensor

import deqfast as dq
from deqfast.gradients import adjoint, linear


def test_implicit_gradients_are_those_of_the_closed_form():
    problem = LinearQuadratic(B=2, nz=10, nx=3, norm=0.7)
    weights = torch.randn(2, 3, dtype=F64)

    def of_solver(*args: Tensor) -> Tensor:
        options = {"rtol": 1e-13, "max_iter": 300, "backward": dq.Implicit(rtol=1e-13, max_iter=300)}
        return (problem.solve(args=args, **options).x * weights).sum()

    def of_closed_form(*args: Tensor) -> Tensor:
        return (problem.solution(*args)[0] * weights).sum()

    args = tuple(t.requires_grad_() for t in problem.tensors())
    expected = torch.autograd.grad(of_closed_form(*args), args)
    for got, wanted in zip(torch.autograd.grad(of_solver(*args), args), expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-6, atol=1e-8)


class Nonlinear:
    def __init__(self, n: int = 8, nx: int = 2) -> None:
        self.W = torch.randn(n, n, dtype=F64)
        self.W = (0.6 * self.W / torch.linalg.matrix_norm(self.W, 2)).requires_grad_()
        self.U = torch.randn(n, nx, dtype=F64, requires_grad=True)
        self.y = torch.randn(3, n, dtype=F64, requires_grad=True)
        self.start = torch.zeros(3, n, dtype=F64), torch.zeros(3, nx, dtype=F64)

    def f(self, z: Any, x: Any, y: Any) -> Any:
        return torch.tanh(z @ self.W.T) + x @ self.U.T

    def loss(self, z: Any, x: Any, y: Any) -> Tensor:
        return 0.5 * (z - y).square().sum(1) + 0.1 * x.square().sum(1)

    def solve(self, **options: Any) -> Any:
        settings = {"step_size": 0.03, "rtol": 1e-11, "max_iter": 500, **options}
        return dq.joint_solve(self.f, self.loss, *self.start, (self.y,), **settings)

    def descended(self, steps: int = 600, inner: int = 60) -> tuple[Tensor, Tensor]:
        """Gradient descent on x, with z and mu iterated anew for every step."""
        z, x = self.start
        for _ in range(steps):
            for _ in range(inner // 10):
                z = self.f(z, x, self.y)
            x = x.detach().requires_grad_() if not x.requires_grad else x
            zx = z
            for _ in range(inner):
                zx = self.f(zx, x, self.y)
            cost = self.loss(zx, x, self.y).sum()
            (q,) = torch.autograd.grad(cost, x, create_graph=False)
            x = (x - 0.03 * q).detach()
            z = zx.detach()
        return z, x


def test_optimum_is_that_of_nested_gradient_descent():
    problem = Nonlinear()
    solution = problem.solve(backward="none")
    assert solution.converged.all()
    _, x = problem.descended()
    assert torch.allclose(solution.x, x, rtol=1e-5, atol=1e-6)


def central_difference(function: Any, at: Tensor, direction: Tensor, step: float = 1e-5) -> float:
    with torch.no_grad():
        forward, backward = (function(at + sign * step * direction) for sign in (1, -1))
    return float((forward - backward) / (2 * step))


@pytest.mark.parametrize("name", ["W", "U", "y"])
def test_envelope_gradient_is_that_of_the_optimal_cost(name):
    problem = Nonlinear()
    solution = problem.solve(backward="envelope")
    assert not solution.x.requires_grad and not solution.mu.requires_grad
    cost = problem.loss(solution.z, solution.x, problem.y).sum()
    at = getattr(problem, name)
    (got,) = torch.autograd.grad(cost, at)

    def optimal_cost(value: Tensor) -> Tensor:
        setattr(problem, name, value)
        s = problem.solve(backward="none")
        return problem.loss(s.z, s.x, problem.y).sum()

    direction = torch.randn_like(at)
    assert math.isclose(
        central_difference(optimal_cost, at.detach(), direction), float((got * direction).sum()), rel_tol=1e-5
    )


@pytest.mark.parametrize("name", ["W", "U", "y"])
def test_implicit_gradient_is_that_of_the_solution(name):
    problem = Nonlinear()
    weights = [torch.randn_like(t) for t in (*problem.start, problem.start[0])]

    def total(s: Any) -> Tensor:
        return sum((t * w).sum() for t, w in zip((s.z, s.x, s.mu), weights, strict=True))

    at = getattr(problem, name)
    solution = problem.solve(backward=dq.Implicit(rtol=1e-12, max_iter=300))
    (got,) = torch.autograd.grad(total(solution), at)

    def of(value: Tensor) -> Tensor:
        setattr(problem, name, value)
        return total(problem.solve(backward="none"))

    direction = torch.randn_like(at)
    assert math.isclose(central_difference(of, at.detach(), direction), float((got * direction).sum()), rel_tol=1e-5)


def test_implicit_gradient_is_that_of_the_unrolled_joint_map():
    """Autograd through two thousand plain steps of the map, double VJPs and all, from the solution on."""
    problem = Nonlinear()
    at = [getattr(problem, name) for name in ("W", "U", "y")]
    solution = problem.solve(backward=dq.Implicit(rtol=1e-12, max_iter=300))
    weights = [torch.randn_like(t) for t in (*problem.start, problem.start[0])]

    def total(z: Tensor, x: Tensor, mu: Tensor) -> Tensor:
        return sum(((t * w).sum() for t, w in zip((z, x, mu), weights, strict=True)), torch.zeros(()))

    z, x, mu = (t.detach().requires_grad_() for t in (solution.z, solution.x, solution.mu))
    for _ in range(2000):
        fz, cost = problem.f(z, x, problem.y), problem.loss(z, x, problem.y).sum()
        p, q = torch.autograd.grad([fz, cost], [z, x], [mu, None], create_graph=True)
        z, mu, x = fz, p, x - 0.03 * q
    assert torch.allclose(x, solution.x, atol=1e-8)
    expected = torch.autograd.grad(total(z, x, mu), at)
    for got, wanted in zip(torch.autograd.grad(total(solution.z, solution.x, solution.mu), at), expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-6, atol=1e-8)


def test_implicit_gradient_passes_gradcheck():
    problem = LinearQuadratic(B=2, nz=5, nx=2, norm=0.6)

    def solve(*args: Tensor) -> tuple[Tensor, ...]:
        options = {"rtol": 1e-13, "max_iter": 300, "backward": dq.Implicit(rtol=1e-13, max_iter=300)}
        s = problem.solve(args=args, **options)
        return s.z, s.mu, s.x

    assert torch.autograd.gradcheck(solve, tuple(t.requires_grad_() for t in problem.tensors()), atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-4, -3.0])
def test_envelope_backward_begins_at_mu_and_needs_hardly_a_vjp(monkeypatch, scale):
    problem = Nonlinear()
    counts: list[int] = []
    plain = linear.solve_linear

    def counted(f: Any, *rest: Any) -> Any:
        def counting(u: Any) -> Any:
            counts[-1] += 1
            return f(u)

        counts.append(0)
        return plain(counting, *rest)

    monkeypatch.setattr(adjoint, "solve_linear", counted)
    solution = problem.solve(backward="envelope")
    (scale * problem.loss(solution.z, solution.x, problem.y).sum()).backward()
    z = dq.fixed_point(lambda z: problem.f(z, solution.x, problem.y), problem.start[0], rtol=1e-8).z
    (scale * problem.loss(z, solution.x, problem.y).sum()).backward()
    assert counts[0] <= 2 < counts[1]


def test_envelope_has_options_of_its_own_and_the_tolerance_of_mu_by_default(monkeypatch):
    problem = Nonlinear()
    seen: list[Any] = []
    plain = linear.solve_linear

    def watched(*given: Any) -> Any:
        seen.append(given[4])
        return plain(*given)

    monkeypatch.setattr(adjoint, "solve_linear", watched)
    envelope = dq.Envelope(solver=dq.Broyden(), rtol=1e-6, max_iter=44)
    for options in ({"rtol": {"mu": 1e-5}}, {"rtol": 0.0, "max_iter": 30}, {"backward": envelope}):
        solution = problem.solve(**{"backward": "envelope", **options})
        problem.loss(solution.z, solution.x, problem.y).sum().backward()
    assert [(type(o.solver), o.stopping.rtol, o.stopping.max_iter) for o in seen] == [
        (dq.Anderson, 1e-5, seen[0].stopping.max_iter),
        (dq.Anderson, 1e-8, 30),  # float64's default
        (dq.Broyden, 1e-6, 44),
    ]
    with pytest.raises(ValueError, match="rtol must be finite and not negative, got -1"):
        dq.Envelope(rtol=-1)
    with pytest.raises(ValueError, match="max_iter"):
        dq.Envelope(max_iter=0)
