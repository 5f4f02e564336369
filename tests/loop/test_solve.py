"""``fixed_point`` and ``root``: what is counted, how samples end, what is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from problems import (
    BACKENDS,
    EPS,
    EVERY_SOLVER,
    ONE_OF_EACH,
    SOLVERS,
    SOME_SOLVERS,
    Counted,
    assert_same_samples,
    assert_same_solution,
    linear,
    problem,
    pull,
    relative_residual,
    solve,
)

import deqfast as dq
from deqfast import Status

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]


def never(*_):
    raise AssertionError("f was called before the arguments were checked")


# ---- counting ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_nfe_is_the_calls_of_f_and_steps_those_a_sample_used(solver, backend):
    p = problem(9, 12)
    f = Counted(pull)
    sol = solve(p, f, solver=solver, rtol=1e-4, trace=True, backend=backend)
    assert bool(sol.converged.all())
    assert sol.nfe == len(f.rows) == int(sol.steps.max())
    assert sol.trace.shape == (sol.nfe, 9)
    evaluated = torch.arange(sol.nfe)[:, None] < sol.steps
    assert torch.equal(~torch.isnan(sol.trace), evaluated)
    last = sol.trace[sol.steps.long() - 1, torch.arange(9)]
    assert torch.equal(last, sol.residual)
    assert bool((torch.where(evaluated, sol.trace, 1)[:-1] > 1e-4)[torch.arange(1, sol.nfe)[:, None] < sol.steps].all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize("max_iter", [1, 2, 7])
def test_zero_tolerances_make_exactly_max_iter_evaluations(max_iter, solver, backend):
    p = problem(5, 12)
    p.rate.fill_(0.99)
    f = Counted(pull)
    sol = solve(p, f, solver=solver, rtol=0.0, atol=0.0, max_iter=max_iter, backend=backend)
    assert sol.nfe == len(f.rows) == max_iter
    assert sol.steps.tolist() == [max_iter] * 5
    assert not bool(sol.converged.any())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_exact_fixed_point_ends_a_solve_without_tolerance(solver, backend):
    c = torch.randn(3, 5)
    sol = dq.fixed_point(lambda z: c, c, solver=solver, rtol=0.0, backward="none", backend=backend)
    assert sol.nfe == 1
    assert sol.status.tolist() == [Status.CONVERGED] * 3
    assert torch.equal(sol.z, c)
    assert sol.residual.tolist() == [0.0] * 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_converged_sample_is_frozen_while_others_go_on(solver, backend):
    p = problem(6, 10, slowest=0.95)
    states = []
    sol = solve(
        p, solver=solver, rtol=1e-4, backend=backend, callback=lambda k, s: states.append(s.evaluated()) or False
    )
    for b in range(6):
        done = int(sol.steps[b])
        assert all(torch.equal(z[b], sol.z[b]) for z in states[done:])
    assert int(sol.steps.min()) < sol.nfe


# ---- stopping ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize(("rtol", "atol"), [(1e-3, 0.0), (0.0, 1e-3), (1e-4, 1e-3), (None, 0.0)])
def test_sample_stops_at_the_first_evaluation_within_tolerance(rtol, atol, solver, backend):
    p = problem(7, 15, dtype=torch.float64, slowest=0.9)
    norms = []

    def f(z, *args):
        fz = pull(z, *args)
        norms.append(((fz - z).norm(dim=1), fz.norm(dim=1)))
        return fz

    sol = solve(p, f, solver=solver, rtol=rtol, atol=atol, max_iter=400, backend=backend)
    assert bool(sol.converged.all())
    rtol = 1e-8 if rtol is None else rtol
    within = torch.stack([g <= atol + rtol * f for g, f in norms])
    assert torch.equal(sol.steps.long(), within.int().argmax(dim=0) + 1)


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [
        (torch.float64, 1e-8),
        (torch.float32, 1e-4),
        (torch.float16, 4e-3),
        (torch.bfloat16, 2e-2),
        (torch.complex64, 1e-4),
    ],
    ids=str,
)
def test_default_tolerance_is_the_documented_one(dtype, rtol):
    p = problem(4, 20, dtype=dtype, slowest=0.7)
    sol = solve(p)
    assert_same_solution(sol, solve(p, rtol=rtol))
    assert bool(sol.converged.all())
    assert bool((sol.residual <= rtol).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_way_to_end_has_its_status(backend):
    """Rows of z -> a z + b under plain iteration; one row turns into NaN, one is stopped by nobody but max_iter."""
    a = torch.tensor([0.5, 0.999, -1.0, -2.0, 0.5], dtype=torch.float64)[:, None]
    z0 = torch.tensor([0.0, 0.0, 0.4, 1.001, 0.0], dtype=torch.float64)[:, None].expand(5, 3)
    b = torch.tensor([1.0, 1.0, 1.0, 3.0, 1.0], dtype=torch.float64)[:, None]

    def f(z):
        fz = a * z + b
        fz[4] = torch.where(z[4] > 1.7, torch.nan, fz[4])
        return fz

    sol = dq.fixed_point(f, z0, solver="picard", max_iter=30, backward="none", backend=backend)
    expected = [Status.CONVERGED, Status.MAX_ITER, Status.STALLED, Status.DIVERGED, Status.NON_FINITE]
    assert sol.status.tolist() == expected
    assert sol.converged.tolist() == [True, False, False, False, False]
    assert sol.steps.tolist() == [27, 30, 30, 30, 4]
    assert sol.status.dtype == sol.steps.dtype == torch.int32
    assert sol.summary() == (
        "1 converged, 1 max_iter, 1 non_finite, 1 diverged, 1 stalled; 30 evaluations, "
        f"largest residual {float(sol.residual.max()):.2e}"
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOME_SOLVERS)
@pytest.mark.parametrize("returns", ["best", "last"])
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_non_finite_sample_keeps_its_best_finite_iterate(bad, returns, solver, backend):
    p = problem(4, 8, dtype=torch.float64, slowest=0.9)
    seen = []

    def f(z, *args):
        fz = pull(z, *args)
        seen.append((z[2].clone(), float(relative_residual(z, fz)[2])))
        if len(seen) == 4:
            fz[2, 5] = bad
        return fz

    sol = solve(p, f, solver=solver, rtol=1e-9, max_iter=60, returns=returns, backend=backend)
    assert sol.status[2] == Status.NON_FINITE
    assert sol.steps[2] == 4
    best, residual = min(seen[:3], key=lambda pair: pair[1])
    assert torch.equal(sol.z[2], best)
    assert float(sol.residual[2]) == pytest.approx(residual, rel=1e-12)
    others = [0, 1, 3]
    assert_same_samples(
        sol, others, solve(p, solver=solver, rtol=1e-9, max_iter=60, returns=returns, backend=backend), others
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_sample_that_is_never_finite_returns_its_start(solver, backend):
    p = problem(3, 4, zero=False)
    p.x[1] = torch.nan
    sol = solve(p, solver=solver, backend=backend)
    assert sol.status.tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    assert sol.steps[1] == 1
    assert torch.equal(sol.z[1], p.z0[1])
    assert sol.residual[1] == torch.inf


# ---- what is returned ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (0,), (2, 3, 0, 4)])
def test_empty_state_returns_at_once(shape, solver, backend):
    z0 = torch.empty(shape)
    sol = dq.fixed_point(never, z0, solver=solver, trace=True, backward="none", backend=backend, throw=True)
    assert sol.z.shape == shape
    assert sol.nfe == 0
    assert sol.converged.tolist() == [True] * shape[0]
    assert sol.residual.tolist() == [0.0] * shape[0]
    assert sol.steps.tolist() == [0] * shape[0]
    assert sol.trace.shape == (0, shape[0])
    assert "0 evaluations" in sol.summary()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_root_is_the_fixed_point_of_the_shifted_map(solver, backend):
    p = problem(4, 9, dtype=torch.float64)
    sol = dq.root(
        lambda z, *args: pull(z, *args) - z, p.z0, p.args, solver=solver, rtol=1e-8, backend=backend, backward="none"
    )
    assert bool(sol.converged.all())
    g = pull(sol.z, *p.args) - sol.z
    shifted = sol.z + g
    assert bool((g.norm(dim=1) <= 1e-8 * (1 + 1e-6) * shifted.norm(dim=1)).all())
    assert torch.allclose(sol.residual, g.norm(dim=1) / shifted.norm(dim=1), rtol=1e-6, atol=0)


def test_root_takes_trees_and_names_g_in_its_errors():
    z0 = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 1)}
    sol = dq.root(lambda z: {"a": 1 - z["a"], "b": 0.5 - z["b"]}, z0, backward="none")
    assert torch.equal(sol.z["a"], torch.ones(2, 3))
    assert torch.equal(sol.z["b"], torch.full((2, 1), 0.5))
    with pytest.raises(TypeError, match=r"g must be callable, got int"):
        dq.root(3, torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"g\(z\) must have the structure of z0"):
        dq.root(lambda z: (z, z), torch.zeros(2, 3), backward="none")
    with pytest.raises(ValueError, match=r"g\(z\)|f\(z\)"):
        dq.root(lambda z: torch.zeros(2, 4), torch.zeros(2, 3), backward="none")


def test_root_of_a_wrong_shape_that_broadcasts_raises():
    with pytest.raises(ValueError, match=r"g\(z\) must have the shape of z0"):
        dq.root(lambda z: torch.zeros(3), torch.zeros(2, 3), backward="none")


# ---- modes ----


def test_linear_problem_is_solved_to_the_accuracy_the_tolerance_promises():
    f, exact = linear(8, 30, norm=0.9)
    for solver in SOLVERS.values():
        sol = dq.fixed_point(f, torch.zeros_like(exact), solver=solver, rtol=1e-9, max_iter=2000, backward="none")
        assert bool(sol.converged.all())
        # ||z - z*|| <= ||f(z) - z|| / (1 - ||A||)
        assert bool(((sol.z - exact).norm(dim=1) <= 10 * 1e-9 * f(sol.z).norm(dim=1) * (1 + 1e-6)).all())


def test_solves_raise_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sol = solve(problem(3, 5), trace=True)
    assert EPS[torch.float32] < float(sol.trace[0].max())
