"""Solves on a GPU agree with the CPU's, in any batch and on any stream, and never wait for the device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import problems
import pytest
import torch
from gpu import (
    GPU,
    SOLVERS,
    Cell,
    cuda,
    every_backend,
    every_solver,
    needs_gpu,
    no_sync,
    not_dry,
    on_stream,
    problem,
    some,
    to_gpu,
)
from problems import assert_same_samples, pull, relative_residual, same_bits, solve
from torch.utils import _pytree as pytree

import deqfast as dq
from deqfast.ops.lag import LAG

pytestmark = needs_gpu

SIZES = [(5, 1), (17, 7), (20_000, 8), (33, 33), (4, 1000), (3, 4097), (2, 8192), (2, 8193), (2, 16_385), (2, 140_000)]
HISTORIES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


@every_backend
@every_solver
def test_solve_does_not_wait_for_the_device(solver, backend):
    cell, x = Cell(), torch.randn(7, 24, device=GPU)
    for guard in (torch.no_grad, no_sync):  # what happens at a first call only is over after one
        with guard():
            solution = dq.fixed_point(
                cell, torch.zeros_like(x), (x,), solver=solver, backend=backend, backward="none", max_iter=200
            )
    assert solution.backend == backend
    assert bool(solution.converged.all())


def agree(got: dq.Solution, expected: dq.Solution, error: float) -> None:
    """The same verdicts, and answers within a relative error."""
    assert torch.equal(got.status.cpu(), expected.status)
    assert int((got.steps.cpu() - expected.steps).abs().max()) <= 1
    gap = problems.rows_of(pytree.tree_map(lambda t: t.cpu(), got.z)) - problems.rows_of(expected.z)
    assert bool((gap.norm(dim=1) <= error * problems.rows_of(expected.z).norm(dim=1)).all())


@every_backend
@every_solver
@pytest.mark.parametrize(("B", "N"), some(*SIZES))
def test_answers_are_those_of_the_cpu(B, N, solver, backend):
    p = problems.problem(B, N, slowest=0.8)
    expected = solve(p, solver=solver, rtol=1e-5, backend="reference")
    got = solve(to_gpu(p), solver=solver, rtol=1e-5, backend=backend)
    agree(got, expected, 2 * 1e-5 / (1 - 0.8) + 1e-5)
    assert int(got.steps.max()) <= got.nfe <= int(got.steps.max()) + LAG


@every_backend
@every_solver
@pytest.mark.parametrize("dtype", some(torch.float64, torch.bfloat16, torch.float16, torch.complex64), ids=str)
@pytest.mark.parametrize("N", some(6, 40, 17_000))
def test_states_of_every_dtype_are_solved_to_their_own_precision(N, dtype, solver, backend):
    p = problem(5, N, dtype=dtype, slowest=0.6)
    rtol = {torch.float64: 1e-9, torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.complex64: 1e-5}[dtype]
    solution = solve(p, solver=solver, rtol=rtol, backend=backend)
    assert solution.z.dtype == dtype
    assert bool(solution.converged.all())
    assert bool((relative_residual(solution.z, pull(solution.z, *p.args)) <= 1.1 * rtol).all())


@every_backend
@pytest.mark.parametrize("history", some(*HISTORIES), ids=str)
@pytest.mark.parametrize("kind", some("mixed", 1, 2))
@pytest.mark.parametrize("N", some(5, 1025, 20_000))
def test_history_of_every_dtype_leads_to_the_same_answer(N, kind, history, backend):
    p = problem(3, N, slowest=0.8)
    solution = solve(p, solver=dq.Anderson(m=4, type=kind, history_dtype=history), rtol=1e-5, backend=backend)
    assert bool(solution.converged.all())
    assert bool((relative_residual(solution.z, pull(solution.z, *p.args)) <= 1.1e-5).all())


@every_backend
@every_solver
@pytest.mark.parametrize("N", some(3, 8, 40, 1000, 20_000))
def test_sample_has_the_same_bits_in_any_batch_beside_nan_and_in_every_run(N, solver, backend):
    p = problem(33, N, slowest=0.9)
    p.x[4], p.x[7] = torch.nan, torch.inf
    together, again = (solve(p, solver=solver, backend=backend, max_iter=60) for _ in range(2))
    assert_same_samples(together, slice(None), again, slice(None))
    for rows in (slice(0, 1), slice(5, 9), slice(16, 33)):
        assert_same_samples(
            solve(p.rows(rows), solver=solver, backend=backend, max_iter=60), slice(None), together, rows
        )
    failed = together.status == dq.Status.NON_FINITE
    assert failed.nonzero().flatten().tolist() == [4, 7]
    assert bool(torch.isfinite(together.z).all())


@every_backend
@every_solver
def test_trees_of_channels_last_and_complex_tensors_and_strided_outputs_are_read_in_place(solver, backend):
    x = {"image": torch.randn(3, 6, 5, 4), "none": torch.zeros(3, 0), "wave": torch.randn(3, 7, dtype=torch.complex64)}
    x["image"] = x["image"].to(memory_format=torch.channels_last)

    def f(z, x):
        wide = torch.stack([0.4 * z["wave"] + x["wave"]] * 2, dim=2)
        image = 0.3 * z["image"] + x["image"]
        return {"image": image.contiguous(), "none": z["none"] * 1, "wave": wide[:, :, 1]}

    found = []
    for device, by in ((torch.device("cpu"), "reference"), (GPU, backend)):
        given = {name: t.to(device) for name, t in x.items()}
        z0 = {name: torch.zeros_like(t) for name, t in given.items()}
        found.append(dq.fixed_point(f, z0, (given,), solver=solver, rtol=1e-5, backend=by, backward="none"))
    agree(found[1], found[0], 1e-4)
    assert found[1].z["image"].is_contiguous(memory_format=torch.channels_last)


@every_backend
@every_solver
@pytest.mark.parametrize("n", some(24, 20_000))
def test_narrower_output_under_autocast_is_taken_as_it_is(n, solver, backend):
    x, rate = torch.randn(3, n, device=GPU), 0.5

    def f(z):
        fz = rate * z + x
        return fz.bfloat16() if torch.is_autocast_enabled(GPU.type) else fz.bfloat16().float()

    with torch.autocast(GPU.type, dtype=torch.bfloat16):
        narrow = dq.fixed_point(f, torch.zeros_like(x), solver=solver, rtol=2e-2, backend=backend, backward="none")
    wide = dq.fixed_point(f, torch.zeros_like(x), solver=solver, rtol=2e-2, backend=backend, backward="none")
    assert narrow.z.dtype == torch.float32
    assert same_bits(narrow.z, wide.z)
    assert torch.equal(narrow.steps, wide.steps)


@every_backend
@every_solver
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_states_return_at_once(shape, solver, backend):
    solution = dq.fixed_point(torch.cos, torch.zeros(shape, device=GPU), solver=solver, backend=backend)
    assert (solution.nfe, solution.z.shape) == (0, shape)
    assert bool(solution.converged.all())


@every_backend
@every_solver
@pytest.mark.parametrize("max_iter", some(1, 2, 3, 7))
def test_without_a_tolerance_exactly_max_iter_evaluations_are_made(max_iter, solver, backend):
    p = problem(3, 30)
    counted = problems.Counted(pull)
    solution = solve(p, f=counted, solver=solver, rtol=0.0, max_iter=max_iter, backend=backend)
    assert solution.nfe == len(counted.rows) == max_iter
    assert solution.steps.tolist() == [max_iter] * 3


@every_backend
@every_solver
def test_compacted_solve_has_the_bits_of_the_whole_one(solver, backend):
    p = problem(20, 12, slowest=0.9)
    whole, compact = (
        solve(p, solver=solver, backend=backend, rtol=1e-4, max_iter=300, compact=choice)
        for choice in (False, (True, True))
    )
    assert_same_samples(whole, slice(None), compact, slice(None))


@every_backend
@every_solver
def test_solve_on_another_stream_gives_the_same_bits(solver, backend):
    p = problem(4, 500)
    expected = solve(p, solver=solver, backend=backend)
    got = on_stream(cuda.Stream(GPU), lambda: solve(p, solver=solver, backend=backend))
    assert_same_samples(got, slice(None), expected, slice(None))


@every_backend
def test_threads_on_streams_of_their_own_do_not_disturb_each_other(backend):
    parts = [problem(4, N, seed=N) for N in (40, 1000, 20_000, 7)]
    expected = [solve(p, backend=backend) for p in parts]
    cuda.synchronize()

    def work(p):
        with cuda.stream(cuda.Stream(GPU)):
            found = [solve(p, backend=backend) for _ in range(8)]
            cuda.current_stream(GPU).synchronize()
        return found

    with ThreadPoolExecutor(len(parts)) as pool:
        for found, wanted in zip(pool.map(work, parts), expected, strict=True):
            for solution in found:
                assert_same_samples(solution, slice(None), wanted, slice(None))


@every_backend
@pytest.mark.skipif(cuda.device_count() < 2, reason="there is one device at most")
def test_solve_runs_where_its_tensors_are(backend):
    p = problem(4, 500)
    second = torch.device("cuda", 1)
    moved = problems.Problem(*(pytree.tree_map(lambda t: t.to(second), part) for part in (p.z0, p.x, p.rate)))
    solution = solve(moved, backend=backend)
    assert solution.z.device == second
    assert same_bits(solution.z.cpu(), solve(p, backend=backend).z.cpu())


@not_dry
@every_backend
def test_output_on_another_device_raises(backend):
    z0 = torch.zeros(2, 3, device=GPU)
    with pytest.raises(ValueError, match=r"f\(z\) must be on the device of z0, expected cuda:0, got cpu"):
        dq.fixed_point(lambda z: z.cpu(), z0, backend=backend)


@not_dry
@every_backend
def test_history_that_does_not_fit_says_what_to_do(backend):
    B, N = 4, 1 << 20
    room = torch.cuda.get_device_properties(GPU).total_memory
    solver = dq.Anderson(m=room // (2 * B * N * 4) + 2, history_dtype=torch.float32)
    with pytest.raises(torch.OutOfMemoryError, match=r"no room for the history of Anderson\(.*keep fewer columns"):
        dq.fixed_point(torch.cos, torch.zeros(B, N, device=GPU), solver=solver, backend=backend)


@every_backend
def test_failure_that_is_to_be_thrown_carries_the_solution(backend):
    p = problem(3, 20)
    with pytest.raises(dq.ConvergenceError, match="2 evaluations") as caught:
        solve(p, solver=SOLVERS["mixed"], rtol=1e-7, max_iter=2, throw=True, backend=backend)
    assert caught.value.solution.status.tolist() == [dq.Status.MAX_ITER] * 3


@every_backend
def test_state_saved_to_the_cpu_goes_on_on_the_gpu(backend):
    p = problem(3, 33)
    states = [dq.Anderson(m=3).init(p.z0, rtol=0.0, max_iter=8, backend=backend) for _ in range(2)]
    for _ in range(4):
        states[0].step(problems.pull(states[0].z, *p.args))
    saved = states[0].state_dict()
    saved["tensors"] = {name: t.cpu() for name, t in saved["tensors"].items()}
    states[1].load_state_dict(saved)
    for state in states:
        while not state.done:
            state.step(problems.pull(state.z, *p.args))
    assert torch.equal(states[0].z, states[1].z)
    assert states[1].failed() == int((states[1].status != dq.Status.CONVERGED).sum()) > 0


@not_dry  # a CPU has no memory beside the host's
@pytest.mark.parametrize("history", HISTORIES, ids=str)
@pytest.mark.parametrize(("B", "N"), [(1, 3_000_000), (5, 70_000), (33, 1000)])
def test_columns_in_the_hosts_memory_lead_to_the_same_answer(B, N, history):
    p = problem(B, N, slowest=0.8)
    solver = dq.Anderson(m=4, history_dtype=history, history_device="cpu")
    state = solver.init(p.z0, rtol=1e-5)
    assert state.backend == "torch" and state.ws.history.is_pinned() and state.ws.x[0][0].device.type == "cuda"
    found, expected = (solve(p, solver=s, rtol=1e-5) for s in (solver, dq.Anderson(m=4, history_dtype=history)))
    assert bool(found.converged.all())
    gap = (problems.rows_of(found.z) - problems.rows_of(expected.z)).norm(dim=1)
    assert bool((gap <= 1e-3 * problems.rows_of(expected.z).norm(dim=1)).all())


@not_dry
def test_columns_in_the_hosts_memory_leave_room_on_the_device():
    z0 = torch.zeros(1, 8 << 20, device=GPU)
    b = torch.linspace(-1, 1, z0.shape[1], device=GPU)
    state = dq.Anderson(m=10, history_device="cpu").init(z0, rtol=0.0, max_iter=14)
    before = torch.cuda.memory_allocated(GPU)
    torch.cuda.reset_peak_memory_stats(GPU)
    while not state.done:
        state.step(torch.addcmul(b, state.z, b))
    assert torch.cuda.max_memory_allocated(GPU) - before < 6 * z0.nbytes < state.ws.history.nbytes


@not_dry
def test_saved_columns_are_those_that_the_device_has_written():
    p = problem(3, 200_000, slowest=0.9)
    solver = dq.Anderson(m=4, history_device="cpu")
    states = [solver.init(p.z0, rtol=0.0) for _ in range(2)]
    for _ in range(6):
        states[0].step(pull(states[0].z, *p.args))
    states[1].load_state_dict(states[0].state_dict())  # while copies to the host may be on their way
    for _ in range(3):
        for state in states:
            state.step(pull(state.z, *p.args))
        assert bool((states[0].z - states[1].z).abs().max() <= 1e-5)
