"""compact="auto" leaves samples out of what f sees where f is seen to treat them independently, and nowhere else."""

from __future__ import annotations

import warnings

import pytest
import torch
from problems import BACKENDS, ONE_OF_EACH, ORDERED, Counted, Problem, problem
from problems import solve as solve_pull
from torch import nn
from torch.utils import _pytree as pytree

import deqfast as dq
from deqfast.rows import Schedule, needed


def shift(z, x, rate):
    """The neighbour's number times ``rate``, plus x: no column of history helps much before there are as many as
    numbers, and every row has the same bits in any batch."""
    return pytree.tree_map(lambda z, x: rate.reshape(-1, *[1] * (z.dim() - 1)) * z.roll(1, -1) + x, z, x)


def uneven(B: int, *shape: int, dtype: torch.dtype = torch.float32, hard: int = 2) -> Problem:
    """All samples contract by 0.05 but for some, which take several times as long."""
    p = problem(B, *shape, dtype=dtype)
    p.rate.fill_(0.05)
    p.rate[:hard] = 0.9
    return p


def solve(p: Problem, f=shift, **options) -> dq.Solution:
    """``fixed_point`` of a problem, without gradients."""
    return solve_pull(p, f, **options)


def same_answer(sol: dq.Solution, plain: dq.Solution) -> bool:
    """Whether all samples have converged, and to the same answer up to rounding, in as many evaluations."""
    pairs = zip(pytree.tree_leaves(sol.z), pytree.tree_leaves(plain.z), strict=True)
    close = [torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs]
    return all(close) and torch.equal(sol.steps, plain.steps) and torch.equal(sol.status, plain.status)


# ---- f that treats samples independently ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_answers_are_those_of_the_whole_batch(dtype, solver, backend):
    p = uneven(24, 20, dtype=dtype)
    f = Counted(shift)
    options = {"solver": solver, "backend": backend, "max_iter": 400}
    sol, plain = solve(p, f, compact="auto", **options), solve(p, **options)
    if backend in ORDERED:
        assert torch.equal(sol.z, plain.z) and torch.equal(sol.steps, plain.steps)
    assert torch.equal(sol.status, plain.status)
    assert sol.rows.whole is None and sol.rows.seen == sum(f.rows)
    assert min(f.rows) < 24 and f.rows[-1] == 24, "one look at all rows ends it"
    assert sol.rows.spared > 0.3


def test_a_trial_of_the_first_smaller_batch_is_all_it_costs():
    p, f = uneven(24, 20), Counted(shift)
    sol = solve(p, f, compact="auto", trace=True)
    smaller = [i for i, rows in enumerate(f.rows) if rows < 24]
    assert f.rows[smaller[0] + 1] == f.rows[smaller[0]], "the trial, where f of the whole batch was taken last"
    assert len(f.rows) == sol.nfe + 1 == sol.trace.shape[0] + 1
    believed = solve(p, compact=(True, True))
    assert sol.nfe == believed.nfe + 1 and torch.equal(sol.z, believed.z)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_that_need_the_same_cost_nothing(backend):
    p = problem(16, 10)
    p.x[:], p.rate[:] = p.x[0], 0.6
    f = Counted(shift)
    sol = solve(p, f, compact="auto", backend=backend)
    assert f.rows == [16] * sol.nfe and sol.nfe == solve(p, backend=backend).nfe
    assert sol.rows.spared == 0 and sol.rows.whole is None


@pytest.mark.parametrize("returns", ["best", "last", "image", "next"])
def test_every_kind_of_answer(returns):
    p = uneven(24, 20)
    sol, plain = solve(p, compact="auto", returns=returns), solve(p, returns=returns)
    assert sol.rows.spared > 0.3
    assert torch.equal(sol.steps, plain.steps) and torch.equal(sol.z, plain.z)


