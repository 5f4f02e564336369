"""The state for own loops: what f may do with its tensors, trees and memory formats, saving, errors in the middle."""

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
from deqfast.ops.native import extension as native

Pair = namedtuple("Pair", ["hidden", "cell"])


# ---- what f may return ----


def one_buffer(p):
    buffer = torch.empty_like(p.z0)
    return lambda z, *args: buffer.copy_(pull(z, *args))


def two_buffers(p):
    buffers = [torch.empty_like(p.z0), torch.empty_like(p.z0)]

    def f(z, *args):
        buffers.reverse()
        return buffers[0].copy_(pull(z, *args))

    return f


def both_buffers_written(p):
    """The output of the call before is overwritten, though another tensor is returned."""
    buffers = [torch.empty_like(p.z0), torch.empty_like(p.z0)]

    def f(z, *args):
        fz = pull(z, *args)
        buffers.reverse()
        buffers[1].fill_(torch.nan)
        return buffers[0].copy_(fz)

    return f


def numpy_buffer(p):
    """Written without torch's version counter."""
    array = p.z0.clone().numpy()

    def f(z, *args):
        array[...] = pull(z, *args).numpy()
        return torch.from_numpy(array)

    return f


def view_of_a_growing_buffer(p):
    buffer = torch.empty(200, *p.z0.shape)
    calls = []

    def f(z, *args):
        calls.append(1)
        return buffer[len(calls)].copy_(pull(z, *args))

    return f


