"""Picard is the loop written out."""

from __future__ import annotations

import pytest
import torch
from problems import (
    BACKENDS,
    DEVICE,
    EPS,
    double_of,
    linear,
    needs_native,
    problem,
    pull,
    relative_residual,
    rows_of,
    same_bits,
)
from torch.utils import _pytree as pytree

import deqfast as dq

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 3, 7, 31, 32, 33, 1000, 4097, 70000])
def test_undamped_iterates_are_repeated_application_bit_for_bit(N, dtype, backend):
    p = problem(2 if N > 4097 else 5, N, dtype=dtype, zero=False)
    state = dq.Picard().init(p.z0, rtol=0.0, backend=backend)
    z = p.z0
    for _ in range(4):
        assert same_bits(state.z, z)
        z = pull(z, *p.args)
        state.step(pull(state.z, *p.args))
    assert same_bits(state.z, z)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 7, 33, 1000, 4097])
def test_damped_step_is_that_of_the_loop_written_out(N, dtype, backend):
    p = problem(5, N, dtype=dtype, zero=False)
    state = dq.Picard(damping=0.7).init(p.z0, rtol=0.0, backend=backend)
    for _ in range(4):
        z, f = rows_of(state.z), pull(state.z, *p.args)
        fz = rows_of(f)
        expected = z + 0.7 * (fz - z)
        state.step(f)
        size = z.abs() + fz.abs()
        bound = 2 * EPS[state.layout.acc] * size + EPS[state.layout.dtype] * expected.abs()
        assert bool(((rows_of(state.z) - expected).abs() <= bound).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_contraction_takes_the_evaluations_that_its_rate_says(backend):
    z0 = torch.zeros(3, 4, dtype=torch.float64)
    rate = torch.tensor([[0.5], [0.25], [0.125]], dtype=torch.float64)
    # z_k = b (1 - rate^k) / (1 - rate): ||f - z|| / ||f|| = rate^k (1 - rate) / (1 - rate^(k + 1))
    sol = dq.fixed_point(lambda z: rate * z + 1, z0, solver="picard", rtol=2.0**-21, backend=backend)
    expected = []
    for r in rate[:, 0].tolist():
        expected.append(next(k for k in range(100) if r**k * (1 - r) / (1 - r ** (k + 1)) <= 2.0**-21) + 1)
    assert sol.steps.tolist() == expected
    assert bool(sol.converged.all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("damping", [0.3, 0.7, 1.0])
def test_residual_is_that_of_f_and_not_of_the_damped_map(damping, backend):
    p = problem(4, 9, dtype=torch.float64)
    sol = dq.fixed_point(
        pull, p.z0, p.args, solver=dq.Picard(damping=damping), rtol=0.0, max_iter=6, trace=True, backend=backend
    )
    z = p.z0
    for row in sol.trace:
        fz = pull(z, *p.args)
        assert torch.allclose(row, relative_residual(z, fz), rtol=1e-12, atol=0)
        z = z + damping * (fz - z)


@pytest.mark.parametrize("backend", BACKENDS)
def test_damping_solves_a_map_that_overshoots(backend):
    f = lambda z: 1 - 1.5 * z  # noqa: E731
    z0 = torch.zeros(2, 3, dtype=torch.float64)
    plain = dq.fixed_point(f, z0, solver=dq.Picard(), backend=backend)
    damped = dq.fixed_point(f, z0, solver=dq.Picard(damping=0.5), backend=backend)
    assert (
        plain.status.tolist() == [dq.Status.MAX_ITER] * 2
        or plain.status.tolist() == [dq.Status.DIVERGED] * 2
        or (plain.status.tolist() == [dq.Status.STALLED] * 2)
    )
    assert bool(damped.converged.all())
    assert torch.allclose(damped.z, torch.full_like(z0, 0.4), rtol=1e-7, atol=0)


def test_picard_keeps_no_history():
    state = dq.Picard().init(torch.zeros(3, 1000))
    assert state.ws.history.numel() == 0
    numbers = sum(t.numel() for t in pytree.tree_leaves(list(state.ws.tensors().values())))
    assert numbers <= 3 * 3 * 1000 + 1000  # three iterates, a little for the samples


@needs_native
def test_fixed_point_of_a_linear_map_is_reached_by_every_backend_alike():
    f, exact = linear(4, 20, norm=0.5)
    answers = [
        dq.fixed_point(f, torch.zeros_like(exact), solver="picard", rtol=1e-12, backend=backend)
        for backend in ("reference", "native")
    ]
    assert torch.equal(answers[0].steps, answers[1].steps)
    assert torch.equal(answers[0].z, answers[1].z)
    assert bool(((answers[0].z - exact).norm(dim=1) <= 2e-12 * exact.norm(dim=1)).all())


@pytest.mark.parametrize("damping", [0, -0.5, 1.5, float("nan")])
def test_damping_out_of_range_raises(damping):
    with pytest.raises(ValueError, match=r"damping must be in \(0, 1\]"):
        dq.Picard(damping=damping)


def test_damping_that_is_no_number_raises_with_its_name():
    with pytest.raises(TypeError, match="damping must be"):
        dq.Picard(damping="half")


def test_double_of_keeps_complex_complex():
    assert double_of(torch.complex64) == torch.complex128
    assert double_of(torch.bfloat16) == torch.float64


# What a sample does to its unit: it stays, grows out of it, shrinks out of it, or was zero to begin with.
RATES = [0.9, 30.0, -30.0, 0.01, 0.5]


@pytest.mark.parametrize("backend", [*BACKENDS, "unrolled"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("damping", [1.0, 0.5])
@pytest.mark.parametrize("N", [3, 40, 2000])
def test_events_are_those_of_the_oracle(N, damping, dtype, backend):
    rate = torch.tensor(RATES, dtype=dtype, device=DEVICE)[:, None]
    z0 = torch.ones(len(RATES), N, dtype=dtype, device=DEVICE)
    z0[-1] = 0  # and stays there
    options = {"solver": dq.Picard(damping=damping), "rtol": 0.0, "max_iter": 14}
    expected = dq.fixed_point(lambda z: rate * z, z0, backend="reference", **options).events
    assert int(expected["rescales"][0]) == 0 and int(expected["rescales"][1]) > 0
    how = {"backward": dq.Unroll()} if backend == "unrolled" else {"backend": backend}
    events = dq.fixed_point(lambda z: rate * z, z0.clone().requires_grad_(), **options, **how).events
    for name in set(events):  # of a history, which there is none of
        assert torch.equal(events[name], expected[name]), name
