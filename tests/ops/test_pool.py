"""Histories of finished solves serve the next ones, and nobody can tell."""

import threading

import pytest
import torch

import deqfast as dq
from deqfast.ops import pool

pytestmark = pytest.mark.host

SHAPE = (8, 40_000)  # an Anderson history of 15 MB


@pytest.fixture(autouse=True)
def empty_pool():
    pool.clear()
    yield
    pool.clear()


def waiting() -> list[torch.Tensor]:
    with pool._lock:
        return list(pool._free)


def problem(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    a = 1.8 * torch.rand(SHAPE, generator=generator) - 0.9
    b = torch.randn(SHAPE, generator=generator)
    return lambda z: a * torch.tanh(z) + b


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_second_solve_uses_the_buffer_of_the_first(solver, backend):
    dq.fixed_point(problem(), torch.zeros(SHAPE), solver=solver, backend=backend, max_iter=5)
    (buffer,) = waiting()
    dq.fixed_point(problem(1), torch.zeros(SHAPE), solver=solver, backend=backend, max_iter=5)
    assert [t.data_ptr() for t in waiting()] == [buffer.data_ptr()]


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_what_a_buffer_held_changes_no_bit(solver):
    fresh = dq.fixed_point(problem(), torch.zeros(SHAPE), solver=solver, rtol=1e-6)
    for buffer in waiting():
        buffer.fill_(255)  # NaN in every history dtype
    again = dq.fixed_point(problem(), torch.zeros(SHAPE), solver=solver, rtol=1e-6)
    assert torch.equal(fresh.z, again.z)
    assert torch.equal(fresh.steps, again.steps)


def test_the_backward_solve_gives_its_history_back():
    weight = torch.full((), 0.5, requires_grad=True)
    f = problem()
    solution = dq.fixed_point(lambda z: weight * f(z), torch.zeros(SHAPE), rtol=1e-5)
    pool.clear()
    solution.z.sum().backward()
    assert weight.grad is not None
    assert len(waiting()) == 1


def test_a_solution_does_not_lie_in_a_buffer():
    solution = dq.fixed_point(problem(), torch.zeros(SHAPE), rtol=1e-6)
    z, residual, steps = solution.z.clone(), solution.residual.clone(), solution.steps.clone()
    for buffer in waiting():
        buffer.fill_(255)
    assert torch.equal(solution.z, z)
    assert torch.equal(solution.residual, residual)
    assert torch.equal(solution.steps, steps)
    assert solution.events["evictions"].shape == (8,)


def test_a_state_that_a_callback_may_have_kept_stays_usable():
    kept = []
    dq.fixed_point(problem(), torch.zeros(SHAPE), callback=lambda k, state: kept.append(state) or k == 3)
    assert waiting() == []
    state, f = kept[-1], problem()
    while not state.done:
        state.step(f(state.z))
    assert bool((state.status == dq.Status.CONVERGED).all())


def test_the_limit_bounds_what_waits(monkeypatch):
    monkeypatch.setenv("DEQFAST_POOL_MB", "0")
    dq.fixed_point(problem(), torch.zeros(SHAPE), max_iter=3)
    assert waiting() == []
    monkeypatch.setenv("DEQFAST_POOL_MB", "20")
    for size in (12, 11):
        pool.give(torch.empty(size << 20, dtype=torch.uint8))
    assert [t.numel() >> 20 for t in waiting()] == [11]  # the older one went


def test_small_and_much_smaller_requests_take_no_waiting_buffer():
    pool.give(torch.empty(16 << 20, dtype=torch.uint8))
    assert pool.empty((16,), torch.float32, torch.device("cpu"))[1] is None
    _, other = pool.empty((1 << 20,), torch.float32, torch.device("cpu"))
    assert other is not None
    assert other.numel() == 4 << 20
    assert len(waiting()) == 1


def test_threads_never_share_a_buffer():
    expected = [dq.fixed_point(problem(i), torch.zeros(SHAPE), rtol=1e-6).z for i in range(4)]
    results: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        for _ in range(3):
            results[i] = dq.fixed_point(problem(i), torch.zeros(SHAPE), rtol=1e-6).z

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(results[i], expected[i]) for i in range(4))


@pytest.mark.parametrize("text", ["abc", "nan", "inf", "-1"])
def test_wrong_limit_is_said_before_f_is_evaluated(monkeypatch, text):
    monkeypatch.setenv("DEQFAST_POOL_MB", text)
    with pytest.raises(ValueError, match=f"DEQFAST_POOL_MB must be .*{text}"):
        dq.fixed_point(lambda z: 1 / 0, torch.zeros(SHAPE))
