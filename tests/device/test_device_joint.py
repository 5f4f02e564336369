"""Joint solves on a GPU: the answers of the CPU, nothing waited for, late refusals, streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu import GPU, cuda, every_backend, needs_gpu, no_sync, on_stream
from quadratics import LinearQuadratic

import deqfast as dq
from deqfast.ops.lag import LAG

pytestmark = needs_gpu
CPU, F64 = torch.device("cpu"), torch.float64

WAYS: dict[str, dict[str, Any]] = {
    "best": {},
    "cost": {"returns": "cost", "safeguard": True},
    "last": {"returns": "last", "solver": dq.Anderson(type=2, m=5)},
    "box": {"project": dq.project.Box(-0.5, 0.5), "accelerate": ("z", "mu")},
    "ball": {"project": dq.project.L2Ball(0.3), "accelerate": ("z", "mu"), "normalize": True, "step_size": 0.05},
    "own-projection": {"project": lambda x: x.clamp(-0.5, 0.5), "accelerate": ("z", "mu")},
    "picard": {"solver": dq.Picard(), "damping": 0.9},
}


def parts(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Any, float, tuple[Any, ...], Any]:
    """A linear-quadratic problem, 1/L, starts and arguments."""
    problem = LinearQuadratic(B=5, nz=40, nx=4, norm=0.7)
    _, curvature = problem.solution(*problem.tensors())
    args = tuple(t.to(device, dtype) for t in problem.tensors())
    start = torch.zeros(5, 40, device=device, dtype=dtype), torch.zeros(5, 4, device=device, dtype=dtype)
    return problem, 1 / float(curvature), start, args


def solve(given: tuple[Any, ...], **options: Any) -> dq.JointSolution:
    """Of what ``parts`` gave."""
    problem, rate, start, args = given
    settings = {"step_size": rate, "max_iter": 60, "backward": "none", **options}
    z0, x0 = start
    return dq.joint_solve(problem.f, problem.loss, z0, x0, args, **settings)


@every_backend
@pytest.mark.parametrize("way", WAYS)
def test_joint_solve_does_not_wait_for_the_device(way, backend):
    given = parts(GPU)
    for guard in (torch.no_grad, no_sync):  # what happens at a first call only is over after one
        with guard():
            solution = solve(given, backend=backend, **WAYS[way])
    assert solution.backend == backend
    assert bool(torch.isfinite(solution.cost).all())


@every_backend
@pytest.mark.parametrize("way", WAYS)
def test_answers_are_those_of_the_cpu(way, backend):
    options = {"rtol": 0.0, "max_iter": 30, **WAYS[way]}
    expected = solve(parts(CPU, F64), backend="reference", **options)
    got = solve(parts(GPU, F64), backend=backend, **options)
    assert torch.equal(got.status.cpu(), expected.status)
    for name in ("z", "mu", "x", "cost"):
        assert torch.allclose(getattr(got, name).cpu(), getattr(expected, name), rtol=1e-6, atol=1e-8), name


@every_backend
def test_solves_that_converge_stop_a_little_later(backend):
    expected = solve(parts(CPU, F64), backend="reference", rtol=1e-6)
    got = solve(parts(GPU, F64), backend=backend, rtol=1e-6)
    assert bool(got.converged.all())
    assert int((got.steps.cpu() - expected.steps).abs().max()) <= 1
    assert int(got.steps.max()) <= got.nfe <= int(got.steps.max()) + LAG


@every_backend
def test_sample_whose_cost_is_no_number_stops_alone(backend):
    problem, rate, (z0, x0), args = parts(GPU)
    bad = torch.tensor([0.0, 0.0, float("nan"), 0.0, 0.0], device=GPU)
    s = dq.joint_solve(problem.f, lambda *a: problem.loss(*a) + bad, z0, x0, args, step_size=rate, backend=backend)
    assert s.status.tolist() == [dq.Status.CONVERGED] * 2 + [dq.Status.NON_FINITE] + [dq.Status.CONVERGED] * 2


@every_backend
def test_start_outside_of_the_projection_is_refused(backend):
    with pytest.raises(ValueError, match="x0 must lie within the projection"):
        solve(parts(GPU), backend=backend, project=dq.project.Box(1.0, 2.0))
    with pytest.raises(ValueError, match="step_size must be positive"):
        solve(parts(GPU), backend=backend, step_size=torch.zeros(4, device=GPU))


@every_backend
def test_joint_solve_on_another_stream_gives_the_same_bits(backend):
    options: dict[str, Any] = {"backend": backend, "accelerate": ("z",), "returns": "cost", "max_iter": 25}
    given = parts(GPU)
    here = solve(given, **options)
    there = on_stream(cuda.Stream(GPU), lambda: solve(given, **options))
    for name in ("z", "mu", "x", "cost"):
        assert torch.equal(getattr(here, name), getattr(there, name)), name


@every_backend
@pytest.mark.parametrize("backward", ["envelope", "implicit"])
def test_gradients_are_those_of_the_cpu(backward, backend):
    found = []
    for device, name in ((CPU, "reference"), (GPU, backend)):
        problem, rate, (z0, x0), args = parts(device, F64)
        args = tuple(t.detach().requires_grad_() for t in args)
        options = {"step_size": rate, "rtol": 1e-11, "max_iter": 300, "backward": backward, "backend": name}
        s = dq.joint_solve(problem.f, problem.loss, z0, x0, args, **options)
        out = problem.loss(s.z, s.x, *args).sum() + (s.x.sum() if backward == "implicit" else 0)
        found.append([g.cpu() for g in torch.autograd.grad(out, args)])
    for expected, got in zip(*found, strict=True):
        assert torch.allclose(got, expected, rtol=1e-6, atol=1e-8)
