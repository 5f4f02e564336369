"""What comes back from solves that failed, nearly failed, or made few evaluations."""

from __future__ import annotations

import warnings

import pytest
import torch
from problems import BACKENDS, EVERY_SOLVER, ONE_OF_EACH, problem, pull, solve

import deqfast as dq


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_solution_at_zero_converges_by_itself(dtype, solver, backend):
    z0 = torch.ones(6, 5, dtype=dtype)
    for scale in (1.0, 1e-6, 1e6):
        sol = dq.fixed_point(lambda z: 0.5 * z, z0 * scale, solver=solver, backend=backend)
        assert bool(sol.converged.all())
        assert float(sol.z.abs().max()) < 1e-150 * scale or bool((sol.z == 0).all())
        assert sol.nfe <= 100


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_a_solution_that_is_small_is_owed_its_digits(solver, backend):
    for small in (1e-5, 1e-9):
        c = torch.full((4, 3), small)
        sol = dq.fixed_point(lambda z, c=c: 0.5 * z + c, torch.ones(4, 3), solver=solver, backend=backend)
        assert bool(sol.converged.all())
        assert torch.allclose(sol.z, 2 * c, rtol=1e-3, atol=0)


def test_one_sample_at_zero_does_not_cost_the_others():
    scale = torch.ones(64, 1)
    scale[3] = 0
    sol = dq.fixed_point(lambda z: 0.5 * z + scale, torch.ones(64, 4), solver="picard")
    assert bool(sol.converged.all())
    assert sol.nfe < 50


