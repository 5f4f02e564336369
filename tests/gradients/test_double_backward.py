"""Second derivatives through a fixed point: right, or a clear error."""

import warnings

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

import deqfast as dq

F64 = torch.float64
SOLVERS = ["anderson", "broyden", "picard", dq.Anderson(type=2), dq.Anderson(type=1)]


def problem(B=2, N=3):
    W = (torch.randn(N, N, dtype=F64) * 0.5 / N**0.5).requires_grad_()
    return W, torch.randn(B, N, dtype=F64, requires_grad=True), torch.randn(B, N, dtype=F64)


def f(z, x, W):
    return torch.tanh(z @ W + x)


def solve(x, W, f=f, **options):
    return dq.fixed_point(f, torch.zeros_like(x), (x, W), **{"rtol": 1e-13, "max_iter": 300, **options}).z


def second(z, x, W, c):
    """Gradients of a loss that is itself a function of gradients, of z and of x."""
    gx, gW = grad((z.square() * c).sum(), (x, W), create_graph=True)
    return grad((gx.square() * z).sum() + (gW.sin() * gW).sum() + (z * x).sum(), (x, W))


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_gradgradcheck(solver):
    W, x, _ = problem()
    assert gradgradcheck(lambda x, W: solve(x, W, solver=solver), (x, W))


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_second_derivatives_equal_those_of_the_unrolled_solver(solver):
    W, x, c = problem()
    got = second(solve(x, W, solver=solver), x, W, c)
    expected = second(solve(x, W, solver="picard", backward=dq.Unroll()), x, W, c)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)


def test_first_derivatives_with_a_graph_equal_those_without():
    W, x, c = problem()
    z = solve(x, W)
    with_graph = grad((z * c).sum(), (x, W), create_graph=True)
    without = grad((z * c).sum(), (x, W))
    for a, b in zip(with_graph, without, strict=True):
        assert torch.allclose(a, b, rtol=1e-9) and a.requires_grad and not b.requires_grad


def scalar_equation():
    """z = sin(x) + 0.7 x tanh(z), with dz/dx and d2z/dx2 in closed form."""
    x = torch.tensor([[0.3], [-1.2]], dtype=F64, requires_grad=True)

    def exact(z):
        t = torch.tanh(z)
        s, y = 1 - t.square(), x.detach()
        slope = 1 - 0.7 * y * s
        first = (y.cos() + 0.7 * t) / slope
        return first, (-y.sin() + 1.4 * s * first - 1.4 * y * t * s * first.square()) / slope

    return (lambda z, x: x.sin() + 0.7 * x * torch.tanh(z)), x, exact


def test_second_derivative_of_a_scalar_equation():
    f, x, exact = scalar_equation()
    z = dq.fixed_point(f, torch.zeros_like(x), (x,), rtol=1e-14).z
    first = grad(z.sum(), x, create_graph=True)[0]
    second = grad(first.sum(), x)[0]
    expected_first, expected_second = exact(z.detach())
    assert torch.allclose(first, expected_first, rtol=1e-9) and torch.allclose(second, expected_second, rtol=1e-8)


def test_torchdeq_is_silently_wrong_there():
    f, x, exact = scalar_equation()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchdeq = pytest.importorskip("torchdeq")
        deq = torchdeq.get_deq(
            f_solver="fixed_point_iter", b_solver="fixed_point_iter", hook_ift=True, f_tol=1e-12, b_tol=1e-12
        )
        deq.f_max_iter = deq.b_max_iter = 300
        z = deq(lambda z: f(z, x), torch.zeros_like(x))[0][-1]
        first = grad(z.sum(), x, create_graph=True)[0]
        second = grad(first.sum(), x)[0]
    expected_first, expected_second = exact(z.detach())
    assert torch.allclose(first, expected_first, rtol=1e-6) and not torch.allclose(second, expected_second, rtol=1e-1)


def test_closed_over_parameters_and_nested_args():
    W, x, c = problem()
    b = torch.randn(3, dtype=F64, requires_grad=True)

    def closed(z, tree):
        return f(z, tree["x"] + b, W)

    def run(**options):
        z = dq.fixed_point(closed, torch.zeros_like(x), ({"x": x, "k": 2},), rtol=1e-13, max_iter=300, **options).z
        gx, gW, gb = grad((z.square() * c).sum(), (x, W, b), create_graph=True)
        return grad((gx.square() * c).sum() + gW.square().sum() + gb.sin().sum(), (x, W, b))

    for got, expected in zip(run(), run(solver="picard", backward=dq.Unroll()), strict=True):
        assert torch.allclose(got, expected, rtol=1e-7, atol=1e-9)


