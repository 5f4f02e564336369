"""Segments of unequal length: each is solved as if it were alone, in memory of its own size."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from problems import BACKENDS, ONE_OF_EACH

import deqfast as dq
from deqfast.ops.grouped import GroupedWorkspace
from deqfast.ops.layout import layout_of

LENGTHS = [5, 1, 40, 5, 0, 3, 200, 1, 40, 2]
BOUNDS = [0, *itertools.accumulate(LENGTHS)]
EXACT = [name for name in BACKENDS if name != "torch"]


def problem(width: int = 5, dtype: torch.dtype = torch.float32, lengths: list[int] = LENGTHS):
    """Elementwise and correctly rounded, so that a row has the same bits in any batch; some rows are slow."""
    rows = sum(lengths)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    slope = 1.9 * torch.rand(rows, width, generator=generator, dtype=torch.float64) - 0.95
    return pull, torch.zeros(rows, width, dtype=dtype), (x.to(dtype), slope.to(dtype))


def pull(z, x, slope):
    return slope * z / (1 + z.abs()) + x


def parts(*tensors, bounds=BOUNDS):
    for a, b in itertools.pairwise(bounds):
        yield tuple(t[a:b] for t in tensors)


def alike(a, b, backend):
    if backend == "torch":
        return torch.allclose(a, b, rtol=1e-3, atol=1e-5)
    return torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", [*ONE_OF_EACH, dq.Anderson(type=2), dq.Anderson(m=4, history_dtype=torch.int8)])
@pytest.mark.parametrize("width", [1, 5])
def test_segment_has_the_bits_that_it_has_alone(width, solver, backend):
    f, z0, args = problem(width)
    sol = dq.fixed_point(f, z0, args, segments=BOUNDS, solver=solver, backend=backend, rtol=1e-5)
    assert bool(sol.converged.all()) and sol.steps.shape == (len(LENGTHS),)
    for i, (start, x, slope) in enumerate(parts(z0, *args)):
        if not len(start):
            assert int(sol.steps[i]) == 1 and float(sol.residual[i]) == 0
            continue
        alone = dq.fixed_point(f, start, (x, slope), batch_dims=0, solver=solver, backend=backend, rtol=1e-5)
        assert alike(sol.z[BOUNDS[i] : BOUNDS[i + 1]], alone.z, backend)
        if backend != "torch":
            assert int(sol.steps[i]) == int(alone.steps) and torch.equal(sol.residual[i], alone.residual)
            for name, count in alone.events.items():
                assert int(sol.events[name][i]) == int(count), name


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_segment_has_the_same_bits_in_another_batch(solver, backend):
    f, z0, args = problem()
    whole = dq.fixed_point(f, z0, args, segments=BOUNDS, solver=solver, backend=backend)
    some = [8, 2, 5]
    bounds = [0, *itertools.accumulate(LENGTHS[i] for i in some)]
    rows = torch.cat([torch.arange(BOUNDS[i], BOUNDS[i + 1]) for i in some])
    part = dq.fixed_point(f, z0[rows], tuple(t[rows] for t in args), segments=bounds, solver=solver, backend=backend)
    assert torch.equal(part.z, whole.z[rows])
    for name in ("steps", "residual", "status"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[some]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_memory_is_that_of_the_segments(solver, backend):
    lengths = [10] * 40 + [5000] + [9] * 3 + [17]
    bounds = [0, *itertools.accumulate(lengths)]
    z0 = torch.zeros(bounds[-1], 2)
    state = solver.init(z0, segments=bounds, backend=backend, max_iter=20)
    assert isinstance(state.ws, GroupedWorkspace)
    columns = max(part.history.numel() / (part.layout.B * max(1, part.layout.N)) for part in state.ws.parts)
    true = z0.numel()
    assert state.ws.x[0][0].numel() <= 1.05 * true
    held = sum(part.history.numel() for part in state.ws.parts)
    assert held <= 1.05 * columns * true
    assert len(state.ws.parts) == (3 if backend == "torch" else 4)


def test_padding_is_at_most_twice_where_groups_are_rough():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 3000, (200,), generator=generator)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    layout = layout_of(torch.zeros(int(bounds[-1]), 1), 1, bounds, pads=True)
    padded = sum(group.count * group.length for group, _ in layout.parts)
    assert len(layout.parts) <= 12
    assert int(lengths.sum()) < padded < 2 * int(lengths.sum())
    one = layout_of(torch.zeros(int(bounds[-1]), 1), 1, bounds)
    assert not one.parts and 200 * int(lengths.max()) == one.B * one.N


def test_groups_come_in_the_order_of_their_first_segment_and_rows_in_place_are_views():
    z0 = torch.zeros(24, 3)
    ordered = layout_of(z0, 1, [0, 10, 12, 14, 17, 20, 24], pads=False)
    assert [(g.first, g.count, g.start, g.length) for g, _ in ordered.parts] == [
        (0, 1, 0, 10),
        (1, 2, 10, 2),
        (3, 2, 14, 3),
        (5, 1, 20, 4),
    ]
    assert ordered.samples.views and ordered.tensors(z0)[0] is z0
    mixed = layout_of(z0, 1, [0, 2, 12, 14, 24], pads=False)
    assert not mixed.samples.views
    t = torch.arange(72.0).view(24, 3)
    assert torch.equal(mixed.unflatten(mixed.tensors(t)), t)
    assert mixed.counted(torch.arange(4)).tolist() == [0, 2, 1, 3]
    assert mixed.spread(torch.arange(4)).tolist() == [0, 0, 1, 1] + [2] * 10 + [3] * 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bounds", [BOUNDS, [0, 200, 250, 297]], ids=["mixed", "in place"])
def test_what_comes_back_and_when_is_asked_for_as_of_a_batch(bounds, backend):
    f, z0, args = problem(dtype=torch.float64)
    options = {"segments": bounds, "backend": backend, "rtol": 1e-9}
    best = dq.fixed_point(f, z0, args, trace=True, states=[2, 5], **options)
    assert best.trace.shape == (best.nfe, len(bounds) - 1)
    last = best.trace.nan_to_num(-1.0)
    assert all(float(last[int(best.steps[i]) - 1, i]) == float(best.residual[i]) for i in range(len(bounds) - 1))
    assert torch.equal(best.states[0], dq.fixed_point(f, z0, args, max_iter=2, **options).z)
    image = dq.fixed_point(f, z0, args, returns="image", **options).z
    assert torch.allclose(image, f(best.z, *args), rtol=1e-12, atol=1e-12)
    following = dq.fixed_point(f, z0, args, returns="next", **options).z
    assert torch.allclose(following, image, rtol=1e-7, atol=1e-7)
    newest = dq.fixed_point(f, z0, args, returns="last", max_iter=4, **options)
    running = newest.status != dq.Status.CONVERGED
    assert bool(running.any()) and bool((newest.steps[running] == 4).all())
    together = dq.fixed_point(f, z0, args, stop="all", **options)
    assert bool((together.steps == together.nfe).all()) and bool((together.residual <= 1e-9).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "state_dict"])
def test_own_loops_are_saved_and_go_on_with_the_same_bits(how, backend):
    f, z0, args = problem()
    state = dq.Anderson(m=4).init(z0, segments=BOUNDS, backend=backend, rtol=1e-5)
    for _ in range(4):
        state.step(f(state.z, *args))
    if how == "state_dict":
        again = dq.Anderson(m=4).init(z0, segments=BOUNDS, backend=backend, rtol=1e-5)
        again.load_state_dict(state.state_dict())
    else:
        again = copy.deepcopy(state) if how == "deepcopy" else pickle.loads(pickle.dumps(state))
    for one in (state, again):
        while not one.done:
            one.step(f(one.z, *args))
    assert torch.equal(state.z, again.z) and torch.equal(state.residual, again.residual)
    assert bool((state.status == dq.Status.CONVERGED).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_history_of_an_earlier_solve_is_taken_over_group_by_group(backend):
    f, z0, (x, slope) = problem()

    def solve(x, z, segments, batch_dims=1, history=None):
        state = dq.Anderson().init(
            z, segments=segments, batch_dims=batch_dims, rtol=1e-6, backend=backend, history=history, max_iter=80
        )
        while not state.done:
            state.step(f(state.z, x, slope_of(len(z))))
        return state

    slope_of = lambda n: slope if n == len(slope) else slope[BOUNDS[6] : BOUNDS[7]]  # noqa: E731
    first = solve(x, z0, BOUNDS)
    later = solve(x + 1e-3, first.z, BOUNDS, history=first)
    assert bool((later.status == dq.Status.CONVERGED).all())
    a, b = BOUNDS[6], BOUNDS[7]
    alone = solve(x[a:b], z0[a:b], None, 0)
    again = solve(x[a:b] + 1e-3, alone.z, None, 0, history=alone)
    assert alike(later.z[a:b], again.z, backend)
    with pytest.raises(ValueError, match="its layout is"):
        solve(x, z0, [*BOUNDS[:2], 20, BOUNDS[-1]], history=first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_trees_and_memory_formats(backend):
    _, z0, args = problem(12, torch.float64)
    wide = lambda t: t.view(-1, 3, 4)  # noqa: E731
    tree = {"a": wide(z0).transpose(1, 2), "b": torch.zeros(len(z0), dtype=torch.complex128)}

    def both(z, x, slope):
        return {
            "a": pull(z["a"], wide(x).transpose(1, 2), wide(slope).transpose(1, 2)),
            "b": 0.5 * z["b"] + torch.complex(x[:, 0], slope[:, 0]),
        }

    sol = dq.fixed_point(both, tree, args, segments=BOUNDS, backend=backend, rtol=1e-9)
    assert bool(sol.converged.all())
    for i, (a, b, x, slope) in enumerate(parts(tree["a"], tree["b"], *args)):
        if not len(a):
            continue
        alone = dq.fixed_point(both, {"a": a, "b": b}, (x, slope), batch_dims=0, backend=backend, rtol=1e-9)
        for name in ("a", "b"):
            assert torch.allclose(sol.z[name][BOUNDS[i] : BOUNDS[i + 1]], alone.z[name], rtol=1e-7, atol=1e-7)
        if backend != "torch":
            assert int(sol.steps[i]) == int(alone.steps)


@pytest.mark.parametrize("backward", [None, dq.Phantom(steps=400), dq.Unroll()], ids=lambda b: type(b).__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_segments_alone(backend, backward):
    if backend != BACKENDS[0] and isinstance(backward, dq.Unroll):
        pytest.skip("Unroll has no backend")
    f, z0, (x, slope) = problem(dtype=torch.float64)
    x.requires_grad_()
    sol = dq.fixed_point(f, z0, (x, slope), segments=BOUNDS, rtol=1e-10, backward=backward, backend=backend)
    (found,) = torch.autograd.grad(sol.z.square().sum(), x)
    z = sol.z.detach()
    expected = 2 * z / (1 - slope / (1 + z.abs()).square())
    assert torch.allclose(found, expected.detach(), rtol=1e-6, atol=1e-6)
    if backward is None:
        assert sol.backward.converged.tolist() == [True] * len(LENGTHS)


def test_second_derivatives_and_forward_mode():
    f, z0, (x, slope) = problem(dtype=torch.float64, lengths=[3, 1, 4])
    solve = lambda x: dq.fixed_point(f, z0, (x, slope), segments=[0, 3, 4, 8], rtol=1e-12).z.square().sum()  # noqa: E731
    assert torch.autograd.gradgradcheck(solve, (x.requires_grad_(),), rtol=1e-4, atol=1e-6)
    tangent = torch.func.jvp(solve, (x.detach(),), (torch.ones_like(x),))[1]
    assert torch.allclose(tangent, torch.func.grad(solve)(x.detach()).sum())


def test_backward_solve_that_fails_says_for_how_many_segments():
    x = torch.ones(6, dtype=torch.float64, requires_grad=True)
    gain = torch.tensor([0.999, 0.5, 0.5, 0.5, 0.5, 0.5], dtype=torch.float64)
    sol = dq.fixed_point(
        lambda z: gain * z + x,
        torch.zeros(6, dtype=torch.float64),
        segments=[0, 3, 4, 6],
        solver="picard",
        rtol=1e-3,
        max_iter=20000,
        backward=dq.Implicit(max_iter=30, rtol=1e-9),
    )
    with pytest.warns(dq.GradientWarning, match="for 1 of 3 samples"):
        sol.z.sum().backward()
    assert sol.backward.converged.tolist() == [False, True, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_that_f_couples_are_judged_again(backend):
    """What converged first moves when the others do: it has to go on."""
    lengths = [2, 3, 1, 30]
    bounds = [0, *itertools.accumulate(lengths)]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(36, 2, generator=generator, dtype=torch.float64)
    slow = torch.linspace(0.1, 0.9, 36, dtype=torch.float64)[:, None]

    def f(z):
        return slow * z / (1 + z.abs()) + x + 0.5 * z[-1] / (1 + z[-1].abs())

    sol = dq.fixed_point(f, torch.zeros_like(x), segments=bounds, backend=backend, solver="picard", rtol=1e-8)
    assert bool(sol.converged.all()) and int(sol.events["woken"].max()) > 0
    for z, value in parts(sol.z, f(sol.z), bounds=bounds):
        assert float((value - z).norm() / value.norm()) <= 1.2e-8


@pytest.mark.parametrize("backend", BACKENDS)
def test_f_may_write_into_its_input_or_use_a_buffer_again(backend):
    f, z0, args = problem()
    buffer = torch.empty_like(z0)

    def reuses(z, *args):
        return buffer.copy_(pull(z, *args))

    def writes(z, *args):
        return z.copy_(pull(z, *args))

    for bounds in (BOUNDS, [0, 97, 197, 297]), ([0, 200, 250, 297]):
        for given in bounds if isinstance(bounds, tuple) else [bounds]:
            options = {"segments": given, "backend": backend, "rtol": 1e-5, "backward": "none"}
            plain = dq.fixed_point(f, z0, args, **options)
            for other in (reuses, writes):
                assert torch.equal(dq.fixed_point(other, z0, args, **options).z, plain.z)


def test_narrower_outputs_under_autocast():
    f, z0, args = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sol = dq.fixed_point(lambda z, *a: f(z, *a).bfloat16(), z0, args, segments=BOUNDS, rtol=2e-2)
    assert bool(sol.converged.all()) and sol.z.dtype == torch.float32


def test_sample_that_came_to_zero_is_sent_there_in_its_group():
    decay = torch.tensor([0.5, 0.5, 0.5, 1.0, 1.0, 1.0])[:, None]
    sol = dq.fixed_point(
        lambda z: decay * torch.where(decay < 1, z, torch.cos(z)),
        torch.ones(6, 2),
        segments=[0, 1, 3, 6],
        solver="picard",
        max_iter=200,
    )
    assert bool(sol.converged.all())
    assert torch.equal(sol.z[:3], torch.zeros(3, 2)) and bool((sol.z[3:] - 0.739085).abs().max() < 1e-3)


def test_residuals_of_ones_own_are_refused():
    state = dq.Anderson(type=2).init(torch.zeros(6, 2), segments=[0, 1, 3, 6])
    with pytest.raises(ValueError, match="residual cannot be given where segments are of unequal length"):
        state.step(torch.ones(6, 2), residual=torch.ones(6, 2))
    assert state.nfe == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stop", ["each", "all"])
@pytest.mark.parametrize("bounds", [[0, 3, 4, 8, 9, 14], [0, 2, 2, 5], [0, 0, 7]], ids=str)
def test_image_is_of_the_best_where_segments_do_not_improve_together(bounds, stop, backend):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(bounds[-1], 6, dtype=torch.float64, generator=g)
    W = torch.randn(6, 6, dtype=torch.float64, generator=g) / 6**0.5

    def f(z):
        return torch.tanh(z @ W + x)

    options = {"segments": bounds, "backend": backend, "stop": stop, "solver": "picard", "rtol": 1e-6, "max_iter": 9}
    start = torch.zeros(bounds[-1], 6, dtype=torch.float64)
    best, image = (dq.fixed_point(f, start, returns=how, **options) for how in ("best", "image"))
    assert torch.allclose(image.z, f(best.z), rtol=0, atol=1e-12)
    assert torch.equal(image.steps, best.steps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bounds", [[0, 3, 4, 9], [0, 2, 2, 5], [0, 3, 6]], ids=str)
def test_own_loop_shows_all_rows_of_its_segments(bounds, backend):
    x = torch.linspace(-1, 1, bounds[-1] * 5, dtype=torch.float64).view(-1, 5)
    options = {"segments": bounds, "backend": backend, "rtol": 1e-9}
    state = dq.Anderson(m=4).init(torch.zeros_like(x), max_iter=50, resumable=True, **options)
    while not state.done:
        state.step(0.5 * torch.tanh(state.z) + x)
    shown = state.solution()
    expected = dq.fixed_point(
        lambda z: 0.5 * torch.tanh(z) + x, torch.zeros_like(x), solver=dq.Anderson(m=4), **options
    )
    assert torch.equal(shown.z, expected.z) and torch.equal(shown.steps, expected.steps)
    assert shown.events["evictions"].shape == shown.steps.shape == (len(bounds) - 1,)


def test_bools_number_no_samples():
    with pytest.raises(TypeError, match="must be an int tensor"):
        dq.fixed_point(lambda z: z, torch.zeros(3, 2), segments=[False, True, True])
    with pytest.raises(ValueError, match="rows of z0, which has none"):
        dq.fixed_point(lambda z: z, torch.zeros(0, 2), segments=torch.zeros(1, dtype=torch.int64))
