"""First-order gradients through a fixed point: right, at any loss scale, however they are asked for."""

import gc
import threading
import warnings
import weakref

import pytest
import torch
import torch.utils.checkpoint
from tanh_map import F64, SOLVERS, by_inverse, problem, relative_error, solve, tanh_map

import deqfast as dq


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
    seen: list[torch.Tensor] = []
    z.register_hook(lambda g: seen.append(g) or 2 * g)
    g = torch.autograd.grad((z * c).sum(), x)[0]
    assert len(seen) == 1 and torch.equal(seen[0], c)
    assert relative_error(g, by_inverse(x, W, 2 * c)[0]) < 1e-9


def test_hook_on_a_parameter_runs_once():
    W, x, c = problem()
    seen: list[torch.Tensor] = []
    W.register_hook(seen.append)
    (dq.fixed_point(lambda z: tanh_map(z, x, W), torch.zeros_like(x), rtol=1e-12).z * c).sum().backward()
    assert len(seen) == 1 and torch.equal(seen[0], W.grad)


def test_solution_may_be_changed_in_place():
    W, x, c = problem()
    z = solve(x, W).z
    z.mul_(3).add_(1)
    assert relative_error(torch.autograd.grad((z * c).sum(), x)[0], by_inverse(x, W, 3 * c)[0]) < 1e-9


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


def test_compacted_solve_has_the_same_gradients():
    W, x, c = problem(8, 16)
    plain = torch.autograd.grad((solve(x, W).z * c).sum(), x)[0]
    z = dq.fixed_point(lambda z, x: tanh_map(z, x, W), torch.zeros_like(x), (x,), rtol=1e-12, compact=True).z
    assert relative_error(torch.autograd.grad((z * c).sum(), x)[0], plain) < 1e-9


def test_root_has_gradients():
    x = torch.rand(5, 1, dtype=F64).add(0.5).requires_grad_()
    z = dq.root(lambda z, x: 0.3 * (x - z.square()), torch.ones_like(x), (x,), rtol=1e-12).z
    assert torch.allclose(z, x.sqrt())
    assert torch.allclose(torch.autograd.grad(z.sum(), x)[0], 0.5 / x.detach().sqrt())
