"""States of 16 bits, and histories in fewer bits than the state: neither limits the answer more than it must."""

from __future__ import annotations

import pytest
import torch
from problems import (
    BACKENDS,
    EPS,
    EVERY_SOLVER,
    linear,
    problem,
    pull,
    relative_residual,
    run,
    same_bits,
    solve,
)

import deqfast as dq
from deqfast.ops.codes import BLOCK, Int, Real
from deqfast.ops.plain.codec import stored as decode
from deqfast.ops.workspace import untile

NARROW = [torch.bfloat16, torch.float16]
LOW = [torch.bfloat16, torch.float16, torch.int8]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_sixteen_bit_state_is_solved_to_its_own_precision(solver, dtype, backend):
    slowest = 0.6
    p = problem(7, 40, dtype=dtype, slowest=slowest)
    sol = solve(p, solver=solver, backend=backend)
    exact = solve(p.to(torch.float64), rtol=1e-12)
    assert sol.z.dtype == dtype
    assert bool(sol.converged.all())
    rtol = {torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    # The tolerance, and five roundings inside f of numbers below 2.5 times the largest of z, over 1 - rate.
    noise = 5 * EPS[dtype] * 2.5 * exact.z.abs().amax(dim=1) * 40**0.5
    bound = (rtol * exact.z.norm(dim=1) * 1.1 + noise) / (1 - slowest)
    assert bool(((sol.z.double() - exact.z).norm(dim=1) <= bound).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_sums_over_a_sixteen_bit_state_are_not_taken_in_sixteen_bits(dtype, backend):
    """4097 squares of 200 overflow float16, and stop growing early in bfloat16."""
    z0 = torch.full((2, 4097), 200.0, dtype=dtype)
    f = z0.clone()
    f[:, ::2] += 8
    state = dq.Anderson(m=2).init(z0, rtol=0.0, backend=backend)
    state.step(f)
    expected = relative_residual(z0, f)
    assert bool(((state.residual.double() - expected).abs() <= 16 * EPS[torch.float32] * expected).all())
    assert bool(state.running.all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("history", LOW, ids=str)
@pytest.mark.parametrize("kind", ["mixed", 1, 2])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
def test_history_in_fewer_bits_does_not_limit_the_answer(dtype, rtol, kind, history, backend):
    f, exact = linear(5, 40, dtype=dtype, norm=0.8)
    solver = dq.Anderson(m=6, type=kind, history_dtype=history)
    sol = dq.fixed_point(f, torch.zeros_like(exact), solver=solver, rtol=rtol, backend=backend, backward="none")
    assert bool(sol.converged.all())
    fz = f(sol.z.double()) if dtype == torch.float64 else linear(5, 40, norm=0.8)[0](sol.z.double())
    noise = 8 * EPS[dtype] * 40**0.5
    assert bool((relative_residual(sol.z, fz) <= rtol + noise).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_history_costs_few_evaluations(backend):
    counts = {}
    for history in (torch.float32, torch.bfloat16):
        steps = 0
        for seed in range(4):
            f, exact = linear(8, 60, dtype=torch.float32, norm=0.95, seed=seed)
            solver = dq.Anderson(history_dtype=history)
            sol = dq.fixed_point(f, torch.zeros_like(exact), solver=solver, rtol=1e-5, backend=backend, backward="none")
            assert bool(sol.converged.all())
            steps += int(sol.steps.sum())
        counts[history] = steps
    assert counts[torch.bfloat16] <= 1.05 * counts[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("history", LOW, ids=str)
@pytest.mark.parametrize("exponent", [-40, 40])
def test_magnitudes_beyond_the_history_dtype_change_no_bit(exponent, history, backend):
    """2^-40 flushes to zero in float16, 2^40 overflows it: columns are held in units of the sample."""
    p = problem(5, 33, zero=False)
    solver, s = dq.Anderson(m=4, history_dtype=history), 2.0**exponent
    expected = solve(p, solver=solver, rtol=1e-5, backend=backend)
    sol = dq.fixed_point(
        lambda z, *args: s * pull(z / s, *args),
        s * p.z0,
        p.args,
        solver=solver,
        rtol=1e-5,
        backend=backend,
        backward="none",
    )
    assert torch.equal(sol.steps, expected.steps)
    assert same_bits(sol.z / s, expected.z)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("history", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("tree", [False, True], ids=["one tensor", "two leaves"])
def test_each_block_of_a_column_has_a_scale_of_its_own(tree, history, backend):
    """Magnitudes from block to block differ by 1e6, and columns of both shrink as the solve converges."""
    N = 2 * BLOCK + 300
    x = torch.randn(3, N, dtype=torch.float64)
    x[:, BLOCK : 2 * BLOCK] *= 1e-6
    x[:, 2 * BLOCK :] *= 1e6
    x = x.float()
    cut = BLOCK + 500
    split = (lambda t: (t[:, :cut], t[:, cut:])) if tree else (lambda t: t)
    join = (lambda t: torch.cat(t, dim=1)) if tree else (lambda t: t)
    bounds = [(0, BLOCK), (BLOCK, cut if tree else 2 * BLOCK), (cut if tree else 2 * BLOCK, N)]
    state = dq.Anderson(m=3, history_dtype=history).init(split(torch.zeros_like(x)), rtol=0.0, backend=backend)
    values, iterates = [], []
    for k in range(4):
        z = join(state.z).clone()
        f = x + 0.1**k * x.flip(0)
        iterates.append(z.double())
        values.append(f.double())
        state.step(split(f))
    unit = state.ws.real_row(Real.UNIT).double()[:, None]
    ages = untile(state.ws.own()["ages"], 3)
    bits = {torch.float16: 2.0**-11, torch.int8: 2.0**-7}[history]
    for which in (0, 1):
        columns = decode(state.ws, which).double()
        for j in range(3):
            k = int(ages[0, j]) - 1
            column = values[k] - values[k - 1]
            noise = 4 * EPS[torch.float32] * (values[k].abs() + values[k - 1].abs())
            if which:
                column = column - (iterates[k] - iterates[k - 1])
                noise = noise + 4 * EPS[torch.float32] * (iterates[k].abs() + iterates[k - 1].abs())
            for a, b in bounds:
                part = slice(a, b)
                largest = column[:, part].abs().amax(dim=1, keepdim=True)
                error = (columns[:, j, part] / unit - column[:, part]).abs()
                assert bool((error <= bits * largest * 1.01 + noise[:, part]).all()), (which, j, a)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("history", LOW, ids=str)
def test_column_of_zeros_is_empty_and_harmless(history, backend):
    """Two equal evaluations at two equal iterates leave nothing to divide by."""
    state = dq.Anderson(m=3, history_dtype=history).init(torch.zeros(3, 12), rtol=0.0, backend=backend)
    c = torch.randint(-8, 9, (3, 12)).float()  # every sum below is exact
    for k in range(4):
        assert torch.equal(state.z, k * c)
        state.step(state.z + c)  # the residual never changes: dG = 0
    assert torch.equal(state.z, 4 * c)
    assert state.ws.int_row(Int.COUNT).tolist() == [0, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_own_loop_in_sixteen_bits_ends_at_a_fixed_point_of_the_rounded_map(dtype, backend):
    p = problem(4, 16, dtype=dtype, slowest=0.5)
    state = run(dq.Picard().init(p.z0, rtol=0.0, max_iter=100, backend=backend), lambda z: pull(z, *p.args))
    settled = state.status == dq.Status.CONVERGED
    assert bool(settled.any())
    assert same_bits(pull(state.z, *p.args)[settled], state.z[settled])
