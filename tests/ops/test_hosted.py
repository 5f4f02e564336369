"""Columns in the host's memory, or read piece by piece where they are: the same solves, with little on the device.

A CPU stands in for the device: there is no link, but every piece goes the same way.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from problems import problem, pull, rows_of, same_bits, solve
from quadratics import LinearQuadratic

import deqfast as dq
from deqfast.loop.state import SolverState
from deqfast.ops.anderson import AndersonWorkspace
from deqfast.ops.codes import BLOCK, Int
from deqfast.ops.hosted import HostedWorkspace
from deqfast.ops.plain.streamed import StreamedStep

pytestmark = pytest.mark.host


SOLVERS = {
    "default": dq.Anderson(m=4, history_dtype=torch.bfloat16),
    "type-1": dq.Anderson(m=4, type=1, history_dtype=torch.float32),
    "type-2": dq.Anderson(m=4, type=2, evict="oldest", history_dtype=torch.bfloat16),
    "mixing": dq.Anderson(m=4, mixing=0.7, history_dtype=torch.float32),
    "turns": dq.Anderson(m=6, mix_every=2, history_dtype=torch.bfloat16),
    "float16": dq.Anderson(m=4, history_dtype=torch.float16),
    "int8": dq.Anderson(m=4, history_dtype=torch.int8),
    "m1": dq.Anderson(m=1),
}
EVERY = [pytest.param(solver, id=name) for name, solver in SOLVERS.items()]
# Pieces of several samples, of parts of one, and of whole blocks and a rest.
SIZES = [(5, 3), (7, 700), (2, 5 * BLOCK + 17), (3, 2 * BLOCK)]


def on_host(solver: dq.Anderson) -> dq.Anderson:
    return dataclasses.replace(solver, history_device="cpu")


def pair(solver: dq.Anderson, z0: Any, **options: Any) -> list[SolverState]:
    """Two states, of which the first has its columns in the host's memory."""
    return [each.init(z0, **{"rtol": 0.0, "backend": "torch", **options}) for each in (on_host(solver), solver)]


def memory(state: SolverState) -> AndersonWorkspace:
    assert isinstance(state.ws, AndersonWorkspace)
    return state.ws


def hosted_memory(state: SolverState) -> HostedWorkspace:
    assert isinstance(state.ws, HostedWorkspace)
    return state.ws


F64 = torch.float64  # of states: of a column rounded to few bits next to none is rounded the other way


def assert_alike(states: list[SolverState], tolerance: float = 1e-9, samples: Any = slice(None)) -> None:
    """The iterates of these samples up to rounding, and the same decisions for all."""
    state, other = states
    for row in (Int.STATUS, Int.STEPS, Int.SLOT, Int.COUNT, Int.EVICTIONS, Int.STEP_FALLBACKS, Int.SOLVE_FALLBACKS):
        assert torch.equal(state.ws.int_row(row), other.ws.int_row(row)), row
    now, then = rows_of(state.z)[samples], rows_of(other.z)[samples]
    assert bool(((now - then).norm(dim=1) <= tolerance * then.norm(dim=1)).all())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("solver", EVERY)
def test_steps_are_those_of_a_history_on_the_device(device, solver, size):
    p = problem(*size, slowest=0.9, zero=False, dtype=F64)
    states = pair(solver, p.z0, max_iter=12)
    assert isinstance(states[0].ws, HostedWorkspace) and isinstance(states[0].bound, StreamedStep)
    for _ in range(9):
        for state in states:
            state.step(pull(state.z, *p.args))
        assert_alike(states)
    if size[1] > BLOCK:
        assert len(hosted_memory(states[0]).pieces) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128], ids=str)
def test_steps_of_every_state_dtype(device, dtype):
    p = problem(3, 900, dtype=dtype, slowest=0.9)
    solver = dq.Anderson(m=4)
    states = pair(solver, p.z0)
    for _ in range(7):
        for state in states:
            state.step(pull(state.z, *p.args))
        assert_alike(states, tolerance={torch.float32: 1e-4, torch.bfloat16: 2e-2}.get(dtype, 1e-9))


def test_trees_and_strided_states(device):
    p = problem(3, 2, 30, 35, slowest=0.9, dtype=F64)
    split = [{"a": t.to(memory_format=torch.channels_last), "b": (t[:, 0, :3] + 1).mT} for t in (p.z0, p.x)]
    solver = dq.Anderson(m=4, history_dtype=torch.int8)
    states = pair(solver, split[0])
    assert {piece.leaf for piece in hosted_memory(states[0]).pieces} == {0, 1}
    for _ in range(7):
        for state in states:
            state.step({name: pull(state.z[name], split[1][name], p.rate) for name in ("a", "b")})
        assert_alike(states)


@pytest.mark.parametrize("solver", EVERY)
def test_samples_that_overflow_stop_or_change_their_unit(device, solver):
    p = problem(6, 700, slowest=0.95, dtype=F64)
    p.rate.fill_(0.9)
    p.rate[3] = 0.05
    states = pair(solver, p.z0, rtol=1e-6, max_iter=18)
    for k in range(18):
        for state in states:
            f = pull(state.z, *p.args)
            if k == 5:
                f[0] *= 1e15
            if k == 7:
                f[1] = torch.nan
            if k == 8:
                f[2] *= 1e30
            state.step(f)
        # On its way back from there a sample has no digit that it shares with one rounded otherwise.
        assert_alike(states, samples=[1, 3, 4, 5] if k < 17 else slice(None))
    assert states[0].status[1] == dq.Status.NON_FINITE and states[0].steps[3] < 12
    assert bool(states[0].ws.int_row(Int.RESCALES).any())


