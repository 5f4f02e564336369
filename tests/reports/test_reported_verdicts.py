"""What users have reported of solvers' verdicts: what is called converged, what comes back, at which evaluation."""

from __future__ import annotations

import math

import pytest
import torch
from problems import ACCELERATED, EVERY_SOLVER, ONE_OF_EACH, linear

import deqfast as dq

F64 = torch.float64


def residual(f, z):
    """||f(z) - z|| / ||f(z)|| of every row."""
    fz = f(z)
    return (fz - z).norm(dim=1) / fz.norm(dim=1)


def plain(rate, rtol, limit=10000):
    """Evaluations of z -> rate z + 1 from 0 until within rtol, and the iterate there: z_k = sum of rate^j, j < k."""
    for k in range(limit):
        if rate**k <= rtol * (1 - rate ** (k + 1)) / (1 - rate):
            return k + 1, (1 - rate**k) / (1 - rate)
    raise AssertionError


# ---- tolerances ----


@pytest.mark.parametrize("rtol", [0.3, 0.05, 1e-3, 1e-6, 1e-10])
def test_relative_tolerance_is_the_one_that_stops_and_what_is_returned_meets_it(rtol):
    """A relative tolerance is ignored (locuslab/torchdeq#12); what is returned is not what was measured.

    The second: francescoalemanno/FixedPoint.jl#4.
    """
    sol = dq.fixed_point(lambda z: 0.9 * z + 1, torch.zeros(1, 1, dtype=F64), solver="picard", rtol=rtol, max_iter=999)
    steps, z = plain(0.9, rtol)
    assert sol.nfe == steps and sol.converged.all()
    assert abs(float(sol.z) - z) < 1e-12
    assert math.isclose(float(sol.residual), float(residual(lambda z: 0.9 * z + 1, sol.z)), rel_tol=1e-4)


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_absolute_tolerance_counts_in_the_units_of_the_state(solver, size):
    """One tolerance is absolute here and relative there: small states are never iterated, large ones for ever."""
    f, exact = linear(3, 6, norm=0.6)
    atol = 1e-4 * size
    sol = dq.fixed_point(lambda z: size * f(z / size), 0 * exact, solver=solver, rtol=0, atol=atol)
    g = size * (f(sol.z / size) - sol.z / size)
    assert sol.converged.all() and float(g.norm(dim=1).max()) <= atol * (1 + 1e-6)
    assert float((sol.z - size * exact).norm(dim=1).max()) <= atol / (1 - 0.6)
    loose = dq.fixed_point(lambda z: size * f(z / size), 0 * exact, solver=solver, rtol=0, atol=1e3 * size)
    assert loose.nfe == 1 and not loose.z.any()


@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize("start", [0.0, 1.0, -3e5])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_solution_at_zero_is_zero_and_converged(dtype, start, solver):
    """f = z / 2 has no relative digits at its solution: 0 / 0 never converges (tlm-adjoint/tlm_adjoint#316)."""
    sol = dq.fixed_point(lambda z: 0.5 * z, torch.full((2, 3), start, dtype=dtype), solver=solver)
    assert sol.converged.all() and not sol.residual.any()
    assert float(sol.z.abs().max()) < 1e-150  # whose squares are 0


def test_start_at_the_solution_is_returned_after_one_evaluation():
    """Started close to or at the solution, a solver fails or leaves it (patrick-kidger/optimistix#27)."""
    f, exact = linear(3, 8)
    sol = dq.fixed_point(f, exact)
    assert torch.equal(sol.z, exact) and sol.nfe == 1 and sol.converged.all()


# ---- what has no solution, or runs away ----


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_map_that_runs_away_is_not_called_converged_and_gives_the_start_back(dtype):
    """f = 2 z + b under plain iteration: the last iterate, 2^100 b, comes back as the answer."""
    b, z0 = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=dtype), torch.full((2, 2), 0.25, dtype=dtype)
    sol = dq.fixed_point(lambda z: 2 * z + b, z0, solver="picard")
    assert not sol.converged.any() and (sol.status == dq.Status.DIVERGED).all()
    assert torch.equal(sol.z, z0)
    assert torch.allclose(sol.residual, residual(lambda z: 2 * z + b, z0), rtol=1e-5)


