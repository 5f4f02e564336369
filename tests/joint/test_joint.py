"""Joint solves: the closed form of a linear-quadratic problem, blocks, projections, what is returned."""

from __future__ import annotations

import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from problems import BACKENDS
from quadratics import F32, F64, LinearQuadratic
from torch import Tensor

import deqfast as dq
from deqfast.status import Status


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "evaluations", "error"), [(F32, 50, 2e-5), (F32, 65, 3e-6), (F64, 150, 1e-10)], ids=str
)
def test_input_reaches_the_closed_form(backend, dtype, evaluations, error):
    problem = LinearQuadratic()
    solution = problem.solve(dtype, max_iter=evaluations, backend=backend)
    assert problem.error(solution) < error
    assert solution.nfe == evaluations


def test_plain_map_diverges_where_the_accelerated_one_converges():
    problem = LinearQuadratic()
    plain = problem.solve(solver=dq.Picard(), damping=1.0, max_iter=100, returns="last")
    assert problem.error(plain) > 100
    assert problem.error(problem.solve(max_iter=100)) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_and_adjoint_alone_are_the_forward_and_the_backward_solve(backend):
    problem = LinearQuadratic(norm=0.8)
    W, _, C, y = problem.tensors()
    b = torch.randn(4, 64, dtype=F64)
    solution = dq.joint_solve(
        lambda z, x: torch.tanh(z @ W.T) + b,
        lambda z, x: 0.5 * (z @ C.T - y).square().sum(1),
        torch.zeros(4, 64, dtype=F64),
        (),
        rtol=1e-12,
        max_iter=200,
        backend=backend,
        backward="none",
    )
    assert solution.converged.all() and solution.x == () and set(solution.residual) == {"z", "mu"}
    given = b.clone().requires_grad_()
    z = dq.fixed_point(lambda z: torch.tanh(z @ W.T) + given, torch.zeros(4, 64, dtype=F64), rtol=1e-13, max_iter=200).z
    (0.5 * (z @ C.T - y).square().sum()).backward()
    assert torch.allclose(solution.z, z, rtol=1e-9, atol=1e-10)
    assert torch.allclose(solution.mu, given.grad, rtol=1e-8, atol=1e-9)  # df/db is the identity


# ---- blocks ----