@pytest.mark.parametrize("backend", BACKENDS)
def test_trees_numbers_and_arguments_that_all_share(backend):
    p = uneven(24, 6)
    z0 = {"a": p.z0, "b": (p.z0.flip(1), p.z0[:, :1])}
    x = {"a": p.x, "b": (p.x.flip(1), p.x[:, :1])}
    args = (x, p.rate, 2, None, torch.ones(3))

    def f(z, x, rate, two, nothing, shared):
        assert (two, nothing, shared.shape) == (2, None, (3,))
        return shift(z, x, rate)

    options = {"backend": backend, "backward": "none", "max_iter": 300}
    sol, plain = (dq.fixed_point(f, z0, args, compact=c, **options) for c in ("auto", False))
    assert same_answer(sol, plain) and sol.rows.spared > 0.3


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_follow_their_sequence(backend):
    p = uneven(12, 3, 20)
    x, rate = p.x, p.rate.view(12, 1, 1).expand(12, 3, 1)
    options = {"batch_dims": 2, "backend": backend, "backward": "none", "max_iter": 400}
    sol, plain = (dq.fixed_point(_row, torch.zeros_like(x), (x, rate), compact=c, **options) for c in ("auto", False))
    assert sol.steps.shape == (12, 3)
    assert same_answer(sol, plain) and sol.rows.spared > 0.3


def _row(z, x, rate):
    return rate * z.roll(1, -1) + x


def test_keyword_arguments_and_what_f_returns_beside_z():
    p = uneven(24, 20)

    def f(z, x, rate, *, gain):
        fz = shift(z, x, rate) * gain
        return fz, fz.sum(1)

    options = {"kwargs": {"gain": 0.9}, "has_aux": True, "backward": "none"}
    sol, plain = (dq.fixed_point(f, p.z0, p.args, compact=c, **options) for c in ("auto", False))
    assert same_answer(sol, plain) and sol.rows.spared > 0.3
    assert torch.allclose(sol.aux, plain.aux, rtol=1e-4) and sol.aux.shape == (24,)


def test_root_and_unpacked_states():
    p = uneven(24, 20)
    options = {"backward": "none", "max_iter": 300}
    sol = dq.root(lambda z, x, r: shift(z, x, r) - z, p.z0, p.args, compact="auto", **options)
    assert same_answer(sol, dq.root(lambda z, x, r: shift(z, x, r) - z, p.z0, p.args, **options))
    assert sol.rows.spared > 0.3

    def of_two(a, b, x, rate):
        return shift(a, x, rate), shift(b, x, rate)

    sol = dq.fixed_point(of_two, (p.z0, p.z0), p.args, unpack=True, compact="auto", **options)
    assert sol.rows.spared > 0.3 and sol.converged.all()


def test_callback_may_stop_it_and_states_are_drawn():
    p = uneven(24, 20)
    for stop in (3, 12):
        options = {"callback": lambda k, state, stop=stop: k == stop, "states": (2, 11)}
        sol, plain = solve(p, compact="auto", **options), solve(p, **options)
        assert torch.equal(sol.z, plain.z) and torch.equal(sol.status, plain.status)
        assert all(torch.equal(a, b) for a, b in zip(sol.states, plain.states, strict=True))


def test_a_layer_takes_it():
    class Cell(nn.Module):
        def forward(self, z, x, rate):
            return shift(z, x, rate)

    p = uneven(24, 20)
    sol = dq.DEQ(Cell(), compact="auto", backward="none").solve(p.x, p.rate)
    assert sol.rows.spared > 0.3 and sol.converged.all()


def test_a_matrix_product_that_rounds_differently_in_a_smaller_batch_is_the_same():
    torch.manual_seed(0)
    W = torch.linalg.qr(torch.randn(256, 256)).Q
    x, rate = torch.randn(96, 256), torch.full((96, 1), 0.3)
    rate[:3] = 0.98

    def f(z, x, rate):
        return torch.tanh(rate * (z @ W) + x)

    for rtol in (1e-3, 1e-5):
        sol, plain = (
            dq.fixed_point(f, torch.zeros_like(x), (x, rate), compact=c, rtol=rtol, backward="none")
            for c in ("auto", False)
        )
        assert sol.rows.whole is None and sol.rows.spared > 0.3
        assert sol.converged.all() and torch.allclose(sol.z, plain.z, atol=20 * rtol)


@pytest.mark.parametrize("order", ["buffer", "z"])
def test_f_that_returns_one_buffer_or_its_input(order):
    p = uneven(24, 20)
    buffer = torch.empty_like(p.z0)

    def f(z, *args):
        fz = shift(z, *args)
        return z.copy_(fz) if order == "z" else buffer[: z.shape[0]].copy_(fz)

    sol = solve(p, f, compact="auto")
    assert_same_z(sol, solve(p, f))
    assert sol.rows.spared > 0.3


def assert_same_z(sol, plain):
    assert torch.equal(sol.z, plain.z) and torch.equal(sol.steps, plain.steps)


# ---- f that does not ----


