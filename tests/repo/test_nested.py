"""The nested baseline of the joint examples solves the same problem as the joint solve, and counts its work."""

import pytest
import torch
from joint_nested import SOLVERS, Counted, nested_solve
from quadratics import quadratic

import deqfast as dq


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_gradient_steps_reach_the_joint_optimum(solver, warm):
    if solver.startswith("torchdeq"):
        pytest.importorskip("torchdeq")
    f, loss, z0, x0, _, _ = quadratic()
    step = dq.joint_step_size(f, loss, z0, x0)
    joint = dq.joint_solve(f, loss, z0, x0, step_size=step, max_iter=300, rtol=1e-10)
    options = {"solver": solver, "rtol": 1e-6, "max_iter": 80, "warm": warm}
    calls = []

    def watched(z, x):
        calls.append(1)
        return f(z, x)

    nested = nested_solve(watched, loss, z0, x0, step_size=step, steps=40, optimiser="pgd", trace=True, **options)
    assert nested.cost.mean() < joint.cost.mean() * 1.05
    assert len(nested.trace) == 40 and nested.trace[0] > nested.trace[-1]
    assert nested.evaluations == len(calls)
    assert nested.vjps >= 80 and nested.seconds > 0  # a step of the adjoint, and the gradient of x, for each step of x


def test_adam_keeps_within_the_projection():
    f, loss, z0, x0, _, _ = quadratic()
    project = dq.project.L2Ball(0.1)
    nested = nested_solve(f, loss, z0, x0, step_size=0.05, steps=20, solver="deqfast", project=project)
    assert (nested.x.norm(dim=1) <= 0.1 + 1e-9).all()
    assert (nested.cost < loss(dq.fixed_point(f, z0, (x0,)).z, x0)).all()


def test_calls_and_products_are_counted():
    counted = Counted(lambda z: 2 * z)
    z = torch.ones(3, requires_grad=True)
    torch.autograd.grad(counted(z).sum(), z)
    counted(z.detach())
    assert (counted.calls, counted.vjps, counted.work) == (2, 1, 3)


def test_unknown_names_raise():
    f, loss, z0, x0, _, _ = quadratic()
    with pytest.raises(ValueError, match="solver must be one of"):
        nested_solve(f, loss, z0, x0, step_size=1.0, steps=1, solver="newton")
    with pytest.raises(ValueError, match="optimiser must be one of"):
        nested_solve(f, loss, z0, x0, step_size=1.0, steps=1, optimiser="sgd")