def test_without_a_tolerance_exactly_max_iter_evaluations_are_made():
    sol = dq.fixed_point(lambda z: 0.5 * z, torch.ones(3, 4), solver="picard", rtol=0.0, max_iter=60)
    assert sol.nfe == 60 and not bool(sol.converged.any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_runaway_gives_back_the_iterate_of_the_least_residual(backend):
    sol = dq.fixed_point(lambda z: 2 * z + 1, torch.ones(3, 4), solver="picard", backend=backend)
    assert bool((sol.status == dq.Status.DIVERGED).all())
    assert torch.equal(sol.z, torch.ones(3, 4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("N", [5, 40, 2000])
def test_a_map_without_a_fixed_point_is_not_called_converged(N, backend):
    z0 = torch.nn.functional.normalize(torch.randn(8, N, generator=torch.Generator().manual_seed(0)), dim=1)

    def residual_block(z):  # a step whose length does not shrink
        return z + z0 / z0.norm(dim=1, keepdim=True) * (1 + 0.0 * z)

    sol = dq.fixed_point(residual_block, z0, solver="picard", rtol=1e-2, max_iter=5000, backend=backend)
    assert not bool(sol.converged.any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "start"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-4), (torch.float32, 1e-9)], ids=str
)
def test_a_start_beside_an_unstable_fixed_point_is_left_for_the_stable_one(dtype, start, backend):
    """||g|| at the start is below what rounding leaves of it at the solution."""
    rate = torch.linspace(1.8, 2.6, 100)
    z0 = (start * torch.rand(4, 100, generator=torch.Generator().manual_seed(0))).to(dtype)
    f = lambda z: rate.to(dtype) * z * (1 - z)  # noqa: E731
    sol = dq.fixed_point(f, z0, solver="picard", max_iter=200, backend=backend)
    assert bool(sol.converged.all())
    assert torch.allclose(sol.z.float(), (1 - 1 / rate).expand(4, 100), atol=0.2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_a_large_solution_from_a_small_start_converges(solver, backend):
    sol = dq.fixed_point(lambda z: 0.9 * z + 100, torch.zeros(4, 3), solver=solver, backend=backend, max_iter=300)
    assert bool(sol.converged.all())
    assert torch.allclose(sol.z, torch.full((4, 3), 1000.0), rtol=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize("limit", [1, 2, 6])
def test_the_image_is_f_at_the_best_iterate(limit, solver, backend):
    p = problem(5, 12, slowest=0.9)
    options = {"solver": solver, "max_iter": limit, "backend": backend}
    best, image = solve(p, **options), solve(p, returns="image", **options)
    assert torch.equal(image.z, pull(best.z, *p.args))
    assert torch.equal(image.residual, best.residual)
    assert image.nfe == best.nfe


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize("limit", [1, 2, 6])
def test_next_is_the_iterate_that_one_more_evaluation_would_be_at(limit, solver, backend):
    p = problem(5, 12, slowest=0.9)
    seen = []

    def watched(z, *args):
        seen.append(z.clone())
        return pull(z, *args)

    sol = solve(p, returns="next", solver=solver, max_iter=limit, backend=backend, rtol=1e-12)
    solve(p, watched, solver=solver, max_iter=limit + 1, backend=backend, rtol=1e-12)
    assert sol.nfe == limit
    out = ~sol.converged
    assert torch.equal(sol.z[out], seen[limit][out]) and bool(out.any())
    assert torch.equal(sol.z[~out], pull(seen[limit - 1], *p.args)[~out])  # of a converged sample f there


@pytest.mark.parametrize("returns", ["image", "next"])
@pytest.mark.parametrize("solver", ONE_OF_EACH)
@pytest.mark.parametrize("limit", [1, 4, 40])
def test_an_unrolled_solve_returns_the_same(limit, solver, returns):
    p = problem(5, 12, slowest=0.9, dtype=torch.float64)
    args = tuple(t.clone().requires_grad_() if torch.is_floating_point(t) else t for t in p.args)
    options = {"solver": solver, "max_iter": limit, "returns": returns, "rtol": 1e-6}
    plain = dq.fixed_point(pull, p.z0, p.args, **options)
    unrolled = dq.fixed_point(pull, p.z0, args, backward=dq.Unroll(), **options)
    assert unrolled.nfe == plain.nfe and torch.equal(unrolled.status, plain.status)
    assert torch.allclose(unrolled.z, plain.z, rtol=1e-6, atol=1e-9)
    assert torch.allclose(unrolled.residual, plain.residual, rtol=1e-4, atol=1e-12)
    unrolled.z.sum().backward()
    assert all(t.grad is not None and bool(t.grad.isfinite().all()) for t in args if t.requires_grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_f_is_never_finite_the_image_is_the_start(backend):
    z0 = torch.arange(6.0).reshape(3, 2) + 1
    hole = torch.tensor([[1.0], [torch.nan], [1.0]])
    sol = dq.fixed_point(lambda z: 0.5 * z * hole + 1, z0, returns="image", backend=backend)
    assert torch.equal(sol.z[1], z0[1]) and torch.allclose(sol.z[[0, 2]], torch.full((2, 2), 2.0), rtol=1e-3)


@pytest.mark.parametrize("solver", ONE_OF_EACH)
@pytest.mark.parametrize("ring", [1, 2, 3])
def test_images_outlive_the_buffers_that_f_writes_to(ring, solver):
    p = problem(5, 12, slowest=0.9)
    buffers, turn = [torch.empty(5, 12) for _ in range(ring)], 0

    def reusing(z, *args):
        nonlocal turn
        turn += 1
        return buffers[turn % ring].copy_(pull(z, *args))

    for limit in (1, 3, 8, 100):
        image = solve(p, reusing, returns="image", solver=solver, max_iter=limit)
        plain = solve(p, returns="image", solver=solver, max_iter=limit)
        assert torch.equal(image.z, plain.z)
        for buffer in buffers:
            buffer.fill_(7)
        assert torch.equal(image.z, plain.z)


def test_an_f_that_begins_to_write_to_its_outputs_is_told_so():
    out, turn = [torch.empty(4, 3)], 0

    def late(z):
        nonlocal turn
        turn += 1
        step = 1 - 2 * z if turn > 5 else 0.5 * z + 1  # grows: what was held is still wanted
        return step.clone() if turn < 5 else out[0].copy_(step)

    with pytest.raises(RuntimeError, match="wrote to an output that it had returned earlier"):
        dq.fixed_point(late, torch.zeros(4, 3), returns="image", solver="picard", max_iter=12)


def test_plain_iteration_makes_as_many_applications_as_evaluations():
    z, W = torch.zeros(3, 4), 0.2 * torch.ones(4, 4)
    for _ in range(6):
        z = torch.tanh(z @ W + 1)
    for returns in ("image", "next"):
        sol = dq.fixed_point(
            lambda z: torch.tanh(z @ W + 1), torch.zeros(3, 4), solver="picard", max_iter=6, rtol=0.0, returns=returns
        )
        assert torch.allclose(sol.z, z)


@pytest.mark.parametrize("limit", [0, 0.0])
def test_no_evaluation_gives_back_the_start(limit):
    x = torch.randn(3, 4)
    W = torch.full((4, 4), 0.1, requires_grad=True)
    sol = dq.fixed_point(lambda z: torch.tanh(z @ W + x), torch.ones(3, 4), max_iter=limit)
    assert torch.equal(sol.z, torch.ones(3, 4))
    assert sol.nfe == 0 and bool((sol.status == dq.Status.MAX_ITER).all()) and bool(sol.residual.isnan().all())
    sol.z.sum().backward()
    assert W.grad is not None and float(W.grad.norm()) > 0
    for backward in (dq.Phantom(), dq.Unroll(), "none"):
        dq.fixed_point(lambda z: torch.tanh(z @ W + x), torch.ones(3, 4), max_iter=0, backward=backward)
    assert dq.fixed_point(lambda z: z * 0.5, torch.ones(2, 2), max_iter=3.0).nfe <= 3


def test_backward_after_an_absolute_tolerance_has_the_default_of_the_dtype():
    torch.manual_seed(0)
    W = (0.2 * torch.randn(6, 6)).requires_grad_()
    x = torch.randn(5, 6)
    reports: list[dq.BackwardReport] = []
    sol = dq.fixed_point(
        lambda z: torch.tanh(z @ W + x),
        torch.zeros(5, 6),
        rtol=0.0,
        atol=1e-5,
        backward=dq.Implicit(callback=reports.append),
    )
    assert sol.backward is None
    sol.z.sum().backward()
    assert sol.backward is reports[0]
    assert sol.backward.evaluations < 30
    assert bool(sol.backward.converged.all()) and float(sol.backward.residual.max()) <= 1e-4


def test_a_backward_that_its_limit_ends_says_so():
    W = torch.full((2, 2), 0.49, requires_grad=True)
    sol = dq.fixed_point(lambda z: z @ W + 1, torch.zeros(3, 2), rtol=0.0, atol=1e-3, backward=dq.Implicit(max_iter=1))
    with pytest.warns(dq.GradientWarning):
        sol.z.square().sum().backward()


def test_a_layer_of_which_no_sample_converges_says_so_once():
    x = torch.randn(3, 4)
    cell = lambda z, x: torch.sin(3 * z) + x  # noqa: E731
    layer = dq.DEQ(cell, solver="picard", max_iter=2)
    with pytest.warns(dq.ConvergenceWarning, match="no sample of a batch converged"):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        dq.DEQ(cell, solver="picard", max_iter=2, warn=False)(x)


def test_f_may_take_keywords_and_return_something_beside_z():
    x = torch.randn(3, 4, requires_grad=True)

    def f(z, x, *, scale):
        return torch.tanh(scale * z + x), {"norm": z.norm(), "calls": 1}

    sol = dq.fixed_point(f, torch.zeros(3, 4), (x,), kwargs={"scale": 0.5}, has_aux=True)
    assert sol.aux["calls"] == 1 and not sol.aux["norm"].requires_grad
    assert torch.allclose(sol.aux["norm"], sol.z.norm(), rtol=1e-2)
    sol.z.sum().backward()
    assert x.grad is not None
    layer = dq.DEQ(f, kwargs={"scale": 0.5}, has_aux=True)
    assert torch.allclose(layer(x), sol.z, atol=1e-5)
    with pytest.raises(TypeError, match=r"f must return \(z, aux\) with has_aux=True, got Tensor"):
        dq.fixed_point(lambda z: z, torch.zeros(2, 2), has_aux=True)
    with pytest.raises(TypeError, match="kwargs must be a mapping"):
        dq.fixed_point(f, torch.zeros(2, 2), kwargs=[("scale", 1)])


@pytest.mark.parametrize(
    ("name", "meant"),
    [("tol", "rtol"), ("f_max_iter", "max_iter"), ("max_itr", "max_iter"), ("f_solver", "solver"), ("ift", "backward")],
)
def test_names_from_elsewhere_are_understood_as_questions(name, meant):
    with pytest.raises(TypeError, match=f"unknown option {name!r}; did you mean {meant!r}"):
        dq.DEQ(lambda z, x: z, **{name: 1})
    with pytest.raises(ValueError, match="got 'fixed_point_iter'; did you mean 'picard'"):
        dq.fixed_point(lambda z: z, torch.zeros(2, 2), solver="fixed_point_iter")


def test_no_evaluation_leaves_an_empty_trace():
    assert dq.fixed_point(lambda z: z, torch.ones(3, 4), max_iter=0, trace=True).trace.shape == (0, 3)


def test_a_sample_at_its_solution_stays_there_while_others_go_on():
    rates = torch.tensor([0.1, 0.5, 0.98], dtype=torch.float64)[:, None]
    seen = []

    def f(z):
        seen.append(z[:, 0].clone())
        return rates * z + 1

    z0 = torch.zeros(3, 4, dtype=torch.float64)
    dq.fixed_point(f, z0, solver="picard", rtol=1e-12, max_iter=5000, stop="all", backward="none")
    assert torch.stack(seen)[100:, :2].min() > 1.1