@pytest.mark.parametrize(
    "settings", [{}, {"compact": True}, {"stop": "all"}, {"returns": "next"}, {"returns": "image"}]
)
@pytest.mark.parametrize("name", ["default", "type-2", "int8"])
def test_solves_are_those_of_a_history_on_the_device(device, name, settings):
    p = problem(9, 300, slowest=0.97)
    expected = solve(p, solver=SOLVERS[name], rtol=1e-5, max_iter=80, backend="torch", **settings)
    found = solve(p, solver=on_host(SOLVERS[name]), rtol=1e-5, max_iter=80, **settings)
    assert found.backend == "torch" and bool(found.converged.all())
    assert bool(((found.steps - expected.steps).abs() <= 2).all())
    assert torch.allclose(found.z, expected.z, rtol=1e-3, atol=1e-4)


def test_segments_of_unequal_length(device):
    lengths = [3, 40, 7, 3]
    rows = sum(lengths)
    p = problem(rows, 50, slowest=0.9)
    offsets = [0, *itertools.accumulate(lengths)]
    a, b = p.rate[:, None], p.x
    solver = dq.Anderson(m=4)
    found, expected = (
        dq.fixed_point(lambda z: a * z.tanh() + b, p.z0, solver=s, segments=offsets, rtol=1e-5, backend="torch")
        for s in (on_host(solver), solver)
    )
    assert bool(found.converged.all()) and found.converged.shape == (4,)
    assert torch.allclose(found.z, expected.z, rtol=1e-3, atol=1e-4)


def test_gradients_are_those_of_a_history_on_the_device(device):
    p = problem(4, 300, slowest=0.8)
    gradients = []
    for solver in (on_host(SOLVERS["default"]), SOLVERS["default"]):
        x = p.x.clone().requires_grad_()
        sol = dq.fixed_point(pull, p.z0, (x, p.rate), solver=solver, rtol=1e-6, backend="torch")
        sol.z.square().sum().backward()
        gradients.append(x.grad)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)


def test_a_joint_solve_has_its_columns_there(device):
    q = LinearQuadratic(norm=0.5)
    args = q.tensors(torch.float32)
    step_size = 1 / q.solution(*q.tensors())[1]
    z0, x0 = torch.zeros(q.B, q.nz), torch.zeros(q.B, q.nx)
    options = {"rtol": 1e-3, "max_iter": 300, "step_size": step_size, "backward": "none"}
    expected = dq.joint_solve(q.f, q.loss, z0, x0, args, solver=dq.Anderson(), backend="torch", **options)
    found = dq.joint_solve(q.f, q.loss, z0, x0, args, solver=dq.Anderson(history_device="cpu"), **options)
    assert found.backend == "torch" and bool(found.converged.all())
    assert torch.allclose(found.x, expected.x, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("solver", EVERY)
def test_a_saved_state_goes_on_to_the_bit(device, solver):
    p = problem(4, 700, slowest=0.95)
    state = on_host(solver).init(p.z0, rtol=0.0, backend="torch")
    for _ in range(6):
        state.step(pull(state.z, *p.args))
    saved = copy.deepcopy(state.state_dict())
    again = on_host(solver).init(p.z0, rtol=0.0, backend="torch")
    for junk in (again.ws.history, memory(again).scales):
        junk.view(torch.uint8).fill_(255)  # NaN in every dtype that has one
    again.load_state_dict(saved)
    third = copy.deepcopy(state)
    for _ in range(4):
        for each in (state, again, third):
            each.step(pull(each.z, *p.args))
        assert same_bits(state.z, again.z) and same_bits(state.z, third.z)
    assert torch.equal(state.ws.own()["history"], again.ws.own()["history"])


def test_a_smaller_batch_and_another_solve_take_the_columns_along(device):
    p = problem(9, 700, slowest=0.97, dtype=F64)
    for solver in (SOLVERS["default"], SOLVERS["int8"]):
        states = pair(solver, p.z0)
        q = p
        for k in range(10):
            if k == 5:
                q = p.rows([1, 4, 8])
                for state in states:
                    state.keep([1, 4, 8])
            for state in states:
                state.step(pull(state.z, *q.args))
            assert_alike(states)
        solvers = (on_host(solver), solver)
        later = [
            each.init(q.z0, rtol=0.0, backend="torch", history=state)
            for each, state in zip(solvers, states, strict=True)
        ]
        for _ in range(3):
            for state in later:
                state.step(pull(state.z, *q.args))
            assert_alike(later)


def test_columns_are_those_that_a_history_on_the_device_holds(device):
    p = problem(5, 3 * BLOCK + 5, slowest=0.9)
    solver = SOLVERS["int8"]
    states = pair(solver, p.z0)
    for _ in range(2):  # whose iterates have the same bits
        for state in states:
            state.step(p.x * (state.nfe + 1) ** 2)
    for state in states:
        state.ws.settle()
    for which in (0, 1):
        found, expected = (memory(state).columns(which)[:, 0] for state in states)
        assert torch.equal(found, expected) and bool(found.any())
    assert torch.equal(*(memory(state).scales[:, :, 0] for state in states))
