"""What chooses a gradient: phantom and one-step, the adjoint's solver and start, refusals; what all of them keep."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.utils.checkpoint
from tanh_map import F64, by_inverse, problem, relative_error, solve

import deqfast as dq


def test_adjoint_that_does_not_converge_warns_and_keeps_its_best_iterate():
    W, x, c = problem()
    z = solve(x, W, backward=dq.Implicit(solver="picard", max_iter=3)).z
    with pytest.warns(dq.GradientWarning, match=r"3 of 3 samples.*rtol=1e-12 within max_iter=3"):
        g = torch.autograd.grad((z * c).sum(), x)[0]
    assert torch.isfinite(g).all()


def test_good_start_saves_vjps():
    W, x, c = problem(4, 32)
    vjps = []

    def f(z, x):
        z = z.view_as(z)
        if z.requires_grad:
            z.register_hook(lambda g: vjps.append(1))
        return torch.tanh(z @ W + x)

    def run(u0):
        vjps.clear()
        z = dq.fixed_point(f, torch.zeros_like(x), (x,), rtol=1e-8, backward=dq.Implicit(u0=u0)).z
        g = torch.autograd.grad((z * c).sum(), x)[0]
        return g, len(vjps)

    g, cold = run(None)
    u = g / (1 - solve(x, W).z.detach().square())
    again, warm = run(u * (1 + 1e-4 * torch.randn_like(u)))
    assert warm < cold
    assert relative_error(again, g) < 1e-6


def test_phantom_is_the_truncated_neumann_series():
    W, x, c = problem()
    sol = solve(x, W, backward=dq.Phantom(steps=3))
    g = torch.autograd.grad((sol.z * c).sum(), x)[0]
    z = solve(x, W, backward="none").z
    d = 1 - z.square()
    expected, term = torch.zeros_like(c), c
    for _ in range(3):
        expected = expected + term * d
        term = (term * d) @ W.detach().T
    assert relative_error(g, expected) < 1e-8
    assert torch.allclose(sol.z, z, atol=1e-10)


def test_phantom_damping_and_many_steps_approach_the_implicit_gradient():
    W, x, c = problem()
    g = torch.autograd.grad((solve(x, W, backward=dq.Phantom(steps=200, damping=0.5)).z * c).sum(), x)[0]
    assert relative_error(g, by_inverse(x, W, c)[0]) < 1e-8


def test_one_step_is_phantom_of_one():
    W, x, c = problem()
    one = torch.autograd.grad((solve(x, W, backward=dq.OneStep()).z * c).sum(), (x, W))
    phantom = torch.autograd.grad((solve(x, W, backward=dq.Phantom(1)).z * c).sum(), (x, W))
    assert all(torch.equal(a, b) for a, b in zip(one, phantom, strict=True))


@pytest.mark.parametrize(
    "option", [dq.Implicit(solver="broyden", rtol=1e-3), dq.Phantom(2, 0.5), dq.OneStep(), dq.Unroll()]
)
def test_options_pickle_copy_and_cannot_be_changed(option):
    assert pickle.loads(pickle.dumps(option)) == option == copy.deepcopy(option)
    with pytest.raises(AttributeError):
        option.steps = 3


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: dq.Implicit(solver="newton"), ValueError, "solver must be one of"),
        (lambda: dq.Implicit(solver=3), TypeError, "solver must be"),
        (lambda: dq.Implicit(rtol=-1), ValueError, "rtol must be finite and not negative, got -1"),
        (lambda: dq.Implicit(max_iter=0), ValueError, "max_iter must be at least 1, got 0"),
        (lambda: dq.Phantom(steps=0), ValueError, "steps must be at least 1, got 0"),
        (lambda: dq.Phantom(steps=1.5), TypeError, "steps must be an int, got float"),
        (lambda: dq.Phantom(damping=1.5), ValueError, r"damping must be in \(0, 1\], got 1.5"),
        (
            lambda: dq.fixed_point(torch.cos, torch.ones(1, 1), backward="ift"),
            ValueError,
            "backward must be .* got 'ift'",
        ),
        (
            lambda: dq.fixed_point(torch.cos, torch.ones(1, 1), backward=dq.Implicit),
            TypeError,
            "got the class Implicit",
        ),
        (lambda: dq.fixed_point(torch.cos, torch.ones(1, 1), backward=True), TypeError, "got bool"),
    ],
)
def test_wrong_options_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_start_of_the_adjoint_must_be_shaped_like_z():
    W, x, c = problem()
    z = solve(x, W, backward=dq.Implicit(u0=torch.zeros(2, 2, dtype=F64))).z
    with pytest.raises(ValueError, match=r"u0 must have the shape of z0, expected \(3, 5\), got \(2, 2\)"):
        (z * c).sum().backward()


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_gradients_do_not_depend_on_the_mode_that_surrounded_the_import(mode):
    code = f"""
import torch
with torch.{mode}():
    import deqfast as dq
w = torch.tensor([[0.5]], requires_grad=True)
dq.fixed_point(lambda z: w * z + 1, torch.zeros(1, 1), rtol=1e-6).z.sum().backward()
print(round(w.grad.item(), 3))
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "4.0"
