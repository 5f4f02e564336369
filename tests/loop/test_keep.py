"""Own loops that drop samples: those that stay end as they would have, those that leave take their results along."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from problems import (
    ACCELERATED,
    BACKENDS,
    DEVICE,
    EVERY_SOLVER,
    ONE_OF_EACH,
    ORDERED,
    SOLVERS,
    SOME_SOLVERS,
    problem,
    pull,
    run,
    same_bits,
)
from torch import Tensor
from torch.utils import _pytree as pytree

import deqfast as dq

EVENTS = ("evictions", "solve_fallbacks", "step_fallbacks", "growth_restarts", "rescales")


def end(state: Any, args: tuple, keep: dict[int, Any] | None = None) -> Any:
    """Run to the end, keeping ``keep[nfe]`` rows of what is there; what is left at last, and whose rows those are."""
    left, rows = [], torch.arange(state.layout.batch_shape[0], device=DEVICE)
    while not state.done:
        if keep and state.nfe in keep:
            chosen = torch.as_tensor(keep.pop(state.nfe), device=DEVICE)
            left.append(state.keep(chosen))
            args, rows = tuple(t[chosen] for t in args), rows[chosen]
        state.step(pull(state.z, *args))
    return state.keep([]), rows, left


def record(sol: dq.Solution, rows: Any) -> list[Any]:
    tree = [sol.z, sol.residual, sol.steps, sol.status, sol.converged, [sol.events[name] for name in EVENTS]]
    return pytree.tree_map(lambda t: t[rows].clone(), tree)


@pytest.mark.parametrize("backend", ORDERED)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize("shape", [(3,), (24,), (40,), (1500,)], ids=str)
def test_kept_samples_end_bit_for_bit_as_without(shape, solver, backend):
    p = problem(21, *shape, slowest=0.97)
    settings = {"rtol": 1e-5, "atol": 1e-7, "max_iter": 40, "backend": backend}
    whole = end(solver.init(p.z0, **settings), p.args)[0]
    mask = torch.arange(21) % 4 != 1
    for keep in ({1: [20, 0, 3, 9]}, {5: mask, 17: [2, 1, 5, 14]}, {6: range(18), 7: range(17), 8: [16]}, {0: mask}):
        part, rows, left = end(solver.init(p.z0, **settings), p.args, dict(keep))
        assert len(rows) < 21 and len(left) <= len(keep)
        assert same_bits(record(part, slice(None)), record(whole, rows))


@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize("shape", [(3,), (40,), (1500,)], ids=str)
def test_kept_samples_end_to_rounding_as_without_on_torch(shape, solver):
    p = problem(21, *shape, dtype=torch.float64, slowest=0.9)
    settings = {"rtol": 1e-9, "max_iter": 300, "backend": "torch"}
    whole = end(solver.init(p.z0, **settings), p.args)[0]
    part, rows, _ = end(solver.init(p.z0, **settings), p.args, {2: range(2, 20), 4: [4, 3, 9, 0, 17]})
    assert rows.tolist() == [6, 5, 11, 2, 19]
    assert bool(part.converged.all()) and bool(whole.converged.all())
    assert bool(((part.steps - whole.steps[rows]).abs() <= 2).all())
    assert bool(((part.z - whole.z[rows]).norm(dim=1) <= 1e-7 * whole.z[rows].norm(dim=1)).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOME_SOLVERS)
def test_first_step_after_keep_is_that_of_the_whole_batch(solver, backend):
    p = problem(9, 33, dtype=torch.float64, slowest=0.97)
    state = run(solver.init(p.z0, rtol=0.0, max_iter=30, backend=backend), lambda z: pull(z, *p.args), 7)
    other = copy.deepcopy(state)
    rows = torch.tensor([8, 1, 4], device=DEVICE)
    state.keep(rows)
    assert same_bits([state.z, state.residual, state.steps], [t[rows] for t in (other.z, other.residual, other.steps)])
    some = p.rows(rows)
    for _ in range(4):
        state.step(pull(state.z, *some.args))
        other.step(pull(other.z, *p.args))
        assert bool(((state.z - other.z[rows]).abs() <= 1e-9 * other.z[rows].abs().amax()).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_what_leaves_is_what_it_had_reached(solver, backend):
    p = problem(12, 10, slowest=0.99)
    state = run(solver.init(p.z0, rtol=1e-4, backend=backend), lambda z: pull(z, *p.args), 6)
    running, moved = state.running.clone(), state.z.clone()
    leaves, residual = state.answer()
    expected = leaves[0].clone()
    assert bool(running.any()) and not bool(running.all())
    left = copy.deepcopy(state).keep(running)
    assert bool(left.converged.all()) and same_bits(left.z, expected[~running])
    assert left.steps.tolist() == state.steps[~running].tolist() and left.nfe == 6
    assert left.backend == state.backend and f"{len(left.steps)} converged" in left.summary()
    for returns, z in (("best", expected), ("next", moved), ("last", state.evaluated())):
        twin = copy.deepcopy(state)
        left = twin.keep(~running, returns)
        assert bool((left.status == dq.Status.STOPPED).all()) and not bool(left.converged.any())
        assert same_bits(left.z, z[running]) and twin.done
        if returns == "best":
            assert same_bits(left.residual, residual[running])


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_copies(backend):
    p = problem(6, 10)
    state = run(dq.Anderson().init(p.z0, rtol=0.0, max_iter=30, backend=backend), lambda z: pull(z, *p.args), 3)
    left = state.keep([0, 1])
    found = copy.deepcopy(record(left, slice(None)))
    some = p.rows(slice(0, 2))
    run(state, lambda z: pull(z, *some.args))
    assert same_bits(record(left, slice(None)), found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_tokens(backend):
    p = problem(5, 6, 12, slowest=0.97)
    rate = torch.linspace(0.2, 0.97, 30, device=DEVICE).view(5, 6, 1)
    f = lambda z, x, r: z.sin() * r + x  # noqa: E731
    state = dq.Anderson().init(p.z0, rtol=1e-5, batch_dims=2, backend=backend)
    whole = run(copy.deepcopy(state), lambda z: f(z, p.x, rate))
    assert whole.status.shape == (5, 6) and bool((whole.status == dq.Status.CONVERGED).all())
    x, r, ids = p.x, rate, torch.arange(5, device=DEVICE)
    found: dict[int, Tensor] = {}
    while not state.done:
        state.step(f(state.z, x, r))
        rows = state.running.any(1)
        left = state.keep(rows)
        assert left.z.shape[1:] == (6, 12) and left.converged.shape == left.events["evictions"].shape
        found.update(zip(ids[~rows].tolist(), left.z, strict=True))
        x, r, ids = x[rows], r[rows], ids[rows]
        assert state.z.shape == (len(ids), 6, 12) and state.steps.shape == (len(ids), 6)
    assert sorted(found) == [0, 1, 2, 3, 4]
    for row, z in found.items():
        assert bool((z - whole.z[row]).abs().max() <= 1e-4 * whole.z[row].abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ACCELERATED)
@pytest.mark.parametrize(
    "start",
    [
        lambda z: z.to(memory_format=torch.channels_last),
        lambda z: z.to(torch.complex64),
        lambda z: (z, {"a": z[:, 0].clone()}),
    ],
    ids=["channels_last", "complex", "tree"],
)
def test_formats_and_trees(start, solver, backend):
    p = problem(7, 4, 5, 6)
    z0 = start(p.z0)
    x = pytree.tree_map(lambda t: torch.randn_like(t), z0)
    settings = {"rtol": 1e-5, "max_iter": 60, "backend": backend}
    state = solver.init(z0, **settings)
    whole = run(copy.deepcopy(state), lambda z: pull(z, x, 0.9))
    rows = [5, 0, 3]
    run(state, lambda z: pull(z, x, 0.9), 5)
    left = state.keep(rows)
    some = pytree.tree_map(lambda t: t[rows].contiguous(), x)
    assert pytree.tree_structure(state.z) == pytree.tree_structure(left.z) == pytree.tree_structure(z0)
    leaf, original = pytree.tree_leaves(state.z)[0], pytree.tree_leaves(z0)[0]
    assert leaf.stride() == original.stride() and leaf.dtype == original.dtype
    run(state, lambda z: pull(z, some, 0.9))
    assert bool((state.status == dq.Status.CONVERGED).all())
    for a, b in zip(pytree.tree_leaves(state.z), pytree.tree_leaves(whole.z), strict=True):
        assert bool((a - b[rows]).abs().max() <= 2e-4 * b.abs().max())
        if backend in ORDERED:
            assert torch.equal(a, b[rows])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_kept_state_is_saved_and_copied(solver, backend):
    p = problem(9, 33, slowest=0.97)
    rows = torch.tensor([0, 2, 3, 7], device=DEVICE)
    some = p.rows(rows)
    state = run(solver.init(p.z0, rtol=1e-5, backend=backend), lambda z: pull(z, *p.args), 5)
    state.keep(rows)
    fresh = solver.init(some.z0, rtol=1e-5, backend=backend)
    fresh.load_state_dict(state.state_dict())
    copies = [copy.deepcopy(state), pickle.loads(pickle.dumps(state)), fresh]
    while not state.done:
        for s in (state, *copies):
            s.step(pull(s.z, *some.args))
    for s in copies:
        assert s.done
        if backend in ORDERED:
            assert same_bits([s.z, s.steps, s.residual], [state.z, state.steps, state.residual])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["buffer", "in place", "itself"])
def test_f_that_uses_its_memory_again(how, backend):
    p = problem(8, 20, slowest=0.97)
    buffer = torch.empty_like(p.z0)

    def f(z, x, rate):
        fz = pull(z, x, rate)
        if how == "in place":
            return z.copy_(fz)
        return fz if how == "itself" else buffer[: len(z)].copy_(fz)

    state = dq.Anderson(m=4).init(p.z0, rtol=1e-5, backend=backend)
    run(state, lambda z: f(z, *p.args), 4)
    state.keep([1, 6, 7])
    some = p.rows([1, 6, 7])
    run(state, lambda z: f(z, *some.args))
    assert bool((state.status == dq.Status.CONVERGED).all())
    assert bool((pull(state.z, *some.args) - state.z).norm() <= 1e-4 * state.z.norm())


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_own_residual_is_taken_along(backend):
    p = problem(8, 20, dtype=torch.float64, slowest=0.97)

    def steps(state, args, count):
        for _ in range(count):
            fz = pull(state.z, *args)
            state.step(fz, residual=(fz - state.z)[:, :10] * 2)
        return state

    state = steps(dq.Anderson(type=2).init(p.z0, rtol=0.0, backend=backend), p.args, 5)
    other = copy.deepcopy(state)
    rows = [6, 0, 3]
    state.keep(rows)
    steps(state, p.rows(rows).args, 3)
    steps(other, p.args, 3)
    assert bool(((state.z - other.z[rows]).abs() <= 1e-9).all())
    assert torch.allclose(state.residual, other.residual[rows], rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_that_stop_together(backend):
    p = problem(10, 20, slowest=0.95)
    whole, state = (dq.Anderson().init(p.z0, rtol=1e-5, stop="all", backend=backend) for _ in range(2))
    run(whole, lambda z: pull(z, *p.args))
    run(state, lambda z: pull(z, *p.args), 5)
    quick = p.rate.argsort()[:4]
    left = state.keep(quick)
    assert not bool(left.converged.any())
    some = p.rows(quick)
    run(state, lambda z: pull(z, *some.args))
    assert bool((state.status == dq.Status.CONVERGED).all()) and len(set(state.steps.tolist())) == 1
    assert state.nfe < whole.nfe


@pytest.mark.parametrize("backend", ORDERED)
def test_solutions_at_zero_are_still_found(backend):
    p = problem(6, 20)
    rate = torch.linspace(0.3, 0.8, 6, device=DEVICE)[:, None]
    z0 = torch.ones_like(p.z0)
    whole = dq.Picard().init(z0, rtol=1e-5, max_iter=300, backend=backend)
    part = copy.deepcopy(whole)
    run(whole, lambda z: z * rate)
    run(part, lambda z: z * rate, 20)
    part.keep([5, 2])
    run(part, lambda z: z * rate[[5, 2]])
    assert bool((part.status == dq.Status.CONVERGED).all())
    assert same_bits([part.z, part.steps], [whole.z[[5, 2]], whole.steps[[5, 2]]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_iterate_handed_out_before_stays_as_it_was(backend):
    p = problem(6, 20)
    state = run(dq.Anderson().init(p.z0, rtol=0.0, backend=backend), lambda z: pull(z, *p.args), 3)
    before = state.z
    values = before.clone()
    state.keep([0, 1])
    some = p.rows([0, 1])
    run(state, lambda z: pull(z, *some.args), 3)
    assert torch.equal(before, values)


def test_everything_kept_changes_nothing():
    p = problem(6, 20)
    state = run(dq.Anderson().init(p.z0, rtol=0.0), lambda z: pull(z, *p.args), 3)
    ws = state.ws
    left = state.keep(torch.ones(6, dtype=torch.bool))
    assert state.ws is ws and left.z.shape == (0, 20) and left.summary().startswith("no samples")


def test_nothing_kept_ends_the_solve():
    p = problem(6, 20)
    for made in (0, 3):
        state = run(dq.Anderson().init(p.z0), lambda z: pull(z, *p.args), made)
        left = state.keep([])
        assert state.done and state.z.shape == (0, 20)
        assert left.z.shape == (6, 20) and bool((left.status == dq.Status.STOPPED).all())
        assert bool(left.residual.isnan().all()) == (made == 0)
        assert state.keep([]).z.shape == (0, 20)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", [SOLVERS["anderson"], SOLVERS["anderson-int8"], SOLVERS["broyden"]], ids=repr)
def test_no_unwritten_memory_is_read(solver, backend, poisoned_memory):
    p = problem(9, 33, slowest=0.97)
    for made in (0, 1, 4):
        state = run(solver.init(p.z0, rtol=1e-5, backend=backend), lambda z: pull(z, *p.args), made)
        state.keep([8, 2, 5])
        some = p.rows([8, 2, 5])
        run(state, lambda z: pull(z, *some.args))  # noqa: B023
        assert bool((state.status == dq.Status.CONVERGED).all())


@pytest.mark.parametrize("inside", [True, False])
def test_in_and_out_of_inference_mode(inside):
    p = problem(6, 20)
    some = p.rows([4, 1])
    with torch.inference_mode(inside):
        state = dq.Anderson().init(p.z0, rtol=1e-5)
        run(state, lambda z: pull(z, *p.args), 3)
        state.keep([4, 1])
    with torch.inference_mode(not inside):
        run(state, lambda z: pull(z, *some.args))
    assert bool((state.status == dq.Status.CONVERGED).all())


def test_what_cannot_be_kept_is_refused_and_changes_nothing():
    p = problem(5, 8)
    state = run(dq.Anderson().init(p.z0, rtol=0.0), lambda z: pull(z, *p.args), 3)
    twin = copy.deepcopy(state)
    tokens = dq.Anderson().init(torch.ones(5, 6, 2), batch_dims=2)
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (state, torch.ones(4, dtype=torch.bool), ValueError, r"expected \(5,\) bools, got shape \(4,\)"),
        (state, [0, 5], ValueError, "from 0 to 4, got 5"),
        (state, [-1], ValueError, "from 0 to 4, got -1"),
        (state, [1, 1], ValueError, "distinct"),
        (state, torch.ones(2), TypeError, "float32"),
        (state, torch.tensor(1), ValueError, r"one dim, got shape \(\)"),
        (tokens, torch.ones(5, 6, dtype=torch.bool), ValueError, r"shape \(5, 6\); .*any\(1\)"),
        (
            dq.Anderson().init(torch.ones(6), batch_dims=0),
            [0],
            ValueError,
            "batch_dims=0 .* one sample",
        ),
        (dq.Broyden().init(torch.ones(6, 2), segments=[0, 2, 6]), [0], ValueError, "segments"),
    ]
    for one, rows, error, message in cases:
        with pytest.raises(error, match=message):
            one.keep(rows)
    with pytest.raises(ValueError, match="returns must be one of 'best', 'last', 'next'"):
        state.keep([0], returns="image")
    state.step(pull(state.z, *p.args))
    twin.step(pull(twin.z, *p.args))
    assert same_bits([state.z, state.residual], [twin.z, twin.residual])


def test_callback_cannot_drop_samples():
    with pytest.raises(RuntimeError, match="compact=True"):
        dq.fixed_point(lambda z: 0.5 * z + 1, torch.zeros(3, 4), callback=lambda k, state: bool(state.keep([0])))
