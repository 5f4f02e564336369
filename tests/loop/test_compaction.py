"""Dropping converged samples from what f sees changes the cost and nothing else."""

from __future__ import annotations

import pytest
import torch
from problems import (
    BACKENDS,
    EVERY_SOLVER,
    ONE_OF_EACH,
    Counted,
    assert_same_samples,
    assert_same_solution,
    problem,
    pull,
    same_bits,
    solve,
)

import deqfast as dq

BOTH = (True, True)  # of the arguments of ``pull``: said outright, so that nothing is left to confirm


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize(("B", "N"), [(1, 5), (2, 33), (17, 12), (33, 40)])
def test_answers_are_those_of_a_solve_without_compaction_bit_for_bit(B, N, solver, backend):
    p = problem(B, N, slowest=0.97)
    options = {"solver": solver, "rtol": 1e-4, "trace": True, "backend": backend}
    assert_same_solution(solve(p, compact=BOTH, **options), solve(p, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_answers_are_the_same_in_every_dtype(dtype, solver, backend):
    p = problem(9, 20, dtype=dtype)
    options = {"solver": solver, "max_iter": 30, "trace": True, "backend": backend}
    assert_same_solution(solve(p, compact=BOTH, **options), solve(p, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_samples_are_followed_too(backend):
    p = problem(5, 4097)
    for solver in (dq.Anderson(m=3), dq.Broyden(memory=5)):
        options = {"solver": solver, "rtol": 1e-4, "max_iter": 40, "backend": backend}
        assert_same_solution(solve(p, compact=BOTH, **options), solve(p, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_f_sees_the_rungs_of_a_ladder_that_hold_every_running_sample(solver, backend):
    p = problem(33, 8, slowest=0.98)
    f, running = Counted(pull), [33]
    sol = solve(
        p,
        f,
        solver=solver,
        compact=BOTH,
        rtol=1e-5,
        max_iter=300,
        backend=backend,
        callback=lambda k, state: running.append(int(state.running.sum())) or False,
    )
    sizes = {33, 25, 19, 15, 12, 9, 7, 6, 5, 4, 3, 2, 1}
    assert set(f.rows) <= sizes
    assert len(set(f.rows)) >= 5
    assert f.rows == sorted(f.rows, reverse=True)
    for rows, alive in zip(f.rows, running, strict=False):
        assert rows == min(size for size in sizes if size >= alive)
    assert sum(f.rows) < 0.8 * 33 * sol.nfe
    assert sum(f.rows) >= int(sol.steps.sum())
    assert sol.rows.seen == sum(f.rows) and sol.rows.plain == 33 * sol.nfe


@pytest.mark.parametrize("backend", BACKENDS)
def test_tree_of_bools_says_which_arguments_follow(backend):
    """A matrix whose dim 0 happens to be B must not be cut."""
    B = N = 12
    p = problem(B, N, dtype=torch.float64)
    W = 0.3 * torch.eye(N, dtype=torch.float64)
    shapes = []

    def f(z, inputs, W, number):
        shapes.append((z.shape[0], inputs["x"].shape[0], W.shape[0]))
        return pull(z, inputs["x"], inputs["rate"]) * 0.5 + (z * W.sum(1)) * 0.5 * number

    args = ({"x": p.x, "rate": p.rate}, W, 1.0)
    options = {"rtol": 1e-8, "backend": backend, "backward": "none"}
    expected = dq.fixed_point(f, p.z0, args, **options)
    shapes.clear()
    sol = dq.fixed_point(f, p.z0, args, compact=({"x": True, "rate": True}, False, False), **options)
    assert_same_solution(sol, expected)
    assert all(z == x and w == N for z, x, w in shapes)
    assert min(z for z, _, _ in shapes) < B


@pytest.mark.parametrize("backend", BACKENDS)
def test_trees_and_numbers_beside_the_batch_are_handed_on(backend):
    p = problem(10, 6)
    z0 = {"a": p.z0, "b": (p.z0.flip(1), p.z0[:, :1])}
    x = {"a": p.x, "b": (p.x.flip(1), p.x[:, :1])}
    args = (x, p.rate, 2, None, "name", torch.ones(3))

    def f(z, x, rate, two, nothing, name, other):
        assert (two, nothing, name, other.shape) == (2, None, "name", (3,))
        return pull(z, x, rate)

    options = {"rtol": 1e-4, "backend": backend, "backward": "none"}
    follow = ({"a": True, "b": (True, True)}, True, False, False, False, False)
    sol = dq.fixed_point(f, z0, args, compact=follow, **options)
    assert_same_solution(sol, dq.fixed_point(f, z0, args, **options))
    assert set(sol.z) == {"a", "b"}
    assert isinstance(sol.z["b"], tuple)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_sample_is_dropped_like_a_converged_one(backend):
    p = problem(9, 7, slowest=0.9)
    p.x[4] = torch.nan
    options = {"rtol": 1e-4, "trace": True, "backend": backend}
    sol = solve(p, compact=BOTH, **options)
    assert_same_solution(sol, solve(p, **options))
    assert sol.status[4] == dq.Status.NON_FINITE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_f_keeps_seeing_the_memory_format_of_the_start(solver, backend):
    p = problem(8, 3, 4, 5)
    z0 = p.z0.to(memory_format=torch.channels_last)
    formats = []

    def f(z, *args):
        formats.append(z.is_contiguous(memory_format=torch.channels_last))
        return pull(z, *args)

    options = {"solver": solver, "rtol": 1e-4, "backend": backend, "backward": "none"}
    sol = dq.fixed_point(f, z0, p.args, compact=BOTH, **options)
    assert all(formats)
    assert_same_solution(sol, dq.fixed_point(f, z0, p.args, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
@pytest.mark.parametrize("returns", ["z", "buffer"])
def test_f_that_returns_its_input_or_one_buffer_is_compacted_too(returns, solver, backend):
    p = problem(17, 6, slowest=0.95)
    buffer = torch.empty_like(p.z0)

    def f(z, *args):
        fz = pull(z, *args)
        return z.copy_(fz) if returns == "z" else buffer[: z.shape[0]].copy_(fz)

    options = {"solver": solver, "rtol": 1e-4, "backend": backend}
    assert_same_solution(solve(p, f, compact=BOTH, **options), solve(p, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stop", [2, 5, 9])
def test_callback_may_stop_a_compacted_solve(stop, backend):
    p = problem(17, 6, slowest=0.95)
    options = {"rtol": 1e-4, "backend": backend, "callback": lambda k, state: k == stop}
    assert_same_solution(solve(p, compact=BOTH, **options), solve(p, **options))


def test_empty_batch_is_compacted_to_itself():
    sol = dq.fixed_point(pull, torch.empty(0, 3), (torch.empty(0, 3), torch.empty(0)), compact=True, backward="none")
    assert sol.nfe == 0


@pytest.mark.parametrize(
    ("compact", "message"),
    [
        ((True,), "shaped like args"),
        ((True, True, True), "shaped like args"),
        ({"x": True, "rate": True}, "shaped like args"),
        ((True, 1), "tree of bools"),
        (("auto", True), "tree of bools"),
        ("Auto", "did you mean .auto."),
        ("yes", "compact must be a bool or a tree of bools"),
        (1, "compact must be a bool or a tree of bools"),
        (None, "compact must be a bool or a tree of bools"),
    ],
    ids=str,
)
def test_compact_that_does_not_fit_args_raises_before_any_work(compact, message):
    p = problem(4, 3)

    def never(*_):
        raise AssertionError("f was called")

    with pytest.raises((TypeError, ValueError), match=message):
        solve(p, never, compact=compact)


@pytest.mark.parametrize("other", [torch.zeros(5, 3), torch.tensor(1.0), 3, None], ids=lambda v: type(v).__name__)
def test_argument_that_cannot_follow_the_batch_raises(other):
    p = problem(4, 3)
    with pytest.raises(ValueError, match="expected dim 0 to be 4, got"):
        dq.fixed_point(lambda z, *_: z, p.z0, (p.x, other), compact=(True, True))


def test_wrong_output_for_a_shrunk_batch_names_the_rows_expected():
    p = problem(16, 3, slowest=0.95)

    def f(z, *args):
        fz = pull(z, *args)
        return fz if z.shape[0] == 16 else fz.new_zeros(16, 3)

    with pytest.raises(ValueError, match=r"f\(z\) must have the shape of z0, expected \(\d, 3\), got \(16, 3\)"):
        solve(p, f, compact=True, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_and_company_change_no_bit_of_a_compacted_sample(backend):
    p = problem(12, 9, slowest=0.95)
    options = {"compact": True, "rtol": 1e-4, "backend": backend}
    sol = solve(p, **options)
    order = torch.randperm(12)
    assert_same_samples(solve(p.rows(order), **options), slice(None), sol, order)
    for b in (0, 5, 11):
        assert_same_samples(solve(p.rows([b]), **options), [0], sol, [b])


def test_arguments_are_not_written_to():
    p = problem(12, 9, slowest=0.95)
    q = p.rows(slice(None))
    solve(p, compact=True, rtol=1e-4)
    assert same_bits((p.z0, p.x, p.rate), (q.z0, q.x, q.rate))
