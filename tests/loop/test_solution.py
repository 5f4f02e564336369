"""What a solve returns: the iterate its residual belongs to, records, pictures; what a callback may do."""

from __future__ import annotations

import pickle

import pytest
import torch
from problems import (
    ACCELERATED,
    BACKENDS,
    EPS,
    ONE_OF_EACH,
    SOLVERS,
    assert_same_solution,
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
    if returns == "last":
        assert torch.equal(sol.residual, last)
    else:  # that of the least ||f(z) - z||, which is the least residual too but where ||f(z)|| differs
        assert bool((sol.residual <= trace.min(dim=0).values * 1.01).all())


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


def test_plot_of_an_empty_trace_raises_no_index_error():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    sol = dq.fixed_point(lambda z: z, torch.empty(0, 3), trace=True, backward="none")
    try:
        ax = sol.plot()
    except ValueError as error:
        assert "trace" in str(error)
    else:
        assert ax.get_xlabel()


# ---- magnitude ----


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


def test_summary_names_the_tensor_that_is_far_off():
    z0 = {"large": torch.zeros(3, 40), "small": (torch.zeros(3, 2),)}
    b = torch.tensor([1.0, 1.0, 0.5])[:, None]

    def f(z):
        return {"large": 0.1 * z["large"] + 100, "small": (0.99 * z["small"][0] + 1e-3 * b,)}

    sol = dq.fixed_point(f, z0, solver="picard", rtol=1e-3)
    assert sol.converged.all()
    lines = sol.summary(f(sol.z)).splitlines()
    assert lines[0] == sol.summary() and len(lines) == 3
    moved = (f(sol.z)["small"][0] - sol.z["small"][0]).norm(dim=1) / f(sol.z)["small"][0].norm(dim=1)
    assert float(moved.max()) > 0.05
    assert lines[2] == f"  ['small'][0]: largest residual {float(moved.max()):.2e}, sample {int(moved.argmax())}"
    assert float(lines[1].split("residual ")[1].split(",")[0]) <= 1e-3
    with pytest.raises(TypeError, match="fz must be structured like z"):
        sol.summary(sol.z["large"])
    with pytest.raises(ValueError, match=r"fz at \['large'\] must have the shape"):
        sol.summary({"large": torch.zeros(3), "small": sol.z["small"]})


def test_summary_of_a_plain_state_and_of_tokens():
    f = lambda z: 0.5 * z + 1  # noqa: E731
    sol = dq.fixed_point(f, torch.zeros(2, 3, 4, dtype=torch.bfloat16), batch_dims=2)
    assert sol.summary(f(sol.z)).splitlines()[1].startswith("  z: largest residual ")
    one = dq.fixed_point(f, torch.zeros(5), batch_dims=0)
    assert (
        one.summary(f(one.z)).splitlines()[1].startswith("  z: largest residual ")
        and "sample" not in one.summary(f(one.z)).splitlines()[1]
    )
