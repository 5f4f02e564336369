"""On a GPU: solves recorded as CUDA graphs, by the library or by its user, give the bits of the plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import tape
import torch
from gpu import (
    DRY,
    GPU,
    Cell,
    cuda,
    every_backend,
    every_solver,
    native_only,
    needs_gpu,
    no_sync,
    not_dry,
    on_stream,
    problem,
    some,
)
from problems import assert_same_samples, pull, same_bits, solve

import deqfast as dq
from deqfast import graphs, ops
from deqfast.graphs import recorder as recording

pytestmark = needs_gpu
every_mode = pytest.mark.parametrize("mode", ["graph", "device"])


Recorder: Any = tape.TapeRecorder if DRY else recording.Recorder


class Counting(Recorder):
    """Counts what is captured."""

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, run, device, stream, pool, keep):
        self.recorded, before = 0, self.recorded
        try:
            return super().record(run, device, stream, pool, keep)
        finally:
            self.recorded = before + 1  # a tape counts too


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    found = Counting()
    monkeypatch.setattr(recording, "RECORDER", found)
    graphs.clear()
    yield found
    graphs.clear()


def clear_workspaces():
    cuda.clear_workspaces() if DRY else torch._C._cuda_clearCublasWorkspaces()


def skip_what_is_not_meant_to_work(mode, backend):
    if mode == "device" and backend != "native":
        pytest.skip("a loop on the device needs the native backend")


@every_backend
@every_mode
@every_solver
@pytest.mark.parametrize("N", some(5, 40, 1000, 20_000))
def test_recorded_solve_has_the_bits_of_the_loop(N, solver, mode, backend, recorder):
    skip_what_is_not_meant_to_work(mode, backend)
    options = {"solver": solver, "backend": backend, "rtol": 1e-4, "max_iter": 101}
    for seed in range(3):
        p = problem(6, N, slowest=0.8, seed=seed, zero=False)
        plain, recorded = solve(p, **options), solve(p, mode=mode, **options)
        assert_same_samples(recorded, slice(None), plain, slice(None))
        assert recorded.mode == mode
        assert int(plain.steps.max()) <= recorded.nfe <= int(plain.steps.max()) + 2 * recording.PASS[mode]
    assert recorder.recorded <= 3  # the first evaluation, a pass, the rest: once for all three


@every_backend
@every_mode
@pytest.mark.parametrize("max_iter", some(1, 2, 3, 4, 6, 9))
def test_recorded_solve_without_a_tolerance_makes_max_iter_evaluations(max_iter, mode, backend):
    skip_what_is_not_meant_to_work(mode, backend)
    p = problem(3, 30)
    options = {"rtol": 0.0, "max_iter": max_iter, "backend": backend}
    recorded = solve(p, mode=mode, **options)
    assert_same_samples(recorded, slice(None), solve(p, **options), slice(None))
    assert recorded.nfe == max_iter


@every_backend
@every_mode
def test_recorded_gradients_have_the_bits_of_the_loop_and_are_recorded_once(mode, backend, recorder):
    skip_what_is_not_meant_to_work(mode, backend)
    cell, counts = Cell(), []
    for _ in range(3):
        x, found = torch.randn(4, 24, device=GPU), {}
        for which in ("loop", mode):
            given = x.clone().requires_grad_()
            cell.zero_grad()
            z = dq.fixed_point(cell, torch.zeros_like(x), (given,), rtol=1e-5, mode=which, backend=backend).z
            z.square().sum().backward()
            found[which] = [given.grad, *(p.grad for p in cell.parameters())]
        assert same_bits(found["loop"], found[mode])
        counts.append(recorder.recorded)
    assert counts[0] == counts[1] == counts[2] > 0


@every_backend
@every_mode
def test_replaying_does_not_wait_for_the_device(mode, backend):
    skip_what_is_not_meant_to_work(mode, backend)
    cell, x = Cell(), torch.randn(4, 24, device=GPU)
    options = {"mode": mode, "backend": backend, "backward": "none", "rtol": 1e-5}
    expected = dq.fixed_point(cell, torch.zeros_like(x), (x,), **options)
    with no_sync():
        got = dq.fixed_point(cell, torch.zeros_like(x), (x,), **options)
    assert_same_samples(got, slice(None), expected, slice(None))


@every_backend
def test_weights_changed_in_place_are_seen_by_a_recording(backend, recorder):
    cell, x = Cell(), torch.randn(2, 24, device=GPU)
    for _ in range(3):
        options = {"backward": "none", "backend": backend}
        recorded = dq.fixed_point(cell, torch.zeros_like(x), (x,), mode="graph", **options)
        assert_same_samples(
            recorded, slice(None), dq.fixed_point(cell, torch.zeros_like(x), (x,), **options), slice(None)
        )
        with torch.no_grad():
            cell.inner.weight.mul_(0.5)
    assert recorder.recorded == 3


def _waits(z):
    return 0.5 * z + float(z.sum().item() > 1e30) + 1


def _random(z):
    return 0.5 * torch.nn.functional.dropout(z, 1e-6) + 1


@not_dry
@every_mode
@native_only
@pytest.mark.parametrize(("f", "reason"), [(_waits, "capturing f failed"), (_random, "draws random numbers")])
def test_what_cannot_be_recorded_runs_in_the_loop_and_says_why(f, reason, mode, backend):
    with pytest.warns(graphs.ModeWarning, match=reason):
        solution = dq.fixed_point(f, torch.zeros(2, 8, device=GPU), mode=mode, backend=backend, backward="none")
    assert solution.mode == "loop"
    assert bool(solution.converged.all())
    after = dq.fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 8, device=GPU), mode=mode, backend=backend)
    assert after.mode == mode  # a capture that failed leaves nothing behind


@not_dry
@native_only
def test_capture_that_failed_leaves_the_generator_and_the_memory_as_they_were(backend):
    with pytest.warns(graphs.ModeWarning, match="capturing f failed"):
        dq.fixed_point(_waits, torch.zeros(2, 8, device=GPU), mode="graph", backend=backend, backward="none")
    assert torch.randn(64, device=GPU).unique().numel() > 1
    block = torch.empty(1 << 24, device=GPU)
    held = torch.cuda.memory_allocated(GPU)
    del block
    assert torch.cuda.memory_allocated(GPU) == held - (1 << 26)
    reserved = torch.cuda.memory_reserved(GPU)
    torch.cuda.empty_cache()  # gives nothing back that lies in the pool of a graph
    assert torch.cuda.memory_reserved(GPU) <= reserved - (1 << 26)


@every_backend
@every_mode
def test_recordings_of_matrix_products_write_into_nobody_elses_memory(mode, backend, recorder):
    skip_what_is_not_meant_to_work(mode, backend)
    cells, x = [Cell(96) for _ in range(2)], torch.randn(64, 96, device=GPU)
    options = {"mode": mode, "backend": backend, "backward": "none", "rtol": 1e-5}

    def solve_all(**change):
        return [dq.fixed_point(cell, torch.zeros_like(x), (x,), **{**options, **change}) for cell in cells]

    solve_all()
    recorded = recorder.recorded
    clear_workspaces()  # as Inductor does, which gives back what products keep beside their tensors
    filled = [torch.full((1 << 20,), 3.0, device=GPU) for _ in range(64)]  # takes it up, whatever it was
    got, expected = solve_all(), solve_all(mode="loop")
    for a, b in zip(got, expected, strict=True):
        assert a.mode == mode
        assert_same_samples(a, slice(None), b, slice(None))
    assert all(bool((t == 3.0).all()) for t in filled)
    assert recorder.recorded == recorded > 0


@not_dry
@every_mode
def test_tensors_on_the_cpu_run_in_the_loop_and_say_so(mode):
    with pytest.warns(graphs.ModeWarning, match="device cpu has no graphs"):
        assert dq.fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 8), mode=mode).mode == "loop"


@not_dry
@every_mode
def test_reference_backend_runs_in_the_loop_and_says_so(mode):
    with pytest.warns(graphs.ModeWarning, match="steps of the reference backend cannot be captured"):
        solution = dq.fixed_point(
            lambda z: 0.5 * z + 1, torch.zeros(2, 8, device=GPU), mode=mode, backend="reference", backward="none"
        )
    assert solution.mode == "loop"


@not_dry  # a tape never tells the loop that it may end
@every_backend
@every_solver
@pytest.mark.parametrize("N", some(5, 40, 20_000))
def test_users_own_graph_replays_with_new_input(N, solver, backend):
    first, second = (problem(4, N, seed=seed, zero=False) for seed in range(2))
    x = first.x.clone()

    def run():
        return dq.fixed_point(
            pull, first.z0, (x, first.rate), solver=solver, backend=backend, rtol=0.0, max_iter=7, backward="none"
        )

    for _ in range(2):  # outside of a capture first, as torch asks for
        on_stream(cuda.Stream(GPU), run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for given in (second.x, first.x):
        x.copy_(given)
        graph.replay()
        replayed = captured.z.clone(), captured.steps.clone(), captured.residual.clone()
        expected = run()
        assert same_bits(replayed, (expected.z, expected.steps, expected.residual))


@not_dry  # a tape runs what it records
@every_backend
def test_step_captured_by_a_user_goes_on_where_it_was(backend):
    p = problem(3, 50, zero=False)
    state, loop = (dq.Anderson(m=3).init(p.z0, rtol=0.0, backend=backend) for _ in range(2))
    for s in (state, loop):
        for _ in range(4):
            s.step(pull(s.z, *p.args))
    cuda.synchronize()
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for _ in range(2):
            kept.append(pull(state.z, *p.args))
            state.step(kept[-1])
    graph.replay()
    for _ in range(2):
        loop.step(pull(loop.z, *p.args))
    assert same_bits(state.z, loop.z)
    assert state.steps.tolist() == [6] * 3


@native_only
def test_registered_ops_do_what_the_eager_step_does(backend):
    from deqfast.ops import library
    from deqfast.ops.layout import Layout
    from deqfast.ops.workspace import Stopping

    for solver, op in (
        (dq.Anderson(m=3), torch.ops.deqfast.anderson_step),
        (dq.Broyden(memory=4), torch.ops.deqfast.broyden_step),
    ):
        z0 = [torch.randn(5, 40, device=GPU)]
        eager, registered = (solver.workspace(Layout(z0), Stopping(1e-6, max_iter=50)) for _ in range(2))
        for ws in (eager, registered):
            ws.x[0][0].copy_(z0[0])
        update, previous = ops.choose(backend, GPU).bind(eager), None
        for _ in range(6):
            f = [torch.tanh(0.9 * eager.x[eager.cur][0].flip(-1)) + 0.1]
            update(f, previous, None, None)
            running = op(*library.arguments(registered, f, previous))
            for ws in (eager, registered):
                ws.cur = 1 - ws.cur
            previous = f if solver.uses_previous else None
            assert running.device == GPU
            assert int(running) == 5
            assert same_bits(eager.x[eager.cur][0], registered.x[registered.cur][0])
            assert same_bits(eager.int_row(0), registered.int_row(0))
