"""Joint solves at the edges: dtypes of the step, schedules, projections of any x, modes, empty batches."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from problems import BACKENDS, DEVICE
from quadratics import F32, F64, LinearQuadratic
from torch import Tensor
from torch.autograd import forward_ad

import deqfast as dq


def small(dtype: torch.dtype = F32) -> tuple[Any, Any, Tensor, Tensor]:
    """f, loss and starts with x* = (1, 1, 1) / 2.05 for every sample."""
    z0, x0 = torch.zeros(4, 3, dtype=dtype), torch.zeros(4, 3, dtype=dtype)
    return (lambda z, x: 0.5 * z + 0.5 * x), (lambda z, x: (z - 1).square().sum(1) + 0.05 * x.square().sum(1)), z0, x0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16])
@pytest.mark.parametrize("given", [F64, F32, torch.bfloat16, torch.int64])
def test_step_size_of_any_real_dtype_means_the_same(given, dtype, backend):
    f, loss, z0, x0 = small(dtype)
    rates = torch.ones(4, 1, dtype=given) if given == torch.int64 else torch.full((4, 1), 0.25, dtype=given)
    options = {"max_iter": 12, "backend": backend, "backward": "none", "returns": "last"}
    one = dq.joint_solve(f, loss, z0, x0, step_size=rates, **options)
    other = dq.joint_solve(f, loss, z0, x0, step_size=float(rates[0]), **options)
    assert torch.allclose(one.x, other.x, rtol=1e-5 if dtype != torch.bfloat16 else 0.1)


def test_step_size_from_numpy():
    f, loss, z0, x0 = small()
    rates = torch.from_numpy(np.full((4, 1), 0.25)).to(DEVICE)
    assert dq.joint_solve(f, loss, z0, x0, step_size=rates).converged.all()


@pytest.mark.parametrize("last", [0.2, 1e-4, 1e-9])
def test_implicit_gradient_does_not_depend_on_how_small_the_last_steps_were(last):
    problem = LinearQuadratic(B=2, nz=10, nx=3, norm=0.7)
    _, curvature = problem.solution(*problem.tensors())
    found = []
    for size in (1 / curvature, lambda k: (1 if k < 25 else last) / curvature):
        args = tuple(t.requires_grad_() for t in problem.tensors())
        z0, x0 = torch.zeros(2, 10, dtype=F64), torch.zeros(2, 3, dtype=F64)
        options = {"rtol": 1e-9, "max_iter": 100, "backward": dq.Implicit(rtol=1e-3, max_iter=200)}
        s = dq.joint_solve(problem.f, problem.loss, z0, x0, args, step_size=size, **options)
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(s.x.square().sum(), args)]))
    assert (found[1] - found[0]).norm() < 0.02 * found[0].norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accelerate", [("z", "mu", "x"), ("z", "mu")], ids="-".join)
@pytest.mark.parametrize("returns", ["best", "last", "cost"])
def test_cost_and_residual_are_those_of_what_a_lost_sample_goes_back_to(returns, accelerate, backend):
    """f becomes no number for sample 1 at evaluation 7, where a plain solve still climbs and falls."""
    problem = LinearQuadratic(B=3, nz=24, nx=4, norm=0.9)
    _, curvature = problem.solution(*problem.tensors())
    calls, seen = [], []

    def f(z: Any, x: Any, *args: Any) -> Any:
        calls.append(1)
        bad = torch.zeros(3, 1, dtype=F64)
        bad[1] = math.nan if len(calls) >= 7 else 0
        return problem.f(z, x, *args) + bad

    def look(k: int, state: Any) -> None:
        seen.append((state.cost.clone(), {name: r.clone() for name, r in state.residual.items()}))

    z0, x0 = torch.zeros(3, 24, dtype=F64), torch.zeros(3, 4, dtype=F64)
    options = {"solver": dq.Anderson(m=3), "max_iter": 9, "rtol": 0.0, "backward": "none", "callback": look}
    args = problem.tensors()
    s = dq.joint_solve(
        f, problem.loss, z0, x0, args, step_size=1 / curvature, returns=returns, accelerate=accelerate,
        backend=backend, **options,
    )  # fmt: skip
    assert s.status.tolist()[1] == dq.Status.NON_FINITE
    assert torch.allclose(s.cost, problem.loss(s.z, s.x, *args))
    steps = [k for k, (cost, _) in enumerate(seen) if torch.allclose(cost[1], s.cost[1], rtol=1e-12)]
    assert any(all(float(seen[k][1][n][1]) == float(s.residual[n][1]) for n in s.residual) for k in steps)


def test_projection_that_writes_to_its_argument_leaves_the_start_alone_and_is_checked():
    f, loss, z0, x0 = small()
    inside = {"step_size": 0.2, "project": lambda x: x.clamp_(-0.1, 0.1)}
    given = torch.full_like(x0, 0.1)
    s = dq.joint_solve(f, loss, z0, given, **inside)
    assert torch.allclose(s.x, given) and torch.equal(given, torch.full_like(x0, 0.1))
    outside = torch.full_like(x0, 3.0)
    with pytest.raises(ValueError, match="x0 must lie within the projection"):
        dq.joint_solve(f, loss, z0, outside, **inside)
    assert bool((outside == 3).all())


def test_number_that_is_none_does_not_hide_another_start_outside():
    f, loss, z0, x0 = small()
    x0[0, 0], x0[1, 1] = math.nan, 3.0
    with pytest.raises(ValueError, match="x0 must lie within the projection"):
        dq.joint_solve(f, loss, z0, x0, step_size=0.2, project=dq.project.Box(-1.0, 1.0))
    x0[1, 1] = 0.0
    s = dq.joint_solve(f, loss, z0, x0, step_size=0.2, project=dq.project.Box(-1.0, 1.0))
    assert s.status.tolist() == [dq.Status.NON_FINITE] + [dq.Status.CONVERGED] * 3


SETS = [None, dq.project.Box(-1, 1), dq.project.LinfBall(0.5), dq.project.L2Ball(0.5)]


@pytest.mark.parametrize("project", SETS, ids=["none", "box", "linf", "l2"])
@pytest.mark.parametrize("backward", ["envelope", "implicit"])
@pytest.mark.parametrize("shape", [(0,), (0, 3)])
def test_empty_batch_is_solved_and_differentiated(shape, backward, project):
    w = torch.ones((), requires_grad=True)
    z0, x0 = torch.zeros(shape), torch.zeros(shape)

    def loss(z: Tensor, x: Tensor) -> Tensor:
        return z.square().reshape(0, -1 if z.numel() else math.prod(shape[1:])).sum(1)

    s = dq.joint_solve(lambda z, x: 0.5 * z + w * x, loss, z0, x0, step_size=0.1, project=project, backward=backward)
    assert s.nfe == 0 and s.z.shape == shape
    (s.z.sum() + (s.x.sum() if backward == "implicit" else 0)).backward()
    assert w.grad is None or float(w.grad) == 0


@pytest.mark.parametrize("project", SETS[1:], ids=["box", "linf", "l2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_complex_input_stays_within_its_set(project, backend):
    target = torch.tensor([[2 + 3j, -1 - 2j, 0.1j]], dtype=torch.complex128).expand(2, 3)

    def loss(z: Tensor, x: Tensor) -> Tensor:
        return (z - target).abs().square().sum(1)

    z0, x0 = torch.zeros(2, 3, dtype=torch.complex128), torch.zeros(2, 3, dtype=torch.complex128)
    options = {"solver": dq.Picard(), "max_iter": 600, "rtol": 1e-9, "backend": backend}
    s = dq.joint_solve(lambda z, x: 0.3 * z + 0.7 * x, loss, z0, x0, step_size=0.05, project=project, **options)
    pair = torch.view_as_real(target.resolve_conj().clone())  # the nearest point of the set, where f is the identity
    if project.ball == "l2":
        expected = target * (0.5 / target.norm(dim=1, keepdim=True))
    else:
        expected = torch.view_as_complex(pair.clamp(-0.5, 0.5) if project.ball else pair.clamp(-1, 1))
    assert torch.allclose(s.x, expected, atol=1e-6)
    with pytest.raises(ValueError, match="x0 must lie within the projection"):
        dq.joint_solve(lambda z, x: z + x, loss, z0, x0 + 5j, step_size=0.3, project=project, backend=backend)


def test_sample_at_the_centre_of_a_ball_keeps_its_gradient():
    w = torch.ones((), dtype=F64, requires_grad=True)
    target = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=F64)

    def loss(z: Tensor, x: Tensor) -> Tensor:
        return (z - target).square().sum(1)

    z0, x0 = torch.zeros(2, 2, dtype=F64), torch.zeros(2, 2, dtype=F64)
    found = []
    for project in (None, dq.project.L2Ball(5.0)):
        options = {"step_size": 0.1, "project": project, "backward": "implicit", "rtol": 1e-10, "max_iter": 300}
        s = dq.joint_solve(lambda z, x: 0.5 * z + w * x, loss, z0, x0, **options)
        found.append(torch.autograd.grad(s.x.sum(), w)[0])
    assert math.isclose(float(found[1]), float(found[0]), rel_tol=1e-6) and float(found[0]) != 0


def test_within_inference_mode():
    f, loss, _, _ = small()
    with torch.inference_mode():
        z0, x0, shift = torch.zeros(4, 3), torch.zeros(4, 3), torch.full((3,), 0.1)
        step = dq.joint_step_size(lambda z, x, s: f(z, x) + s, lambda z, x, s: loss(z, x), z0, x0, (shift,))
        s = dq.joint_solve(lambda z, x, s: f(z, x) + s, lambda z, x, s: loss(z, x), z0, x0, (shift,), step_size=step)
    assert s.converged.all() and not s.z.requires_grad


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own forward mode
def test_transforms_are_refused():
    f, loss, z0, x0 = small()

    def cost(x: Tensor) -> Tensor:
        return dq.joint_solve(f, loss, z0, x, step_size=0.2).cost.sum()

    for call in (torch.func.grad(cost), lambda x: torch.func.jvp(cost, (x,), (x,))):
        with pytest.raises(NotImplementedError, match=r"joint_solve within torch\.func transforms or forward mode"):
            call(x0)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="joint_solve within"):
        cost(forward_ad.make_dual(x0, x0))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="joint_step_size within"):
        dq.joint_step_size(f, loss, z0, x0)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of the compiler's
@pytest.mark.parametrize("backward", ["envelope", "implicit"])
def test_gradients_and_step_size_within_torch_compile(backward):
    problem = LinearQuadratic(B=2, nz=8, nx=3, norm=0.6)
    z0, x0 = torch.zeros(2, 8, dtype=F64), torch.zeros(2, 3, dtype=F64)

    def run(*args: Tensor) -> Tensor:
        with torch.no_grad():
            step = dq.joint_step_size(problem.f, problem.loss, z0, x0, args)
        s = dq.joint_solve(problem.f, problem.loss, z0, x0, args, step_size=step, max_iter=200, backward=backward)
        return problem.loss(s.z, s.x, *args).sum() + (s.x.sum() if backward == "implicit" else 0)

    found = []
    for function in (run, torch.compile(run, backend="aot_eager")):
        args = tuple(t.detach().requires_grad_() for t in problem.tensors())
        found.append(torch.autograd.grad(function(*args), args))
    for expected, got in zip(*found, strict=True):
        assert torch.allclose(got, expected, rtol=1e-6, atol=1e-9)


def test_envelope_asks_the_loss_for_nothing_before_it_is_differentiated():
    f, loss, z0, x0 = small()
    calls = []

    def counted(z: Tensor, x: Tensor) -> Tensor:
        calls.append(1)
        return loss(z, x)

    s = dq.joint_solve(f, counted, z0, x0, step_size=0.2)
    assert len(calls) == s.nfe


def test_step_size_says_where_there_is_no_fixed_point_and_leaves_out_what_is_no_number():
    z0 = x0 = torch.zeros(2, 3, dtype=F64)

    def loss(z: Tensor, x: Tensor) -> Tensor:
        return (z - 1).square().sum(1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dq.joint_step_size(lambda z, x: torch.cos(z) + x, loss, z0, x0, max_iter=2)
    assert any("fixed point at x0 was not found for 2 of 2 samples" in str(w.message) for w in caught)
    bad = torch.tensor([0.0, math.nan], dtype=F64)
    rates = dq.joint_step_size(
        lambda z, x: 0.5 * z + x, lambda z, x: (1 + bad) * loss(z, x), z0, x0, per_sample=True, iterations=30
    )
    assert torch.allclose(rates, torch.full((2, 1), 1 / 8, dtype=F64), rtol=1e-6)
    with pytest.raises(ValueError, match="none that is a number"):
        dq.joint_step_size(lambda z, x: 0.5 * z + x, lambda z, x: math.nan * loss(z, x), z0, x0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cost_that_carries_a_negative_bit_is_read_with_its_sign(backend):
    """The imaginary part of a conjugate is a view whose numbers torch negates when it reads them."""
    z0, x0 = torch.zeros(1, 1, dtype=torch.complex128), torch.zeros(1, 1, dtype=torch.complex128)

    def loss(z: Tensor, x: Tensor) -> Tensor:
        return (z - (1 + 2j)).conj().imag[:, 0]

    options = {"step_size": 1e-3, "max_iter": 1, "backward": "none", "returns": "cost", "backend": backend}
    assert dq.joint_solve(lambda z, x: 0.5 * z + x, loss, z0, x0, **options).cost.tolist() == [2.0]


def test_residual_of_a_sample_whose_cost_is_no_number_shows_it():
    bad = torch.tensor([0.0, math.nan])

    def loss(z: Tensor, x: Tensor) -> Tensor:
        return x.square().sum(1) + bad

    seen = []
    dq.joint_solve(
        lambda z, x: 0.5 * z + x, loss, torch.zeros(2, 3), torch.ones(2, 3), step_size=0.1, max_iter=2,
        callback=lambda k, state: seen.append(state.residual["mu"].clone()),
    )  # fmt: skip
    assert seen[0][0] == 0 and seen[0][1].isnan()


@pytest.mark.parametrize("radius", [1e-170, 1e200])
def test_ball_of_any_radius(radius):
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=F64)
    inside = dq.project.L2Ball(radius)(x)
    assert torch.allclose(inside[0], x[0] * min(1.0, radius / 5), rtol=1e-12, atol=0) and bool((inside[1] == 0).all())


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 1e-9), (torch.float16, 1e6), (F32, 1e-60)])
def test_step_size_that_the_state_cannot_hold_is_refused(dtype, size):
    f, loss, z0, x0 = small(dtype)
    with pytest.raises(ValueError, match=f"step_size must be positive and finite throughout, as {dtype} too"):
        dq.joint_solve(f, loss, z0, x0, step_size=torch.full((4, 1), size, dtype=F64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_start_outside_in_half_precision(dtype):
    f, loss, z0, x0 = small(dtype)
    project = dq.project.Box(0.0, 1.0)
    with pytest.raises(ValueError, match="x0 must lie within the projection"):
        dq.joint_solve(f, loss, z0, x0 + 1.5, step_size=0.1, project=project)
    on_the_edge = dq.project.L2Ball(0.3)(torch.randn(4, 3).to(dtype))
    assert dq.joint_solve(f, loss, z0, on_the_edge, step_size=0.1, project=dq.project.L2Ball(0.3)).nfe > 0


@pytest.mark.parametrize("project", [dq.project.L2Ball, dq.project.LinfBall], ids=["l2", "linf"])
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_projection_does_not_mind_the_order_in_memory(dtype, project):
    x, center = torch.randn(2, 3, 4, 5, dtype=dtype), torch.randn(2, 3, 4, 5, dtype=dtype)
    turned = [t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for t in (x, center)]
    expected = project(0.7, center)(x)
    assert torch.allclose(project(0.7, turned[1])(turned[0]), expected, rtol=1e-12)
    assert torch.allclose(project(0.7, center)(turned[0]), expected, rtol=1e-12)
    away = (x - center).reshape(2, -1)
    shrunk = center + (x - center) * (0.7 / away.norm(dim=1)).clamp(max=1).view(2, 1, 1, 1)
    assert project is not dq.project.L2Ball or torch.allclose(expected, shrunk, rtol=1e-12)
    assert torch.allclose(project(0.7, center[:1].expand_as(x))(x), project(0.7, center[:1])(x))