@pytest.mark.parametrize("solver", ACCELERATED)
def test_map_that_only_plain_iteration_runs_away_from_is_solved(solver):
    """f = 2 z + b has the solution -b: an accelerated solver gives up with the plain one."""
    b = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=F64)
    sol = dq.fixed_point(lambda z: 2 * z + b, torch.full((2, 2), 0.25, dtype=F64), solver=solver)
    assert sol.converged.all() and float((sol.z + b).abs().max()) < 1e-6


WITHOUT = {"z + 1": lambda z: z + 1, "z + sqrt(1 + z^2)": lambda z: z + torch.sqrt(1 + z * z)}


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("limit", [50, 3000])
@pytest.mark.parametrize("name", WITHOUT)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_map_without_a_fixed_point_is_not_called_converged(solver, name, limit, dtype):
    """An equation without a solution (xitorch/xitorch#28): far out, a bounded step is small beside z."""
    with pytest.raises(dq.ConvergenceError) as caught:
        dq.fixed_point(WITHOUT[name], torch.ones(3, 1, dtype=dtype), solver=solver, max_iter=limit, throw=True)
    sol = caught.value.solution
    assert not sol.converged.any() and sol.z.isfinite().all()


def from_rest(z):
    """A step of 1, of 1e-13 from 0."""
    return z + torch.where(z == 0, 1e-13, 1.0)


@pytest.mark.parametrize(
    ("f", "rtol"),
    [
        pytest.param(lambda z: z + 1 + torch.sin(z) / 5, 1e-3, id="step of 0.8 to 1.2"),
        pytest.param(
            lambda z: z + 1 + torch.sin(z) / 2,
            1e-3,
            id="step of 0.5 to 1.5",
        ),
        pytest.param(
            from_rest,
            0.1,
            id="grown 2^40 times",
        ),
    ],
)
def test_bounded_step_without_end_is_not_called_converged(f, rtol):
    """The same where plain iteration meets the tolerance: there is no z at which f(z) - z is 0, or near it."""
    sol = dq.fixed_point(f, torch.zeros(1, 1, dtype=F64), solver="picard", rtol=rtol, max_iter=4000)
    assert not sol.converged.any(), (float(sol.z), float(f(sol.z) - sol.z))


@pytest.mark.parametrize("solver", ["anderson", "broyden", "picard"])
def test_step_of_one_is_not_called_converged_where_rounding_hides_it(solver):
    """z + 1 from 0.001: differences of f(z) - z are rounding alone, and what they say leads to 1e16."""
    sol = dq.fixed_point(lambda z: z + 1, torch.full((1, 1), 1e-3, dtype=F64), solver=solver)
    assert not sol.converged.any(), float(sol.z)


LEFT = pytest.mark.xfail(
    strict=True, reason="a column of rounding alone leads to 1e16: not called converged, not right"
)


@pytest.mark.parametrize("solver", [pytest.param("anderson", marks=LEFT), "broyden", "picard"])
def test_ramp_up_to_a_bound_ends_at_the_bound(solver):
    """The same with a solution: min(z + 1, 1000) has one, 1000."""
    z0 = torch.full((1, 1), 1e-3, dtype=F64)
    sol = dq.fixed_point(lambda z: torch.clamp(z + 1, max=1000.0), z0, solver=solver, max_iter=1100)
    assert sol.converged.all() and abs(float(sol.z) - 1000) < 1e-4


def test_two_cycle_is_not_called_converged_by_plain_iteration_and_solved_by_the_others():
    """An SCF or a network that oscillates between two states, z -> 1 - z from 0: right is 1 / 2."""
    z0 = torch.zeros(1, 1, dtype=F64)
    sol = dq.fixed_point(lambda z: 1 - z, z0, solver="picard")
    assert not sol.converged.any() and sol.nfe == 100
    for solver in ("anderson", "broyden", dq.Picard(damping=0.5)):
        sol = dq.fixed_point(lambda z: 1 - z, z0, solver=solver)
        assert sol.converged.all() and abs(float(sol.z) - 0.5) < 1e-8