def test_converged_state_does_not_hide_an_input_that_moves():
    """x is a thousandth of the state and slow: one norm over all of it would be met long before x is."""

    def f(z: Any, x: Any) -> Any:
        return 0.1 * z + 1000 + 0.0 * x

    def loss(z: Any, x: Any) -> Tensor:
        return (x - 1).square().sum(1) + 1e-6 * z.sum(1)

    def solve(rtol: Any) -> Any:
        start = torch.zeros(2, 3, dtype=F64)
        return dq.joint_solve(
            f, loss, start, start, step_size=0.05, solver="picard", damping=1.0, rtol=rtol, max_iter=300
        )

    loose, tight = solve({"z": 1e-3, "mu": 1e-3, "x": 1e9}), solve(1e-3)
    assert loose.converged.all() and tight.converged.all()
    assert float(loose.residual["x"].min()) > 1e-2 and float(tight.residual["x"].max()) <= 1e-3
    assert bool((loose.steps < tight.steps).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accelerate", [("z",), ("z", "mu"), ("mu", "x"), "x"])
def test_blocks_left_out_move_by_the_plain_map(backend, accelerate):
    problem = LinearQuadratic(B=3, nz=12, nx=3, norm=0.5)
    seen = []

    def look(k: int, state: Any) -> None:
        seen.append({name: getattr(state, name).clone() for name in ("z", "mu", "x")})

    problem.solve(accelerate=accelerate, max_iter=9, backend=backend, callback=look, damping=(0.8, 0.6))
    W, U, C, y = problem.tensors()
    _, curvature = problem.solution(W, U, C, y)
    for before, after in itertools.pairwise(seen[2:-1]):
        z, mu, x = before["z"], before["mu"], before["x"]
        p = (z @ C.T - y) @ C + mu @ W
        q = problem.ridge * x + mu @ U
        plain = {
            "z": z + 0.8 * (problem.f(z, x, W, U, C, y) - z),
            "mu": mu + 0.6 * (p - mu),
            "x": x - q / curvature,
        }
        for name, value in plain.items():
            assert torch.allclose(after[name], value) == (name not in accelerate), name


def test_trees_in_every_block():
    a = torch.randn(2, 3, 4, dtype=F64)

    def f(z: Any, x: Any) -> Any:
        return {"a": 0.3 * torch.cos(z["a"]) + x[0][:, None], "b": 0.5 * z["b"] + x[1] * z["a"].mean((1, 2))[:, None]}

    def loss(z: Any, x: Any) -> Tensor:
        return (z["a"] - a).square().sum((1, 2)) + z["b"].square().sum(1) + 0.1 * sum(t.square().sum(1) for t in x)

    z0 = {"a": torch.zeros(2, 3, 4, dtype=F64), "b": torch.zeros(2, 5, dtype=F64)}
    x0 = (torch.zeros(2, 4, dtype=F64), torch.zeros(2, 5, dtype=F64))
    s = dq.joint_solve(f, loss, z0, x0, step_size=0.05, rtol=1e-9, max_iter=400, backward="implicit")
    assert s.converged.all()
    again = f(s.z, s.x)
    assert all(torch.allclose(again[k], s.z[k], rtol=1e-7, atol=1e-8) for k in ("a", "b"))
    assert [t.shape for t in s.x] == [t.shape for t in x0] and set(s.mu) == {"a", "b"}


# ---- projections ----


FEASIBLE = {
    "box": (dq.project.Box(-0.05, 0.1), lambda x: bool((x >= -0.05).all() and (x <= 0.1).all())),
    "l2": (dq.project.L2Ball(0.2), lambda x: bool((x.norm(dim=1) <= 0.2 * (1 + 1e-12)).all())),
    "linf": (dq.project.LinfBall(0.1), lambda x: bool((x.abs() <= 0.1).all())),
    "linf-box": (dq.project.LinfBall(0.1, low=0.0, high=1.0), lambda x: bool((x >= 0).all() and (x <= 0.1).all())),
    "own": (lambda x: x.clamp(max=0.0), lambda x: bool((x <= 0).all())),
}


def constrained_optimum(problem: LinearQuadratic, project: Any) -> Tensor:
    W, U, C, y = problem.tensors()
    _, curvature = problem.solution(W, U, C, y)
    M = C @ torch.linalg.solve(torch.eye(problem.nz, dtype=F64) - W, U)
    x = torch.zeros(problem.B, problem.nx, dtype=F64)
    for _ in range(2000):
        x = project(x - (((x @ M.T - y) @ M) + problem.ridge * x) / curvature)
    return x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FEASIBLE)
def test_answer_is_the_constrained_optimum_and_feasible(backend, name):
    problem = LinearQuadratic(B=3, nz=12, nx=3, norm=0.5)
    project, inside = FEASIBLE[name]
    s = problem.solve(project=project, rtol=1e-8, max_iter=150, backend=backend)
    x = constrained_optimum(problem, project)
    assert inside(s.x)
    assert torch.allclose(s.x, x, atol=1e-5)
    assert not torch.allclose(x, problem.solution(*problem.tensors())[0], atol=1e-3)  # the constraint binds


@pytest.mark.parametrize("name", ["box", "l2", "linf", "linf-box"])
def test_projected_input_may_step_plainly(name):
    problem = LinearQuadratic(B=3, nz=12, nx=3, norm=0.5)
    project, inside = FEASIBLE[name]
    s = problem.solve(project=project, max_iter=80, accelerate=("z", "mu"), returns="cost")
    assert inside(s.x)
    args = problem.tensors()
    x = constrained_optimum(problem, project)
    z = dq.fixed_point(problem.f, torch.zeros(3, 12, dtype=F64), (x, *args), backward="none", rtol=1e-10).z
    best = problem.loss(z, x, *args)
    z = dq.fixed_point(problem.f, torch.zeros(3, 12, dtype=F64), (s.x, *args), backward="none", rtol=1e-10).z
    assert bool((problem.loss(z, s.x, *args) <= 1.05 * best).all())


def test_centres_shift_the_balls():
    center = torch.full((3, 3), 0.5, dtype=F64)
    problem = LinearQuadratic(B=3, nz=12, nx=3, norm=0.5)
    args = problem.tensors()
    for ball in (dq.project.L2Ball(0.1, center), dq.project.LinfBall(0.1, center)):
        s = dq.joint_solve(
            problem.f,
            problem.loss,
            torch.zeros(3, 12, dtype=F64),
            center,
            args,
            step_size=0.1,
            project=ball,
            max_iter=50,
        )
        assert torch.allclose(ball(s.x), s.x)
        assert float((s.x - center).norm(dim=1).max()) <= 0.1 * 3**0.5 + 1e-12


