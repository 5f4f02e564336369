"""A residual of the caller's own steers as the same residual of the iterates does, or is refused."""

from __future__ import annotations

import pytest
import torch
from problems import (
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


@pytest.mark.parametrize("backend", ["torch", "reference"])
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


@pytest.mark.skipif(native._C is None, reason="the extension is not built")
def test_residual_of_your_own_moves_an_automatic_state_to_plain_torch_and_no_other(monkeypatch):
    monkeypatch.delenv("DEQFAST_BACKEND", raising=False)
    p = problem(4, 12, slowest=0.8)
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
        ValueError, match="residual needs backend='auto' or one of 'torch', 'reference', got backend='native'"
    ):
        fixed.step(p.z0, residual=p.z0)
    with pytest.raises(ValueError, match="residual needs backend"):
        fixed.load_state_dict(chosen.state_dict())
    monkeypatch.setenv("DEQFAST_BACKEND", "native")
    with pytest.raises(ValueError, match="residual needs backend"):
        solver.init(p.z0).step(p.z0, residual=p.z0)
