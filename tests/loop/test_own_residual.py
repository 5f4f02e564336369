"""A residual of the caller's own steers as the same residual of the iterates does, or is refused."""

from __future__ import annotations

import pytest
import torch
from problems import (
    BACKENDS,
    problem,
    pull,
    same_state,
)

import deqfast as dq
from deqfast.ops.native import extension as native


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


ABLE = [name for name in BACKENDS if name in ("native", "torch", "reference") and not native.EMULATED]


@pytest.mark.parametrize("backend", ABLE)
def test_residual_in_another_space_steers_as_the_same_residual_does(backend):
    """An orthogonal change of space keeps every product that the least-squares problem is made of."""
    p = problem(4, 12, dtype=torch.float64, slowest=0.8)
    Q = torch.linalg.qr(torch.randn(20, 12, dtype=torch.float64))[0]
    solver = dq.Anderson(m=4, type=2)
    states = [solver.init(p.z0, rtol=1e-7, max_iter=60, backend=backend) for _ in range(2)]
    while not states[0].done:
        f = [pull(s.z, *p.args) for s in states]
        states[0].step(f[0])
        states[1].step(f[1], residual=(f[1] - states[1].z) @ Q.T)
    plain, steered = states
    assert steered.done
    assert torch.equal(plain.steps, steered.steps)
    assert bool(((plain.z - steered.z).norm(dim=1) <= 1e-6 * plain.z.norm(dim=1)).all())


@pytest.mark.parametrize("backend", [name for name in ABLE if name != "reference"])
@pytest.mark.parametrize(("N", "M"), [(9, 6), (40, 9), (130, 700), (1500, 40), (5000, 2500)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_backend_makes_the_reference_s_steps(dtype, N, M, backend):
    p = problem(3, N, dtype=dtype, slowest=0.8)
    P = torch.randn(N, M, generator=torch.Generator().manual_seed(1), dtype=p.z0.dtype) / N**0.5
    solver = dq.Anderson(m=3, type=2, history_dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    states = [solver.init(p.z0, rtol=1e-30, max_iter=9, backend=b) for b in ("reference", backend)]
    eps = torch.finfo(dtype).eps
    while not states[0].done:
        z = states[0].z.clone()
        fz = pull(z, *p.args)
        r = (fz - z) @ P
        r[1] *= 1e-3 if states[0].nfe % 2 else 1  # its norm jumps, and with it what is restarted
        for state in states:
            state.step(fz, residual=r.clone())
        expected, got = (s.z.double() for s in states)
        assert bool(((expected - got).norm(dim=1) <= 2000 * eps * expected.norm(dim=1)).all())
        for a, b in ((s.residual.double() for s in states),):
            assert torch.allclose(a, b, rtol=20 * torch.finfo(states[0].residual.dtype).eps)
        assert torch.equal(states[0].status, states[1].status)
        states[1].load_state_dict(states[0].state_dict())
    assert states[1].done


@pytest.mark.skipif(native._C is None or native.EMULATED, reason="the extension is not built")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sample_s_steps_do_not_depend_on_its_batch_nor_on_threads(threads):
    p = problem(6, 300, slowest=0.8)
    solver = dq.Anderson(m=4, type=2)

    def run(rows):
        state = solver.init(p.z0[rows], max_iter=12, rtol=1e-5, backend="native")
        while not state.done:
            fz = torch.tanh(state.z * 0.5 + p.z0[rows] + 1)  # elementwise: the same bits in every batch
            state.step(fz, residual=((fz - state.z) * 3)[:, :77])
        return state.z

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = run(slice(None))
        for b in range(6):
            assert torch.equal(run(slice(b, b + 1))[0], together[b])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ABLE)
def test_a_residual_that_is_no_number_stops_its_sample_alone(backend):
    p = problem(3, 12, slowest=0.8)
    state = dq.Anderson(m=4, type=2).init(p.z0, rtol=1e-4, max_iter=60, backend=backend)
    while not state.done:
        fz = pull(state.z, *p.args)
        r = fz - state.z
        if state.nfe >= 3:
            r[1] = torch.nan
        state.step(fz, residual=r)
    assert state.status.tolist() == [dq.Status.CONVERGED, dq.Status.NON_FINITE, dq.Status.CONVERGED]
    assert bool(state.z.isfinite().all())


@pytest.mark.skipif(native._C is None or native.EMULATED, reason="the extension is not built")
def test_samples_of_a_few_numbers_move_to_plain_torch_and_no_other(monkeypatch):
    monkeypatch.delenv("DEQFAST_BACKEND", raising=False)
    p = problem(4, 6, slowest=0.8)
    solver = dq.Anderson(m=4, type=2)
    chosen = solver.init(p.z0, rtol=1e-5, max_iter=60)
    asked = solver.init(p.z0, rtol=1e-5, max_iter=60, backend="torch")
    assert chosen.backend == "native"
    while not asked.done:
        for state in (chosen, asked):
            fz = pull(state.z, *p.args)
            state.step(fz, residual=2 * (fz - state.z))
    assert chosen.backend == "torch"
    assert same_state(chosen, asked)
    resumed = solver.init(p.z0, rtol=1e-5, max_iter=60)
    resumed.load_state_dict(chosen.state_dict())
    assert resumed.backend == "torch"
    fixed = solver.init(p.z0, backend="native")
    with pytest.raises(
        ValueError,
        match="residual needs backend='auto' or one of 'torch', 'reference' for these samples, got backend='native'",
    ):
        fixed.step(p.z0, residual=p.z0)
    with pytest.raises(ValueError, match="residual needs backend"):
        fixed.load_state_dict(chosen.state_dict())
    monkeypatch.setenv("DEQFAST_BACKEND", "native")
    with pytest.raises(ValueError, match="residual needs backend"):
        solver.init(p.z0).step(p.z0, residual=p.z0)
    larger = problem(4, 12, slowest=0.8)
    state = solver.init(larger.z0)
    state.step(larger.z0, residual=larger.z0)
    assert state.backend == "native"


def test_verify_cannot_judge_by_a_residual_that_it_is_not_given():
    state = dq.Anderson(type=2).init(torch.zeros(3, 40, dtype=torch.float64), rtol=1e-8)
    while not state.done:
        fz = 0.5 * state.z + 1
        state.step(fz, residual=fz - state.z)
    with pytest.raises(ValueError, match="verify needs a state whose residual is f"):
        state.verify(3 * state.z + 100)
    assert bool((state.status == dq.Status.CONVERGED).all())


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_residual_of_no_numbers_is_refused(backend):
    state = dq.Anderson(type=2).init(torch.zeros(3, 40), backend=backend)
    with pytest.raises(ValueError, match="must have a number a sample"):
        state.step(state.z + 1, residual=torch.zeros(3, 0))
    assert state.nfe == 0
