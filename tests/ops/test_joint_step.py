"""The whole joint step agrees with float64, whatever the backend, the blocks and the dtypes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from joint_step import (
    BF16,
    F16,
    F32,
    F64,
    I8,
    PROJECTIONS,
    Start,
    given,
    rows,
    start,
    tree,
    workspace,
)
from problems import BACKENDS, DEVICE, EPS, bits
from torch import Tensor

import deqfast as dq
from deqfast import ops
from deqfast.ops.anderson import AndersonWorkspace
from deqfast.ops.codes import BLOCKS, Int, Real
from deqfast.ops.joint import JointWorkspace
from deqfast.ops.joint_step import JointStep
from deqfast.ops.layout import real_dtype
from deqfast.status import Status

pytestmark = pytest.mark.sanitize


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    at = start(0, 5, 3)
    ops.choose(backend, DEVICE).joint(workspace(at, **PROJECTIONS["normalised-l2"])).map(at.every(), 0.1, None)
    assert JointStep(workspace(at, dq.Anderson(m=2)), ops.choose(backend, DEVICE))(at.every(), 0.1) == 0


# ---- the whole step ----


def joint_f(leaves: list[Tensor], n: int) -> list[Tensor]:
    """f, p and q of a smooth contraction that couples the blocks, of n tensors in z; rows are independent."""
    z, mu, x = leaves[:n], leaves[n : 2 * n], leaves[2 * n :]
    drive = sum(mean(t) for t in x) if x else 0.0
    found = []
    for t in z:
        found.append(0.5 * t.roll(1, -1) / (1 + t.abs()) + like(drive, t) + 0.2)
    for t, s in zip(mu, z, strict=True):
        found.append(0.4 * t.roll(-1, -1) - 0.3 * t / (1 + s.abs()) + s)
    pull = sum(mean(t) for t in mu)
    return found + [0.7 * t + 0.3 * like(pull, t) for t in x]


def mean(t: Tensor) -> Tensor:
    return t.flatten(1).sum(1) / max(1, t[0].numel())


def like(value: Any, t: Tensor) -> Any:
    return value.view(-1, *[1] * (t.dim() - 1)) if isinstance(value, Tensor) else value


def drive(ws: JointWorkspace, backend: str, steps: int, step_size: float = 0.2) -> list[Tensor]:
    step = JointStep(ws, ops.choose(backend, DEVICE))
    n = sum(part.block == 0 for part in ws.parts)
    for _ in range(steps):
        step(joint_f([ws.value(i) for i in range(len(ws.parts))], n), step_size)
    return [ws.value(i) for i in range(len(ws.parts))]


SOLVERS = {
    "mixed": dq.Anderson(m=3, history_dtype=F32),
    "type-1": dq.Anderson(m=3, type=1, history_dtype=F32),
    "type-2": dq.Anderson(m=3, type=2, history_dtype=F32),
    "mixed-bf16": dq.Anderson(m=3, history_dtype=BF16),
    "mixed-f16": dq.Anderson(m=3, history_dtype=F16),
    "type-2-int8": dq.Anderson(m=3, type=2, history_dtype=I8),
    "mixing": dq.Anderson(m=3, mixing=0.7, history_dtype=F32),
    "picard": dq.Picard(),
}


def check_step(
    solver: Any, at: Start, backend: str, steps: int = 5, accelerate: tuple[str, ...] = BLOCKS, **options: Any
) -> None:
    """A few whole steps end as near to float64 as the reference's in the same dtype, and with the same record."""
    if isinstance(solver, dq.Anderson):
        solver = dataclasses.replace(solver, ridge=1e-3)
    common = {"solver": solver, "accelerate": accelerate, "rules": [(0.0, 0.0, 1.0)] * 3, **options}
    ws, peer, oracle = workspace(at, **common), workspace(at, **common), workspace(at.to(F64), **common)
    results = [drive(ws, backend, steps), drive(peer, "reference", steps), drive(oracle, "reference", steps)]
    got, beside, expected = (torch.cat(rows(w, r), dim=1) for w, r in zip((ws, peer, oracle), results, strict=True))
    eps = EPS[real_dtype(at.z[0].dtype)]
    history = ws.core.history.dtype if isinstance(ws.core, AndersonWorkspace) and ws.core.method.m else F64
    ulp = 1e-2 if history in (BF16, F16, I8) else 0  # a column that rounds the other way
    error, own = (got - expected).norm(dim=1), (beside - expected).norm(dim=1)
    assert bool((error <= 30 * own + (100 * eps + ulp) * expected.norm(dim=1)).all()), (error, own)
    for row in (Int.STATUS, Int.STEPS, Int.COUNT):
        assert torch.equal(ws.core.int_row(row), oracle.core.int_row(row)), row.name
    residual = ws.core.real_row(Real.RESIDUAL).double(), oracle.core.real_row(Real.RESIDUAL)
    assert torch.allclose(*residual, rtol=0.05 + 10 * ulp + 10 * eps, atol=100 * eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize(("B", "nz", "nx"), [(3, 33, 9), (2, 9000, 50)])
def test_step_agrees_with_float64(B, nz, nx, solver, backend):
    check_step(solver, start(B, nz, nx), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "solver", [SOLVERS["mixed"], SOLVERS["type-2"], SOLVERS["picard"]], ids=["mixed", "2", "picard"]
)
@pytest.mark.parametrize("dtype", [F64, BF16, F16])
def test_step_agrees_for_other_dtypes(dtype, solver, backend):
    check_step(solver, start(3, 33, 9, dtype=dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accelerate", [("z", "mu"), ("z",), ("x",), ("mu", "x")], ids="-".join)
def test_blocks_left_out_move_to_their_mapped_value(accelerate, backend):
    for nz in (6, 33):
        check_step(SOLVERS["mixed"], start(3, nz, 9), backend, accelerate=accelerate, ball="l2", radius=3.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_of_trees_agrees(backend):
    at = tree()
    at = Start([at.z[0], at.z[2]], [at.mu[0], at.mu[2]], at.x, at.center)
    check_step(SOLVERS["mixed"], at, backend, ball="linf", radius=2.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accelerate", [BLOCKS, ("z",)], ids="-".join)
@pytest.mark.parametrize("nz", [6, 40, 9000])
def test_sample_stops_when_every_block_is_within_its_tolerance(nz, accelerate, backend):
    """Sample 0 moves nowhere, samples 1 to 3 in one block only, sample 4 in all, sample 5 within the tolerances."""
    at = start(6, nz, 9)
    values = [t.clone() for t in at.every()]
    values[2].zero_()  # a gradient: x stays
    for block, value in enumerate(values):
        for b in (1 + block, 4):
            value[b] += 0.5 * at.every()[block][b]
    values[0][5] *= 1 + 1e-3
    values[1][5] *= 1 + 1e-4
    rules = [(2e-3, 0.0, 0.05), (2e-4, 0.0, 0.5), (1e-4, 0.0, 1.0)]
    ws = workspace(at, dq.Anderson(m=2), accelerate, rules)
    assert JointStep(ws, ops.choose(backend, DEVICE))(values, 0.3) >= 4  # a GPU tells late
    status = ws.core.int_row(Int.STATUS).tolist()
    running, done = int(Status.RUNNING), int(Status.CONVERGED)
    assert status == [done, running, running, running, running, done]
    norms = ws.core.block_norms[:, :, :6]
    weighted = (norms[:, 0] / norms[:, 1]) * torch.tensor([rule[2] for rule in rules], dtype=F64)[:, None]
    assert torch.allclose(ws.core.real_row(Real.RESIDUAL).double(), weighted.amax(0), rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_absolute_tolerance_of_a_block(backend):
    at = start(2, 12, 5)
    values = [t.clone() for t in at.every()]
    values[2].zero_()
    values[1] += 0.01
    for atol, status in ((0.01, Status.RUNNING), (0.05, Status.CONVERGED)):
        ws = workspace(at, dq.Anderson(m=2), rules=[(1e-6, 0.0, 1.0), (0.0, atol, 1.0), (1e-6, 0.0, 1.0)])
        JointStep(ws, ops.choose(backend, DEVICE))(values, 0.3)
        assert ws.core.int_row(Int.STATUS).tolist() == [int(status)] * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accelerate", [BLOCKS, ("z", "mu")], ids="-".join)
@pytest.mark.usefixtures("poisoned_memory")
def test_sample_that_is_no_number_in_one_block_stops_alone(accelerate, backend):
    at = start(3, 20, 6)
    clean = given(at)
    for i in range(3):
        values = [t.clone() for t in clean]
        values[i][1, 0] = math.nan
        ws, without = (workspace(at, dq.Anderson(m=2), accelerate) for _ in range(2))
        JointStep(ws, ops.choose(backend, DEVICE))(values, 0.3)
        JointStep(without, ops.choose(backend, DEVICE))(clean, 0.3)
        assert ws.core.int_row(Int.STATUS).tolist() == [Status.RUNNING, Status.NON_FINITE, Status.RUNNING]
        for j in range(3):
            assert bool(torch.isfinite(ws.value(j)).all())
            assert torch.equal(bits(ws.value(j)[[0, 2]]), bits(without.value(j)[[0, 2]]))
