"""Solves that go on: beyond their limit, and under a map that has changed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from problems import BACKENDS, DEVICE, EVERY_SOLVER, ONE_OF_EACH, ORDERED, problem, pull, run, same_bits
from torch import Tensor

import deqfast as dq
from deqfast.ops.broyden import BroydenWorkspace

DOUBLE = {"dtype": torch.float64, "device": DEVICE}


def assert_same(a: dq.Solution, b: dq.Solution) -> None:
    for name in ("z", "status", "steps", "residual", "converged"):
        assert same_bits(getattr(a, name), getattr(b, name)), name
    assert a.nfe == b.nfe and all(same_bits(a.events[name], b.events[name]) for name in a.events)


# ---- beyond the limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize("shape", [(3,), (40,), (1500,)], ids=str)
def test_interrupted_solve_has_the_bits_of_one_that_was_not(shape, solver, backend):
    p = problem(18, *shape, slowest=0.99)
    f = lambda z: pull(z, *p.args)  # noqa: E731
    settings = {"rtol": 1e-6, "backend": backend}
    state = solver.init(p.z0, max_iter=5, resumable=True, **settings)
    for limit in (5, 6, 16, 40):  # at 16 the solution at 0 is looked for
        if limit > 5:
            state.extend(limit)
        run(state, f)
        whole = run(solver.init(p.z0, max_iter=limit, **settings), f)
        found = state.solution()
        assert state.done and state.nfe == whole.nfe
        for name in ("status", "steps"):
            assert torch.equal(getattr(found, name), getattr(whole.solution(), name)), name
        assert same_bits(found.z, whole.z) or (isinstance(solver, dq.Broyden) and solver.memory is None and limit < 40)
        # Those that had converged are judged once more where a solve ends, and not where it pauses.
        torch.testing.assert_close(found.residual, whole.solution().residual, rtol=1e-3, atol=1e-12)
    assert state.nfe == 40 or bool(found.converged.all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "state_dict"])
def test_paused_state_is_saved(how, solver, backend):
    p = problem(9, 33, slowest=0.99)
    f = lambda z: pull(z, *p.args)  # noqa: E731
    settings = {"rtol": 1e-6, "backend": backend, "resumable": True, "max_iter": 6}
    state = run(solver.init(p.z0, **settings), f)
    if how == "state_dict":
        again = solver.init(p.z0, **settings)
        again.load_state_dict(state.state_dict())
        longer = solver.init(p.z0, **{**settings, "max_iter": 8})
        longer.load_state_dict(state.state_dict())
        assert not longer.done and run(longer, f).nfe == 8
    else:
        again = copy.deepcopy(state) if how == "deepcopy" else pickle.loads(pickle.dumps(state))
    assert state.done and again.done and again.paused
    assert_same(state.solution(), again.solution())
    for s in (state, again):
        s.extend(30)
        run(s, f)
    if backend == "torch":  # whose small matrices are formed anew
        torch.testing.assert_close(state.z, again.z, rtol=1e-4, atol=1e-5)
    else:
        assert_same(state.solution(), again.solution())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_samples_that_stop_together_go_on_together(solver, backend):
    p = problem(9, 33, slowest=0.9)
    f = lambda z: pull(z, *p.args)  # noqa: E731
    settings = {"rtol": 1e-5, "backend": backend, "stop": "all"}
    state = run(solver.init(p.z0, max_iter=4, resumable=True, **settings), f)
    assert state.nfe == 4 and bool((state.solution().status == dq.Status.MAX_ITER).all())
    state.extend(None)
    whole = run(solver.init(p.z0, max_iter=99, **settings), f)
    assert_same(run(state, f).solution(), whole.solution())
    assert bool(state.solution().converged.all()) and set(state.steps.tolist()) == {state.nfe}


@pytest.mark.parametrize("backend", BACKENDS)
def test_paused_batch_shrinks(backend):
    p = problem(12, 20, slowest=0.99)
    state = run(
        dq.Anderson().init(p.z0, rtol=1e-5, max_iter=5, resumable=True, backend=backend), lambda z: pull(z, *p.args)
    )
    before = state.solution()
    rows = torch.tensor([11, 2, 5], device=DEVICE)
    left = state.keep(rows)
    others = [i for i in range(12) if i not in (2, 5, 11)]
    assert same_bits(left.z, before.z[others]) and torch.equal(left.status, before.status[others])
    assert state.done and bool((left.status != dq.Status.STOPPED).all())
    state.extend(60)
    some = p.rows(rows)
    whole = run(dq.Anderson().init(p.z0, rtol=1e-5, backend=backend), lambda z: pull(z, *p.args))
    run(state, lambda z: pull(z, *some.args))
    assert bool(state.solution().converged.all())
    torch.testing.assert_close(state.z, whole.z[rows], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("returns", ["best", "last", "next"])
def test_looking_at_a_solution_changes_nothing(returns):
    p = problem(7, 33, slowest=0.99)
    f = lambda z: pull(z, *p.args)  # noqa: E731
    state, twin = (dq.Anderson().init(p.z0, rtol=1e-6) for _ in range(2))
    assert bool(state.solution().residual.isnan().all()) and same_bits(state.solution(returns).z, p.z0)
    for _ in range(8):
        found = state.solution(returns)
        state.step(f(state.z))
        twin.step(f(twin.z))
        assert same_bits(state.z, twin.z)
        assert found.z.data_ptr() not in (state.ws.x[0][0].data_ptr(), state.ws.x[1][0].data_ptr())
    assert same_bits(state.solution("next").z, state.z) and same_bits(state.solution("last").z, state.evaluated())
    for dims in (0, 2):
        token = dq.Anderson().init(p.z0.view(7, 11, 3), batch_dims=dims)
        token.step(0.5 * token.z + 1)
        assert token.solution().status.shape == (7, 11)[:dims]


def test_extend_refuses_and_says_why():
    p = problem(4, 8, slowest=0.99)
    f = lambda z: pull(z, *p.args)  # noqa: E731
    ended = run(dq.Anderson().init(p.z0, rtol=0.0, max_iter=3), f)
    with pytest.raises(RuntimeError, match="resumable=True"):
        ended.extend(9)
    state = run(dq.Anderson().init(p.z0, rtol=0.0, max_iter=3, resumable=True), f)
    for value, error, message in (
        (3, ValueError, "above the 3 evaluations made, got 3"),
        ("9", TypeError, "max_iter must be"),
    ):
        with pytest.raises(error, match=message):
            state.extend(value)
    with pytest.raises(RuntimeError, match="at its limit: call extend first"):
        state.verify(f(state.z))
    with pytest.raises(TypeError, match="resumable must be a bool"):
        dq.Anderson().init(p.z0, max_iter=3, resumable=1)
    z = state.z.clone()
    assert state.step(f(state.z)) and state.nfe == 3 and same_bits(state.z, z)
    state.extend(4)
    assert not state.done and state.step(f(state.z))


# ---- a map that has changed


class Affine:
    """z -> A z + b with ||A|| = norm, in float64, its right-hand side to be moved; fixed points in closed form."""

    def __init__(self, B: int = 6, N: int = 12, norm: float = 0.97, seed: int = 0, dtype: torch.dtype = torch.float64):
        self.generator = torch.Generator().manual_seed(seed)
        A = torch.linalg.qr(torch.randn(N, N, generator=self.generator, dtype=torch.float64))[0]
        self.A = (norm * A).to(DEVICE, dtype)
        self.b = self.normal(B, N)
        self.z0 = torch.zeros_like(self.b)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(DEVICE, self.A.dtype)

    def __call__(self, z: Tensor) -> Tensor:
        return z @ self.A.mT + self.b

    def move(self, by: float) -> None:
        self.b = self.b + by * self.normal(*self.b.shape)

    @property
    def exact(self) -> Tensor:
        return torch.linalg.solve(torch.eye(len(self.A), **DOUBLE) - self.A.double(), self.b.double().mT).mT


ACCELERATED = [
    pytest.param(dq.Anderson(m=15), id="mixed"),
    pytest.param(dq.Anderson(m=15, type=1), id="type1"),
    pytest.param(dq.Anderson(m=15, type=2), id="type2"),
    pytest.param(dq.Broyden(), id="broyden"),
    pytest.param(dq.Broyden(scale="first_step"), id="broyden-scaled"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ACCELERATED)
@pytest.mark.parametrize("made", [6, 11, 60])  # on the way; nearly there; converged
def test_repaired_solve_is_right_and_takes_fewer_evaluations_than_a_cold_one(made, solver, backend):
    counts = []
    for seed in range(4):
        f = Affine(seed=seed)
        state = run(solver.init(f.z0, rtol=1e-9, backend=backend), f, made)
        f.move(0.2)
        before = state.nfe
        assert not state.repair(f(state.evaluated())) and state.nfe == before + 1
        assert bool((state.status == dq.Status.RUNNING).all())
        run(state, f)
        assert bool((state.status == dq.Status.CONVERGED).all())
        torch.testing.assert_close(state.z, f.exact, rtol=1e-6, atol=1e-6)
        cold = run(solver.init(f.z0, rtol=1e-9, backend=backend), f)
        counts.append((state.nfe - before, cold.nfe))
    assert all(warm < cold for warm, cold in counts), counts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ACCELERATED[:3])
def test_newest_column_is_a_difference_of_one_map_only_with_repair(solver, backend):
    """With columns that span the space an affine map is solved in one step: unless one of them spans two maps."""
    for repaired in (True, False):
        f = Affine(B=1, N=5)
        state = run(solver.init(f.z0, rtol=1e-13, backend=backend), f, 6)  # five differences of five numbers
        f.move(1.0)
        if repaired:
            state.repair(f(state.evaluated()))
        else:
            state.step(f(state.z))
        error = float((state.z - f.exact).norm() / f.exact.norm())
        assert error < 1e-3 if repaired else error > 0.1, (repaired, error)


@pytest.mark.parametrize("backend", BACKENDS)
def test_broyden_makes_no_update_of_two_maps(backend):
    """Its inverse after the repair is the one before: the step is H (f - z) with H of the old evaluations."""
    f = Affine(B=3, N=7)
    solver = dq.Broyden()
    steps: dict[Any, list[Tensor]] = {}
    for kind in (
        "first",
        "second",
        "both",
    ):  # H is linear: what it makes of g1 + g2 is the sum of what it makes of each
        g = copy.deepcopy(f)
        state = run(solver.init(g.z0, rtol=1e-13, backend=backend), g, 5)
        z = state.evaluated()
        for by in {"first": (1,), "second": (2,), "both": (1, 2)}[kind]:
            g.b = g.b + by * torch.linspace(-1, 1, 7, **DOUBLE) ** by
        state.repair(g(z))
        steps[kind] = [g(z) - z, state.z - z]
    old = run(solver.init(f.z0, rtol=1e-13, backend=backend), f, 5)
    z = old.evaluated()
    base = old.z - z  # H (f(z) - z)
    moved = steps["both"][1] - base
    torch.testing.assert_close(moved, steps["first"][1] - base + steps["second"][1] - base, rtol=1e-6, atol=1e-8)
    # And it is a secant inverse of the old differences still: exact for the last one.
    s = old.evaluated() - run(solver.init(f.z0, rtol=1e-13, backend=backend), f, 4).evaluated()
    g = copy.deepcopy(f)
    g.b = g.b - (s @ f.A.mT - s)  # g changes by -y, so that the step changes by H (-y) = s
    state = run(solver.init(f.z0, rtol=1e-13, backend=backend), f, 5)
    state.repair(g(z))
    torch.testing.assert_close(state.z - z - base, s, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_broyden_step_across_two_maps_spoils_its_inverse(backend):
    """Why there is a repair: without it the update of the first evaluation after a change is of no map's difference."""
    took = {}
    for repaired in (True, False):
        counts = []
        for seed in range(6):
            f = Affine(seed=seed)
            state = run(dq.Broyden().init(f.z0, rtol=1e-9, backend=backend), f, 10)
            f.move(1.0)
            before = state.nfe
            if repaired:
                state.repair(f(state.evaluated()))
            run(state, f)
            torch.testing.assert_close(state.z, f.exact, rtol=1e-6, atol=1e-6)
            counts.append(state.nfe - before)
        took[repaired] = sum(counts)
    assert took[True] < took[False], took


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_converged_failed_and_running_samples_all_go_on(solver, backend):
    p = problem(6, 20, slowest=0.99, dtype=torch.float64)
    rate = torch.tensor([0.01, 0.02, 0.9, 0.95, 0.97, 0.5], **DOUBLE)
    f = lambda z: pull(z, p.x, rate)  # noqa: E731
    state = solver.init(p.z0, rtol=1e-8, backend=backend)
    state.step(f(state.z))
    poisoned = f(state.z)
    poisoned[5] = torch.nan
    state.step(poisoned)
    run(state, f, 4)
    assert state.status.tolist()[:2] == [1, 1] and int(state.status[5]) == dq.Status.NON_FINITE
    assert bool(state.running[2:5].all())
    x = p.x + 0.01
    state.repair(pull(state.evaluated(), x, rate))
    assert bool(state.running.all()) and state.solution().events["woken"].tolist() == [1, 1, 0, 0, 0, 1]
    run(state, lambda z: pull(z, x, rate))
    assert bool((state.status == dq.Status.CONVERGED).all())
    fz = pull(state.z, x, rate)
    assert bool(((fz - state.z).norm(dim=1) <= 2e-8 * fz.norm(dim=1)).all())