def whole(sol: dq.Solution, f: Counted, B: int) -> bool:
    """Whether f saw the whole batch, but for one trial."""
    return sum(rows != B for rows in f.rows) <= 1 and sol.rows.whole is not None and sol.rows.whole in sol.summary()


@pytest.mark.parametrize("backend", BACKENDS)
def test_f_that_couples_samples_stays_whole(backend):
    p = uneven(24, 20)

    def coupled(z, x, rate):
        return shift(z, x, rate) + 0.02 * z.mean(0)

    f = Counted(coupled)
    options = {"backend": backend, "max_iter": 60}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dq.CouplingWarning)
        sol, plain = solve(p, f, compact="auto", **options), solve(p, coupled, **options)
    assert whole(sol, f, 24) and "came out otherwise" in sol.summary()
    assert torch.equal(sol.z, plain.z) and torch.equal(sol.steps, plain.steps)


def test_batch_norm_stays_whole_in_training_and_shrinks_in_evaluation():
    torch.manual_seed(0)
    p = uneven(24, 20)
    norm = nn.BatchNorm1d(20)

    def normed(z, x, rate):  # of two samples alone the statistics of all are read, so that the others finish
        fz = shift(z, x, rate)
        return torch.cat([fz[:2] + 0.05 * norm(z)[:2], fz[2:]])

    f = Counted(normed)
    assert whole(solve(p, f, compact="auto", max_iter=60), f, 24)
    assert sum(rows < 24 for rows in f.rows) == 1
    norm.eval()
    f = Counted(lambda z, x, rate: shift(0.9 * norm(z), x, rate))
    sol = solve(p, f, compact="auto", max_iter=300)
    assert sol.rows.spared > 0.3 and sol.rows.whole is None


def test_dropout_and_f_with_a_state_stay_whole():
    p = uneven(24, 20)
    torch.manual_seed(0)

    def random(z, x, rate):
        # Two samples are drawn anew at every evaluation, so that the others finish.
        fz = shift(z, x, rate)
        return torch.cat([nn.functional.dropout(fz[:2], 0.1), fz[2:]])

    f = Counted(random)
    assert whole(solve(p, f, compact="auto", max_iter=60), f, 24)

    count = [0]

    def counting(z, x, rate):
        count[0] += 1
        return torch.cat([shift(z, x, rate)[:2] + 1.0 / count[0], shift(z, x, rate)[2:]])

    f = Counted(counting)
    assert whole(solve(p, f, compact="auto", max_iter=60), f, 24)


def test_an_exception_in_the_trial_is_an_answer():
    p = uneven(24, 20)
    f = Counted(lambda z: shift(z, p.x, p.rate))  # what it closes over cannot follow
    sol = dq.fixed_point(f, p.z0, compact="auto", backward="none")
    plain = dq.fixed_point(lambda z: shift(z, p.x, p.rate), p.z0, backward="none")
    assert whole(sol, f, 24) and "RuntimeError" in sol.summary()
    assert torch.equal(sol.z, plain.z) and torch.equal(sol.steps, plain.steps)

    def wrong(z, *args):
        return shift(z, *args) if len(z) == 24 else p.z0

    sol = solve(p, wrong, compact="auto")
    assert "ValueError" in sol.rows.whole and sol.converged.all()


def test_an_exception_after_the_trial_is_raised():
    p = uneven(24, 20)
    p.rate[2:20] = torch.linspace(0.2, 0.8, 18)

    def broken(z, *args):
        if len(z) < 6:
            raise ZeroDivisionError("later")
        return shift(z, *args)

    f = Counted(broken)
    with pytest.raises(ZeroDivisionError, match="later"):
        solve(p, f, compact="auto", max_iter=300)
    assert 6 <= min(rows for rows in f.rows[:-1]) < 24


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("B", "N"), [(8, 1), (5, 1), (2, 5), (8, 8), (24, 24)])
@pytest.mark.parametrize("shared", ["bias", "table", "own"])
def test_an_argument_of_ambiguous_shape_is_found_out(shared, B, N, backend):
    """(B,) numbers that every sample reads, or each its own: the answer is right, whatever a shape says."""
    generator = torch.Generator().manual_seed(0)
    rate = torch.full((B, 1), 0.2, dtype=torch.float64)
    rate[-1] = 0.97
    other = torch.randn(B, dtype=torch.float64, generator=generator)

    def f(z, rate, other):
        if shared == "own":
            return rate * z + other[:, None]
        return rate * z + (other.sum() if shared == "table" else other[:N].sum() + other.mean())

    z0 = torch.zeros(B, N, dtype=torch.float64)
    exact = (f(z0, rate, other) / (1 - rate)).expand(B, N)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dq.CouplingWarning)
        sol = dq.fixed_point(
            f, z0, (rate, other), compact="auto", backend=backend, solver="picard", max_iter=2000, backward="none"
        )
    assert bool(sol.converged.all()) and torch.allclose(sol.z, exact, rtol=1e-6)
    assert (sol.rows.whole is None) == (shared == "own")


