"""``fixed_point`` and ``root``: what is counted, how samples end, what is returned, what is refused."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from problems import (
    ACCELERATED,
    BACKENDS,
    EPS,
    EVERY_SOLVER,
    ONE_OF_EACH,
    SOLVERS,
    SOME_SOLVERS,
    Counted,
    Problem,
    assert_same_samples,
    assert_same_solution,
    linear,
    problem,
    pull,
    relative_residual,
    residual_bound,
    same_bits,
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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("returns", ["best", "last"])
@pytest.mark.parametrize("solver", ONE_OF_EACH)
@pytest.mark.parametrize("max_iter", [1, 2, 5, 12])
def test_residual_is_that_of_exactly_the_returned_iterate(max_iter, solver, returns, dtype, backend):
    p = problem(6, 21, dtype=dtype, slowest=1.2, zero=False)
    sol = solve(p, solver=solver, rtol=0.0, max_iter=max_iter, returns=returns, trace=True, backend=backend)
    fz = pull(sol.z, *p.args)
    assert bool(
        ((sol.residual.double() - relative_residual(sol.z, fz)).abs() <= residual_bound(sol.z, fz, dtype)).all()
    )
    trace = torch.where(torch.isnan(sol.trace), torch.inf, sol.trace)
    last = sol.trace[sol.steps.long() - 1, torch.arange(6)]
    assert torch.equal(sol.residual, trace.min(dim=0).values if returns == "best" else last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("returns", ["best", "last"])
@pytest.mark.parametrize("solver", [SOLVERS["anderson"], SOLVERS["anderson-mixing"], SOLVERS["picard"]])
@pytest.mark.parametrize("stop", [1, 2, 3, 6])
def test_callback_that_stops_ends_as_max_iter_would(stop, solver, returns, backend):
    p = problem(6, 21, slowest=1.3, zero=False)
    sol = solve(p, solver=solver, returns=returns, callback=lambda k, state: k == stop, backend=backend)
    limited = solve(p, solver=solver, returns=returns, max_iter=stop, backend=backend)
    assert sol.nfe == stop
    unfinished = ~limited.converged
    assert bool((sol.status[unfinished] == Status.STOPPED).all())
    assert bool(unfinished.any())
    for name in ("z", "steps", "converged"):
        assert same_bits(getattr(sol, name), getattr(limited, name)), name
    # A sample that is known to stop may have its norms taken more carefully.
    assert bool(((sol.residual - limited.residual).abs() <= 4 * EPS[torch.float32] * limited.residual).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_callback_is_called_after_every_evaluation_with_a_copy_of_the_iterate(backend):
    p = problem(3, 6, dtype=torch.float64)
    kept, copies, counts = [], [], []

    def callback(k, state):
        counts.append(k)
        kept.append(state.z)
        copies.append(state.z.clone())
        assert state.nfe == k

    sol = solve(p, rtol=1e-6, callback=callback, backend=backend)
    assert counts == list(range(1, sol.nfe + 1))
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ACCELERATED)
def test_callback_that_writes_into_its_iterate_changes_nothing(solver, backend):
    p = problem(3, 6)
    expected = solve(p, solver=solver, backend=backend)

    def callback(k, state):
        state.z.fill_(7.0)

    assert_same_solution(solve(p, solver=solver, callback=callback, backend=backend), expected)


def test_callback_error_passes_through():
    p = problem(3, 6)

    def callback(k, state):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        solve(p, callback=callback)


@pytest.mark.parametrize("backend", BACKENDS)
def test_throw_raises_with_the_whole_solution(backend):
    p = problem(4, 8, slowest=0.99)
    expected = solve(p, max_iter=3, trace=True, backend=backend)
    with pytest.raises(dq.ConvergenceError, match=r"did not converge: .*3 evaluations") as caught:
        solve(p, max_iter=3, trace=True, throw=True, backend=backend)
    assert_same_solution(caught.value.solution, expected)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert_same_solution(again.solution, expected)
    assert bool(solve(p, throw=True, backend=backend).converged.all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_events_count_fallbacks_by_cause(backend):
    p = problem(4, 30)
    p.rate.fill_(0.99)
    sol = solve(p, solver=dq.Anderson(m=4), rtol=0.0, max_iter=12, backend=backend)
    assert set(sol.events) >= {"evictions", "solve_fallbacks", "step_fallbacks", "growth_restarts", "full_restarts"}
    # Every evaluation from the second on adds a column. After the fifth the history is full and names the next one to
    # go, and so on up to the last but one: a sample that stops needs no room.
    assert sol.events["evictions"].tolist() == [11 - 4] * 4
    assert all(count.shape == (4,) for count in sol.events.values())


def test_summary_of_a_converged_solve():
    sol = dq.fixed_point(lambda z: torch.zeros_like(z), torch.zeros(2, 3), backward="none")
    assert sol.summary() == "2 converged; 1 evaluations, largest residual 0.00e+00"


def test_progress_bar_counts_evaluations(capsys):
    pytest.importorskip("tqdm")
    p = problem(3, 6)
    sol = solve(p, progress=True)
    assert_same_solution(sol, solve(p))
    shown = capsys.readouterr().err
    assert "/100" in shown


def test_plot_draws_median_and_band():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sol = solve(problem(5, 9), trace=True)
    ax = sol.plot(label="mine")
    (line,) = ax.get_lines()
    assert line.get_label() == "mine"
    assert len(line.get_xdata()) == sol.nfe
    assert line.get_ydata()[0] == pytest.approx(float(sol.trace[0].double().median()))
    assert sol.plot(ax=ax) is ax
    assert len(ax.get_lines()) == 2
    plt.close("all")


def test_plot_without_a_trace_raises():
    with pytest.raises(ValueError, match="trace=True"):
        solve(problem(2, 3)).plot()


# ---- empty ----


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


def test_plot_of_an_empty_trace_raises_no_index_error():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    sol = dq.fixed_point(never, torch.empty(0, 3), trace=True, backward="none")
    try:
        ax = sol.plot()
    except ValueError as error:
        assert "trace" in str(error)
    else:
        assert ax.get_xlabel()


# ---- magnitude ----


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_start_is_left_as_it_was(backend):
    z0 = torch.randn(3, 8)
    before = z0.clone()
    dq.fixed_point(lambda z: 0.5 * z + 1, z0, backend=backend, backward="none")
    assert torch.equal(z0, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_of_two_solves_share_no_memory(backend):
    p = problem(3, 8)
    first = solve(p, backend=backend)
    z = first.z.clone()
    second = solve(p, backend=backend)
    second.z.fill_(0)
    assert torch.equal(first.z, z)


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
