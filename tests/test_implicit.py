"""First-order gradients through a fixed point: right, at any loss scale, whatever f and the state look like."""

import copy
import gc
import pickle
import subprocess
import sys
import threading
import warnings
import weakref

import pytest
import torch
import torch.utils.checkpoint

import deqfast as dq

F64 = torch.float64
SOLVERS = [
    "anderson",
    "broyden",
    "picard",
    dq.Anderson(m=3, type=2),
    dq.Anderson(m=4, type=1, mixing=0.8, evict="oldest"),
    dq.Anderson(history_dtype=torch.int8),
    dq.Broyden(memory=4),
    dq.Picard(damping=0.7),
]


def problem(B=3, N=5, dtype=F64, scale=0.6):
    generator = torch.Generator().manual_seed(B * 100 + N)
    W = torch.randn(N, N, dtype=F64, generator=generator) * scale / N**0.5
    x = torch.randn(B, N, dtype=F64, generator=generator)
    c = torch.randn(B, N, dtype=F64, generator=generator)
    return W.to(dtype).requires_grad_(), x.to(dtype).requires_grad_(), c.to(dtype)


def tanh_map(z, x, W):
    return torch.tanh(z @ W + x)


def solve(x, W, f=tanh_map, **options):
    options = {"rtol": 1e-12, "max_iter": 300, **options}
    return dq.fixed_point(f, torch.zeros_like(x), (x, W), **options)


def by_inverse(x, W, c):
    """x and W gradients of <c, z> from (I - J)^-1, formed in float64."""
    x, W, c = x.detach().double(), W.detach().double(), c.double()
    z = solve(x, W, backward="none", rtol=1e-14).z
    d = 1 - z.square()
    gx, gW = [], torch.zeros_like(W)
    for i in range(len(x)):
        J = d[i][:, None] * W.T
        u = torch.linalg.solve((torch.eye(len(W), dtype=F64) - J).T, c[i])
        gx.append(u * d[i])
        gW += torch.outer(z[i], u * d[i])
    return torch.stack(gx), gW