@pytest.mark.parametrize("solver", ACCELERATED)
def test_solve_that_runs_out_returns_its_best_iterate(solver):
    """The newest iterate comes back, not the one of least residual that was seen (locuslab/torchdeq#7)."""
    W = 2.2 * torch.linalg.qr(torch.randn(24, 24, dtype=F64)).Q
    x = torch.randn(6, 24, dtype=F64)

    def f(z):
        return torch.tanh(z @ W) + x

    sol = dq.fixed_point(f, torch.zeros_like(x), solver=solver, rtol=1e-12, max_iter=14, trace=True)
    assert not sol.converged.any() and sol.nfe == 14
    assert torch.allclose(sol.residual, sol.trace.min(0).values, rtol=1e-9)
    assert torch.allclose(residual(f, sol.z), sol.residual, rtol=1e-6)
    assert bool((sol.trace.argmin(0) < 13).any())


# ---- limits ----


def test_limit_read_from_a_file_may_be_a_float_that_is_whole():
    """max_iter=50.0 from a configuration file raises from inside of range()."""
    f, exact = linear(2, 5, norm=0.99)
    sols = [dq.fixed_point(f, 0 * exact, solver="picard", max_iter=limit) for limit in (50, 50.0)]
    assert torch.equal(sols[0].z, sols[1].z) and sols[1].nfe == 50
    with pytest.raises(TypeError, match="max_iter must be an int, got float"):
        dq.fixed_point(f, 0 * exact, max_iter=50.5)


@pytest.mark.parametrize("none", [0, 0.0])
def test_no_evaluation_at_all_returns_the_start_and_knows_nothing(none):
    """max_iter=0 to switch the solve off raises, or returns what was never made."""
    x = torch.randn(2, 3, dtype=F64, requires_grad=True)
    z0 = torch.randn(2, 3, dtype=F64)
    sol = dq.fixed_point(lambda z, x: 0.5 * z + x, z0, (x,), max_iter=none)
    assert torch.equal(sol.z.detach(), z0) and sol.nfe == 0
    assert sol.residual.isnan().all() and not sol.converged.any()
    (g,) = torch.autograd.grad(sol.z.sum(), x)  # of the equilibrium, which of a linear map is the same everywhere
    assert torch.allclose(g, torch.full_like(g, 2.0))


def test_stopping_together_is_stopping_with_the_worst_sample():
    """The worst sample stops the batch in one library and each its own in another: the others differ by digits."""
    rate = torch.tensor([[0.1], [0.5], [0.9]], dtype=F64)
    z0 = torch.zeros(3, 1, dtype=F64)
    sols = {
        stop: dq.fixed_point(lambda z: rate * z + 1, z0, solver="picard", rtol=1e-6, stop=stop, max_iter=999)
        for stop in ("each", "all")
    }
    steps = [plain(r, 1e-6)[0] for r in rate.flatten().tolist()]
    assert sols["each"].steps.tolist() == steps
    assert sols["all"].steps.tolist() == [max(steps)] * 3 == [sols["all"].nfe] * 3
    for r, each, together in zip(rate.flatten().tolist(), sols["each"].z, sols["all"].z, strict=True):
        assert abs(float(each) - plain(r, 1e-6)[1]) < 1e-12
        assert abs(float(together) - (1 - r ** (max(steps) - 1)) / (1 - r)) < 1e-12
    assert sols["all"].converged.all()


@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_start_from_the_solution_of_a_near_problem_saves_evaluations(solver):
    """A warm start is ignored, or costs as much as a cold one."""
    A = torch.randn(10, 10, dtype=F64)
    A *= 0.8 / torch.linalg.matrix_norm(A, 2)
    b = torch.randn(4, 10, dtype=F64)
    first, right = (torch.linalg.solve(torch.eye(10, dtype=F64) - A, c.mT).mT for c in (b, b + 1e-3))
    cold, warm = (dq.fixed_point(lambda z: z @ A.mT + b + 1e-3, z0, solver=solver, rtol=1e-6) for z0 in (0 * b, first))
    assert warm.converged.all() and warm.nfe < 0.7 * cold.nfe
    for sol in (cold, warm):
        assert float((sol.z - right).norm() / right.norm()) < 1e-5
