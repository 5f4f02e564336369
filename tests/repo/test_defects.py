"""Measured defects of torchdeq 0.1.0: each check passes here, and fails there where that shows quickly."""

from __future__ import annotations

import copy
import functools
import importlib
import warnings

import pytest
import torch
from problems import BACKENDS, Counted, linear

import deqfast as dq


@pytest.fixture(scope="module")
def torchdeq():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes in its docstrings
        return pytest.importorskip("torchdeq")


def deqfast_evaluations(f, z0, rtol, backend, **options) -> int:
    sol = dq.fixed_point(f, z0, rtol=rtol, max_iter=400, backend=backend, backward="none", **options)
    assert bool(sol.converged.all())
    return sol.nfe


def torchdeq_evaluations(torchdeq, f, z0, rtol, solver="anderson", **options) -> int:
    counted = Counted(f)
    _, _, stat = torchdeq.solver.get_solver(solver)(counted, z0, max_iter=400, tol=rtol, stop_mode="rel", **options)
    assert bool((stat["rel_lowest"] < rtol).all()), "did not converge"
    return len(counted.rows)


# ---- an absolute ridge: the scale of a problem decides whether it is solved ----


def assert_scaled_counts(evaluations) -> None:
    f, exact = linear(4, 30, norm=0.95, symmetric=True)
    counts = []
    for s in (1e3, 1.0, 1e-3):
        scaled = lambda z: s * f(z / s)  # noqa: B023, E731
        counts.append(evaluations(scaled, torch.zeros_like(exact), 1e-6))
    assert max(counts) - min(counts) <= 1, counts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ["anderson", "broyden", dq.Anderson(m=6, type=2), dq.Anderson(m=6, type=1)])
def test_scale_of_a_problem_does_not_change_the_evaluations(solver, backend):
    assert_scaled_counts(lambda f, z0, rtol: deqfast_evaluations(f, z0, rtol, backend, solver=solver))


def test_scale_of_a_problem_changes_torchdeq_evaluations(torchdeq):
    with pytest.raises(AssertionError):
        assert_scaled_counts(lambda f, z0, rtol: torchdeq_evaluations(torchdeq, f, z0, rtol))