def relative_error(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_gradients_equal_those_of_the_inverse(solver):
    W, x, c = problem()
    sol = solve(x, W, solver=solver)
    assert sol.converged.all()
    got = torch.autograd.grad((sol.z * c).sum(), (x, W))
    for g, expected in zip(got, by_inverse(x, W, c), strict=True):
        assert relative_error(g, expected) < 1e-9


@pytest.mark.parametrize("adjoint", SOLVERS, ids=str)
def test_backward_may_use_another_solver(adjoint):
    W, x, c = problem()
    z = solve(x, W, backward=dq.Implicit(solver=adjoint, rtol=1e-11, max_iter=200)).z
    got = torch.autograd.grad((z * c).sum(), (x, W))
    for g, expected in zip(got, by_inverse(x, W, c), strict=True):
        assert relative_error(g, expected) < 1e-8


@pytest.mark.parametrize("solver", ["anderson", "broyden", "picard"])
def test_gradcheck(solver):
    W, x, _ = problem()
    assert torch.autograd.gradcheck(lambda x, W: solve(x, W, solver=solver).z, (x, W))


@pytest.mark.parametrize("B, N", [(1, 1), (3, 63), (2, 1000), (1, 4097)])
def test_odd_sizes(B, N):
    _, x, c = problem(B, N)
    z = dq.fixed_point(lambda z, x: 0.7 * torch.sin(z.roll(1, dims=1)) + x, torch.zeros_like(x), (x,), rtol=1e-12).z
    u = torch.autograd.grad((z * c).sum(), x)[0]
    # u solves u = J^T u + c with J^T v = roll(0.7 cos(roll(z)) v, -1)
    applied = (0.7 * torch.cos(z.detach().roll(1, dims=1)) * u).roll(-1, dims=1)
    assert relative_error(u, applied + c) < 1e-9


def test_value_is_exactly_the_solution_without_gradients():
    W, x, _ = problem()
    with_graph, without = solve(x, W), solve(x, W, backward="none")
    assert torch.equal(with_graph.z, without.z)
    assert torch.equal(with_graph.residual, without.residual)
    assert with_graph.nfe == without.nfe
    assert with_graph.z.requires_grad and not without.z.requires_grad


def test_attaching_is_one_evaluation_that_nfe_does_not_count():
    W, x, _ = problem()
    calls = []

    def f(z, x):
        calls.append(torch.is_grad_enabled())
        return torch.tanh(z @ W + x)

    sol = dq.fixed_point(f, torch.zeros_like(x), (x,))
    assert calls == [False] * sol.nfe + [True]


@pytest.mark.parametrize("solver", ["anderson", "broyden", "picard"])
@pytest.mark.parametrize("loss_scale", [1e7, 1, 1e-3, 1e-5, 1e-7, 1e-20])
def test_error_of_gradients_does_not_depend_on_the_scale_of_the_loss(solver, loss_scale):
    W, x, c = problem(8, 32, torch.float32, scale=0.9)
    z = solve(x, W, solver=solver, rtol=3e-6).z
    g = torch.autograd.grad((z * c * loss_scale).sum(), W)[0]
    assert relative_error(g.double() / loss_scale, by_inverse(x, W, c)[1]) < 1e-4


def test_torchdeq_loses_gradients_of_small_losses():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchdeq = pytest.importorskip("torchdeq")
        W, x, c = problem(8, 32, torch.float32, scale=0.9)
        deq = torchdeq.get_deq(f_solver="anderson", b_solver="anderson", ift=True, f_tol=1e-6, f_max_iter=200)
        z = deq(lambda z: torch.tanh(z @ W + x), torch.zeros_like(x))[0][-1]
        g = torch.autograd.grad((z * c * 1e-7).sum(), W)[0]
    assert relative_error(g.double() / 1e-7, by_inverse(x, W, c)[1]) > 1e-2


def test_gradient_of_a_sample_is_unaffected_by_its_neighbours():
    _, x, c = problem(4, 16)
    c[1] *= 1e9
    c[2] = 0

    def gradient(x, c):
        x = x.detach().requires_grad_()
        z = dq.fixed_point(lambda z, x: 0.8 * z.roll(1, dims=1).sin() + x, torch.zeros_like(x), (x,)).z
        return torch.autograd.grad((z * c).sum(), x)[0]

    together = gradient(x, c)
    for i in range(4):
        assert torch.equal(gradient(x[i : i + 1], c[i : i + 1])[0], together[i])


def test_nan_in_an_incoming_gradient_stays_in_its_sample_and_is_no_failure():
    W, x, c = problem(3, 8)
    clean = torch.autograd.grad((solve(x, W).z * c).sum(), x)[0]
    c[1, 2], c[2, 0] = torch.nan, torch.inf
    g = torch.autograd.grad((solve(x, W).z * c).sum(), x)[0]
    assert torch.equal(g[0], clean[0])
    assert not torch.isfinite(g[1]).all() and not torch.isfinite(g[2]).all()


def test_zero_incoming_gradient_gives_zero_after_one_vjp():
    W, x, c = problem()
    gx, gW = torch.autograd.grad((solve(x, W).z * c * 0).sum(), (x, W))
    assert not gx.any() and not gW.any()


@pytest.mark.parametrize("loss", [torch.sum, lambda z: z[:, ::2].mean(), lambda z: z.t().flip(0).select(0, 1).sum()])
def test_expanded_and_strided_incoming_gradients(loss):
    W, x, _ = problem()
    z = solve(x, W).z
    c = torch.autograd.grad(loss(z), z, retain_graph=True)[0].contiguous()
    expected = by_inverse(x, W, c)
    for g, e in zip(torch.autograd.grad(loss(z), (x, W)), expected, strict=True):
        assert relative_error(g, e) < 1e-9


def test_two_forwards_before_one_backward():
    W, x, c = problem()
    other = (x.detach() + 1).requires_grad_()
    z1, z2 = solve(x, W).z, solve(other, W).z
    got = torch.autograd.grad((z1 * z2 * c).sum(), (x, other, W))
    gx, gW1 = by_inverse(x, W, c * z2.detach())
    go, gW2 = by_inverse(other, W, c * z1.detach())
    for g, expected in zip(got, (gx, go, gW1 + gW2), strict=True):
        assert relative_error(g, expected) < 1e-9


def test_one_solution_used_twice_and_backward_twice():
    W, x, c = problem()
    z = solve(x, W).z
    expected = by_inverse(x, W, 2 * c)[0]
    loss = (z * c).sum() + (z * c).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert relative_error(first, expected) < 1e-9
    assert torch.equal(torch.autograd.grad(loss, x)[0], first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


def test_gradient_with_respect_to_the_solution_itself_is_the_partial_one():
    W, x, c = problem()
    z = solve(x, W).z
    assert torch.equal(torch.autograd.grad((z * c).sum(), z)[0], c)


def test_hook_on_the_solution_sees_one_gradient_once():
    W, x, c = problem()
    z = solve(x, W).z
    seen = []
    z.register_hook(lambda g: seen.append(g) or 2 * g)
    g = torch.autograd.grad((z * c).sum(), x)[0]
    assert len(seen) == 1 and torch.equal(seen[0], c)
    assert relative_error(g, by_inverse(x, W, 2 * c)[0]) < 1e-9


def test_hook_on_a_parameter_runs_once():
    W, x, c = problem()
    seen = []
    W.register_hook(seen.append)
    (dq.fixed_point(lambda z: tanh_map(z, x, W), torch.zeros_like(x), rtol=1e-12).z * c).sum().backward()
    assert len(seen) == 1 and torch.equal(seen[0], W.grad)


def test_solution_may_be_changed_in_place():
    W, x, c = problem()
    z = solve(x, W).z
    z.mul_(3).add_(1)
    assert relative_error(torch.autograd.grad((z * c).sum(), x)[0], by_inverse(x, W, 3 * c)[0]) < 1e-9


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


def test_gradients_in_several_threads_at_once():
    W, x, c = problem(4, 16)
    expected = torch.autograd.grad((solve(x, W).z * c).sum(), x)[0]
    results = [None] * 6

    def work(i):
        own = x.detach().clone().requires_grad_()
        for _ in range(5):
            results[i] = torch.autograd.grad((solve(own, W).z * c).sum(), own)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(g, expected) for g in results)


def test_nothing_outlives_the_solution():
    W, x, c = problem()
    gc.collect()
    gc.disable()
    try:
        z = solve(x, W).z
        attachment = weakref.ref(z.grad_fn.attachment)
        (z * c).sum().backward()
        del z
        assert attachment() is None  # freed by reference counts alone: no cycle
    finally:
        gc.enable()


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


def test_compacted_solve_has_the_same_gradients():
    W, x, c = problem(8, 16)
    plain = torch.autograd.grad((solve(x, W).z * c).sum(), x)[0]
    z = dq.fixed_point(lambda z, x: tanh_map(z, x, W), torch.zeros_like(x), (x,), rtol=1e-12, compact=True).z
    assert relative_error(torch.autograd.grad((z * c).sum(), x)[0], plain) < 1e-9


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


def test_root_has_gradients():
    x = torch.rand(5, 1, dtype=F64).add(0.5).requires_grad_()
    z = dq.root(lambda z, x: 0.3 * (x - z.square()), torch.ones_like(x), (x,), rtol=1e-12).z
    assert torch.allclose(z, x.sqrt())
    assert torch.allclose(torch.autograd.grad(z.sum(), x)[0], 0.5 / x.detach().sqrt())


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty_batches_and_empty_states(shape):
    x = torch.zeros(shape, requires_grad=True)
    z = dq.fixed_point(lambda z, x: 0.5 * z + x, torch.zeros(shape), (x,)).z
    z.sum().backward()
    assert x.grad.shape == shape


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


def test_error_of_f_in_the_attaching_evaluation_passes_through():
    W, x, _ = problem()

    def f(z, x):
        if torch.is_grad_enabled():
            raise KeyError("mine")
        return tanh_map(z, x, W)

    with pytest.raises(KeyError, match="mine"):
        dq.fixed_point(f, torch.zeros_like(x), (x,))


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