@pytest.mark.parametrize("backend", ORDERED)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize("shape", [(3,), (40,), (1500,)], ids=str)
def test_repaired_samples_have_the_same_bits_in_another_batch(shape, solver, backend):
    p = problem(18, *shape, slowest=0.97)
    rows = torch.tensor([17, 4, 11], device=DEVICE)
    some = p.rows(rows)
    x, part_x = p.x + 0.1, some.x + 0.1
    states = []
    for q, moved in ((p, x), (some, part_x)):
        state = run(solver.init(q.z0, rtol=1e-6, max_iter=40, backend=backend), lambda z, q=q: pull(z, *q.args), 4)
        assert state.nfe == 4
        state.repair(pull(state.evaluated(), moved, q.rate))
        states.append(run(state, lambda z, q=q, moved=moved: pull(z, moved, q.rate)))
    whole, part = states
    assert same_bits(whole.z[rows], part.z) and torch.equal(whole.status[rows], part.status)
    assert torch.equal(whole.steps[rows], part.steps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repair_is_saved_and_may_come_again_and_again(backend):
    f = Affine()
    state = dq.Broyden().init(f.z0, rtol=1e-9, backend=backend)
    for _ in range(4):
        run(state, f, 3)
        f.move(0.1)
        state.repair(f(state.evaluated()))
        again = copy.deepcopy(state)
        state.step(f(state.z))
        again.step(f(again.z))
        torch.testing.assert_close(state.z, again.z, rtol=1e-9, atol=1e-9)
    run(state, f)
    torch.testing.assert_close(state.z, f.exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_broyden_samples_of_gram_form_forget(backend):
    x = torch.linspace(-1, 1, 1 << 16, **DOUBLE).expand(2, -1)
    f = lambda z, x: 0.8 * torch.sin(z) + x  # noqa: E731
    state = run(dq.Broyden(memory=20).init(torch.zeros_like(x), rtol=1e-8, backend=backend), lambda z: f(z, x), 5)
    assert isinstance(state.ws, BroydenWorkspace) and state.ws.gram.shape[1] == 20
    z = state.evaluated()
    fz = f(z, x + 0.1)
    state.repair(fz)
    torch.testing.assert_close(state.z, fz)  # the first step of a solve
    run(state, lambda z: f(z, x + 0.1))
    assert bool(state.solution().converged.all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_samples_that_stop_together_are_repaired(solver, backend):
    p = problem(5, 12, slowest=0.6)
    state = run(solver.init(p.z0, rtol=1e-5, stop="all", backend=backend), lambda z: pull(z, *p.args))
    assert state.done
    x = p.x + 0.3
    assert not state.repair(pull(state.evaluated(), x, p.rate))
    run(state, lambda z: pull(z, x, p.rate))
    assert bool(state.solution().converged.all()) and set(state.steps.tolist()) == {state.nfe}
    fz = pull(state.z, x, p.rate)
    assert bool(((fz - state.z).norm(dim=1) <= 2e-5 * fz.norm(dim=1)).all())
    same = pull(state.z, x, p.rate)
    assert state.repair(same), "the same map: its evaluation is within tolerance at once"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("resumable", [True, False])
def test_limit_stays_when_a_map_changes(resumable, backend):
    f = Affine()
    state = run(dq.Anderson().init(f.z0, rtol=1e-9, max_iter=6, resumable=resumable, backend=backend), f)
    f.move(0.1)
    assert state.repair(f(state.evaluated())) and state.nfe == 7
    assert not bool(state.solution().converged.any()) and not bool((state.solution().status == dq.Status.RUNNING).any())
    if resumable:
        state.extend(60)
        run(state, f)
        torch.testing.assert_close(state.z, f.exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_output_may_be_used_again_after_repair(solver):
    f = Affine()
    state = run(solver.init(f.z0, rtol=1e-9), f, 5)
    f.move(0.1)
    fz = f(state.evaluated())
    twin = copy.deepcopy(state)
    twin.repair(fz.clone())
    state.repair(fz)
    fz.fill_(7.0)
    for s in (state, twin):
        run(s, f, 2)
    assert same_bits(state.z, twin.z)


def test_repair_refuses_and_says_why():
    f = Affine()
    state = dq.Anderson().init(f.z0)
    with pytest.raises(RuntimeError, match="none has been made: give fz to step"):
        state.repair(f(state.z))
    run(state, f, 3)
    before = state.state_dict()
    for fz, error, message in (
        (f(state.z)[:, :-1], ValueError, r"fz must have the shape of z0, expected \(6, 12\), got \(6, 11\)"),
        (f(state.z)[:-1], ValueError, r"fz must have the shape of z0, expected \(6, 12\), got \(5, 12\)"),
        (f(state.z).float(), TypeError, "fz must have the dtype of z0"),
        ([f(state.z)], TypeError, "fz must have the structure of z0"),
    ):
        with pytest.raises(error, match=message):
            state.repair(fz)
    after = state.state_dict()
    assert before["nfe"] == after["nfe"] and same_bits(before["tensors"], after["tensors"])
    steered = dq.Anderson(type=2).init(f.z0)
    steered.step(f(f.z0), residual=f(f.z0))
    with pytest.raises(ValueError, match="not one of your own"):
        steered.repair(f(f.z0))

    def look(k: int, state: dq.SolverState) -> None:
        state.repair(state.evaluated())

    with pytest.raises(RuntimeError, match="callback of fixed_point cannot repair"):
        dq.fixed_point(f, f.z0, callback=look)


@pytest.mark.parametrize("backend", BACKENDS)
def test_trees_tokens_and_half_precision_are_repaired(backend):
    p = problem(4, 6, 12, slowest=0.9)
    z0 = {"a": p.z0, "b": p.z0[..., :5].contiguous()}

    def f(z, x):
        return {"a": (0.9 * z["a"]).sin() + x, "b": (0.9 * z["b"]).sin() + x[..., 1:6]}

    for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        start, x = {k: t.to(dtype) for k, t in z0.items()}, p.x.to(dtype)
        state = run(dq.Anderson().init(start, rtol=rtol, batch_dims=2, backend=backend), lambda z, x=x: f(z, x), 5)
        moved = x + 0.2
        state.repair(f(state.evaluated(), moved))
        run(state, lambda z, moved=moved: f(z, moved), 100)
        assert state.solution().status.shape == (4, 6) and bool(state.solution().converged.all())
        torch.testing.assert_close(state.z["a"], f(state.z, moved)["a"], rtol=10 * rtol, atol=10 * rtol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ["anderson", "broyden", "picard"])
@pytest.mark.parametrize("limit", [4, 8, 12])
def test_samples_that_stop_together_end_at_the_limit_alike_whatever_is_returned(limit, solver, backend):
    slope = torch.tensor([0.05, 0.1, 0.3, 0.9, 0.95, 0.97], **DOUBLE)[:, None]
    x = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    options = {"rtol": 1e-5, "max_iter": limit, "stop": "all", "backend": backend}

    def f(z):
        return slope * torch.tanh(z).flip(1) + x

    expected = dq.fixed_point(f, torch.zeros_like(x), solver=solver, **options)
    assert bool(expected.converged.any()) or limit == 4
    for returns in ("last", "image", "next"):
        found = dq.fixed_point(f, torch.zeros_like(x), solver=solver, returns=returns, **options)
        assert torch.equal(found.status, expected.status), returns
    ways = {"anderson": dq.Anderson(), "broyden": dq.Broyden(), "picard": dq.Picard()}
    state = ways[solver].init(torch.zeros_like(x), resumable=True, **options)
    while not state.done:
        state.step(f(state.z))
    assert torch.equal(state.solution().status, expected.status)
