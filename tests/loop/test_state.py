"""The state for own loops: trees and memory formats, errors in the middle, the loop of ``fixed_point``."""

from __future__ import annotations

import copy
import weakref
from collections import namedtuple

import pytest
import torch
from problems import (
    ACCELERATED,
    BACKENDS,
    EVERY_SOLVER,
    ONE_OF_EACH,
    SOME_SOLVERS,
    assert_same_solution,
    problem,
    pull,
    rows_of,
    run,
    same_bits,
    same_state,
    solve,
)
from torch.utils import _pytree as pytree

import deqfast as dq

Pair = namedtuple("Pair", ["hidden", "cell"])


# ---- what f may return ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_channels_last_state_stays_channels_last(solver, backend):
    p = problem(4, 3, 5, 7)
    z0 = p.z0.to(memory_format=torch.channels_last)
    seen = []

    def f(z, *args):
        seen.append(z.stride())
        return pull(z, *args)

    options = {"solver": solver, "rtol": 1e-4, "backend": backend, "backward": "none"}
    sol = dq.fixed_point(f, z0, p.args, **options)
    assert set(seen) == {z0.stride()}
    assert sol.z.stride() == z0.stride()
    assert bool(sol.converged.all())
    for memory_format in (torch.contiguous_format, torch.channels_last):
        other = dq.fixed_point(
            lambda z, *args, to=memory_format: pull(z, *args).contiguous(memory_format=to),
            z0,
            p.args,
            **options,
        )
        assert_same_solution(sol, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ACCELERATED)
@pytest.mark.parametrize(
    "start",
    [
        lambda z: z.transpose(1, 2).contiguous().transpose(1, 2),
        lambda z: z.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        lambda z: z.repeat_interleave(2, dim=3)[..., ::2],
        lambda z: z[:, :1].expand(4, 3, 5, 7),
        lambda z: z[:1].expand(4, 3, 5, 7),
    ],
    ids=["transposed", "permuted", "strided", "expanded", "expanded batch"],
)
def test_start_of_any_strides_is_solved_alike(start, solver, backend):
    p = problem(4, 3, 5, 7, dtype=torch.float64, slowest=0.8)
    options = {"solver": solver, "rtol": 1e-9, "backend": backend, "backward": "none"}
    sol = dq.fixed_point(pull, start(p.z0), p.args, **options)
    expected = dq.fixed_point(pull, p.z0, p.args, **options)
    assert bool(sol.converged.all())
    # Both are within rtol / (1 - rate) of the fixed point.
    error = rows_of(sol.z - expected.z).norm(dim=1)
    assert bool((error <= 2e-9 / (1 - 0.8) * rows_of(expected.z).norm(dim=1)).all())


