"""Neither the scale of a state nor the mode that torch is in changes what a solve does."""

from __future__ import annotations

import pytest
import torch
from problems import (
    BACKENDS,
    EVERY_SOLVER,
    ONE_OF_EACH,
    Problem,
    assert_same_solution,
    problem,
    pull,
    same_bits,
    solve,
)

import deqfast as dq

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_power_of_two_scale_changes_nothing_but_the_scale(dtype, solver, backend):
    p = problem(5, 33, dtype=dtype, zero=False)
    expected = solve(p, solver=solver, rtol=1e-5, backend=backend)
    for k in (-90, -20, -7, -1, 3, 11, 20, 90):
        s = 2.0**k
        f = lambda z, *args: s * pull(z / s, *args)  # noqa: B023, E731
        sol = dq.fixed_point(f, s * p.z0, p.args, solver=solver, rtol=1e-5, backend=backend, backward="none")
        assert torch.equal(sol.steps, expected.steps)
        assert same_bits(sol.z / s, expected.z)
        assert same_bits(sol.residual, expected.residual)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", range(-20, 21))
def test_default_solver_takes_the_same_evaluations_at_every_scale(k, backend):
    p = problem(3, 20)
    s = 2.0**k
    f = lambda z, *args: s * pull(z / s, *args)  # noqa: E731
    sol = dq.fixed_point(f, p.z0, p.args, rtol=1e-5, backend=backend, backward="none")
    expected = solve(p, rtol=1e-5, backend=backend)
    assert torch.equal(sol.steps, expected.steps)
    assert same_bits(sol.z / s, expected.z)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize("s", [1e-36, 1e-30, 1e30, 1e36])
def test_huge_and_tiny_states_are_solved(s, solver, backend):
    p = problem(4, 50, slowest=0.8)
    f = lambda z, *args: s * pull(z / s, *args)  # noqa: E731
    sol = dq.fixed_point(f, p.z0, p.args, solver=solver, backend=backend, backward="none")
    exact = solve(p.to(torch.float64), rtol=1e-12)
    assert bool(sol.converged.all())
    # ||z - z*|| <= ||f(z) - z|| / (1 - rate)
    assert bool(((sol.z.double() / s - exact.z).norm(dim=1) <= 1e-4 / (1 - 0.8) * exact.z.norm(dim=1)).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_magnitude_may_change_during_a_solve(solver, backend):
    """From 1e30 down to 1: differences of the first iterates drown every later one unless the history is dropped."""
    p = problem(4, 20, dtype=torch.float64, slowest=0.6)
    sol = dq.fixed_point(
        pull, torch.full_like(p.z0, 1e30), p.args, solver=solver, rtol=1e-10, backend=backend, backward="none"
    )
    exact = solve(p, rtol=1e-12)
    assert bool(sol.converged.all())
    assert bool(((sol.z - exact.z).norm(dim=1) <= 4e-10 * exact.z.norm(dim=1)).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_zero_fixed_point_is_approached_and_met_by_an_absolute_tolerance(solver, backend):
    z0 = torch.randn(3, 12)
    sol = dq.fixed_point(lambda z: z / 2, z0, solver=solver, max_iter=60, backend=backend, backward="none")
    assert bool(torch.isfinite(sol.z).all())
    assert bool((sol.z.norm(dim=1) <= z0.norm(dim=1)).all())
    # ||f(z) - z|| = ||f(z)||: the relative residual is 1 as long as halving is exact.
    halved_exactly = sol.z.abs().amax(dim=1) > 1e-30
    assert bool((sol.residual[halved_exactly] == 1).all())
    assert not bool(sol.converged[halved_exactly].any())
    sol = dq.fixed_point(lambda z: z / 2, z0, solver=solver, atol=1e-6, max_iter=60, backend=backend, backward="none")
    assert bool(sol.converged.all())
    assert bool((sol.z.norm(dim=1) <= 2e-6).all())


# ---- root ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_autocast_does_not_touch_the_solver_arithmetic(solver, backend):
    p = problem(4, 40)
    expected = solve(p, solver=solver, rtol=1e-5, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sol = solve(p, solver=solver, rtol=1e-5, backend=backend)
    assert_same_solution(sol, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize("strided", [False, True])
def test_narrower_output_under_autocast_is_read_as_if_widened(strided, solver, backend):
    W, b = 0.4 * torch.eye(24) + 0.1 * torch.randn(24, 24) / 24**0.5, torch.randn(4, 24)
    kinds = []

    def f(z):
        fz = torch.nn.functional.linear(z, W) + b.bfloat16()
        kinds.append(fz.dtype)
        return fz.t().contiguous().t() if strided else fz

    options = {"solver": solver, "rtol": 2e-2, "backend": backend, "backward": "none"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sol = dq.fixed_point(f, torch.zeros(4, 24), **options)
        expected = dq.fixed_point(lambda z: f(z).float(), torch.zeros(4, 24), **options)
    assert set(kinds) == {torch.bfloat16}
    assert sol.z.dtype == torch.float32
    assert bool(sol.converged.all())
    assert_same_solution(sol, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes_give_the_same_bits(mode, solver, backend):
    p = problem(4, 40)
    expected = solve(p, solver=solver, backend=backend)
    with mode():
        assert_same_solution(solve(p, solver=solver, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_tensors_are_taken_as_input(backend):
    p = problem(4, 40)
    expected = solve(p, backend=backend)
    with torch.inference_mode():
        q = Problem(p.z0 + 0, p.x + 0, p.rate + 0)
    with torch.no_grad():
        assert_same_solution(solve(q, backend=backend), expected)
