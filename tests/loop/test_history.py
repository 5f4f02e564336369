"""Solves that begin with the columns of an earlier one: fewer evaluations, counted from zero, nothing else changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import BACKENDS, DEVICE, ORDERED, alike, problem, pull, run, same_bits, same_state
from torch import Tensor

import deqfast as dq
from deqfast.ops import pool

METHODS = {
    "mixed": dq.Anderson(),
    "m20": dq.Anderson(m=20),
    "type1": dq.Anderson(m=6, type=1),
    "type2": dq.Anderson(m=6, type=2),
    "oldest": dq.Anderson(m=4, evict="oldest"),
    "int8": dq.Anderson(m=4, history_dtype=torch.int8),
    "f32": dq.Anderson(m=5, history_dtype=torch.float32, mixing=0.8),
}
EVERY = [pytest.param(solver, id=name) for name, solver in METHODS.items()]


def slowly_changing(seed: int, N: int = 96, B: int = 12, moved: float = 1e-3) -> list[Callable[[Tensor], Tensor]]:
    """A tanh layer beyond the radius of plain iteration, and the same with weights that have moved."""
    cpu = {"generator": torch.Generator().manual_seed(seed)}
    A, D, x = torch.randn(N, N, **cpu), torch.randn(N, N, **cpu), torch.randn(B, N, **cpu)
    A *= 1.2 / torch.linalg.eigvals(A).abs().max()
    D *= moved * A.norm() / D.norm()
    first, second, x = A.to(DEVICE), (A + D).to(DEVICE), x.to(DEVICE)
    return [lambda z: torch.tanh(z @ first + x), lambda z: torch.tanh(z @ second + x)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", [METHODS["mixed"], METHODS["m20"], METHODS["type2"]], ids=["mixed", "m20", "type2"])
def test_columns_save_evaluations_on_a_map_that_changed_slowly(solver, backend):
    counts = []
    for seed in range(8):
        before, after = slowly_changing(seed)
        settings = {"rtol": 1e-5, "max_iter": 200, "backend": backend}
        earlier = run(solver.init(torch.zeros(12, 96, device=DEVICE), **settings), before)
        plain = run(solver.init(earlier.z, **settings), after)
        warm = run(solver.init(earlier.z, history=earlier, **settings), after)
        assert bool((warm.status == dq.Status.CONVERGED).all())
        assert bool(((after(warm.z) - warm.z).norm(dim=1) <= 2e-5 * warm.z.norm(dim=1)).all())
        counts.append((plain.nfe, warm.nfe))
    assert sum(warm <= plain for plain, warm in counts) >= 7
    assert sum(warm for _, warm in counts) < 0.95 * sum(plain for plain, _ in counts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY)
@pytest.mark.parametrize("shape", [(3,), (24,), (40,), (1500,)], ids=str)
def test_evaluations_are_counted_from_zero(shape, solver, backend):
    p = problem(18, *shape, slowest=0.97)
    f = lambda z: pull(z, *p.args)  # noqa: E731
    earlier = run(solver.init(p.z0, rtol=1e-5, backend=backend), f)
    z0 = torch.randn_like(p.z0)
    state = solver.init(z0, rtol=0.0, max_iter=7, backend=backend, history=earlier)
    assert state.nfe == 0 and not state.done and bool((state.steps == 0).all()) and torch.equal(state.z, z0)
    assert bool((state.status == dq.Status.RUNNING).all())
    for made in range(1, 8):
        state.step(f(state.z))
        running = state.running
        assert state.nfe == made and bool((state.steps[running] == made).all())
        assert state.done == (made == 7)
    for _ in range(3):  # from one to the next
        state = solver.init(z0, rtol=1e-4, max_iter=60, backend=backend, history=state)
        run(state, f)
        assert bool((state.status == dq.Status.CONVERGED).all()) and int(state.steps.max()) <= state.nfe <= 60
        left = state.keep([])
        assert same_bits(left.steps, left.steps.clamp(1, 60)) and left.nfe == state.nfe
        state = copy.deepcopy(earlier)


@pytest.mark.parametrize("backend", BACKENDS)
def test_earlier_state_goes_on_as_if_nothing_had_been_taken(backend):
    p = problem(9, 33, slowest=0.99)
    f = lambda z: pull(z, *p.args)  # noqa: E731
    state, twin = (run(dq.Anderson().init(p.z0, rtol=0.0, backend=backend), f, 6) for _ in range(2))
    warm = dq.Anderson().init(state.z, rtol=0.0, backend=backend, history=state)
    run(warm, f, 5)
    run(state, f, 5)
    run(twin, f, 5)
    assert alike(state, twin, backend)


@pytest.mark.parametrize("backend", ORDERED)
@pytest.mark.parametrize("solver", EVERY)
@pytest.mark.parametrize("shape", [(3,), (40,)], ids=str)
def test_samples_have_the_same_bits_in_another_batch(shape, solver, backend):
    p = problem(18, *shape, slowest=0.97)
    rows = torch.tensor([17, 4, 11], device=DEVICE)
    some = p.rows(rows)
    settings = {"rtol": 1e-6, "max_iter": 30, "backend": backend}
    earlier = run(solver.init(p.z0, **settings), lambda z: pull(z, *p.args))
    fewer = copy.deepcopy(earlier)
    fewer.keep(rows)
    z0 = torch.randn_like(p.z0)
    whole = run(solver.init(z0, history=earlier, **settings), lambda z: pull(z, *p.args))
    part = run(solver.init(z0[rows], history=fewer, **settings), lambda z: pull(z, *some.args))
    shrunk = run(solver.init(z0, history=earlier, **settings), lambda z: pull(z, *p.args), 2)
    shrunk.keep(rows)
    run(shrunk, lambda z: pull(z, *some.args))
    for state in (part, shrunk):
        for name in ("z", "steps", "status", "residual"):
            assert same_bits(getattr(state, name), getattr(whole, name)[rows]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_it_is_saved(at, how, backend):
    p = problem(9, 33, slowest=0.97)
    f = lambda z: pull(z, *p.args)  # noqa: E731
    settings = {"rtol": 0.0, "max_iter": 12, "backend": backend}
    earlier = run(dq.Anderson().init(p.z0, rtol=1e-4, backend=backend), f)
    state = run(dq.Anderson().init(torch.randn_like(p.z0), history=earlier, **settings), f, at)
    if how == "state_dict":
        again = dq.Anderson().init(p.z0, **settings)
        again.load_state_dict(state.state_dict())
    else:
        again = copy.deepcopy(state) if how == "deepcopy" else pickle.loads(pickle.dumps(state))
    assert same_state(state, again)
    for s in (state, again):
        run(s, f)
        assert s.nfe == 12 and s.done
    assert alike(state, again, backend)
    plain = dq.Anderson().init(p.z0, **settings)
    again.load_state_dict(run(plain, f, 2).state_dict())  # and back to a solve without
    run(again, f)
    assert again.nfe == 12


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_that_stop_together(backend):
    before, after = slowly_changing(0)
    settings = {"rtol": 1e-5, "stop": "all", "backend": backend, "max_iter": 100}
    earlier = run(dq.Anderson().init(torch.zeros(12, 96, device=DEVICE), **settings), before)
    plain = run(dq.Anderson().init(earlier.z, **settings), after)
    state = dq.Anderson().init(earlier.z, history=earlier, **settings)
    again = pickle.loads(pickle.dumps(state))
    for s in (state, again):
        run(s, after)
        assert bool((s.status == dq.Status.CONVERGED).all()) and set(s.steps.tolist()) == {s.nfe}
        assert s.nfe <= plain.nfe
    limited = dq.Anderson().init(earlier.z, history=earlier, **{**settings, "max_iter": 3})
    assert run(limited, after).nfe == 3 and set(limited.steps.tolist()) == {3}


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_and_trees(backend):
    p = problem(4, 6, 12, slowest=0.9)
    z0 = {"a": p.z0, "b": p.z0[..., :5].contiguous()}

    def f(z):
        return {"a": (0.9 * z["a"]).sin() + p.x, "b": (0.9 * z["b"]).sin() + p.x[..., 1:6]}

    earlier = run(dq.Anderson().init(z0, rtol=1e-4, batch_dims=2, backend=backend), f)
    warm = run(dq.Anderson().init(earlier.z, rtol=1e-6, batch_dims=2, backend=backend, history=earlier), f)
    cold = run(dq.Anderson().init(z0, rtol=1e-6, batch_dims=2, backend=backend), f)
    assert warm.steps.shape == (4, 6) and bool((warm.status == dq.Status.CONVERGED).all())
    assert int(warm.steps.sum()) < 0.8 * int(cold.steps.sum())
    assert bool((warm.z["a"] - cold.z["a"]).abs().max() < 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_that_are_woken_go_on(backend):
    p = problem(6, 20)
    x = p.x.clone()
    f = lambda z: pull(z, x, p.rate)  # noqa: E731
    earlier = run(dq.Anderson().init(p.z0, rtol=1e-3, backend=backend), f)
    state = run(dq.Anderson().init(p.z0, rtol=1e-5, max_iter=60, backend=backend, history=earlier), f)
    made, steps = state.nfe, state.steps.clone()
    x[::2] += 0.1
    assert not state.verify(f(state.z)) and state.nfe == made + 1
    assert torch.equal(state.steps[1::2], steps[1::2]) and state.wakings == 1
    run(state, f)
    assert bool((state.status == dq.Status.CONVERGED).all())
    assert state.nfe == int(state.steps.max()) <= 60 and bool((state.steps[::2] > made).all())
    assert bool(((f(state.z) - state.z).norm(dim=1) <= 2e-5 * state.z.norm(dim=1)).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_evaluation_that_is_no_number_leaves_the_start(backend, poisoned_memory):
    p = problem(5, 12)
    earlier = run(dq.Anderson().init(p.z0, rtol=1e-4, backend=backend), lambda z: pull(z, *p.args))
    z0 = torch.randn_like(p.z0)
    state = dq.Anderson().init(z0, rtol=1e-4, backend=backend, history=earlier)
    fz = pull(z0, *p.args)
    fz[2] = torch.nan
    state.step(fz)
    run(state, lambda z: pull(z, *p.args))
    assert state.status.tolist() == [1, 1, int(dq.Status.NON_FINITE), 1, 1]
    assert torch.equal(state.z[2], z0[2])


def test_solve_that_has_made_no_evaluation_has_nothing_to_give():
    p = problem(5, 12)
    cold = run(dq.Anderson().init(p.z0), lambda z: pull(z, *p.args))
    warm = run(dq.Anderson().init(p.z0, history=dq.Anderson().init(p.z0)), lambda z: pull(z, *p.args))
    assert same_state(cold, warm)


def test_label_of_samples_that_run_out():
    p = problem(5, 40, slowest=0.5)
    earlier = run(dq.Anderson().init(p.z0, rtol=1e-4), lambda z: pull(z, *p.args))
    state = run(dq.Anderson().init(p.z0, max_iter=20, history=earlier), lambda z: 3 * z + p.x, 20)
    assert state.done and not bool((state.status == dq.Status.RUNNING).any())


def test_what_does_not_fit_is_refused_naming_it():
    p = problem(5, 12)
    z0 = p.z0
    f = lambda z: pull(z, *p.args)  # noqa: E731
    earlier = run(dq.Anderson().init(z0), f, 3)
    steered = dq.Anderson(type=2).init(z0)
    steered.step(f(z0), residual=f(z0))
    released = run(dq.Anderson().init(z0), f, 3)
    released.release()
    big = torch.zeros(64, 4096)
    assert big.numel() * 40 > pool.MIN_BYTES
    gone = dq.Anderson().init(big)
    gone.step(big + 1)
    gone.release()
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (dq.Anderson(m=4), z0, {}, r"solver is Anderson\(m=10.*this one's is Anderson\(m=4"),
        (dq.Anderson(), z0[:4], {}, r"layout is .*\(5, 12\).*this one's is .*\(4, 12\)"),
        (dq.Anderson(), z0.double(), {}, "layout is .*float32.*float64"),
        (dq.Anderson(), z0, {"batch_dims": 2}, "layout is .*batch_dims=2"),
        (dq.Broyden(), z0, {}, r"that of Broyden.*in a row alone"),
        (dq.Picard(), z0, {}, r"that of Picard.*it keeps none"),
        (dq.Anderson(mix_every=2), z0, {}, "mix_every=1 is needed"),
        (dq.Anderson(type=2), z0, {"history": steered}, "residuals of your own"),
        (dq.Anderson(), big, {"history": gone}, "given its columns back"),
    ]
    for solver, start, more, message in cases:
        with pytest.raises(ValueError, match=message):
            solver.init(start, **{"history": earlier, **more})
    with pytest.raises(TypeError, match="history must be a SolverState, got Tensor"):
        dq.Anderson().init(z0, history=z0)


def slow_modes(seed: int, moved: float, B: int = 12, N: int = 96) -> list[Callable[[Tensor], Tensor]]:
    """A linear map with six slow modes whose solution is far larger than f(0), and the same with other weights."""
    cpu = {"generator": torch.Generator().manual_seed(seed)}
    Q = torch.linalg.qr(torch.randn(N, N, **cpu))[0]
    rates = torch.cat([torch.linspace(0.9, 0.995, 6), torch.linspace(0, 0.3, N - 6)])
    A, D, x = (Q * rates) @ Q.T, torch.randn(N, N, **cpu), torch.randn(B, N, **cpu)
    D *= moved * A.norm() / D.norm()
    first, second, x = A.to(DEVICE), (A + D).to(DEVICE), x.to(DEVICE)
    return [lambda z: z @ first + x, lambda z: z @ second + x]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rtol", [1e-3, 1e-4, 1e-5])
def test_columns_cost_nothing_where_the_old_solution_is_within_tolerance_or_nearly(rtol, backend):
    """The first size is that of this solve's first evaluation, and not of the cold start that was ten times smaller."""
    for moved in (0.0, 1e-3):
        counts = []
        for seed in range(6):
            before, after = slow_modes(seed, moved)
            settings = {"rtol": rtol, "max_iter": 200, "backend": backend}
            earlier = run(dq.Anderson().init(torch.zeros(12, 96, device=DEVICE), **settings), before)
            assert bool((earlier.z.norm(dim=1) > 10 * before(torch.zeros_like(earlier.z)).norm(dim=1)).any())
            plain = run(dq.Anderson().init(earlier.z, **settings), after)
            warm = run(dq.Anderson().init(earlier.z, history=earlier, **settings), after)
            assert bool((warm.status == dq.Status.CONVERGED).all())
            counts.append((plain.nfe, warm.nfe))
        assert sum(warm for _, warm in counts) <= sum(plain for plain, _ in counts)