TREES = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"b": a, "a": b},
    "named": Pair,
    "nested": lambda a, b: {"x": [a, (b,)], "y": {"z": (a[:, :1],)}},
    "with a vector": lambda a, b: (a, b[:, 0, 0]),
    "with an empty leaf": lambda a, b: (a, b[:, :, :0], b),
    "one leaf": lambda a, b: [a],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOME_SOLVERS)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_tree_is_solved_as_its_leaves_side_by_side(tree, solver, backend):
    p, q = problem(6, 9, dtype=torch.float64), problem(6, 2, 3, dtype=torch.float64, seed=1)
    z0, x = tree(p.z0, q.z0), tree(p.x, q.x)
    options = {"solver": solver, "rtol": 1e-8, "backend": backend, "backward": "none"}
    structures = []

    def f(z):
        structures.append(pytree.tree_structure(z))
        return pytree.tree_map(lambda z, x: x + 0.4 * z / (1 + z.abs()), z, x)

    sol = dq.fixed_point(f, z0, **options)
    assert set(structures) == {pytree.tree_structure(z0)}
    assert pytree.tree_structure(sol.z) == structures[0]
    assert type(sol.z) is type(z0)
    joined, flat = rows_of(z0), rows_of(x)
    expected = dq.fixed_point(lambda z: flat + 0.4 * z / (1 + z.abs()), joined, **options)
    assert torch.equal(sol.steps, expected.steps)
    assert bool(((rows_of(sol.z) - expected.z).norm(dim=1) <= 1e-7 * expected.z.norm(dim=1)).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_real_and_complex_leaves_of_one_precision_mix(backend):
    p, q = problem(4, 5, dtype=torch.complex64), problem(4, 6)
    z0 = (p.z0, q.z0)
    sol = dq.fixed_point(
        lambda z: (pull(z[0], *p.args), pull(z[1], *q.args)), z0, rtol=1e-5, backend=backend, backward="none"
    )
    assert bool(sol.converged.all())
    assert [t.dtype for t in sol.z] == [torch.complex64, torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_complex_state_is_solved_as_its_real_and_imaginary_parts(solver, dtype, backend):
    p = problem(4, 7, dtype=dtype)
    options = {"solver": solver, "rtol": 1e-5, "backend": backend, "backward": "none"}
    sol = dq.fixed_point(pull, p.z0, p.args, **options)

    def as_real(z):
        return torch.view_as_real(pull(torch.view_as_complex(z), *p.args))

    real = dq.fixed_point(as_real, torch.view_as_real(p.z0).clone(), **options)
    assert torch.equal(sol.steps, real.steps)
    assert same_bits(torch.view_as_real(sol.z), real.z)
    conjugated = dq.fixed_point(lambda z, *args: pull(z, *args).conj().resolve_conj().conj(), p.z0, p.args, **options)
    assert_same_solution(sol, conjugated)


# ---- errors in the middle ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOME_SOLVERS)
@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize(
    "trouble", ["f raises", "Ctrl-C in f", "wrong shape", "wrong dtype", "wrong structure", "wrong device"]
)
def test_own_loop_goes_on_after_trouble_as_if_nothing_had_happened(trouble, at, solver, backend):
    p = problem(5, 12)
    undisturbed = solver.init(p.z0, rtol=1e-5, max_iter=40, backend=backend)
    state = solver.init(p.z0, rtol=1e-5, max_iter=40, backend=backend)

    def f(z):
        if trouble == "f raises":
            raise ZeroDivisionError
        if trouble == "Ctrl-C in f":
            raise KeyboardInterrupt
        return {
            "wrong shape": lambda: z[:, :3],
            "wrong dtype": lambda: z.double(),
            "wrong structure": lambda: (z, z),
            "wrong device": lambda: z.to("meta"),
        }[trouble]()

    while not undisturbed.done:
        if state.nfe == at:
            with pytest.raises((ZeroDivisionError, KeyboardInterrupt, TypeError, ValueError)):
                state.step(f(state.z))
        for s in (undisturbed, state):
            s.step(pull(s.z, *p.args))
        assert same_state(state, undisturbed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_f_that_spoils_z_and_then_raises_leaves_the_first_iterate_intact(solver, backend):
    p = problem(5, 12, zero=False)
    state = solver.init(p.z0, rtol=1e-5, backend=backend)
    with pytest.raises(ZeroDivisionError):
        state.step(1 / 0 if state.z.mul_(3).numel() else None)
    expected = solver.init(p.z0, rtol=1e-5, backend=backend)
    for s in (state, expected):
        run(s, lambda z: pull(z, *p.args))
    assert same_state(state, expected)


def test_step_of_a_finished_state_changes_nothing():
    state = dq.Anderson().init(torch.ones(2, 3))
    assert state.step(torch.ones(2, 3)) is True
    before = copy.deepcopy(state)
    assert state.step(torch.zeros(2, 3)) is True
    assert same_state(state, before)


# ---- gradients ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOME_SOLVERS)
def test_own_loop_with_gradients_on_keeps_no_graph(solver, backend):
    p = problem(4, 6)
    weight = torch.tensor(0.5, requires_grad=True)
    state = solver.init(p.z0.clone().requires_grad_(), rtol=0.0, max_iter=30, backend=backend)
    kept = []
    for _ in range(6):
        h = weight * state.z + p.x
        state.step(h * h / (1 + h * h))  # the graph holds h
        kept.append(weakref.ref(h))
        assert not state.z.requires_grad
    del h
    assert [ref() is None for ref in kept] == [True] * 6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_own_loop_is_the_loop_of_fixed_point(solver, backend):
    p = problem(5, 21)
    sol = solve(p, solver=solver, rtol=1e-4, max_iter=100, backend=backend)
    state = run(solver.init(p.z0, rtol=1e-4, max_iter=100, backend=backend), lambda z: pull(z, *p.args))
    assert state.nfe == sol.nfe
    for name in ("z", "steps", "status", "residual"):
        assert same_bits(getattr(state, name), getattr(sol, name)), name


def test_own_loop_without_a_limit_runs_on():
    state = dq.Picard().init(torch.zeros(1, 2), rtol=0.0)
    for _ in range(150):
        assert state.step(state.z + 1) is False
    assert state.steps.tolist() == [150]


def test_state_starts_at_a_copy():
    z0 = torch.randn(2, 3)
    state = dq.Anderson().init(z0)
    start = z0.clone()
    z0.fill_(0)
    assert torch.equal(state.z, start)
