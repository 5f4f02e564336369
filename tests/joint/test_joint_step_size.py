"""The step of the input: one over the curvature, against closed forms."""

import pytest
import torch
from quadratics import quadratic

import deqfast as dq


def test_step_is_one_over_the_largest_curvature_of_the_batch():
    f, loss, z0, x0, s, hessian = quadratic()
    largest = s.max() * torch.linalg.eigvalsh(hessian)[-1]
    assert dq.joint_step_size(f, loss, z0, x0, iterations=60) == pytest.approx(1 / float(largest), rel=1e-6)
    few = dq.joint_step_size(f, loss, z0, x0)
    assert 0.999 <= few * float(largest) < 1.25  # from below in L


def test_each_sample_has_a_step_of_its_own():
    f, loss, z0, x0, s, hessian = quadratic()
    steps = dq.joint_step_size(f, loss, z0, x0, iterations=60, per_sample=True)
    assert steps.shape == (3, 1)
    torch.testing.assert_close(1 / steps[:, 0], s * torch.linalg.eigvalsh(hessian)[-1], rtol=1e-6, atol=0)


def test_a_sample_has_the_same_step_alone():
    f, loss, z0, x0, _, _ = quadratic()
    together = dq.joint_step_size(f, loss, z0, x0, per_sample=True)
    alone = dq.joint_step_size(f, loss, z0[:1], x0[:1], per_sample=True)
    torch.testing.assert_close(together[:1], alone)


def test_the_step_makes_a_joint_solve_reach_the_closed_form():
    f, loss, z0, x0, _, hessian = quadratic()
    for per_sample in (False, True):
        step = dq.joint_step_size(f, loss, z0, x0, per_sample=per_sample)
        sol = dq.joint_solve(f, loss, z0, x0, step_size=step, max_iter=200, rtol=1e-9)
        assert sol.converged.all()
        x = sol.x.requires_grad_()
        z = dq.fixed_point(f, z0, (x,), rtol=1e-12, max_iter=300).z
        (gradient,) = torch.autograd.grad(loss(z, x).sum(), x)
        assert gradient.norm() < 1e-6 * hessian.norm()


def test_trees_arguments_and_single_precision():
    f, loss, z0, x0, s, hessian = quadratic()

    def f_tree(z, x, shift):
        return {"z": f(z["z"].double(), torch.cat(x, 1).double()).float() + shift}

    def loss_tree(z, x, shift):
        return loss(z["z"].double(), torch.cat(x, 1).double()).float()

    x = (x0[:, :1].float(), x0[:, 1:].float())
    steps = dq.joint_step_size(
        f_tree, loss_tree, {"z": z0.float()}, x, (torch.ones(()),), iterations=60, per_sample=True, rtol=1e-6
    )
    assert [t.shape for t in steps] == [(3, 1), (3, 1)] and steps[0].dtype == torch.float32
    torch.testing.assert_close(1 / steps[1][:, 0].double(), s * torch.linalg.eigvalsh(hessian)[-1], rtol=1e-3, atol=0)


def test_nothing_is_left_behind_on_parameters():
    f, loss, z0, x0, _, _ = quadratic()
    scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    with torch.no_grad():
        assert dq.joint_step_size(lambda z, x: scale * f(z, x), loss, z0, x0) > 0
    assert scale.grad is None and not x0.requires_grad


def test_wrong_calls_name_the_argument():
    f, loss, z0, x0, _, _ = quadratic()
    cases = [
        (TypeError, "f must be callable", lambda: dq.joint_step_size(None, loss, z0, x0)),
        (TypeError, "loss must be callable", lambda: dq.joint_step_size(f, 3, z0, x0)),
        (TypeError, "args must be a tuple", lambda: dq.joint_step_size(f, loss, z0, x0, z0)),
        (TypeError, "iterations must be an int", lambda: dq.joint_step_size(f, loss, z0, x0, iterations=2.0)),
        (ValueError, "iterations must be at least 1", lambda: dq.joint_step_size(f, loss, z0, x0, iterations=0)),
        (TypeError, "per_sample must be a bool", lambda: dq.joint_step_size(f, loss, z0, x0, per_sample=1)),
        (ValueError, "x0 must have the batch of z0", lambda: dq.joint_step_size(f, loss, z0, x0[:2])),
        (ValueError, "x0 must have the precision of z0", lambda: dq.joint_step_size(f, loss, z0, x0.float())),
        (ValueError, "x0 must hold a number", lambda: dq.joint_step_size(f, loss, z0[:0], x0[:0])),
        (
            ValueError,
            "one number a sample",
            lambda: dq.joint_step_size(f, lambda z, x: loss(z, x).mean(), z0, x0),
        ),
        (
            ValueError,
            "positive curvature",
            lambda: dq.joint_step_size(f, lambda z, x: z.sum(1), z0, x0),
        ),
        (
            ValueError,
            "must depend on x",
            lambda: dq.joint_step_size(lambda z, x: z / 2, lambda z, x: z.square().sum(1), z0, x0),
        ),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
