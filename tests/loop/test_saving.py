"""States are saved, restored and copied whole, or refused with nothing changed."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from problems import (
    ACCELERATED,
    BACKENDS,
    EVERY_SOLVER,
    ONE_OF_EACH,
    alike,
    assert_same_solution,
    problem,
    pull,
    run,
    same_bits,
    same_state,
    solve,
)
from torch.utils import _pytree as pytree

import deqfast as dq

# ---- saving ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize("at", [0, 1, 7])
@pytest.mark.parametrize("how", ["state_dict", "torch.save", "pickle", "deepcopy"])
def test_saved_solve_goes_on_bit_for_bit(how, at, solver, backend):
    p = problem(5, 33, slowest=0.97)
    settings = {"rtol": 1e-5, "atol": 1e-7, "max_iter": 30, "backend": backend}
    f = lambda z: pull(z, *p.args)  # noqa: E731
    state = run(solver.init(p.z0, **settings), f, at)
    if how == "pickle":
        again = pickle.loads(pickle.dumps(state))
    elif how == "deepcopy":
        again = copy.deepcopy(state)
    else:
        saved = state.state_dict()
        if how == "torch.save":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        again = solver.init(torch.randn_like(p.z0), **settings)
        again.load_state_dict(saved)
    assert same_state(again, state)
    while not state.done:
        for s in (state, again):
            s.step(f(s.z))
        assert alike(again, state, backend)
    assert again.done


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ACCELERATED)
@pytest.mark.parametrize(
    "start", [lambda z: z.to(memory_format=torch.channels_last), lambda z: z.bfloat16(), lambda z: (z, {"a": z[:, 0]})]
)
def test_formats_dtypes_and_trees_are_saved(start, solver, backend):
    p = problem(3, 4, 5, 6)
    z0 = start(p.z0)
    x = pytree.tree_map(lambda t: torch.randn_like(t), z0)
    f = lambda z: pull(z, x, 0.9)  # noqa: E731
    state = run(solver.init(z0, rtol=0.0, max_iter=12, backend=backend), f, 5)
    again = pickle.loads(pickle.dumps(state))
    leaves = [pytree.tree_leaves(s.z) for s in (state, again)]
    assert [t.stride() for t in leaves[0]] == [t.stride() for t in leaves[1]]
    for s in (state, again):
        run(s, f)
    assert alike(again, state, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ACCELERATED)
def test_state_dict_is_a_copy(solver, backend):
    p = problem(5, 12, slowest=0.97)
    f = lambda z: pull(z, *p.args)  # noqa: E731
    state = run(solver.init(p.z0, rtol=0.0, max_iter=20, backend=backend), f, 3)
    saved = state.state_dict()
    run(state, f, 4)
    again = solver.init(p.z0, rtol=0.0, max_iter=20, backend=backend)
    again.load_state_dict(saved)
    assert again.nfe == 3
    first = run(copy.deepcopy(again), f, 4)
    assert same_state(first, state)
    assert again.nfe == 3
    second = solver.init(p.z0, rtol=0.0, max_iter=20, backend=backend)
    second.load_state_dict(saved)
    assert same_state(again, second)


@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("way", list(itertools.permutations(("reference", "native", "torch"), 2)), ids="-to-".join)
def test_solve_saved_by_one_backend_is_finished_by_the_other(way, dtype, solver):
    p = problem(6, 40, dtype=dtype, slowest=0.8)
    rtol = 1e-9 if dtype == torch.float64 else 1e-5
    f = lambda z: pull(z, *p.args)  # noqa: E731
    first, second = (solver.init(p.z0, rtol=rtol, max_iter=200, backend=backend) for backend in way)
    run(first, f, 5)
    second.load_state_dict(first.state_dict())
    assert second.backend == way[1]
    for s in (first, second):
        run(s, f)
    assert bool((second.status == dq.Status.CONVERGED).all())
    assert bool(((first.steps - second.steps).abs() <= 1).all())
    error = (first.z - second.z).norm(dim=1)
    assert bool((error <= 2 * rtol / (1 - 0.8) * first.z.norm(dim=1)).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_f_that_changes_z_in_place_may_be_saved_too(solver, backend):
    p = problem(5, 12, slowest=0.9)
    f = lambda z: z.copy_(pull(z, *p.args))  # noqa: E731
    state = run(solver.init(p.z0, rtol=1e-5, backend=backend), f, 3)
    again = copy.deepcopy(state)
    for s in (state, again):
        run(s, f)
    assert same_state(again, state)


def test_state_dict_of_other_options_or_another_shape_raises():
    state = dq.Anderson(m=3).init(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"saved with options Anderson\(m=4.*has Anderson\(m=3"):
        state.load_state_dict(dq.Anderson(m=4).init(torch.zeros(2, 5)).state_dict())
    for other in (torch.zeros(3, 5), torch.zeros(2, 6), torch.zeros(2, 5, dtype=torch.float64)):
        with pytest.raises(ValueError, match="saved with layout"):
            state.load_state_dict(dq.Anderson(m=3).init(other).state_dict())
    with pytest.raises(ValueError, match=r"saved with options Broyden\(.*has Anderson"):
        state.load_state_dict(dq.Broyden().init(torch.zeros(2, 5)).state_dict())


def test_failed_load_leaves_the_state_as_it_was():
    p = problem(2, 5)
    state = run(dq.Anderson(m=3).init(p.z0, rtol=0.0), lambda z: pull(z, *p.args), 3)
    before = copy.deepcopy(state)
    with pytest.raises(ValueError, match="state_dict"):
        state.load_state_dict(dq.Anderson(m=3).init(torch.zeros(2, 6)).state_dict())
    for s in (state, before):
        run(s, lambda z: pull(z, *p.args), 2)
    assert same_state(state, before)


@pytest.mark.parametrize(
    "value", [dq.Anderson(m=3, type=2), dq.Broyden(memory=4), dq.Picard(damping=0.5), dq.Status.STALLED]
)
def test_options_pickle_and_copy_to_equal_values(value):
    assert pickle.loads(pickle.dumps(value)) == value
    assert copy.deepcopy(value) == value


@pytest.mark.parametrize("backend", BACKENDS)
def test_solution_pickles_and_copies(backend):
    sol = solve(problem(3, 5), trace=True, backend=backend)
    for again in (pickle.loads(pickle.dumps(sol)), copy.deepcopy(sol)):
        assert_same_solution(again, sol)
        assert again.summary() == sol.summary()
        assert same_bits(again.events, sol.events)
    again.z.fill_(0)
    assert bool((sol.z != 0).any())


# ---- states that do not fit, and copies that must ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_state_of_another_memory_format_or_structure_is_refused(backend):
    image = torch.randn(2, 3, 4, 5)
    solver = dq.Anderson(m=3)
    saved = solver.init(image.contiguous(memory_format=torch.channels_last), backend=backend).state_dict()
    with pytest.raises(ValueError, match="saved with layout"):
        solver.init(image, backend=backend).load_state_dict(saved)
    with pytest.raises(ValueError, match="saved with layout"):
        solver.init({"a": image}, backend=backend).load_state_dict(solver.init({"b": image}).state_dict())


@pytest.mark.parametrize(
    "missing", ["options", "layout", "nfe", "before", "running", "copies_f", "copies_z", "tensors"]
)
def test_incomplete_saved_state_is_refused_and_changes_nothing(missing):
    solver = dq.Anderson(m=3)
    saved = solver.init(torch.ones(2, 3)).state_dict()
    del saved[missing]
    state = solver.init(torch.zeros(2, 3))
    before = copy.deepcopy(state)
    with pytest.raises(ValueError, match=f"no entry '{missing}'"):
        state.load_state_dict(saved)
    assert same_state(state, before)


def test_refused_saved_residual_leaves_a_plain_state_plain():
    solver = dq.Anderson(m=3, type=2)
    steered = solver.init(torch.ones(2, 3))
    steered.step(torch.zeros(2, 3), residual=torch.ones(2, 5))
    saved = steered.state_dict()
    saved["tensors"]["x.0"] = torch.ones(2, 4)
    state = solver.init(torch.ones(2, 3))
    backend = state.backend
    with pytest.raises(ValueError, match=r"'x\.0'"):
        state.load_state_dict(saved)
    assert state.backend == backend
    state.step(torch.full((2, 3), 0.5))
    assert state.nfe == 1


def test_copy_of_an_automatic_state_is_automatic():
    z0 = torch.ones(2, 3)
    state = copy.deepcopy(dq.Anderson(type=2).init(z0))
    state.step(0.5 * z0, residual=-0.5 * z0)
    assert copy.deepcopy(state).backend == state.backend == "torch"


@pytest.mark.parametrize("backend", BACKENDS)
def test_copy_of_a_fresh_state_still_mends_an_f_that_writes_into_z(backend):
    def f(z):
        return z.mul_(0.5).add_(1)

    state = copy.deepcopy(dq.Anderson(m=3).init(torch.ones(2, 3), rtol=1e-4, backend=backend))
    run(state, f)
    assert bool((state.z - 2).abs().max() < 1e-3)


def test_copy_made_in_a_callback_does_not_go_on_copying():
    copies = []
    dq.fixed_point(
        lambda z: 0.5 * z + 1, torch.zeros(2, 3), callback=lambda k, s: copies.append(copy.deepcopy(s)), max_iter=3
    )
    assert not any(state.copies_z for state in copies)


def test_solution_does_not_follow_a_state_that_a_callback_kept():
    kept: list[Any] = []

    def stop_at_three(k, state):
        kept[:] = [state]
        return k == 3

    def f(z):
        return 0.9 * z + 1

    sol = dq.fixed_point(f, torch.zeros(2, 3), rtol=1e-7, callback=stop_at_three)
    found = sol.z.clone(), sol.steps.clone(), sol.status.clone(), {k: v.clone() for k, v in sol.events.items()}
    run(kept[0], f)
    assert torch.equal(sol.z, found[0])
    assert torch.equal(sol.steps, found[1])
    assert torch.equal(sol.status, found[2])
    assert all(torch.equal(sol.events[k], v) for k, v in found[3].items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
@pytest.mark.parametrize("inside_first", [True, False])
def test_state_may_go_on_in_or_out_of_inference_mode(solver, backend, inside_first):
    p = problem(3, 12)
    with torch.inference_mode(inside_first):
        state = solver.init(p.z0, rtol=1e-5, max_iter=40, backend=backend)
        for _ in range(3):
            state.step(pull(state.z, *p.args))
    with torch.inference_mode(not inside_first):
        while not state.done:
            state.step(pull(state.z, *p.args))
    assert bool((state.status == dq.Status.CONVERGED).all())
