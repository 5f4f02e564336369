"""Whatever f does with its tensors and whatever the state looks like, the gradients are right."""

import pytest
import torch
import torch.utils.checkpoint
from tanh_map import F64, by_inverse, problem, relative_error, solve, tanh_map

import deqfast as dq


def test_args_computed_upstream_closures_and_frozen_parameters():
    W, x, c = problem()
    encoder = torch.nn.Linear(5, 5, dtype=F64)
    frozen = torch.randn(5, dtype=F64)
    closed_over = torch.randn(5, dtype=F64, requires_grad=True)

    def f(z, tree):
        return torch.tanh(z @ W + tree["x"][0] + frozen + closed_over)

    z = dq.fixed_point(f, torch.zeros_like(x), ({"x": [encoder(x)], "n": 3},), rtol=1e-12, max_iter=200).z
    got = torch.autograd.grad((z * c).sum(), (x, W, encoder.weight, closed_over))
    injected = (encoder(x) + frozen + closed_over).detach().requires_grad_()
    gi, gW = by_inverse(injected, W, c)
    expected = (gi @ encoder.weight.detach(), gW, gi.T @ x.detach(), gi.sum(0))
    for g, e in zip(got, expected, strict=True):
        assert relative_error(g, e) < 1e-9
    assert not frozen.requires_grad


def test_closed_over_tensor_computed_upstream_gets_its_gradient():
    W, x, c = problem()
    injected = x * 2
    z = dq.fixed_point(lambda z: tanh_map(z, injected, W), torch.zeros_like(x), rtol=1e-12).z
    g_injected, gx = torch.autograd.grad((z * c).sum(), (injected, x))
    assert relative_error(g_injected, by_inverse(2 * x, W, c)[0]) < 1e-9
    assert torch.equal(gx, 2 * g_injected)


def test_start_gets_no_gradient():
    W, x, c = problem()
    z0 = torch.zeros_like(x, requires_grad=True)
    (dq.fixed_point(tanh_map, z0, (x, W)).z * c).sum().backward()
    assert z0.grad is None and x.grad is not None


def test_nothing_to_differentiate_gives_a_plain_tensor():
    W, x, _ = problem()
    assert not solve(x.detach(), W.detach()).z.requires_grad
    assert not dq.fixed_point(lambda z: z, torch.randn(2, 3)).z.requires_grad
    with torch.no_grad():
        assert not solve(x, W).z.requires_grad


def test_f_that_does_not_depend_on_z():
    _, x, c = problem()
    z = dq.fixed_point(lambda z, x: x.sin(), torch.zeros_like(x), (x,)).z
    assert torch.allclose(torch.autograd.grad((z * c).sum(), x)[0], c * x.cos())


def test_f_that_returns_an_argument_itself():
    _, x, c = problem()
    z = dq.fixed_point(lambda z, x: x, torch.zeros_like(x), (x,)).z
    assert torch.equal(torch.autograd.grad((z * c).sum(), x)[0], c)


def test_f_that_writes_into_z():
    W, x, c = problem()
    z = dq.fixed_point(lambda z, x: z.mul_(0.5).add_(x @ W), torch.zeros_like(x), (x,), rtol=1e-12).z
    assert torch.allclose(z, 2 * x @ W)
    gx, gW = torch.autograd.grad((z * c).sum(), (x, W))
    assert torch.allclose(gx, 2 * c @ W.detach().T) and torch.allclose(gW, 2 * x.detach().T @ c)


def test_f_that_overwrites_what_its_gradient_needs_gets_the_error_of_autograd():
    W, x, c = problem()
    z = dq.fixed_point(lambda z, x: z.copy_(torch.tanh(z @ W + x)), torch.zeros_like(x), (x,)).z
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (z * c).sum().backward()


def test_f_that_reuses_its_output_buffer():
    W, x, c = problem()
    buffer = torch.empty_like(x, requires_grad=False)

    def f(z, x):
        return buffer.copy_(torch.tanh(z @ W + x))

    z = dq.fixed_point(f, torch.zeros_like(x), (x,), rtol=1e-12).z
    for g, expected in zip(torch.autograd.grad((z * c).sum(), (x, W)), by_inverse(x, W, c), strict=True):
        assert relative_error(g, expected) < 1e-9


def test_f_that_returns_an_expanded_tensor():
    x = torch.randn(4, 1, dtype=F64, requires_grad=True)
    c = torch.randn(4, 6, dtype=F64)
    z = dq.fixed_point(
        lambda z, x: (0.5 * z.mean(1, keepdim=True) + x).expand(4, 6), torch.zeros(4, 6, dtype=F64), (x,)
    ).z
    assert torch.allclose(torch.autograd.grad((z * c).sum(), x)[0], 2 * c.sum(1, keepdim=True), rtol=1e-7)


def test_channels_last_state_has_the_gradients_of_a_contiguous_one():
    torch.manual_seed(1)
    conv = torch.nn.Conv2d(6, 6, 3, padding=1, dtype=F64)
    torch.nn.init.normal_(conv.weight, std=0.06)
    x = torch.randn(2, 6, 5, 7, dtype=F64)
    c = torch.randn_like(x)

    def run(x, c):
        sol = dq.fixed_point(lambda z, x: torch.tanh(conv(z) + x), torch.zeros_like(x), (x,), rtol=1e-11)
        return sol.z, torch.autograd.grad((sol.z * c).sum(), conv.weight)[0]

    plain, expected = run(x, c)
    z, g = run(x.to(memory_format=torch.channels_last), c.to(memory_format=torch.channels_last))
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(z, plain, atol=1e-9) and relative_error(g, expected) < 1e-9


