"""``states=``: what would have come back after so many evaluations."""

from __future__ import annotations

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