def test_args_that_are_functions_of_one_another_are_not_counted_twice():
    W, x, c = problem()

    def run(**options):
        h = (x * W.sum()).sin()
        z = dq.fixed_point(
            lambda z, x, h, again: torch.tanh(z @ W + x * h + 0.1 * again),
            torch.zeros_like(x),
            (x, h, x),
            rtol=1e-13,
            max_iter=300,
            **options,
        ).z
        gx, gW = grad((z * c).sum(), (x, W), create_graph=True)
        return gx, gW, *grad((gx.square() * c).sum() + gW.square().sum(), (x, W))

    for got, expected in zip(run(), run(solver="picard", backward=dq.Unroll()), strict=True):
        assert torch.allclose(got, expected, rtol=1e-7, atol=1e-9)


def test_gradient_penalty_reaches_the_parameters():
    W, x, _ = problem()

    def penalty(W, **options):
        g = grad(solve(x, W, **options).sum(), x, create_graph=True)[0]
        return (g.norm(dim=1) - 1).square().sum()

    penalty(W).backward()
    got, W.grad = W.grad, None
    expected = grad(penalty(W, solver="picard", backward=dq.Unroll()), W)[0]
    assert torch.allclose(got, expected, rtol=1e-7, atol=1e-9)


def test_trees_complex_numbers_and_linear_maps():
    _, x, _ = problem()
    A = (torch.randn(3, 3, dtype=torch.complex128) * 0.2).requires_grad_()

    def tree(x, A):
        z0 = (torch.zeros(2, 3, dtype=torch.complex128), torch.zeros_like(x))
        z = dq.fixed_point(
            lambda z, x, A: (z[0] @ A + 0.2 * z[1] + x, 0.3 * z[0].abs() * x), z0, (x, A), rtol=1e-13, max_iter=300
        ).z
        return torch.view_as_real(z[0]), z[1]

    assert gradcheck(tree, (x, A)) and gradgradcheck(tree, (x, A))
    W, x, _ = problem()
    assert gradgradcheck(lambda x, W: solve(x, W, f=lambda z, x, W: z @ W + x), (x, W))


def test_f_that_writes_into_z():
    W, x, _ = problem()
    assert gradgradcheck(lambda x, W: solve(x, W, f=lambda z, x, W: z.mul_(0.5).add_(x @ W)), (x, W))


def test_phantom_is_differentiable_twice():
    W, x, _ = problem()
    assert gradgradcheck(lambda x, W: solve(x, W, backward=dq.Unroll(), max_iter=6, rtol=0), (x, W))
    assert gradgradcheck(lambda x: solve(x, x.new_zeros(3, 3), backward=dq.Phantom(2)), (x,))


def test_autocast_is_entered_again():
    linear = torch.nn.Linear(8, 8)
    torch.nn.init.normal_(linear.weight, std=0.2)
    x = torch.randn(4, 8, requires_grad=True)
    seen = []

    def f(z, x):
        y = linear(z)
        seen.append((torch.is_grad_enabled(), y.dtype))
        return torch.tanh(y + x)

    with torch.autocast("cpu", torch.bfloat16):
        z = dq.fixed_point(f, torch.zeros_like(x), (x,)).z
    g = grad(z.square().sum(), x, create_graph=True)[0]
    g.square().sum().backward()
    assert all(dtype == torch.bfloat16 for _, dtype in seen)
    assert linear.weight.grad.dtype == torch.float32 and torch.isfinite(linear.weight.grad).all()


def test_closing_over_a_computed_tensor_is_a_clear_error():
    W, x, _ = problem()
    h = x * 2
    z = dq.fixed_point(lambda z: f(z, h, W), torch.zeros_like(x)).z
    with pytest.raises(RuntimeError, match="pass it through args="):
        grad(z.sum(), x, create_graph=True)


def test_hooked_closed_over_parameter_is_a_clear_error():
    W, x, _ = problem()
    z = dq.fixed_point(lambda z, x: f(z, x, W), torch.zeros_like(x), (x,)).z
    W.register_hook(lambda g: 2 * g)
    with pytest.raises(RuntimeError, match="hooks on a parameter"):
        grad(z.sum(), x, create_graph=True)


def test_hooked_args_are_hooked_once():
    W, x, c = problem()
    x.register_hook(lambda g: 2 * g)
    z = solve(x, W)
    doubled = grad((z * c).sum(), x, create_graph=True)[0]
    assert torch.allclose(doubled, grad((z * c).sum(), x)[0])


def test_third_derivatives():
    f, x, exact = scalar_equation()

    def second(x):
        z = dq.fixed_point(f, torch.zeros_like(x), (x,), rtol=1e-14).z
        return grad(grad(z.sum(), x, create_graph=True)[0].sum(), x, create_graph=True)[0]

    assert torch.allclose(second(x), exact(dq.fixed_point(f, torch.zeros_like(x), (x,), rtol=1e-14).z.detach())[1])
    assert gradcheck(second, (x,))
    W, x, _ = problem()
    assert gradgradcheck(lambda x, W: grad(solve(x, W).sum(), (x, W), create_graph=True), (x, W))
