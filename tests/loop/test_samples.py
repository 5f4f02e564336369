"""What counts as a sample: several leading dims, none, segments; and samples that stop together."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from coupled import graph_network, row_residuals
from problems import BACKENDS, ONE_OF_EACH

import deqfast as dq

SEGMENTS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 4, 4, 4])  # sample 3 has no row


def contraction(*shape: int):
    generator = torch.Generator().manual_seed(0)
    W = 0.2 * torch.randn(shape[-1], shape[-1], dtype=torch.float64, generator=generator)
    x = torch.randn(*shape, dtype=torch.float64, generator=generator)
    return lambda z, x=x: torch.tanh(z @ W + x), x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_every_token_is_a_sample_with_the_bits_of_a_flat_batch(solver, backend):
    f, x = contraction(3, 4, 5)
    flat = dq.fixed_point(
        lambda z: f(z, x.view(12, 5)), torch.zeros(12, 5, dtype=x.dtype), solver=solver, backend=backend
    )
    sol = dq.fixed_point(f, torch.zeros_like(x), batch_dims=2, solver=solver, backend=backend, trace=True)
    assert torch.equal(sol.z.view(12, 5), flat.z)
    for name in ("converged", "steps", "residual", "status"):
        assert getattr(sol, name).shape == (3, 4)
        assert torch.equal(getattr(sol, name).flatten(), getattr(flat, name)), name
    assert sol.trace.shape == (sol.nfe, 3, 4)
    assert sol.events["woken"].shape == (3, 4)
    assert sol.summary() == flat.summary()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_the_whole_state_may_be_one_sample(solver, backend):
    f, x = contraction(3, 4, 5)
    sol = dq.fixed_point(f, torch.zeros_like(x), batch_dims=0, solver=solver, backend=backend)
    one = dq.fixed_point(
        lambda z: f(z[0])[None], torch.zeros(1, 3, 4, 5, dtype=x.dtype), solver=solver, backend=backend
    )
    assert torch.equal(sol.z, one.z[0])
    assert sol.converged.shape == sol.steps.shape == sol.residual.shape == ()
    assert bool(sol.converged)
    number = dq.fixed_point(lambda z: 0.5 * z + 1, torch.tensor(0.0), batch_dims=0, solver=solver, backend=backend)
    assert number.z.shape == () and abs(float(number.z) - 2) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "given", [SEGMENTS, torch.tensor([0, 3, 5, 9, 9, 12]), [0, 3, 5, 9, 9, 12]], ids=lambda g: type(g).__name__
)
def test_segments_are_solved_as_samples_of_their_own(given, backend):
    f, x = contraction(12, 5)
    sol = dq.fixed_point(f, torch.zeros_like(x), segments=given, backend=backend, trace=True)
    assert sol.converged.shape == (5,) and bool(sol.converged.all())
    assert sol.trace.shape == (sol.nfe, 5)
    bounds = [0, 3, 5, 9, 9, 12]
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        if a == b:
            assert int(sol.steps[i]) == 1
            continue
        part = x[a:b]
        alone = dq.fixed_point(lambda z, part=part: f(z, part), torch.zeros_like(part), batch_dims=0, backend=backend)
        assert int(alone.steps) == int(sol.steps[i])
        assert torch.allclose(alone.z, sol.z[a:b], rtol=1e-12)
        assert torch.allclose(alone.residual, sol.residual[i], rtol=1e-6)


def test_segments_of_one_length_are_views_with_the_bits_of_a_batch():
    f, x = contraction(12, 5)
    sol = dq.fixed_point(f, torch.zeros_like(x), segments=torch.arange(12) // 3)
    batch = dq.fixed_point(lambda z: f(z.view(12, 5)).view(4, 3, 5), torch.zeros(4, 3, 5, dtype=x.dtype))
    assert torch.equal(sol.z, batch.z.view(12, 5))
    assert torch.equal(sol.residual, batch.residual)


def test_graphs_as_segments_take_fewer_evaluations_than_nodes_as_samples():
    f, z0 = graph_network(200)
    joined = lambda z: torch.cat([f(part) for part in z.split(200)])  # noqa: E731
    z0 = z0.repeat(5, 1)
    segments = torch.arange(1000) // 200
    sol = dq.fixed_point(joined, z0, segments=segments, rtol=1e-4)
    assert bool(sol.converged.all())
    for part in sol.z.split(200):
        assert float((f(part) - part).norm() / f(part).norm()) < 1.2e-4
    with pytest.warns(dq.CouplingWarning):
        rows = dq.fixed_point(joined, z0, solver="picard", rtol=1e-4)
    assert sol.nfe < 0.7 * rows.nfe


@pytest.mark.parametrize(
    "options", [{"batch_dims": 2}, {"batch_dims": 0}, {"segments": torch.tensor([0, 2, 3])}], ids=str
)
@pytest.mark.parametrize("backward", [None, dq.Phantom(steps=80), dq.Unroll()], ids=lambda b: type(b).__name__)
def test_gradients_are_those_of_a_batch(backward, options):
    f, x = contraction(3, 4, 5)
    x = x.requires_grad_()

    def gradient(**options):
        z0 = torch.zeros_like(x, requires_grad=False)
        z = dq.fixed_point(f, z0, (x,), rtol=1e-12, backward=backward, **options).z
        return torch.autograd.grad(z.square().sum(), x)[0]

    assert torch.allclose(gradient(**options), gradient(), atol=1e-8)


def test_trees_memory_formats_and_second_derivatives():
    x = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    z0 = {
        "a": torch.zeros(2, 3, 4, 5, 5, dtype=torch.float64).transpose(2, 4),
        "b": torch.zeros(2, 3, dtype=torch.float64),
    }

    def f(z, x):
        return {"a": 0.3 * torch.tanh(z["a"]) + x.transpose(2, 4), "b": 0.5 * z["b"] + x.sum((2, 3, 4)).cos()}

    sol = dq.fixed_point(f, z0, (x,), batch_dims=2, rtol=1e-12)
    assert sol.converged.shape == (2, 3)
    assert sol.z["a"].stride() == z0["a"].stride()
    (g,) = torch.autograd.grad(sol.z["a"].square().sum() + sol.z["b"].sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(g.square().sum(), x)
    assert bool(torch.isfinite(again).all()) and float(again.norm()) > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_of_ones_own_have_the_shape_too_and_can_be_saved(backend):
    f, x = contraction(3, 4, 5)
    for options in ({"batch_dims": 2}, {"segments": torch.tensor([0, 1, 3])}, {"stop": "all"}):
        state = dq.Anderson(m=4).init(torch.zeros_like(x), backend=backend, **options)
        state.step(f(state.z))
        for copied in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
            while not copied.done:
                copied.step(f(copied.z))
        while not state.done:
            state.step(f(state.z))
        assert torch.equal(copied.z, state.z)
        assert state.residual.shape == copied.residual.shape == state.status.shape
        assert bool((row_residuals(f, state.z) < 2e-8).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_tokens_are_dropped_when_all_of_theirs_have_stopped(backend):
    f, x = contraction(6, 4, 5)
    x = x * torch.logspace(-2, 1, 6, dtype=x.dtype)[:, None, None]
    rows = []

    def counted(z, x):
        rows.append(z.shape[0])
        return f(z, x)

    sol = dq.fixed_point(
        counted, torch.zeros_like(x), (x,), batch_dims=2, compact=(True,), backend=backend, solver="picard"
    )
    assert min(rows) < 6
    plain = dq.fixed_point(f, torch.zeros_like(x), (x,), batch_dims=2, backend=backend, solver="picard")
    assert torch.allclose(sol.z, plain.z, atol=1e-12)
    assert torch.equal(sol.steps, plain.steps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_nothing_freezes_before_every_sample_is_within_tolerance(solver, backend):
    f, x = contraction(6, 5)
    x = x * torch.logspace(-3, 1, 6, dtype=x.dtype)[:, None]
    traced = dq.fixed_point(f, torch.zeros_like(x), (x,), solver=solver, stop="all", trace=True, backend=backend)
    assert bool(traced.converged.all())
    assert bool((traced.steps == traced.nfe).all())
    within = (traced.trace <= 1e-8).all(1)
    assert int(within.int().argmax()) + 1 == traced.nfe
    assert bool((row_residuals(lambda z: f(z, x), traced.z) <= 1.01e-8).all())
    assert torch.equal(traced.residual, traced.trace[-1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_together_a_sample_that_breaks_holds_nobody_up(backend):
    f, x = contraction(5, 5)
    x[2] = torch.nan
    sol = dq.fixed_point(f, torch.zeros_like(x), (x,), stop="all", backend=backend)
    assert sol.converged.tolist() == [True, True, False, True, True]
    assert sol.status[2] == dq.Status.NON_FINITE
    short = dq.fixed_point(f, torch.zeros_like(x), (x,), stop="all", backend=backend, max_iter=3)
    assert not bool(short.converged[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_dims": 4}, r"batch_dims=4 needs tensors of at least 4 dims in z0, got one of shape \(3, 4, 5\)"),
        ({"batch_dims": -1}, "batch_dims must be at least 0, got -1"),
        ({"batch_dims": True}, "batch_dims must be an int, got bool"),
        ({"segments": torch.tensor([0, 1])}, "segments must cover the 3 rows of z0: expected"),
        ({"segments": torch.tensor([0, 2, 1])}, "segments must be sorted"),
        ({"segments": torch.tensor([-1, 0, 1])}, "segments must number samples from 0, got -1"),
        ({"segments": torch.tensor([0.0, 1, 2])}, "segments must be an int tensor"),
        ({"segments": torch.tensor([0, 1, 2]), "batch_dims": 2}, "segments say what a sample is; leave out batch_dims"),
        ({"batch_dims": 0, "compact": True}, "compact leaves out samples of dim 0; with batch_dims=0"),
        ({"segments": torch.tensor([0, 1, 2]), "compact": True}, "cannot be combined with segments"),
        ({"stop": "any"}, "stop must be one of 'each', 'all', 'consensus', got 'any'"),
        ({"stop": "all", "compact": True}, "they stop together"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named_before_any_work(options, message):
    def never(*_):
        raise AssertionError("f was called")

    with pytest.raises((TypeError, ValueError), match=message):
        dq.fixed_point(never, torch.zeros(3, 4, 5), (torch.zeros(3),), **options)


def test_leaves_must_share_the_dims_that_count():
    z0 = {"a": torch.zeros(3, 4, 5), "b": torch.zeros(3, 2)}
    with pytest.raises(ValueError, match=r"must share their first 2 dims.*expected \(3, 4, \.\.\.\) of each"):
        dq.fixed_point(lambda z: z, z0, batch_dims=2)


def test_a_joint_solve_of_tokens_has_the_bits_of_a_flat_one():
    torch.manual_seed(0)
    W = 0.3 * torch.randn(4, 4, dtype=torch.float64)
    args = lambda z, x: torch.tanh(z @ W + x), lambda z, x: (z - 0.3).square().sum(-1) + 0.1 * x.square().sum(-1)
    z0 = torch.zeros(3, 2, 4, dtype=torch.float64)
    sol = dq.joint_solve(*args, z0, z0, step_size=0.5, batch_dims=2)
    flat = dq.joint_solve(*args, z0.view(6, 4), z0.view(6, 4), step_size=0.5)
    assert torch.equal(sol.x.view(6, 4), flat.x)
    assert sol.converged.shape == sol.cost.shape == sol.residual["x"].shape == (3, 2)
    whole = dq.joint_solve(args[0], lambda z, x: args[1](z, x).sum(), z0, z0, step_size=0.5, batch_dims=0)
    assert whole.converged.shape == () and bool(whole.converged)