@pytest.mark.parametrize("backend", BACKENDS)
def test_coupling_that_no_trial_sees_is_seen_at_the_end(backend):
    """A sample that reads another one's state once it is small enough: alike at the trial, and not at the end."""
    late = [False]

    def f(z, x, rate):
        fz = shift(z, x, rate)
        return fz + 0.05 * z.roll(1, 0) if late[0] else fz

    p = uneven(24, 20)

    def turn(k, state):
        late[0] = k >= 15

    options = {"backend": backend, "max_iter": 100, "callback": turn}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dq.CouplingWarning)
        sol = solve(p, f, compact="auto", **options)
    assert sol.rows.whole is not None and "were not within tolerance" in sol.summary()
    late[0] = True
    residual = (f(sol.z, *p.args) - sol.z).norm(dim=1) / f(sol.z, *p.args).norm(dim=1)
    assert bool((residual[sol.converged] <= 1.2e-4).all())


def test_samples_that_are_never_finite_are_left_out():
    p = uneven(24, 20)
    p.x[4] = torch.nan
    sol, plain = solve(p, compact="auto"), solve(p)
    assert sol.rows.whole is None and sol.rows.spared > 0.3
    assert sol.status[4] == dq.Status.NON_FINITE and torch.equal(sol.status, plain.status)


# ---- what is said of it ----


def test_summary_says_what_auto_would_have_spared_and_what_it_did():
    p = uneven(200, 20)
    plain, sol = solve(p), solve(p, compact="auto")
    assert f"{plain.nfe} evaluations for a mean of" in plain.summary() and 'compact="auto"' in plain.summary()
    assert f"compact spared {100 * sol.rows.spared:.0f} % of the rows" in sol.summary()
    assert needed(plain.steps, plain.nfe) == sol.rows.seen, "the forecast is exact"
    assert needed(plain.steps, plain.nfe, trial=False) == solve(p, compact=True).rows.seen
    assert needed(plain.steps, plain.nfe, trial=False, confirms=False) == solve(p, compact=(True, True)).rows.seen
    p.rate.fill_(0.5)
    assert "compact" not in solve(p).summary()
    assert "compact" not in solve(p, stop="all").summary() and "compact" not in solve(p, batch_dims=0).summary()


def test_tokens_are_forecast_by_their_rows():
    p = uneven(12, 3, 20)
    x, rate = p.x, p.rate.view(12, 1, 1).expand(12, 3, 1).clone()
    rate[2:, 1:] = 0.3
    options = {"batch_dims": 2, "backward": "none", "max_iter": 400}
    sol, plain = (dq.fixed_point(_row, torch.zeros_like(x), (x, rate), compact=c, **options) for c in ("auto", False))
    assert needed(plain.steps.amax(1), plain.nfe) == sol.rows.seen
    assert 'compact="auto"' in plain.summary()


def test_the_ladder_holds_who_runs_and_waits_until_it_pays():
    free = Schedule(100, confirms=False)
    for alive in (100, 99, 75, 60, 20, 3, 1):
        size = free.next(alive)
        assert alive <= size <= max(alive + 1, alive / 0.74)
    paid = Schedule(100, confirms=True, trust=0.5)
    sizes = [paid.next(60) for _ in range(4)]
    assert sizes == [100, 100, 75, 75], "40 rows, 80 rows are wasted, then it shrinks"
    dear = Schedule(100, confirms=False, price=1.0)
    assert [dear.next(50) for _ in range(3)] == [100, 100, 57]


def test_a_compiled_f_meets_few_shapes():
    p = uneven(24, 20)
    f = torch.compile(shift, backend="eager", dynamic=True)
    sol = solve(p, f, compact="auto")
    assert sol.rows.spared > 0.3 and torch.allclose(sol.z, solve(p).z, atol=1e-5)
