"""Samples around the sizes at which a GPU spreads one over several blocks: by N alone, so that bits stay."""

import pytest
import torch
from problems import BACKENDS, ORDERED, assert_same_samples, problem, pull, solve

import deqfast as dq
from deqfast.ops.broyden import BroydenWorkspace
from deqfast.ops.codes import Int

SOLVERS = {
    "mixed": dq.Anderson(m=3),
    "type-2": dq.Anderson(m=3, type=2, evict="oldest"),
    "int8": dq.Anderson(m=3, history_dtype=torch.int8),
    "broyden": dq.Broyden(memory=4),
}
# The last block, the first of several, the last chain, the first Gram form, chunks added up at once and in groups.
SIZES = [4096, 4104, 8192, 8193, 40_000, 140_000]


@pytest.mark.parametrize("backend", ORDERED)
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("N", SIZES)
def test_sample_has_the_bits_alone_that_it_has_in_a_batch(N, name, backend):
    p = problem(3, N, slowest=0.9, zero=False)
    options = {"solver": SOLVERS[name], "backend": backend, "rtol": 0.0, "max_iter": 7}
    together = solve(p, **options)
    for rows in (slice(0, 1), slice(1, 3)):
        assert_same_samples(solve(p.rows(rows), **options), slice(None), together, rows)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "reference"])
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("N", SIZES)
def test_steps_are_those_of_the_reference(N, name, backend):
    p = problem(2, N, slowest=0.9, zero=False)
    options = {"solver": SOLVERS[name], "rtol": 0.0, "max_iter": 7}
    got, expected = solve(p, backend=backend, **options), solve(p, backend="reference", **options)
    assert torch.equal(got.status, expected.status)
    gap, size = (got.z - expected.z).norm(dim=1), expected.z.norm(dim=1)
    assert bool((gap <= (0.02 * expected.residual + 1e-6) * size).all())
    assert float(expected.residual.max()) < 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("before", "after"), [(100, 10), (10, 100)])
def test_state_saved_in_one_form_goes_on_in_the_other(before, after, backend, monkeypatch):
    p, states = problem(3, 50, slowest=0.9, zero=False), []
    for limit in (before, after):
        for name in ("GRAM_MIN_N", "DEVICE_GRAM_MIN_N"):
            monkeypatch.setattr(BroydenWorkspace, name, limit)
        states.append(dq.Broyden(memory=6).init(p.z0, rtol=0.0, backend=backend))
        if len(states) == 1:
            for _ in range(4):
                states[0].step(pull(states[0].z, *p.args))
    states[1].load_state_dict(states[0].state_dict())
    sides = [state.ws.own()["gram"].shape[1] for state in states]
    assert sorted(sides) == [0, 6]
    for _ in range(4):
        for state in states:
            state.step(pull(state.z, *p.args))
    assert torch.allclose(states[1].z, states[0].z, rtol=1e-4, atol=1e-5)
    assert states[1].ws.int_row(Int.DENOMINATOR_RESTARTS).tolist() == [0] * 3
    assert torch.equal(states[1].ws.int_row(Int.COUNT), states[0].ws.int_row(Int.COUNT))


def test_devices_keep_a_gram_matrix_from_another_size_on():
    cpu, gpu = (BroydenWorkspace.gram_min_n(torch.device(name)) for name in ("cpu", "cuda"))
    assert gpu == BroydenWorkspace.DEVICE_GRAM_MIN_N <= cpu
