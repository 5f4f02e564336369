"""``states=``: what would have come back after so many evaluations."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from problems import BACKENDS, ONE_OF_EACH

import deqfast as dq

B, N = 6, 10
W = 0.9 * torch.linalg.qr(torch.randn(N, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
X = torch.randn(B, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Z0 = torch.zeros(B, N, dtype=torch.float64)


def f(z, x=X):
    return torch.tanh(z @ W + x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
@pytest.mark.parametrize("returns", ["best", "last", "image", "next"])
@pytest.mark.parametrize("stop", ["each", "all"])
def test_as_if_the_solve_had_ended_there(solver, backend, returns, stop):
    if isinstance(solver, dq.Broyden):
        solver = dq.Broyden(memory=50)  # else another limit is another memory
    options = {"solver": solver, "backend": backend, "returns": returns, "stop": stop, "rtol": 1e-6, "backward": "none"}
    wanted = [9, 3, 4, 200]
    sol = dq.fixed_point(f, Z0, states=wanted, max_iter=100, **options)
    assert sol.states is not None and len(sol.states) == 4
    for at, state in zip(sorted(wanted), sol.states, strict=True):
        short = dq.fixed_point(f, Z0, max_iter=min(at, 100), **options)
        torch.testing.assert_close(state, short.z, rtol=0, atol=1e-12)
    assert torch.equal(sol.states[-1], sol.z) and sol.states[-1].data_ptr() != sol.z.data_ptr()


def test_trees_compaction_and_gradients():
    def pair(z, x):
        return {"a": torch.cos(z["b"]) * 0.5 + x, "b": torch.sin(z["a"])}

    z0 = {"a": Z0, "b": Z0.clone()}
    x = X.clone().requires_grad_()
    sol = dq.fixed_point(pair, z0, (x,), states=(2, 5), compact=True)
    plain = dq.fixed_point(pair, z0, (x,), states=(2, 5))
    assert sol.states is not None and plain.states is not None
    for a, b in zip(sol.states, plain.states, strict=True):
        assert set(a) == {"a", "b"} and not a["a"].requires_grad
        torch.testing.assert_close(a, b)
    assert sol.z["a"].requires_grad
    torch.testing.assert_close(sol.states[0], dq.fixed_point(pair, z0, (X,), max_iter=2).z)


def test_none_asked_none_there_and_no_evaluation():
    assert dq.fixed_point(f, Z0).states is None
    assert dq.fixed_point(f, Z0, states=[]).states is None
    assert dq.fixed_point(f, Z0, max_iter=0).states is None
    sol = dq.fixed_point(f, Z0, max_iter=0, states=[1, 2])
    assert sol.states is not None and [bool(torch.equal(z, Z0)) for z in sol.states] == [True, True]
    assert len(dq.root(lambda z: f(z) - z, Z0, states=[3]).states) == 1
    assert len(dq.DEQ(f, states=[3]).solve(X).states) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"states": [0]}, ValueError, "states must be at least 1, got 0; the first evaluation is 1"),
        ({"states": [1.5]}, TypeError, "states must be an int, got float"),
        ({"states": 3}, TypeError, "states must be a list of evaluations, counted from 1, got int"),
        ({"states": [3], "mode": "graph"}, ValueError, "cannot be combined with states"),
        ({"states": [3], "backward": dq.Unroll()}, ValueError, "states does not go together with backward=dq.Unroll"),
    ],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        dq.fixed_point(f, Z0.clone().requires_grad_(), **options)


KINDS = ["best", "last", "image", "next"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ONE_OF_EACH)
@pytest.mark.parametrize("stop", ["each", "all"])
def test_states_of_any_kind_beside_any_answer(solver, backend, stop):
    if isinstance(solver, dq.Broyden):
        solver = dq.Broyden(memory=50)
    options = {"solver": solver, "backend": backend, "stop": stop, "rtol": 1e-6, "backward": "none"}
    for limit, wanted in ((7, [7, 2, 5, 9]), (100, [3, 4, 200])):
        for returns in KINDS:
            plain = dq.fixed_point(f, Z0, max_iter=limit, returns=returns, **options)
            for of in KINDS:
                sol = dq.fixed_point(f, Z0, max_iter=limit, returns=returns, states=dq.States(wanted, of), **options)
                assert torch.equal(sol.z, plain.z) and torch.equal(sol.status, plain.status), (returns, of)
                assert torch.equal(sol.residual, plain.residual) and torch.equal(sol.steps, plain.steps)
                assert sol.states_at == tuple(sorted(wanted)) and sol.nfe == plain.nfe
                for at in wanted:
                    short = dq.fixed_point(f, Z0, max_iter=min(at, limit), returns=of, **options)
                    torch.testing.assert_close(sol.state(at), short.z, rtol=0, atol=1e-12)


def test_iterates_of_plain_iteration_are_powers_of_f():
    z, powers = Z0, [Z0]
    for _ in range(6):
        z = f(z)
        powers.append(z)
    options = {"solver": "picard", "rtol": 0.0, "max_iter": 6}
    sol = dq.fixed_point(f, Z0, states=dq.States([1, 4, 6], of="next"), **options)
    assert all(torch.equal(sol.state(k), powers[k]) for k in (1, 4, 6))
    sol = dq.fixed_point(f, Z0, states=dq.States([1, 4, 6], of="last"), **options)
    assert all(torch.equal(sol.state(k), powers[k - 1]) for k in (1, 4, 6))


def test_best_iterate_is_kept_for_states_where_the_answer_is_the_last_one():
    rising = lambda z: 1.4 * z + 1  # noqa: E731
    options = {"solver": "picard", "rtol": 0.0, "max_iter": 5}
    sol = dq.fixed_point(rising, Z0, returns="last", states=dq.States([4, 5], of="best"), **options)
    assert torch.equal(sol.state(4), Z0) and torch.equal(sol.state(5), Z0) and not torch.equal(sol.z, Z0)


def test_random_states_are_drawn_at_every_call_and_again_from_the_same_seed():
    def calls(seed):
        wanted = dq.RandomStates(2, upto=8, of="next", generator=torch.Generator().manual_seed(seed))
        layer = dq.DEQ(lambda z, x: f(z, x), states=wanted, rtol=0.0, max_iter=8, warn=False)
        return [layer.solve(X) for _ in range(40)]

    first, again, other = calls(0), calls(0), calls(1)
    drawn = [sol.states_at for sol in first]
    assert drawn == [sol.states_at for sol in again] != [sol.states_at for sol in other]
    assert all(1 <= a < b <= 8 for a, b in drawn) and len(set(drawn)) > 10
    assert {k for pair in drawn for k in pair} == set(range(1, 9))
    whole = dq.fixed_point(f, Z0, (X,), states=dq.States(range(1, 9), of="next"), rtol=0.0, max_iter=8)
    for sol in first[:5]:
        assert all(torch.equal(sol.state(k), whole.state(k)) for k in sol.states_at)
    torch.manual_seed(3)
    default = [dq.RandomStates(1, upto=100).draw() for _ in range(5)]
    torch.manual_seed(3)
    assert default == [dq.RandomStates(1, upto=100).draw() for _ in range(5)]


def test_random_states_copy_and_pickle_with_their_generator():
    wanted = dq.RandomStates(3, upto=20, generator=torch.Generator().manual_seed(5))
    wanted.draw()
    copies = [copy.deepcopy(wanted), pickle.loads(pickle.dumps(wanted)), copy.deepcopy(dq.DEQ(f, states=wanted))]
    copies[2] = copies[2].options["states"]
    drawn = [[w.draw() for _ in range(4)] for w in (*copies, wanted)]
    assert all(d == drawn[0] for d in drawn)
    assert pickle.loads(pickle.dumps(dq.RandomStates(1, 2))) == dq.RandomStates(1, 2)


def test_random_budget_of_a_layer():
    layer = dq.DEQ(f, rtol=0.0, max_iter=8, warn=False, solver="picard", returns="next")
    for budget in (1, 3, 8, 12):
        sol = layer.solve(X, max_iter=budget)
        assert sol.nfe == budget and torch.equal(layer(X, max_iter=budget), sol.z)
    assert layer.solve(X).nfe == 8
    with pytest.raises(ValueError, match="max_iter must be at least 1, got -1"):
        layer(X, max_iter=-1)


def test_empty_batch_has_empty_states():
    for of in KINDS:
        sol = dq.fixed_point(lambda z: z, Z0[:0], states=dq.States([1, 2], of))
        assert [z.shape for z in sol.states] == [(0, N), (0, N)]


def test_state_that_was_not_stored():
    sol = dq.fixed_point(f, Z0, states=[2, 8])
    assert torch.equal(sol.state(2), sol.states[0])
    with pytest.raises(ValueError, match=r"at must be one of \[2, 8\], the evaluations that states= asked for, got 5"):
        sol.state(5)
    with pytest.raises(ValueError, match=r"at must be asked for, got 5: this solve was called without states="):
        dq.fixed_point(f, Z0).state(5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dq.States([2, 0]), ValueError, "states must be at least 1, got 0"),
        (lambda: dq.States(3), TypeError, "states must be a list of evaluations"),
        (lambda: dq.States([2], of="iterate"), ValueError, "of must be one of 'best', 'last', 'image', 'next', got"),
        (lambda: dq.RandomStates(0, 3), ValueError, "count must be at least 1, got 0"),
        (lambda: dq.RandomStates(4, 3), ValueError, "count must be at most upto=3, got 4"),
        (lambda: dq.RandomStates(1, 3, generator=7), TypeError, "generator must be a torch.Generator or None, got int"),
        (lambda: dq.DEQ(f, states=[0]), ValueError, "states must be at least 1, got 0"),
    ],
)
def test_refusals_of_states(make, error, message):
    with pytest.raises(error, match=message):
        make()