def assert_faster_than_plain(evaluations, plain) -> None:
    """A float32 problem whose residual soon lies below the ridge."""
    f, exact = linear(4, 30, dtype=torch.float32, norm=0.97, symmetric=True)
    f_small = lambda z: 1e-2 * f(z / 1e-2)  # noqa: E731
    z0 = torch.zeros_like(exact)
    assert evaluations(f_small, z0, 1e-5) < 0.6 * plain(f_small, z0, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_acceleration_beats_plain_iteration_with_the_defaults(backend):
    assert_faster_than_plain(
        lambda f, z0, rtol: deqfast_evaluations(f, z0, rtol, backend),
        lambda f, z0, rtol: deqfast_evaluations(f, z0, rtol, backend, solver="picard"),
    )


def test_acceleration_of_torchdeq_loses_that_with_its_defaults(torchdeq):
    with pytest.raises(AssertionError):
        assert_faster_than_plain(
            lambda f, z0, rtol: torchdeq_evaluations(torchdeq, f, z0, rtol),
            lambda f, z0, rtol: torchdeq_evaluations(torchdeq, f, z0, rtol, "fixed_point_iter"),
        )


# ---- one NaN sample ----


RATES = torch.linspace(0.2, 0.9, 12, dtype=torch.float64)


def nan_map(calls: list[int]):
    """Rows 0 and 2 contract; row 1 does until its fifth evaluation, and is NaN from then on."""

    def f(z):
        calls.append(1)
        fz = RATES * z + 1
        if len(calls) >= 5:
            fz[1] = torch.nan
        return fz

    return f


def assert_nan_sample_is_contained(solve) -> None:
    calls: list[int] = []
    z = solve(nan_map(calls), torch.zeros(3, 12, dtype=torch.float64))
    assert bool(torch.isfinite(z).all()), "the best iterate is lost"
    assert float((RATES * z + 1 - z)[1].norm()) < 0.8 * 12**0.5  # at the start f - z is one
    assert len(calls) < 400, "the batch was dragged on"
    exact = 1 / (1 - RATES)
    assert bool(((z - exact)[[0, 2]].norm(dim=1) <= 10 * 1e-9 * exact.norm()).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ["anderson", "broyden", "picard"])
def test_nan_sample_keeps_its_best_iterate_and_stops_nobody(solver, backend):
    assert_nan_sample_is_contained(
        lambda f, z0: dq.fixed_point(f, z0, solver=solver, rtol=1e-9, max_iter=400, backend=backend, backward="none").z
    )


@pytest.mark.parametrize("solver", ["anderson", "broyden", "fixed_point_iter"])
def test_nan_sample_loses_its_best_iterate_in_torchdeq(solver, torchdeq):
    run = torchdeq.solver.get_solver(solver)
    with pytest.raises(AssertionError):
        assert_nan_sample_is_contained(lambda f, z0: run(f, z0, max_iter=400, tol=1e-9, stop_mode="rel")[0])


# ---- limited memory ----


def assert_limited_memory_converges(evaluations) -> None:
    f, exact = linear(3, 40, norm=0.97, symmetric=True)
    assert evaluations(f, torch.zeros_like(exact), 1e-6) <= 200


@pytest.mark.parametrize("backend", BACKENDS)
def test_broyden_with_six_columns_converges(backend):
    assert_limited_memory_converges(
        lambda f, z0, rtol: deqfast_evaluations(f, z0, rtol, backend, solver=dq.Broyden(memory=6))
    )


def test_broyden_of_torchdeq_with_six_columns_does_not(torchdeq):
    with pytest.raises((AssertionError, RuntimeError)):
        assert_limited_memory_converges(
            lambda f, z0, rtol: torchdeq_evaluations(torchdeq, f, z0, rtol, "broyden", LBFGS_thres=6)
        )


# ---- one slow sample ----


def assert_finished_samples_rest(solve) -> None:
    """Rows with rate 0.1 are done after about nine evaluations; one row with rate 0.99 is not."""
    rate = torch.full((8, 1), 0.1, dtype=torch.float64)
    rate[3] = 0.99
    seen = []

    def f(z):
        seen.append(z.clone())
        return rate * z + 1

    solve(f, torch.zeros(8, 2, dtype=torch.float64))
    fast = [0, 1, 2, 4, 5, 6, 7]
    assert len(seen) > 100
    assert all(torch.equal(z[fast], seen[20][fast]) for z in seen[20:]), "finished samples still move"


@pytest.mark.parametrize("backend", BACKENDS)
def test_finished_samples_rest_while_a_slow_one_goes_on(backend):
    options = {"solver": "picard", "rtol": 1e-8, "max_iter": 3000, "backend": backend, "backward": "none"}
    assert_finished_samples_rest(lambda f, z0: dq.fixed_point(f, z0, **options))


def test_finished_samples_still_move_in_torchdeq(torchdeq):
    run = torchdeq.solver.get_solver("fixed_point_iter")
    with pytest.raises(AssertionError, match="still move"):
        assert_finished_samples_rest(lambda f, z0: run(f, z0, max_iter=3000, tol=1e-8, stop_mode="rel", tau=0.9))


def assert_slow_sample_pays_alone(rows) -> None:
    f_rate = torch.full((16, 1), 0.1, dtype=torch.float64)
    f_rate[3] = 0.99
    f = Counted(lambda z, rate: rate * z + 1)
    rows(f, torch.zeros(16, 2, dtype=torch.float64), f_rate)
    assert sum(f.rows) < 4 * len(f.rows), "every evaluation saw every sample"


@pytest.mark.parametrize("backend", BACKENDS)
def test_slow_sample_pays_alone(backend):
    options = {"solver": "picard", "rtol": 1e-6, "max_iter": 3000, "backend": backend, "backward": "none"}
    assert_slow_sample_pays_alone(lambda f, z0, rate: dq.fixed_point(f, z0, (rate,), compact=True, **options))


def test_all_pay_for_a_slow_sample_in_torchdeq(torchdeq):
    run = torchdeq.solver.get_solver("fixed_point_iter")
    with pytest.raises(AssertionError, match="every evaluation saw every sample"):
        assert_slow_sample_pays_alone(
            lambda f, z0, rate: run(lambda z: f(z, rate), z0, max_iter=3000, tol=1e-6, stop_mode="rel")
        )


# ---- options that are ignored, configurations that change ----


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


def test_unknown_options_pass_in_torchdeq(torchdeq):
    deq = torchdeq.get_deq(tolerance=1e-3, nonsense=True)
    z, _ = deq(lambda z: 0.5 * z + 1, torch.zeros(2, 3))
    assert z[-1].shape == (2, 3)
    torchdeq.solver.get_solver("anderson")(lambda z: 0.5 * z + 1, torch.zeros(2, 3), tolerance=1e-3)


def assert_tolerance_is_honoured(residual) -> None:
    """residual(tolerance) of a solve that asks for it."""
    loose, tight = residual(1e-1), residual(1e-8)
    assert tight <= 1e-8 < loose <= 1e-1


@pytest.mark.parametrize("backend", BACKENDS)
def test_tolerance_of_a_call_is_honoured(backend):
    z0 = torch.zeros(2, 3, dtype=torch.float64)

    def residual(rtol):
        sol = dq.fixed_point(
            lambda z: 0.9 * z + 1, z0, solver="picard", rtol=rtol, max_iter=500, backend=backend, backward="none"
        )
        return float(sol.residual.max())

    assert_tolerance_is_honoured(residual)


def test_tolerance_of_a_call_is_ignored_by_torchdeq(torchdeq):
    def residual(tol):
        deq = torchdeq.get_deq(f_max_iter=500, f_stop_mode="rel")
        _, info = deq(lambda z: 0.9 * z + 1, torch.zeros(2, 3, dtype=torch.float64), solver_kwargs={"f_tol": tol})
        return float(info["rel_lowest"].max())

    with pytest.raises(AssertionError):
        assert_tolerance_is_honoured(residual)


@pytest.mark.parametrize("backend", BACKENDS)
def test_options_of_the_caller_are_as_before_after_a_solve(backend):
    solver = dq.Broyden(memory=3)
    options = {"solver": solver, "rtol": 1e-6, "max_iter": 50, "backend": backend, "backward": "none"}
    args = ({"x": torch.ones(2, 3)}, [1.0])
    before = copy.deepcopy((options, args))
    dq.fixed_point(lambda z, a, b: 0.5 * z + a["x"] * b[0], torch.zeros(2, 3), args, **options)
    assert options == before[0]
    assert torch.equal(args[0]["x"], before[1][0]["x"])
    assert args[1] == before[1][1]


def test_configuration_of_the_caller_is_changed_by_torchdeq(torchdeq):
    config = {"f_max_iter": 7}
    torchdeq.get_deq(config, f_tol=1e-2)
    assert config != {"f_max_iter": 7}


def assert_damping_does_not_flatter(residual) -> None:
    """f(z) = z / 2 + 1 at z = 1: f - z = 1/2, whatever the damping."""
    for damping in (1.0, 0.5, 0.1):
        assert residual(damping) == pytest.approx(0.5, rel=1e-12), damping


@pytest.mark.parametrize("backend", BACKENDS)
def test_damped_iteration_reports_the_residual_of_f(backend):
    z0 = torch.ones(1, 1, dtype=torch.float64)

    def residual(damping):
        sol = dq.fixed_point(
            lambda z: 0.5 * z + 1, z0, solver=dq.Picard(damping=damping), max_iter=1, backend=backend, backward="none"
        )
        return float(sol.residual[0]) * 1.5  # relative to ||f(z)||

    assert_damping_does_not_flatter(residual)


def test_damped_iteration_of_torchdeq_reports_less(torchdeq):
    run = torchdeq.solver.get_solver("fixed_point_iter")
    z0 = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_damping_does_not_flatter(
            lambda damping: float(run(lambda z: 0.5 * z + 1, z0, max_iter=1, tau=damping)[2]["abs_lowest"][0])
        )


# ---- torch.compile ----


class Layered(torch.nn.Module):
    """linear -> equilibrium -> linear."""

    def __init__(self, solver) -> None:
        super().__init__()
        self.first, self.inner, self.last = (torch.nn.Linear(6, 6) for _ in range(3))
        torch.nn.init.normal_(self.inner.weight, std=0.1)
        self.solver = solver

    def forward(self, x):
        h = self.first(x)
        z = self.solver(lambda z: torch.tanh(self.inner(z) + h), torch.zeros_like(h))
        return self.last(z.z if isinstance(z, dq.Solution) else z[0][-1])


def assert_compiled_in_three_graphs(solver) -> None:
    """What lies before the solve, f, and what lies after it."""
    model, x = Layered(solver), torch.randn(4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's imports, and what the tracer meets
        dynamo = importlib.import_module("torch._dynamo")
        dynamo.reset()
        dynamo.utils.counters.clear()
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))
        breaks = sum(dynamo.utils.counters["graph_break"].values())
        graphs = dynamo.utils.counters["stats"]["unique_graphs"]
        dynamo.reset()
        dynamo.utils.counters.clear()
    assert (breaks, graphs) == (1, 3), f"{breaks} graph breaks, {graphs} graphs"


@pytest.mark.parametrize("backward", [None, "none"])
def test_a_compiled_model_has_one_graph_break_a_solve(backward):
    assert_compiled_in_three_graphs(functools.partial(dq.fixed_point, backward=backward))


def test_a_compiled_model_falls_apart_in_torchdeq(torchdeq):
    with pytest.raises(AssertionError, match="graph breaks"):
        assert_compiled_in_three_graphs(torchdeq.get_deq())
