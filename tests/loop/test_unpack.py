"""``unpack=True``: f is called with the entries of a tuple; and ``root`` takes what ``fixed_point`` does."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn

import deqfast as dq

Pair = collections.namedtuple("Pair", "a b")


def f(a, b, x):
    return torch.cos(b) / 2 + x, torch.sin(a) / 2


def whole(z, x):
    a, b = z
    return f(a, b, x)


def start(kind=tuple):
    z0 = torch.zeros(3, 4), torch.ones(3, 4)
    return Pair(*z0) if kind is Pair else kind(z0)


@pytest.mark.parametrize("solver", ["anderson", "broyden", "picard"])
@pytest.mark.parametrize("kind", [tuple, list])
def test_f_with_the_entries_is_f_of_the_whole(kind, solver):
    x = torch.randn(3, 4)
    sol = dq.fixed_point(f, start(kind), (x,), solver=solver, unpack=True)
    same = dq.fixed_point(whole, start(kind), (x,), solver=solver)
    assert type(sol.z) is kind and bool(sol.converged.all()) and sol.nfe == same.nfe
    assert all(torch.equal(a, b) for a, b in zip(sol.z, same.z, strict=True))


def test_a_named_tuple_is_a_tuple():
    sol = dq.fixed_point(lambda a, b: Pair(b / 2 + 1, a / 2), start(Pair), unpack=True)
    assert isinstance(sol.z, Pair)
    assert torch.allclose(sol.z.a, torch.full((3, 4), 4 / 3), atol=1e-3)


@pytest.mark.parametrize("backward", [dq.Implicit(), dq.Phantom(), dq.OneStep(), dq.Unroll()], ids=str)
def test_gradients_are_those_of_the_whole(backward):
    x = torch.randn(3, 4, requires_grad=True)
    found: list[torch.Tensor] = []
    for g, options in ((f, {"unpack": True}), (whole, {})):
        sol = dq.fixed_point(g, start(), (x,), backward=backward, rtol=1e-6, **options)
        found += torch.autograd.grad(sol.z[0].sum() + sol.z[1].square().sum(), x)
    assert torch.equal(*found) and bool(found[0].abs().sum() > 0)


def test_with_keywords_and_something_beside_z():
    def g(a, b, x, *, scale):
        return f(a, b, x * scale), a.shape

    x = torch.randn(3, 4)
    sol = dq.fixed_point(g, start(), (x,), kwargs={"scale": 2.0}, has_aux=True, unpack=True)
    same = dq.fixed_point(whole, start(), (2 * x,))
    assert sol.aux == (3, 4) and all(torch.equal(a, b) for a, b in zip(sol.z, same.z, strict=True))


def test_of_a_layer():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def init(self, x):
            return x.new_zeros(3, 4), x.new_zeros(3, 4)

        def forward(self, a, b, x):
            return torch.tanh(self.linear(b)) / 2 + x, a / 2

    layer = dq.DEQ(Cell(), unpack=True, rtol=1e-6)
    a, b = layer(torch.randn(3, 4))
    assert torch.allclose(b, a / 2, atol=1e-5)
    with pytest.raises(TypeError, match="unpack must be a bool, got str"):
        dq.DEQ(Cell(), unpack="yes")


@pytest.mark.parametrize("solve", [dq.fixed_point, dq.root])
@pytest.mark.parametrize(
    ("z0", "kind"), [(torch.zeros(3, 4), "Tensor"), ({"a": torch.zeros(3, 4)}, "dict"), (None, "NoneType")]
)
def test_what_has_no_entries_in_order_is_refused(z0, kind, solve):
    calls = []
    message = f"unpack=True hands f the entries of a tuple or list, got z0 as {kind}"
    with pytest.raises(TypeError, match=message):
        solve(lambda *z: calls.append(1), z0, unpack=True)
    with pytest.raises(TypeError, match="unpack must be a bool, got int"):
        solve(lambda *z: calls.append(1), start(), unpack=1)
    assert not calls


@pytest.mark.parametrize("kind", [tuple, list])
def test_of_a_root(kind):
    def g(a, b, x):
        return f(a, b, x)[0] - a, f(a, b, x)[1] - b

    x = torch.randn(3, 4)
    sol = dq.root(g, start(kind), (x,), unpack=True)
    same = dq.fixed_point(whole, start(kind), (x,))
    assert type(sol.z) is kind
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(sol.z, same.z, strict=True))


def test_a_root_takes_keywords_and_returns_something_beside_g():
    sol = dq.root(lambda z, *, s: (s - 2 * z, z.shape), torch.ones(2, 3), kwargs={"s": 1.0}, has_aux=True)
    assert sol.aux == (2, 3) and torch.allclose(sol.z, torch.full((2, 3), 0.5), atol=1e-3)
    sol = dq.root(lambda z, *, s: s - 2 * z, torch.ones(2, 3), kwargs={"s": 3.0})
    assert torch.allclose(sol.z, torch.full((2, 3), 1.5), atol=1e-3)
    with pytest.raises(TypeError, match=r"must return \(z, aux\) with has_aux=True, got Tensor"):
        dq.root(lambda z: -z, torch.ones(2, 3), has_aux=True)
