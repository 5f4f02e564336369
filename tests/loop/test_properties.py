"""What holds whatever the shapes, dtypes, memory sizes and company: independence of samples first of all."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from problems import (
    BACKENDS,
    EVERY_SOLVER,
    ONE_OF_EACH,
    ORDERED,
    SOLVERS,
    SOME_SOLVERS,
    alike,
    assert_same_samples,
    assert_same_solution,
    problem,
    pull,
    relative_residual,
    residual_bound,
    solve,
    threads,
)

import deqfast as dq
from deqfast import Status

SIZES = [1, 5, 8, 9, 31, 32, 33, 64, 1000, 4097]
LARGE = 70000  # the step is split over threads; Broyden takes its Gram form


def sizes_for(backend: str) -> list[int]:
    return SIZES if backend == "native" else [1, 5, 8, 33, 1000]


# ---- company ----


@pytest.mark.parametrize("backend", ORDERED)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_sample_is_the_same_alone_in_any_part_and_any_order(solver, backend):
    for N in sizes_for(backend):
        p = problem(19, N)
        options = {"solver": solver, "rtol": 1e-5, "max_iter": 25, "backend": backend}
        sol = solve(p, **options)
        for part in ([0], [18], [5, 6], list(range(3, 19)), torch.randperm(19).tolist(), [4] * 17):
            assert_same_samples(solve(p.rows(part), **options), slice(None), sol, part)


@pytest.mark.parametrize("backend", ORDERED)
@pytest.mark.parametrize("solver", ["anderson", "anderson-2", "anderson-int8", "broyden", "picard"])
def test_large_sample_is_the_same_alone_and_with_any_number_of_threads(solver, backend):
    p = problem(3, LARGE, slowest=0.9)
    options = {"solver": SOLVERS[solver], "rtol": 1e-5, "max_iter": 7, "backend": backend}
    sol = solve(p, **options)
    assert_same_samples(solve(p.rows([1]), **options), [0], sol, [1])
    with threads(1):
        assert_same_solution(solve(p, **options), sol)


@pytest.mark.parametrize("backend", ORDERED)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_thread_count_changes_no_bit(solver, backend):
    for B, N in ((37, 7), (37, 40), (3, 4097)):
        p = problem(B, N)
        options = {"solver": solver, "rtol": 1e-5, "max_iter": 20, "trace": True, "backend": backend}
        with threads(1):
            one = solve(p, **options)
        with threads(2):
            two = solve(p, **options)
        assert_same_solution(one, two)


NEIGHBOURS = {
    "nan": lambda p, rows: p.x[rows].fill_(torch.nan),
    "inf": lambda p, rows: p.x[rows].fill_(torch.inf),
    "huge": lambda p, rows: p.x[rows].mul_(1e30),
    "tiny": lambda p, rows: p.x[rows].mul_(1e-30),
    "slow": lambda p, rows: p.rate[rows].fill_(0.999),
    "divergent": lambda p, rows: p.rate[rows].fill_(-40.0),
    "solved": lambda p, rows: (p.x[rows].fill_(0), p.z0[rows].fill_(0)),
}


def check_neighbours(solver: Any, N: int, backend: str) -> None:
    p = problem(18, N)
    options = {"solver": solver, "rtol": 1e-5, "max_iter": 15, "backend": backend}
    expected = solve(p, **options)
    quiet = [0, 3, 7, 9, 16]
    for disturb in NEIGHBOURS.values():
        q = p.rows(slice(None))
        for b in set(range(18)) - set(quiet):
            disturb(q, slice(b, b + 1))
        assert_same_samples(solve(q, **options), quiet, expected, quiet)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_short_sample_is_unaffected_by_nan_slow_or_solved_neighbours(solver, backend):
    check_neighbours(solver, 6, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOME_SOLVERS)
def test_sample_is_unaffected_by_nan_slow_or_solved_neighbours(solver, backend):
    for N in (33, 1030):
        check_neighbours(solver, N, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_sample_is_unaffected_by_a_neighbour_that_turns_bad_in_the_middle(bad, solver, backend):
    for N in (6, 33, 1030):
        p = problem(18, N)
        calls = []

        def f(z, *args):
            calls.append(1)  # noqa: B023
            fz = pull(z, *args)
            if len(calls) > 3:  # noqa: B023
                fz[::2, N // 2] = bad  # noqa: B023
            return fz

        options = {"solver": solver, "rtol": 1e-5, "max_iter": 20, "backend": backend}
        odd = slice(1, None, 2)
        assert_same_samples(solve(p, f, **options), odd, solve(p, **options), odd)


# ---- memory that was never written ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_poisoned_memory_changes_no_bit(solver, backend, poisoned_memory):
    for dtype, shape in (
        (torch.float32, (5, 7)),
        (torch.float32, (18, 33)),
        (torch.float32, (2, 1500)),
        (torch.float64, (18, 7)),
        (torch.float64, (2, 1500)),
        (torch.bfloat16, (3, 40)),
        (torch.float16, (3, 40)),
        (torch.complex64, (3, 9)),
    ):
        p = problem(*shape, dtype=dtype)
        options = {"solver": solver, "rtol": 1e-5, "max_iter": 14, "trace": True, "backend": backend}
        torch.use_deterministic_algorithms(False)
        clean = solve(p, **options)
        torch.use_deterministic_algorithms(True)
        poisoned = solve(p, **options)
        assert_same_solution(poisoned, clean)
        assert bool(torch.isfinite(poisoned.z.abs()).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_poisoned_memory_changes_no_bit_of_large_compacted_or_tree_solves(solver, backend, poisoned_memory):
    large, small = problem(2, LARGE), problem(18, 9)
    tree = ({"a": small.z0, "b": (small.z0[:, :4],)}, {"a": small.x, "b": (small.x[:, :4],)})

    def outcomes():
        options = {"solver": solver, "backend": backend, "backward": "none"}
        yield solve(large, max_iter=6, **options)
        yield solve(small, compact=(True, True), rtol=1e-5, **options)
        yield dq.fixed_point(pull, tree[0], (tree[1], small.rate), rtol=1e-5, **options)

    torch.use_deterministic_algorithms(False)
    clean = list(outcomes())
    torch.use_deterministic_algorithms(True)
    for a, b in zip(clean, outcomes(), strict=True):
        assert_same_solution(a, b)


# ---- anything ----

SOLVER = st.one_of(
    st.builds(
        dq.Anderson,
        m=st.integers(1, 12),
        type=st.sampled_from(["mixed", 1, 2]),
        mixing=st.sampled_from([1.0, 0.7, 0.1]),
        ridge=st.sampled_from([None, 0.0, 1e-8, 0.1]),
        history_dtype=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16, torch.int8]),
        evict=st.sampled_from(["least_useful", "oldest"]),
    ),
    st.builds(dq.Broyden, memory=st.none() | st.integers(2, 12), scale=st.sampled_from(["unit", "first_step"])),
    st.builds(dq.Picard, damping=st.sampled_from([1.0, 0.7, 0.1])),
)
DTYPE = st.sampled_from(
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
)
SHAPE = st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple) | st.integers(1, 80).map(lambda n: (n,))
OPTIONS = st.fixed_dictionaries(
    {
        "rtol": st.sampled_from([None, 0.0, 1e-5]),
        "atol": st.sampled_from([0.0, 1e-6]),
        "max_iter": st.integers(1, 25),
        "returns": st.sampled_from(["best", "last"]),
        "compact": st.sampled_from([False, (True, True)]),
    }
)


def any_problem(B, shape, dtype, seed, slowest):
    if shape:
        return problem(B, *shape, dtype=dtype, seed=seed, slowest=slowest, zero=bool(seed % 2))
    p = problem(B, 1, dtype=dtype, seed=seed, slowest=slowest)
    return type(p)(p.z0[:, 0], p.x[:, 0], p.rate)


def any_map(z, x, rate):
    """``pull``, also for samples of one number without a dimension for it."""
    if z.dim() > 1:
        return pull(z, x, rate)
    return pull(z[:, None], x[:, None], rate)[:, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis.settings(max_examples=120)
@hypothesis.given(
    B=st.integers(0, 20), shape=SHAPE, dtype=DTYPE, solver=SOLVER, options=OPTIONS, seed=st.integers(0, 5),
    slowest=st.sampled_from([0.5, 0.95, 1.5]), bad=st.booleans(),
)  # fmt: skip
def test_any_solve_is_told_truly(backend, B, shape, dtype, solver, options, seed, slowest, bad):
    p = any_problem(B, shape, dtype, seed, slowest)
    if bad and B:
        p.x[B // 2] = torch.nan
    sol = solve(p, any_map, solver=solver, trace=True, backend=backend, **options)
    assert sol.z.shape == p.z0.shape
    assert sol.z.dtype == dtype
    assert sol.trace.shape == (sol.nfe, B)
    assert sol.nfe == (int(sol.steps.max()) if B else 0)
    assert sol.nfe <= options["max_iter"]
    if not B:
        return
    fz = any_map(sol.z, *p.args)
    z, fz = (t.reshape(B, -1) for t in (sol.z, fz))
    finite = sol.status != Status.NON_FINITE
    assert finite.tolist() == [not (bad and b == B // 2) for b in range(B)]
    error = (sol.residual.double() - relative_residual(z, fz)).abs()
    true = (error <= residual_bound(z, fz, dtype)) | ~torch.isfinite(fz.abs()).all(dim=1)
    assert bool((true | ~finite).all()), (error, sol.residual)
    rtol = {
        None: {torch.float64: 1e-8, torch.complex128: 1e-8, torch.bfloat16: 2e-2, torch.float16: 4e-3}.get(dtype, 1e-4)
    }
    rtol = rtol.get(options["rtol"], options["rtol"])
    z64, f64 = (torch.view_as_real(t).flatten(1) if t.is_complex() else t for t in (z, fz))
    norm_g, norm_f = (f64.double() - z64.double()).norm(dim=1), f64.double().norm(dim=1)
    slack = residual_bound(z, fz, dtype) * norm_f
    within = norm_g <= options["atol"] + rtol * norm_f + slack
    assert bool((within | ~sol.converged).all())
    assert torch.equal(sol.converged, sol.status == Status.CONVERGED)
    out_of_steps = (sol.status >= Status.DIVERGED) | (sol.status == Status.MAX_ITER)
    assert bool(((sol.steps == options["max_iter"]) | ~out_of_steps).all())
    assert bool((sol.converged | out_of_steps | ~finite).all())
    evaluated = torch.arange(sol.nfe)[:, None] < sol.steps
    assert torch.equal(~torch.isnan(sol.trace), evaluated)


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis.settings(max_examples=60)
@hypothesis.given(
    B=st.integers(1, 20),
    shape=SHAPE,
    dtype=DTYPE,
    solver=SOLVER,
    options=OPTIONS,
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_any_part_of_a_batch_is_solved_as_in_the_whole(backend, B, shape, dtype, solver, options, seed, data):
    p = any_problem(B, shape, dtype, seed, 1.2)
    part = data.draw(st.lists(st.integers(0, B - 1), min_size=1, max_size=20))
    whole = solve(p, any_map, solver=solver, backend=backend, **options)
    some = solve(p.rows(part), any_map, solver=solver, backend=backend, **options)
    assert_same_samples(some, slice(None), whole, part)


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis.settings(max_examples=40)
@hypothesis.given(
    B=st.integers(1, 9), shape=SHAPE, dtype=DTYPE, solver=SOLVER, seed=st.integers(0, 5), at=st.integers(0, 8)
)
def test_any_state_goes_on_from_its_dict(backend, B, shape, dtype, solver, seed, at):
    p = any_problem(B, shape, dtype, seed, 0.95)
    states = [solver.init(p.z0, rtol=0.0, max_iter=12, backend=backend) for _ in range(2)]
    for state in states:
        while not state.done:
            if state is states[1] and state.nfe == at:
                state = solver.init(torch.zeros_like(p.z0), rtol=0.0, max_iter=12, backend=backend)
                state.load_state_dict(states[1].state_dict())
                states[1] = state
                at = -1
            state.step(any_map(state.z, *p.args))
    assert alike(states[0], states[1], backend)
