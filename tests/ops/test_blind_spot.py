"""The mixed test space where f expands: W = dX - dG cancels at an eigenvalue near 2, and -dF takes its place."""

from __future__ import annotations

import pytest
import torch
from expanding import B, affine, named, others, rotations
from problems import BACKENDS, EPS

import deqfast as dq
from deqfast.ops.anderson import AndersonWorkspace
from deqfast.ops.codes import Int, Real

DTYPES = (torch.float32, torch.float64)


def failures(f, N: int, dtype: torch.dtype, solver: dq.Anderson, backend: str) -> int:
    options = {"solver": solver, "backend": backend, "backward": "none", "max_iter": 150}
    return int((~dq.fixed_point(f, torch.zeros(B, N, dtype=dtype), **options).converged).sum())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [3, 10])
def test_no_named_family_fails_with_the_default(N, dtype, backend):
    for name, f in named(N):
        assert failures(f, N, dtype, dq.Anderson(), backend) == 0, name


@pytest.mark.host
@pytest.mark.parametrize("m", [3, 5, 10, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_named_family_fails_that_type_2_solves(dtype, m):
    for N in (3, 10, 40):
        for name, f in named(N):
            if failures(f, N, dtype, dq.Anderson(m=m, type=2), "auto") == 0:
                lost = failures(f, N, dtype, dq.Anderson(m=m), "auto")
                assert lost <= (0 if m >= 10 else 1), (name, N)  # with few columns another rounding may lose one


@pytest.mark.host
def test_of_thousands_of_other_maps_hardly_any_fails():
    failed = tried = 0
    for N in (3, 10, 40):
        for _, f in others(N):
            for dtype in DTYPES:
                for m in (8, 10, 20):
                    failed += failures(f, N, dtype, dq.Anderson(m=m), "auto")
                    tried += B
    assert tried >= 2000
    assert failed <= 0.005 * tried, f"{failed} of {tried}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_roots_of_either_sign_are_found(backend):
    c = torch.linspace(-3, 3, 16)[:, None] * torch.ones(6)
    for g in (lambda z: z - c, lambda z: c - z):
        sol = dq.root(g, torch.zeros_like(c), backend=backend)
        assert bool(sol.converged.all())
        assert torch.allclose(sol.z, c, atol=1e-3)


def expected_step(state: dq.SolverState, f: torch.Tensor) -> torch.Tensor:
    """The next iterate in float64, from the columns that a step has just written: E + signs, row by row."""
    ws = state.ws
    assert isinstance(ws, AndersonWorkspace)
    method = ws.method
    ws.settle()
    dF, dG = (ws.columns(which).double() for which in (0, 1))
    unit = ws.real_row(Real.UNIT).double()[:, None]
    x = ws.x[1 - ws.cur][0].double()
    nexts = []
    for b in range(state.layout.B):
        g = (f[b].double() - x[b]) * unit[b]
        used = [j for j in range(method.m) if float(dG[b, j].norm()) > 0 and j < int(ws.int_row(Int.COUNT)[b])]
        F, G = dF[b, used].T, dG[b, used].T
        W = F - 2 * G
        for j in range(len(used)):
            wg, g2 = float(W[:, j] @ G[:, j]), float(G[:, j] @ G[:, j])
            if abs(wg) < method.turn * (wg + 2 * g2):
                W[:, j] = -F[:, j]
        w, q = W.norm(dim=0), G.norm(dim=0)
        E = (W / w).T @ (G / q) - method.ridge * torch.eye(len(used), dtype=torch.float64)
        y = torch.linalg.solve(E, (W / w).T @ g)
        nexts.append(f[b].double() - F @ (y / q) / unit[b])
    return torch.stack(nexts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("N", [4, 8, 20, 100, 1200])
def test_a_step_with_turned_columns_is_that_of_the_formula(N, backend):
    assert turned_columns(N, backend) > 0


def test_one_column_solves_no_rotation_about_one():
    """What docs/limits.md says is left: of either kind."""
    angle = torch.full((B, 5), torch.pi / 3, dtype=torch.float64)
    f = affine(torch.eye(10, dtype=torch.float64) + 0.5 * rotations(angle), torch.ones(B, 10, dtype=torch.float64))
    for solver in (dq.Anderson(m=1), dq.Anderson(m=1, type=2)):
        assert failures(f, 10, torch.float32, solver, "auto") == B


def turned_columns(N: int, backend: str) -> int:
    """Checks steps with turned columns against the formula; how many there were."""
    generator = torch.Generator().manual_seed(N)
    angle = 0.3 + 0.9 * torch.rand(6, N // 2, dtype=torch.float64, generator=generator)
    J = torch.eye(N, dtype=torch.float64) + angle.cos().repeat_interleave(2, 1)[:, :, None] * rotations(angle)
    J[:, ::4] *= 0.6
    f = affine(J, torch.randn(6, N, dtype=torch.float64, generator=generator))
    state = dq.Anderson(m=4, history_dtype=torch.float32).init(torch.zeros(6, N), rtol=0.0, backend=backend)
    ws, turned = state.ws, 0
    assert isinstance(ws, AndersonWorkspace)
    for k in range(4):
        fz = f(state.z)
        state.step(fz)
        if not k:
            continue
        ws.settle()
        w = ws.norms[:, 1].permute(0, 2, 1).reshape(-1, 4)[:6]
        turned += int((w < 0).sum())
        if int(state.ws.int_row(Int.GROWTH_RESTARTS).sum()):
            break  # columns were forgotten: others than those that were mixed
        expected = expected_step(state, fz)
        error = (state.ws.x[state.ws.cur][0].double() - expected).norm(dim=1) / expected.norm(dim=1)
        assert float(error.max()) < 3e4 * EPS[torch.float32], (k, error)
    return turned