# ---- what a solve returns ----


def test_best_last_and_cost():
    problem = LinearQuadratic()
    solutions = {kind: problem.solve(max_iter=23, returns=kind, trace=True) for kind in ("best", "last", "cost")}
    trace = solutions["best"].trace
    largest = torch.stack(list(trace.values())).amax(0)
    assert largest.shape == (23, 4)
    residual = {kind: torch.stack(list(s.residual.values())).amax(0) for kind, s in solutions.items()}
    assert torch.equal(residual["best"], largest.amin(0))
    assert torch.equal(residual["last"], largest[-1])
    assert bool((solutions["cost"].cost <= solutions["best"].cost).all())
    for s in solutions.values():
        values = (s.z, s.x, *problem.tensors())
        assert torch.allclose(s.cost, problem.loss(*values))
        moved = (problem.f(*values) - s.z).norm(dim=1) / problem.f(*values).norm(dim=1)
        assert torch.allclose(s.residual["z"], moved)


def test_callback_stops_trace_and_pickle():
    problem = LinearQuadratic()
    s = problem.solve(callback=lambda k, state: k == 4, trace=True, max_iter=50)
    assert s.nfe == 4 and bool((s.status == Status.STOPPED).all()) and s.trace["x"].shape == (4, 4)
    again = pickle.loads(pickle.dumps(s))
    assert torch.equal(again.x, s.x) and again.summary() == s.summary()


def test_throw_carries_the_solution():
    with pytest.raises(dq.ConvergenceError, match="4 max_iter; 3 evaluations, mean cost") as caught:
        LinearQuadratic().solve(max_iter=3, throw=True)
    assert caught.value.solution.nfe == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_sample_is_the_same_alone_and_beside_bad_ones(backend):
    rate = torch.tensor([0.3, 0.5, 0.2, 0.4])[:, None]
    target = torch.tensor([1.0, math.nan, -1.0, 2.0])[:, None].expand(4, 6).clone()

    def solve(rows: Any) -> Any:
        def f(z: Any, x: Any) -> Any:
            return rate[rows] * z + x

        def loss(z: Any, x: Any) -> Tensor:
            return (z - target[rows]).square().sum(1) + x.square().sum(1)

        z0, x0 = torch.zeros(4, 6)[rows], torch.zeros(4, 6)[rows]
        return dq.joint_solve(f, loss, z0, x0, step_size=0.1, max_iter=30, backend=backend, backward="none")

    together = solve(slice(None))
    assert int(together.status[1]) == Status.NON_FINITE
    assert bool(torch.isfinite(together.z).all()) and bool(torch.isfinite(together.x).all())
    for i in (0, 2, 3):
        alone = solve(slice(i, i + 1))
        for name in ("z", "x", "mu", "steps", "status"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i]), name


def test_schedule_and_tensors_of_step_sizes():
    problem = LinearQuadratic(B=2, nz=12, nx=3, norm=0.5)
    _, curvature = problem.solution(*problem.tensors())
    fixed = problem.solve(max_iter=7)
    scheduled = problem.solve(max_iter=7, step_size=lambda k: 1 / curvature)
    tensors = problem.solve(max_iter=7, step_size=torch.full((3,), 1 / curvature, dtype=F64))
    assert torch.equal(fixed.x, scheduled.x)
    assert torch.allclose(fixed.x, tensors.x, rtol=1e-12)
    asked: list[int] = []
    problem.solve(max_iter=4, step_size=lambda k: asked.append(k) or 0.1)
    assert asked == [0, 1, 2, 3]


def test_normalised_step_has_the_length_of_the_step_size():
    problem = LinearQuadratic(B=2, nz=12, nx=3, norm=0.5)
    seen = []
    problem.solve(
        normalize=True,
        step_size=0.25,
        accelerate=("z", "mu"),
        max_iter=5,
        callback=lambda k, s: seen.append(s.x.clone()),
    )
    # mu is zero at first and its gradient with it, where x is zero too: that step has no direction
    for before, after in itertools.pairwise(seen[1:-1]):
        assert torch.allclose((after - before).norm(dim=1), torch.full((2,), 0.25, dtype=F64))


def test_empty_batch_and_empty_state():
    f, loss = (lambda z, x: 0.5 * z + x), (lambda z, x: z.square().sum(1))
    s = dq.joint_solve(f, loss, torch.zeros(0, 3), torch.zeros(0, 3), step_size=0.1)
    assert s.nfe == 0 and s.z.shape == (0, 3)