CLEAN_TWINS = {
    "one buffer": one_buffer,
    "two buffers": two_buffers,
    "numpy buffer": numpy_buffer,
    "views of one buffer": view_of_a_growing_buffer,
    "z changed in place and returned": lambda p: lambda z, *args: z.copy_(pull(z, *args)),
    "z changed in place": lambda p: lambda z, *args: (pull(z, *args), z.fill_(torch.nan))[0],
    "strided": lambda p: lambda z, *args: pull(z, *args).repeat_interleave(2, dim=1)[:, ::2],
    "transposed": lambda p: lambda z, *args: pull(z, *args).t().contiguous().t(),
    "offset": lambda p: lambda z, *args: torch.cat([z[:, :1], pull(z, *args)], dim=1)[:, 1:],
    "reversed storage": lambda p: lambda z, *args: pull(z, *args).flip(0).contiguous().flip(0),
    "lazily negated": lambda p: lambda z, *args: torch._neg_view(-pull(z, *args)),
    "requires grad": lambda p: lambda z, *args: pull(z, *args).requires_grad_(),
    "parameter": lambda p: lambda z, *args: torch.nn.Parameter(pull(z, *args)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOME_SOLVERS)
@pytest.mark.parametrize("make", CLEAN_TWINS.values(), ids=CLEAN_TWINS)
def test_whatever_memory_f_returns_the_answer_is_that_of_a_clean_f(make, solver, backend):
    p = problem(5, 33)
    options = {"solver": solver, "rtol": 1e-5, "trace": True, "backend": backend}
    assert_same_solution(solve(p, make(p), **options), solve(p, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_output_overwritten_behind_the_solver_costs_columns_but_not_the_answer(solver, backend):
    p = problem(5, 33, dtype=torch.float64, slowest=0.8)
    sol = solve(p, both_buffers_written(p), solver=solver, rtol=1e-9, backend=backend)
    exact = solve(p, rtol=1e-13)
    assert bool(sol.converged.all())
    assert bool(((sol.z - exact.z).norm(dim=1) <= 1e-9 / (1 - 0.8) * exact.z.norm(dim=1)).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize("make", [torch.zeros_like, torch.ones_like])
def test_constant_tensor_is_a_fixed_point(make, solver, backend):
    z0 = torch.randn(4, 9)
    c = make(z0)
    sol = dq.fixed_point(lambda z: c, z0, solver=solver, backend=backend, backward="none")
    assert bool(sol.converged.all())
    assert torch.equal(c, make(z0))
    error = (sol.z - c).norm(dim=1)
    assert bool((error <= 1e-4 * c.norm(dim=1)).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_f_that_returns_z_itself_converges_at_once_without_a_change(solver, backend):
    z0 = torch.randn(4, 9)
    sol = dq.fixed_point(lambda z: z, z0, solver=solver, rtol=0.0, backend=backend, backward="none")
    assert sol.nfe == 1
    assert bool(sol.converged.all())
    assert torch.equal(sol.z, z0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_leaf_that_f_passes_through_is_read_like_its_copy(solver, backend):
    p = problem(5, 12)
    z0 = {"h": p.z0, "c": torch.randn(5, 3)}
    options = {"solver": solver, "rtol": 1e-5, "trace": True, "backend": backend, "backward": "none"}

    def f(z, keep):
        return {"h": pull(z["h"], p.x + z["c"].sum(1, keepdim=True) / 8, p.rate), "c": keep(z["c"])}

    sol = dq.fixed_point(f, z0, (lambda c: c,), **options)
    assert_same_solution(sol, dq.fixed_point(f, z0, (torch.clone,), **options))
    assert bool(sol.converged.all())


VIEWS = {
    "transposed": lambda z: z.T,
    "first column": lambda z: z[:, :1].expand(z.shape),
    "first row": lambda z: z[:1].expand(z.shape),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOME_SOLVERS)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("B", [6, 24, 40])
def test_view_of_z_is_read_before_z_is_written(B, view, solver, backend):
    """A row of the view belongs to several samples, so that one sample's rest must not change what another reads."""
    z0 = torch.randn(B, B)
    for max_iter in range(1, 7):
        options = {"solver": solver, "rtol": 0.0, "max_iter": max_iter, "trace": True, "backend": backend}
        sol = dq.fixed_point(view, z0, backward="none", **options)
        assert_same_solution(sol, dq.fixed_point(lambda z: view(z).clone(), z0, backward="none", **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOME_SOLVERS)
@pytest.mark.parametrize("call", [2, 3, 5])
def test_z_changed_in_place_at_a_later_call_raises(call, solver, backend):
    p = problem(5, 33, slowest=0.99)
    calls = []

    def f(z, *args):
        calls.append(1)
        fz = pull(z, *args)
        if len(calls) == call:
            z += 1
        return fz

    with pytest.raises(RuntimeError, match=rf"f changed its input z in place at evaluation {call}"):
        solve(p, f, solver=solver, rtol=0.0, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_that_the_caller_changes_after_the_step_does_not_matter(backend):
    p = problem(5, 33)
    expected = solve(p, rtol=1e-5, solver=dq.Broyden(), backend=backend)
    state = dq.Broyden().init(p.z0, rtol=1e-5, backend=backend)
    while not state.done:
        fz = pull(state.z, *p.args)
        state.step(fz)
        fz.fill_(torch.nan)
    assert same_bits(state.z, expected.z)


# ---- memory formats, strides, trees ----


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


def test_residual_of_your_own_is_for_type_2_anderson_alone():
    for solver in (dq.Anderson(), dq.Anderson(type=1), dq.Broyden(), dq.Picard()):
        state = solver.init(torch.zeros(2, 3), backend="reference")
        with pytest.raises(ValueError, match="residual needs"):
            state.step(torch.ones(2, 3), residual=torch.ones(2, 4))
        assert state.nfe == 0


def test_residual_of_your_own_is_given_always_or_never():
    z, r = torch.ones(2, 3), torch.ones(2, 4)
    state = dq.Anderson(type=2).init(z, backend="reference")
    state.step(0.5 * z, residual=r)
    for wrong, error in (
        (None, ValueError),
        (torch.ones(3, 4), ValueError),
        (torch.ones(2, 5), ValueError),
        (1, TypeError),
    ):
        with pytest.raises(error, match="residual must"):
            state.step(0.5 * z, residual=wrong)
    assert state.nfe == 1
    other = dq.Anderson(type=2).init(z, backend="reference")
    other.step(0.5 * z)
    with pytest.raises(ValueError, match="every step of a solve or at none"):
        other.step(0.5 * z, residual=r)


def test_residual_in_another_space_steers_as_the_same_residual_does():
    """An orthogonal change of space keeps every product that the least-squares problem is made of."""
    p = problem(4, 12, dtype=torch.float64, slowest=0.8)
    Q = torch.linalg.qr(torch.randn(20, 12, dtype=torch.float64))[0]
    solver = dq.Anderson(m=4, type=2)
    states = [solver.init(p.z0, rtol=1e-7, max_iter=60, backend="reference") for _ in range(2)]
    while not states[0].done:
        f = [pull(s.z, *p.args) for s in states]
        states[0].step(f[0])
        states[1].step(f[1], residual=(f[1] - states[1].z) @ Q.T)
    plain, steered = states
    assert steered.done
    assert torch.equal(plain.steps, steered.steps)
    assert bool(((plain.z - steered.z).norm(dim=1) <= 1e-6 * plain.z.norm(dim=1)).all())


@pytest.mark.skipif(native._C is None, reason="the extension is not built")
def test_residual_of_your_own_moves_an_automatic_state_to_the_reference_and_no_other(monkeypatch):
    monkeypatch.delenv("DEQFAST_BACKEND", raising=False)
    p = problem(4, 12, slowest=0.8)
    solver = dq.Anderson(m=4, type=2)
    chosen = solver.init(p.z0, rtol=1e-5, max_iter=60)
    asked = solver.init(p.z0, rtol=1e-5, max_iter=60, backend="reference")
    assert chosen.backend == "native"
    while not asked.done:
        for state in (chosen, asked):
            fz = pull(state.z, *p.args)
            state.step(fz, residual=2 * (fz - state.z))
    assert chosen.backend == "reference"
    assert same_state(chosen, asked)
    resumed = solver.init(p.z0, rtol=1e-5, max_iter=60)
    resumed.load_state_dict(chosen.state_dict())
    assert resumed.backend == "reference"
    fixed = solver.init(p.z0, backend="native")
    with pytest.raises(ValueError, match="residual needs backend='auto' or one of 'reference', got backend='native'"):
        fixed.step(p.z0, residual=p.z0)
    with pytest.raises(ValueError, match="residual needs backend"):
        fixed.load_state_dict(chosen.state_dict())
    monkeypatch.setenv("DEQFAST_BACKEND", "native")
    with pytest.raises(ValueError, match="residual needs backend"):
        solver.init(p.z0).step(p.z0, residual=p.z0)


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
