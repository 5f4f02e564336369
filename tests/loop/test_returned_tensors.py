"""What f may return: any memory, views of the iterate, changed later; the answer is that of a clean f."""

from __future__ import annotations

import pytest
import torch
from problems import (
    BACKENDS,
    EVERY_SOLVER,
    SOME_SOLVERS,
    assert_same_solution,
    problem,
    pull,
    same_bits,
    solve,
)

import deqfast as dq


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
