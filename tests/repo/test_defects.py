"""Where torchdeq 0.1.0 goes wrong deqfast does not: the claims of bench/claims.py, on every backend.

bench/test_rival_defects.py shows the other side.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from problems import BACKENDS

import deqfast as dq
from bench import claims


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def evaluations(f, z0, rtol, backend, **options) -> int:
    sol = dq.fixed_point(f, z0, rtol=rtol, max_iter=400, backend=backend, backward="none", **options)
    assert bool(sol.converged.all())
    return sol.nfe


@pytest.mark.parametrize("solver", ["anderson", "broyden", dq.Anderson(m=6, type=2), dq.Anderson(m=6, type=1)])
def test_scale_of_a_problem_does_not_change_the_evaluations(solver, backend):
    claims.assert_scaled_counts(functools.partial(evaluations, backend=backend, solver=solver))


def test_acceleration_beats_plain_iteration_with_the_defaults(backend):
    accelerated = functools.partial(evaluations, backend=backend)
    claims.assert_faster_than_plain(accelerated, functools.partial(accelerated, solver="picard"))


@pytest.mark.parametrize("solver", ["anderson", "broyden", "picard"])
def test_nan_sample_keeps_its_best_iterate_and_stops_nobody(solver, backend):
    options = {"solver": solver, "rtol": 1e-9, "max_iter": 400, "backend": backend, "backward": "none"}
    claims.assert_nan_sample_is_contained(lambda f, z0: dq.fixed_point(f, z0, **options).z)


def test_broyden_with_six_columns_converges(backend):
    solver = dq.Broyden(memory=6)
    claims.assert_limited_memory_converges(functools.partial(evaluations, backend=backend, solver=solver))


def test_finished_samples_rest_while_a_slow_one_goes_on(backend):
    options = {"solver": "picard", "rtol": 1e-8, "max_iter": 3000, "backend": backend, "backward": "none"}
    claims.assert_finished_samples_rest(lambda f, z0: dq.fixed_point(f, z0, **options))


def test_slow_sample_pays_alone(backend):
    options = {"solver": "picard", "rtol": 1e-6, "max_iter": 3000, "backend": backend, "backward": "none"}
    claims.assert_slow_sample_pays_alone(lambda f, z0, rate: dq.fixed_point(f, z0, (rate,), compact=True, **options))


def never(*_):
    raise AssertionError("f was called")


@pytest.mark.parametrize("wrong", [{"tolerance": 1e-3}, {"f_tol": 1e-3}, {"stop_mode": "rel"}, {"lam": 1e-4}])
def test_unknown_options_raise(wrong):
    (name,) = wrong
    with pytest.raises(TypeError, match=name):
        dq.fixed_point(never, torch.zeros(2, 3), **wrong)
    for make in (dq.Anderson, dq.Broyden, dq.Picard):
        with pytest.raises(TypeError, match=name):
            make(**wrong)


def test_tolerance_of_a_call_is_honoured(backend):
    z0 = torch.zeros(2, 3, dtype=torch.float64)
    options = {"solver": "picard", "max_iter": 500, "backend": backend, "backward": "none"}
    claims.assert_tolerance_is_honoured(
        lambda rtol: float(dq.fixed_point(lambda z: 0.9 * z + 1, z0, rtol=rtol, **options).residual.max())
    )


def test_options_of_the_caller_are_as_before_after_a_solve(backend):
    solver = dq.Broyden(memory=3)
    options = {"solver": solver, "rtol": 1e-6, "max_iter": 50, "backend": backend, "backward": "none"}
    args = ({"x": torch.ones(2, 3)}, [1.0])
    before = copy.deepcopy((options, args))
    dq.fixed_point(lambda z, a, b: 0.5 * z + a["x"] * b[0], torch.zeros(2, 3), args, **options)
    assert options == before[0]
    assert torch.equal(args[0]["x"], before[1][0]["x"])
    assert args[1] == before[1][1]


def test_damped_iteration_reports_the_residual_of_f(backend):
    z0 = torch.ones(1, 1, dtype=torch.float64)

    def residual(damping):
        solver = dq.Picard(damping=damping)
        sol = dq.fixed_point(lambda z: 0.5 * z + 1, z0, solver=solver, max_iter=1, backend=backend, backward="none")
        return float(sol.residual[0]) * 1.5  # relative to ||f(z)||

    claims.assert_damping_does_not_flatter(residual)


@pytest.mark.parametrize("backward", [None, "none"])
def test_a_compiled_model_has_one_graph_break_a_solve(backward):
    claims.assert_compiled_in_three_graphs(functools.partial(dq.fixed_point, backward=backward), lambda sol: sol.z)
