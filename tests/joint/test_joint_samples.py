"""What counts as a sample of a joint solve, and samples that stop together."""

from __future__ import annotations

import itertools

import pytest
import torch
from problems import BACKENDS

import deqfast as dq
from deqfast.project import Box, L2Ball

LENGTHS = [3, 1, 0, 4, 3]
BOUNDS = [0, *itertools.accumulate(LENGTHS)]
F64 = torch.float64


def problem(bounds=BOUNDS):
    """f, a loss of one number a segment, and starts."""
    generator = torch.Generator().manual_seed(0)
    W = 0.3 * torch.randn(4, 4, dtype=F64, generator=generator)
    target = 0.3 * torch.randn(bounds[-1], 4, dtype=F64, generator=generator)
    owner = torch.repeat_interleave(torch.arange(len(bounds) - 1), torch.tensor(bounds).diff())
    f = lambda z, x, target, owner: torch.tanh(z @ W + x)  # noqa: E731

    def loss(z, x, target, owner):
        each = (z - target).square().sum(1) + x.square().sum(1)
        return torch.zeros(len(bounds) - 1, dtype=F64).index_add(0, owner, each)

    z0 = torch.zeros(bounds[-1], 4, dtype=F64)
    return f, loss, z0, (target, owner)


def alone(a, b, **options):
    """The rows from a to b as one sample."""
    f, _, z0, (target, owner) = problem()

    def loss(z, x, target, owner):
        return ((z - target).square().sum(1) + x.square().sum(1)).sum()

    return dq.joint_solve(f, loss, z0[a:b], z0[a:b], (target[a:b], owner[a:b]), batch_dims=0, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("project", [None, Box(-0.2, 0.3), Box(0.0, 0.3), L2Ball(0.4)], ids=str)
def test_segments_are_samples_of_their_own(project, backend):
    f, loss, z0, args = problem()
    options = {"step_size": 0.2, "project": project, "backend": backend, "rtol": 1e-8, "max_iter": 300}
    if project is not None:
        options.update(solver="picard", step_size=0.05, max_iter=1000)
    sol = dq.joint_solve(f, loss, z0, z0, args, segments=BOUNDS, **options)
    assert bool(sol.converged.all())
    assert sol.cost.shape == sol.residual["x"].shape == sol.steps.shape == (len(LENGTHS),)
    for i, (a, b) in enumerate(itertools.pairwise(BOUNDS)):
        if a == b:
            continue
        own = alone(a, b, **options)
        assert torch.allclose(own.x, sol.x[a:b], rtol=1e-6, atol=1e-7)
        assert torch.allclose(own.cost, sol.cost[i], rtol=1e-6)


def test_set_without_zero_leaves_padding_out_of_every_norm():
    f, loss, z0, args = problem()
    x0 = torch.full_like(z0, 0.1)
    options = {"step_size": 0.05, "project": Box(0.1, 0.3), "solver": "picard", "rtol": 1e-8, "max_iter": 1000}
    sol = dq.joint_solve(f, loss, z0, x0, args, segments=BOUNDS, **options)
    assert bool(sol.converged.all()) and bool(((sol.x >= 0.1) & (sol.x <= 0.3)).all())
    target, owner = args
    for i, (a, b) in enumerate(itertools.pairwise(BOUNDS)):
        if a < b:
            one = dq.joint_solve(
                f,
                lambda *given: problem()[1](*given).sum(),
                z0[a:b],
                x0[a:b],
                (target[a:b], owner[a:b]),
                batch_dims=0,
                **options,
            )
            assert torch.allclose(one.x, sol.x[a:b], atol=1e-7)
            assert torch.allclose(one.residual["x"], sol.residual["x"][i], atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ball_bounds_every_token_by_itself(backend):
    """With batch_dims=2 a sample is a token, and so is what the ball holds."""
    generator = torch.Generator().manual_seed(0)
    W = 0.3 * torch.randn(4, 4, dtype=F64, generator=generator)
    f, loss = lambda z, x: torch.tanh(z @ W + x), lambda z, x: (z - 0.9).square().sum(-1)
    z0, center = torch.zeros(3, 2, 4, dtype=F64), 0.1 * torch.randn(3, 2, 4, dtype=F64, generator=generator)
    for project, flat_project in (
        (L2Ball(0.5), L2Ball(0.5)),
        (L2Ball(0.5, center), L2Ball(0.5, center.view(6, 4))),
    ):
        sol = dq.joint_solve(f, loss, z0, z0, step_size=0.5, batch_dims=2, project=project, backend=backend)
        flat = dq.joint_solve(
            f, loss, z0.view(6, 4), z0.view(6, 4), step_size=0.5, project=flat_project, backend=backend
        )
        assert torch.equal(sol.x.view(6, 4), flat.x)


@pytest.mark.parametrize("backward", ["envelope", "implicit"])
def test_gradients_with_segments(backward):
    f, loss, z0, (target, owner) = problem()
    target.requires_grad_()
    options = {"step_size": 0.2, "rtol": 1e-11, "max_iter": 400, "backward": backward}
    sol = dq.joint_solve(f, loss, z0, z0, (target, owner), segments=BOUNDS, **options)
    (found,) = torch.autograd.grad(
        loss(sol.z, sol.x, target, owner).sum() if backward == "envelope" else sol.x.square().sum(), target
    )
    f_one = lambda z, x, target: f(z, x, target, None)  # noqa: E731
    each = lambda z, x, target: (z - target).square().sum((0, 1)) + x.square().sum((0, 1))  # noqa: E731
    for a, b in itertools.pairwise(BOUNDS):
        if a == b:
            continue
        part = target[a:b].detach().requires_grad_()
        one = dq.joint_solve(f_one, each, z0[a:b], z0[a:b], (part,), batch_dims=0, **options)
        (expected,) = torch.autograd.grad(
            each(one.z, one.x, part) if backward == "envelope" else one.x.square().sum(), part
        )
        assert torch.allclose(found[a:b], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_for_every_row_and_segments(backend):
    f, loss, z0, args = problem()
    rates = torch.linspace(0.1, 0.4, len(z0), dtype=F64)[:, None]
    sol = dq.joint_solve(f, loss, z0, z0, args, segments=BOUNDS, step_size=rates, max_iter=300, backend=backend)
    assert bool(sol.converged.all())
    for a, b in itertools.pairwise(BOUNDS):
        if a < b:
            own = alone(a, b, step_size=rates[a:b], max_iter=300, backend=backend)
            assert torch.allclose(own.x, sol.x[a:b], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ["anderson", "picard"])
@pytest.mark.parametrize("returns", ["best", "last", "cost"])
def test_samples_stop_together(returns, solver, backend):
    f, loss, z0, args = problem()
    options = {"step_size": 0.05, "backend": backend, "solver": solver, "returns": returns, "max_iter": 1000}
    each = dq.joint_solve(f, loss, z0, z0, args, segments=BOUNDS, trace=True, **options)
    assert len(set(each.steps.tolist())) > 1
    sol = dq.joint_solve(f, loss, z0, z0, args, segments=BOUNDS, trace=True, stop="all", **options)
    assert bool(sol.converged.all()) and bool((sol.steps == sol.nfe).all())
    within = torch.stack([rows <= 1e-8 for rows in sol.trace.values()]).all(0).all(1)
    assert within.int().argmax() + 1 == sol.nfe == len(within)  # not before, and no later
    target, _ = args
    z = f(sol.z, sol.x, target, None)
    if returns != "cost":
        assert float((z - sol.z).norm() / z.norm()) < 2e-8
        for name, rows in sol.trace.items():
            assert torch.equal(sol.residual[name], rows[-1]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_together_a_sample_that_breaks_holds_nobody_up_and_the_limit_counts(backend):
    f, loss, z0, (target, owner) = problem()
    target[3] = torch.nan
    options = {"step_size": 0.2, "backend": backend, "stop": "all", "segments": BOUNDS}
    sol = dq.joint_solve(f, loss, z0, z0, (target, owner), max_iter=300, **options)
    assert sol.converged.tolist() == [True, False, True, True, True]
    assert sol.status[1] == dq.Status.NON_FINITE
    short = dq.joint_solve(f, loss, z0, z0, (target, owner), max_iter=4, **options)
    assert short.nfe == 4 and not bool(short.converged[0]) and not bool(short.converged[3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_coupled_samples_are_all_within_tolerance_when_they_stop_together(backend):
    generator = torch.Generator().manual_seed(2)
    W = 0.2 * torch.randn(4, 4, dtype=F64, generator=generator)
    target = 0.3 * torch.randn(5, 4, dtype=F64, generator=generator)
    f = lambda z, x: torch.tanh(z @ W + x + 0.1 * z.mean(0))  # noqa: E731
    loss = lambda z, x: (z - target).square().sum(1) + x.square().sum(1)  # noqa: E731
    z0 = torch.zeros(5, 4, dtype=F64)
    sol = dq.joint_solve(
        f, loss, z0, z0, step_size=0.02, stop="all", max_iter=1000, backend=backend, rtol=1e-7, solver="picard"
    )
    assert bool(sol.converged.all()) and bool((sol.steps == sol.nfe).all())
    image = f(sol.z, sol.x)
    assert bool(((image - sol.z).norm(dim=1) <= 1.2e-7 * image.norm(dim=1)).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": "some"}, "stop must be one of 'each', 'all', 'consensus', got 'some'"),
        ({"segments": [0, 2, 4], "batch_dims": 2}, "segments say what a sample is; leave out batch_dims"),
        ({"segments": [0, 2, 5]}, "segments must cover the 4 rows of z0"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named_before_any_work(options, message):
    def never(*_):
        raise AssertionError("called")

    z0 = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=message):
        dq.joint_solve(never, never, z0, z0, step_size=0.1, **options)
    with pytest.raises(ValueError, match=r"segments must cover the rows of x0.*expected a tensor of shape \(4, ...\)"):
        dq.joint_solve(never, never, z0, torch.zeros(2, 3), step_size=0.1, segments=[0, 2, 4])