def test_trees_of_tensors_with_unused_leaves():
    W, x, c = problem()
    v = torch.randn(5, dtype=F64, requires_grad=True)

    def f(z, x):
        return {"a": (torch.tanh(z["a"][0] @ W + 0.3 * z["b"] + x),), "b": 0.5 * z["b"] + v}

    z0 = {"a": (torch.zeros_like(x),), "b": torch.zeros_like(x)}
    z = dq.fixed_point(f, z0, (x,), rtol=1e-12, max_iter=200).z
    got = torch.autograd.grad((z["a"][0] * c).sum(), (x, W, v))  # nothing comes in through b
    shifted = (x + 0.6 * v).detach()
    gx, gW = by_inverse(shifted, W, c)
    for g, expected in zip(got, (gx, gW, 0.6 * gx.sum(0)), strict=True):
        assert relative_error(g, expected) < 1e-8
    assert not solve(x, W).z.isnan().any()


def test_complex_states():
    A = (torch.randn(4, 4, dtype=torch.complex128) * 0.2).requires_grad_()
    x = torch.randn(3, 4, dtype=torch.complex128, requires_grad=True)

    def f(A, x):
        return dq.fixed_point(lambda z: z @ A + 0.1 * z.conj() + x, torch.zeros_like(x), rtol=1e-13, max_iter=200).z

    assert torch.autograd.gradcheck(f, (A, x))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 2e-2)])
def test_low_precision_states(dtype, tolerance):
    W, x, c = problem(4, 32, dtype)
    z = solve(x, W, rtol=None).z
    g = torch.autograd.grad((z * c).sum(), x)[0]
    assert g.dtype == dtype
    assert relative_error(g, by_inverse(x, W, c)[0]) < tolerance


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_autocast(solver):
    W, x, c = problem(4, 32, torch.float32)
    linear = torch.nn.Linear(32, 32)
    linear.weight.data.copy_(W.detach().T)
    with torch.autocast("cpu", torch.bfloat16):
        sol = dq.fixed_point(lambda z, x: torch.tanh(linear(z) + x), torch.zeros_like(x), (x,), solver=solver)
        again = dq.fixed_point(lambda z, x: linear(z).tanh(), torch.zeros_like(x), (x,), solver=solver)
    assert sol.z.dtype == again.z.dtype == torch.float32
    gx, gW = torch.autograd.grad((sol.z * c).sum(), (x, linear.weight))
    assert gx.dtype == gW.dtype == torch.float32
    with torch.no_grad():
        shifted = x + linear.bias
    ex, eW = by_inverse(shifted, W, c)
    assert relative_error(gx, ex) < 0.05 and relative_error(gW, eW.T) < 0.05


def test_autocast_output_of_f_may_be_narrower_than_the_state():
    W, x, c = problem(4, 32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z = dq.fixed_point(lambda z, x, W: 0.8 * (z @ W) + (x @ W), torch.zeros_like(x), (x, W)).z
    gx, gW = torch.autograd.grad((z * c).sum(), (x, W))
    A = W.detach().double()
    u = torch.linalg.solve(torch.eye(32, dtype=F64) - 0.8 * A, c.double().T).T  # row vectors: u = 0.8 u A^T + c
    assert gx.dtype == gW.dtype == torch.float32
    assert relative_error(gx, u @ A.T) < 0.05


def test_fixed_point_inside_a_fixed_point():
    W, x, c = problem()
    V = (0.5 * W.detach().T).requires_grad_()

    def outer(backward):
        def f(z, x, W, V):
            start = torch.zeros_like(z)
            inner = dq.fixed_point(lambda y, z, V: torch.sin(y @ V + z), start, (z, V), rtol=1e-13, backward=backward)
            return torch.tanh(0.5 * inner.z @ W + x)

        z = dq.fixed_point(f, torch.zeros_like(x), (x, W, V), rtol=1e-13, max_iter=200, backward=backward).z
        first = torch.autograd.grad((z * c).sum(), (x, W, V), create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, W, V))

    for got, expected in zip(outer(dq.Implicit()), outer(dq.Phantom(100)), strict=True):
        assert relative_error(got.detach(), expected.detach()) < 1e-8


def test_checkpointed_f():
    W, x, c = problem()

    def f(z, x, W):
        return torch.utils.checkpoint.checkpoint(tanh_map, z, x, W, use_reentrant=False)

    got = torch.autograd.grad((solve(x, W, f=f).z * c).sum(), (x, W))
    for g, expected in zip(got, by_inverse(x, W, c), strict=True):
        assert relative_error(g, expected) < 1e-9


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty_batches_and_empty_states(shape):
    x = torch.zeros(shape, requires_grad=True)
    z = dq.fixed_point(lambda z, x: 0.5 * z + x, torch.zeros(shape), (x,)).z
    z.sum().backward()
    assert x.grad.shape == shape


def test_error_of_f_in_the_attaching_evaluation_passes_through():
    W, x, _ = problem()

    def f(z, x):
        if torch.is_grad_enabled():
            raise KeyError("mine")
        return tanh_map(z, x, W)

    with pytest.raises(KeyError, match="mine"):
        dq.fixed_point(f, torch.zeros_like(x), (x,))
