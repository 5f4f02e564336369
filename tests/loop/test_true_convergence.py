"""What is called converged is converged where it is returned, whatever f does with the rows of a batch."""

from __future__ import annotations

import warnings

import pytest
import tape
import torch
from coupled import graph_network, page_rank, row_residuals, two_unknowns
from problems import BACKENDS, DEVICE, EVERY_SOLVER, ONE_OF_EACH, Counted, problem, pull, solve

import deqfast as dq
from deqfast import graphs
from deqfast.graphs import recorder as recording
from deqfast.ops import recheck
from deqfast.ops.codes import Int

quiet = pytest.mark.filterwarnings("ignore::deqfast.CouplingWarning")


def within(sol: dq.Solution, f, rtol: float) -> torch.Tensor:
    """Whether each sample that is called converged is, with the margin for f's rounding."""
    bound = rtol * (1 + recheck.SLACK) + 4 * torch.finfo(sol.residual.dtype).eps
    return row_residuals(f, sol.z) <= bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_a_row_that_is_at_rest_wakes_when_the_other_has_moved(solver, backend):
    sol = dq.fixed_point(two_unknowns, torch.zeros(2), solver=solver, backend=backend, rtol=1e-5)
    assert bool(sol.converged.all())
    assert torch.allclose(sol.z, torch.tensor([1.8, 2.0]), rtol=1e-3)
    assert int(sol.events["woken"][0]) >= 1
    assert torch.allclose(sol.residual.double(), row_residuals(two_unknowns, sol.z), atol=1e-6)


@quiet
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_nodes_of_a_graph_are_told_truly(solver, backend):
    f, z0 = graph_network()
    # "last": where the others did not converge, their best iterates are not those that were evaluated together.
    sol = dq.fixed_point(f, z0, solver=solver, backend=backend, rtol=1e-4, returns="last")
    assert bool(within(sol, f, 1e-4)[sol.converged].all())
    whole = dq.fixed_point(f, z0, solver=solver, backend=backend, rtol=1e-4, batch_dims=0)
    assert bool(whole.converged) and whole.converged.shape == ()
    assert float((f(whole.z) - whole.z).norm() / f(whole.z).norm()) < 1.1e-4


