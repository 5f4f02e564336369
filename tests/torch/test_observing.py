"""What a solve tells: ranges in a profile, lines in a log, numbers for a dashboard."""

from __future__ import annotations

import logging
import math

import pytest
import torch

import deqfast as dq


def problem(B=4, N=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    W = (0.5 * torch.randn(N, N, generator=g) / N**0.5).requires_grad_()
    x = torch.randn(B, N, generator=g)
    return (lambda z: torch.tanh(z @ W.T + x)), torch.zeros(B, N), W


def ranges_of(prof):
    counts: dict[str, int] = {}
    for event in prof.events():
        if event.name.startswith("deqfast::"):
            counts[event.name] = counts.get(event.name, 0) + 1
    return counts


@pytest.mark.parametrize("solver", ["anderson", "broyden", "picard"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_profile_has_ranges_for_every_evaluation_and_step(solver, backend):
    f, z0, _ = problem()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
        solution = dq.fixed_point(f, z0, solver=solver, backend=backend)
        solution.z.sum().backward()
    counts = ranges_of(prof)
    products = solution.backward.evaluations
    assert counts["deqfast::solve"] == counts["deqfast::backward"] == 1
    assert counts["deqfast::f"] == solution.nfe and counts["deqfast::vjp"] == products
    assert counts["deqfast::step"] == solution.nfe + products


def test_a_batch_that_shrinks_has_ranges_too():
    slope = torch.linspace(0.1, 0.85, 64)[:, None].requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
        solution = dq.fixed_point(lambda z, a: a * z + 1, torch.zeros(64, 2), (slope,), solver="picard", compact="auto")
        solution.z.sum().backward()
    counts = ranges_of(prof)
    assert counts["deqfast::f"] >= solution.nfe and counts["deqfast::vjp"] >= solution.backward.evaluations


def test_ranges_change_nothing_of_a_solve():
    f, z0, W = problem()
    plain = dq.fixed_point(f, z0)
    plain.z.sum().backward()
    gradient = W.grad.clone()
    W.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        profiled = dq.fixed_point(f, z0)
        profiled.z.sum().backward()
    assert torch.equal(plain.z, profiled.z) and torch.equal(gradient, W.grad)
    assert torch.equal(plain.steps, profiled.steps)


def test_without_a_profiler_functions_are_left_as_they_are():
    f, _, _ = problem()
    assert dq.ranges.around("name", f) is f


def test_joint_solves_have_ranges():
    f, z0, _ = problem()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
        solution = dq.joint_solve(
            lambda z, x: f(z + 0.1 * x), lambda z, x: (z - 1).square().sum(1), z0, z0.clone(), step_size=0.1, max_iter=5
        )
    counts = ranges_of(prof)
    assert counts["deqfast::joint"] == 1 and counts["deqfast::f"] == counts["deqfast::step"] == solution.nfe


def test_the_log_has_a_line_a_solve(caplog):
    f, z0, _ = problem()
    with caplog.at_level(logging.DEBUG, logger="deqfast"):
        solution = dq.fixed_point(f, z0)
        solution.z.sum().backward()
    forward, backward = [record.getMessage() for record in caplog.records]
    assert "4 samples of 16 numbers" in forward and f"{solution.nfe} evaluations" in forward
    assert solution.backend in forward
    assert f"{solution.backward.evaluations} products" in backward


def test_the_log_is_silent_unless_asked(caplog):
    f, z0, _ = problem()
    with caplog.at_level(logging.INFO):
        dq.fixed_point(f, z0)
    assert not caplog.records


def test_metrics_of_a_layer_say_what_its_solves_say():
    f, z0, _ = problem()
    metrics = dq.Metrics(quantiles=(0.5, 1.0))
    layer = dq.DEQ(lambda z, x: f(z + 0 * x), metrics=metrics, warn=False, backward=dq.Implicit(max_iter=50))
    solutions = [layer.solve(z0), layer.solve(z0, max_iter=3)]
    for solution in solutions:
        solution.z.sum().backward()
    found = metrics.compute()
    steps = torch.cat([s.steps for s in solutions]).double()
    residual = torch.cat([s.residual for s in solutions]).double()
    assert found["solves"] == 2 and found["samples"] == 8
    assert found["evaluations"] == sum(s.nfe for s in solutions) / 2
    assert found["steps"] == float(steps.mean())
    assert found["converged"] == found["max_iter"] == 0.5
    assert found["residual_max"] == found["residual_q100"] == float(residual.max())
    assert float(residual.min()) < found["residual_q50"] < float(residual.max())
    assert found["backward_solves"] == 2 and found["backward_converged"] == 1.0
    products = [s.backward.evaluations for s in solutions if s.backward is not None]
    assert found["backward_evaluations"] == sum(products) / 2
    for name in solutions[0].events:
        assert found[name] == sum(int(solution.events[name].sum()) for solution in solutions) / 8


def test_metrics_count_samples_that_woke():
    # row 0 sees row 1, so that it is within tolerance before its own answer is there
    def f(z):
        return torch.stack([0.9 * z[1], 0.5 * z[1] + 1])

    metrics = dq.Metrics()
    metrics(dq.fixed_point(f, torch.zeros(2, 1)))
    assert metrics.compute()["woken"] > 0


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))


def test_writing_begins_anew():
    f, z0, _ = problem()
    metrics, writer = dq.Metrics(), Writer()
    metrics(dq.fixed_point(f, z0))
    written = metrics.write(writer, 7)
    assert {(name, step) for name, _, step in writer.scalars} == {(f"deqfast/{name}", 7) for name in written}
    assert all(math.isfinite(value) for _, value, _ in writer.scalars)
    assert len(metrics) == 0 and metrics.compute() == {}


def test_only_the_newest_solves_are_remembered():
    f, z0, _ = problem()
    metrics = dq.Metrics(window=3)
    for limit in range(1, 6):
        metrics(dq.fixed_point(f, z0, max_iter=limit))
    assert len(metrics) == 3 and metrics.compute()["evaluations"] == 4


def test_states_are_not_kept():
    f, z0, _ = problem()
    metrics = dq.Metrics()
    solution = metrics(dq.fixed_point(f, z0))
    kept = {id(value) for value in vars(metrics._solves[0]).values()}
    assert id(solution.z) not in kept and not metrics._solves[0].residual.requires_grad


def test_non_finite_residuals_leave_the_others_alone():
    def f(z):
        return torch.cat([z[:1] * 0.5 + 1, z[1:] * float("nan")])

    metrics = dq.Metrics()
    metrics(dq.fixed_point(f, torch.zeros(2, 3)))
    found = metrics.compute()
    assert found["non_finite"] == 0.5 and math.isfinite(found["residual_max"])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: dq.Metrics(quantiles=(1.5,)), ValueError, "quantiles must lie between 0 and 1"),
        (lambda: dq.Metrics(window=0), ValueError, "window must be a number of solves"),
        (lambda: dq.Metrics()(torch.zeros(1)), TypeError, "must be a Solution, got Tensor"),
        (lambda: dq.Metrics().write(object(), 0), TypeError, "add_scalar"),
        (lambda: dq.DEQ(lambda z, x: z, metrics=3), TypeError, "metrics must be a dq.Metrics, got int"),
    ],
)
def test_what_cannot_be_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_tensorboard_takes_them(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    f, z0, _ = problem()
    metrics = dq.Metrics()
    metrics(dq.fixed_point(f, z0))
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        metrics.write(writer, 1)
    assert any(path.stat().st_size for path in tmp_path.iterdir())