@quiet
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_personalised_page_rank_is_right_or_said_to_be_wrong(solver, backend):
    f, z0, exact = page_rank()
    options = {"solver": solver, "backend": backend, "max_iter": 300}
    by_row = dq.fixed_point(f, z0, **options)
    if bool(by_row.converged.all()):
        assert torch.allclose(by_row.z, exact, rtol=1e-6)
    whole = dq.fixed_point(f, z0, batch_dims=0, **options)
    assert bool(whole.converged)
    assert torch.allclose(whole.z, exact, atol=1e-7)
    assert whole.nfe < by_row.nfe


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", EVERY_SOLVER)
@pytest.mark.parametrize("N", [5, 40, 3000])
def test_nobody_wakes_where_rows_are_independent(N, solver, backend):
    p = problem(9, N, slowest=0.9)
    f = Counted(pull)
    sol = solve(p, f, solver=solver, rtol=1e-4, backend=backend)
    assert int(sol.events["woken"].sum()) == 0
    assert sol.nfe == int(sol.steps.max()) == len(f.rows)
    alone = [solve(p.rows(slice(i, i + 1)), solver=solver, rtol=1e-4, backend=backend) for i in range(9)]
    if backend != "torch":  # whose sums depend on the batch
        assert torch.equal(sol.residual, torch.cat([one.residual for one in alone]))
        assert torch.equal(sol.z, torch.cat([one.z for one in alone]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_nobody_wakes_in_any_dtype(dtype, backend):
    p = problem(12, 33, dtype=dtype, slowest=0.9)
    sol = solve(p, backend=backend)
    assert bool(sol.converged.all())
    assert int(sol.events["woken"].sum()) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_that_wakes_goes_on_with_its_history(backend):
    """The second half moves the first, which had converged; nobody starts from nothing."""
    A = torch.linspace(0.1, 0.9, 12, dtype=torch.float64)

    def f(z):
        shift = torch.stack([torch.zeros_like(z[0]), 0.3 * z[0]])
        return A * z + 1 + shift.flip(0)

    z0 = torch.stack([torch.zeros(12, dtype=torch.float64), 1 / (1 - A)])
    sol = dq.fixed_point(f, z0, backend=backend, rtol=1e-9, batch_dims=1)
    assert bool(sol.converged.all())
    assert bool((row_residuals(f, sol.z) < 2e-9).all())


def test_the_second_waking_says_what_to_do():
    def chain(z):  # each waits for the one behind it
        return 0.5 * torch.cat([z[1:], z[-1:]]) + torch.tensor([0.0, 0, 0, 0, 1])[:, None]

    with pytest.warns(dq.CouplingWarning, match="batch_dims=0") as seen:
        sol = dq.fixed_point(chain, torch.zeros(5, 2), solver="anderson", rtol=1e-4)
    assert len(seen) == 1
    assert bool(sol.converged.all())
    assert torch.allclose(sol.z[:, 0], torch.tensor([0.125, 0.25, 0.5, 1.0, 2.0]), rtol=1e-3)


def test_one_waking_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sol = dq.fixed_point(two_unknowns, torch.zeros(2))
    assert sol.events["woken"].tolist() == [1, 0]


@quiet
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("limit", [2, 3, 5, 8])
def test_at_the_limit_frozen_rows_are_judged_too(limit, backend):
    f, z0 = graph_network(100)
    sol = dq.fixed_point(f, z0, max_iter=limit, backend=backend, rtol=1e-3, returns="last")
    assert bool(within(sol, f, 1e-3)[sol.converged].all())
    assert sol.nfe == limit
    assert not bool(sol.converged.all())


@quiet
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_callback_that_ends_the_solve_leaves_no_false_row(backend):
    f, z0 = graph_network(100)
    sol = dq.fixed_point(f, z0, callback=lambda k, state: k == 2, backend=backend, rtol=1e-3, returns="last")
    assert bool(within(sol, f, 1e-3)[sol.converged].all())
    assert bool((sol.status == dq.Status.MAX_ITER).any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_breaks_takes_no_converged_one_with_it_unsaid(backend):
    """The second row overflows; the first depends on it, and is judged at the evaluation at which that shows."""

    def f(z):
        return torch.stack([z[1] * 1e-30, z[1] * 1e12 + 1])

    sol = dq.fixed_point(f, torch.zeros(2, 3), solver="picard", backend=backend)
    assert sol.status[1] == dq.Status.NON_FINITE
    assert not bool(sol.converged[0]) or bool(row_residuals(f, sol.z)[0] < 1.2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loop_of_ones_own_is_told_too(backend):
    state = dq.Anderson().init(torch.zeros(2), rtol=1e-5, backend=backend)
    while not state.done:
        state.step(two_unknowns(state.z))
    assert state.wakings >= 1
    assert torch.allclose(state.z, torch.tensor([1.8, 2.0]), rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
@pytest.mark.parametrize("options", [{"batch_dims": 2}, {"segments": [0, 3, 6]}, {"batch_dims": 1}], ids=str)
def test_rows_wake_however_samples_are_counted(options, solver, backend):
    W = 0.3 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))

    def f(z):
        y = z.reshape(6, 3)
        return (torch.linspace(0.1, 0.9, 6)[:, None] * y + 0.3 * (W @ y).tanh() + 1).reshape(z.shape)

    z0 = torch.zeros(2, 3, 3) if options.get("batch_dims") == 2 else torch.zeros(6, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dq.CouplingWarning)
        sol = dq.fixed_point(f, z0, solver=solver, backend=backend, max_iter=500, **options)
    if bool(sol.converged.all()):
        assert float((f(sol.z) - sol.z).norm() / sol.z.norm()) < 1.2e-4
    assert bool(sol.converged.all()) or solver.__class__ is not dq.Picard


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("N", [6, 20, 200])
@pytest.mark.parametrize("p", [1, 2])
def test_a_woken_sample_steps_as_the_oracle_says(p, N, backend):
    """With a full history, of which the evaluation that stopped the sample may have written a column."""
    if p > 1 and N == 6:
        pytest.skip("few columns leave no room for two")
    first, second = problem(3, N, dtype=torch.float64, slowest=0.9), problem(3, N, dtype=torch.float64, seed=1)
    after = []
    for name in ("reference", backend):
        state = dq.Anderson(m=5, mix_every=p).init(first.z0, rtol=1e-7, backend=name)
        while not state.done:
            state.step(pull(state.z, *first.args))
        columns = int(state.ws.int_row(Int.COUNT).min())
        assert not state.verify(pull(state.z, *second.args))
        assert p > 1 or int(state.ws.int_row(Int.COUNT).min()) >= min(columns, 4)
        for _ in range(2):
            state.step(pull(state.z, *second.args))
        after.append(state.z.clone())
    assert torch.allclose(after[0], after[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"batch_dims": 0}, {"stop": "all"}], ids=str)
def test_verify_judges_one_sample_and_those_that_stop_together(options, backend):
    state = dq.Anderson(m=3).init(torch.zeros(1 if not options else 3, 3), backend=backend, **options)
    while not state.done:
        state.step(0.5 * state.z + 1)
    assert state.verify(0.5 * state.z + 1)
    assert not state.verify(0.5 * state.z + 2)
    while not state.done:
        state.step(0.5 * state.z + 2)
    assert torch.allclose(state.z, torch.full_like(state.z, 4.0), rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_verify_looks_again_at_an_f_that_has_changed(solver, backend):
    shift = 0.0

    def f(z):
        return 0.5 * z + 1 + shift

    state = solver.init(torch.zeros(4, 3), rtol=1e-5, backend=backend)
    while not state.done:
        state.step(f(state.z))
    made = state.nfe
    assert state.verify(f(state.z))
    assert state.nfe == made + 1
    shift = 1.0
    assert not state.verify(f(state.z))
    while not state.done:
        state.step(f(state.z))
    assert torch.allclose(state.z, torch.full((4, 3), 4.0), rtol=1e-3)
    limited = solver.init(torch.zeros(4, 3), rtol=1e-5, backend=backend, max_iter=3)
    while not limited.done:
        limited.step(f(limited.z))
    assert limited.verify(f(limited.z))  # beyond the limit nobody goes on


@quiet
def test_the_backward_solve_of_a_coupled_f_is_told_truly():
    torch.manual_seed(0)
    A = torch.softmax(torch.randn(6, 6, dtype=torch.float64), 1)
    w = torch.full((3,), 0.3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 3, dtype=torch.float64)

    def f(z):
        return torch.tanh((A @ z) * w + x)

    sol = dq.fixed_point(f, torch.zeros_like(x), rtol=1e-12, backward=dq.Implicit(rtol=1e-11))
    (by_row,) = torch.autograd.grad(sol.z.square().sum(), w)
    whole = dq.fixed_point(f, torch.zeros_like(x), rtol=1e-12, batch_dims=0)
    (exact,) = torch.autograd.grad(whole.z.square().sum(), w)
    assert torch.allclose(by_row, exact, rtol=1e-8)


@pytest.mark.filterwarnings("ignore::deqfast.CouplingWarning")
@pytest.mark.parametrize("mode", ["graph", "device"])
@pytest.mark.parametrize("solver", ONE_OF_EACH)
def test_recorded_solves_call_no_false_row_converged(monkeypatch, solver, mode):
    monkeypatch.setattr(recording, "RECORDER", tape.TapeRecorder())
    graphs.clear()
    f, z0 = graph_network(40)
    with tape.taped_backends():
        sol = dq.fixed_point(f, z0, solver=solver, mode=mode, rtol=1e-3, backward="none", returns="last")
    graphs.clear()
    assert sol.mode == mode
    assert bool(within(sol, f, 1e-3)[sol.converged].all())
    assert bool((sol.status == dq.Status.MAX_ITER).any())


# ---- compact ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("B", "N"), [(8, 1), (5, 1), (2, 5), (8, 8)])
@pytest.mark.parametrize("shared", ["bias", "table"])
def test_an_argument_whose_dim_0_is_the_batch_by_chance_is_refused_or_found_out(shared, B, N, backend):
    """What is dropped with the samples is not theirs: a bias of B numbers, a table that every sample reads."""
    generator = torch.Generator().manual_seed(0)
    rate = torch.linspace(0.1, 0.9, B, dtype=torch.float64).view(B, 1)
    other = torch.randn(B, dtype=torch.float64, generator=generator)

    def f(z, rate, other):
        part = other.sum() if shared == "table" else other[:N].sum() + other.mean()
        return rate * z + part

    exact = f(torch.zeros(B, N, dtype=torch.float64), rate, other) / (1 - rate)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dq.CouplingWarning)
            sol = dq.fixed_point(
                f, torch.zeros(B, N, dtype=torch.float64), (rate, other), compact=True, backend=backend
            )
    except ValueError as error:
        assert "compact=" in str(error)
        return
    assert bool(sol.converged.all())
    assert torch.allclose(sol.z, exact.expand(B, N), rtol=1e-6)


def test_ambiguous_shapes_are_refused_with_the_tree_to_write():
    p = problem(4, 4)
    with pytest.raises(ValueError, match=r"argument of shape \(4, 4\).*2 of its dims are 4.*compact=\(True, True\)"):
        solve(p, compact=True)
    bias = torch.zeros(3)
    with pytest.raises(ValueError, match=r"shape \(3,\) counts the 3 samples: it fits the last dims of a sample"):
        dq.fixed_point(lambda z, b: 0.5 * z + b, torch.zeros(3, 3), (bias,), compact=True)


def test_a_last_evaluation_of_the_whole_batch_confirms():
    p = problem(17, 6, slowest=0.95)
    f = Counted(pull)
    sol = solve(p, f, rtol=1e-4, compact=True, trace=True)
    believed = solve(p, rtol=1e-4, compact=(True, True))
    assert f.rows[-1] == 17
    assert sol.nfe == believed.nfe + 1 == sol.trace.shape[0]
    assert torch.equal(sol.z, believed.z) and torch.equal(sol.residual, believed.residual)


# ---- the joint solve ----


@quiet
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_joint_solve_is_judged_block_by_block(backend):
    torch.manual_seed(0)
    W = 0.3 * torch.randn(4, 4, dtype=torch.float64)

    def f(z, x):
        return torch.tanh(z @ W + x + 0.02 * z.roll(1, 0))

    def loss(z, x):
        return (z - 0.3).square().sum(-1) + 0.1 * x.square().sum(-1)

    z0 = torch.zeros(6, 4, dtype=torch.float64)
    x0 = torch.zeros(6, 4, dtype=torch.float64)
    x0[0] = 1.0
    options = {"step_size": 0.3, "rtol": 1e-5, "max_iter": 300, "backend": backend, "backward": "none"}
    sol = dq.joint_solve(f, loss, z0, x0, **options)
    true = row_residuals(lambda z: f(z, sol.x), sol.z)
    assert bool((true[sol.converged] < 1.2e-5).all())
    assert bool(sol.converged.any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_joint_solve_of_independent_samples_wakes_nobody(backend):
    torch.manual_seed(0)
    W = 0.3 * torch.randn(4, 4)
    x0 = 0.1 * torch.randn(7, 4)
    options = {"step_size": lambda k: min(0.2 + 0.01 * k, 0.4), "rtol": 1e-4, "backend": backend, "max_iter": 200}
    args = lambda z, x: torch.tanh(z @ W + x), lambda z, x: (z - 0.3).square().sum(-1) + 0.1 * x.square().sum(-1)
    sol = dq.joint_solve(*args, torch.zeros(7, 4), x0, **options)
    assert bool(sol.converged.all())
    assert sol.nfe == int(sol.steps.max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", [dq.Anderson(), dq.Picard(), dq.Broyden()], ids=["anderson", "picard", "broyden"])
def test_a_woken_sample_that_runs_away_is_not_called_converged(solver, backend):
    """Row 0 has no fixed point once row 1, which is slower, has passed 5."""
    push = torch.tensor([0.5, -1.0, 0.7, 0.3], device=DEVICE)

    def f(z):
        other = 0.9 * z[1] + 1 + 0.5 * torch.sin(z[1])
        return torch.stack([torch.where(z[1].mean() > 5, z[0] + push, 0.5 * z[0] + 1), other])

    state = solver.init(torch.zeros(2, 4, device=DEVICE), rtol=1e-3, max_iter=300, backend=backend)
    with torch.no_grad():
        while not state.done:
            state.step(f(state.z))
    assert state.wakings and int(state.status[0]) != dq.Status.CONVERGED
