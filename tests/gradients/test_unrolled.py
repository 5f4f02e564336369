"""A block applied a fixed number of times: what is computed, its gradient by each way, and what is refused."""

import warnings
import weakref

import pytest
import torch
from torch.utils import _pytree as pytree

import deqfast as dq
from deqfast import unrolled

F64 = torch.float64


def problem(dtype=F64, N=16, B=4):
    W = (0.9 * torch.linalg.qr(torch.randn(N, N, dtype=F64)).Q).to(dtype).requires_grad_()
    x, z0 = (torch.randn(B, N, dtype=F64).to(dtype).requires_grad_() for _ in range(2))
    return (lambda z, x: torch.tanh(z @ W + x)), z0, x, W


def coupled(f, z0, steps, args, b, pass_step=False):
    y = z = z0
    for k in range(steps):
        more = {"step": k} if pass_step else {}
        y = (1 - b) * y + b * f(z, *args, **more)
        z = (1 - b) * z + b * f(y, *args, **more)
    return z


def grads(z, inputs):
    return torch.autograd.grad(sum(t.square().sum() for t in pytree.tree_leaves(z)), inputs)


def far(found, expected):
    return max(((s - t).abs().max() / t.abs().max()).item() for s, t in zip(found, expected, strict=True))


@pytest.mark.parametrize("damping", [1.0, 0.4])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_applies_the_block_and_differentiates_every_step(checkpoint, damping):
    f, z0, x, W = problem()
    z = z0
    for _ in range(5):
        z = z + damping * (f(z, x) - z)
    found = dq.unroll(f, z0, 5, (x,), checkpoint=checkpoint, damping=damping)
    assert torch.allclose(found, z, rtol=1e-14)
    assert far(grads(found, (z0, x, W)), grads(z, (z0, x, W))) < 1e-13


def test_without_damping_the_bits_are_those_of_a_loop():
    f, z0, x, _ = problem(torch.float32)
    z = z0
    for _ in range(7):
        z = f(z, x)
    assert torch.equal(dq.unroll(f, z0, 7, (x,)), z)


def test_no_steps_return_the_start():
    f, z0, x, _ = problem()
    assert dq.unroll(f, z0, 0, (x,)) is z0
    assert dq.unroll(f, z0, 0, (x,), reversible=True, damping=0.5) is z0


class Kept:
    def __init__(self, t):
        self.t = t.detach()  # a graph that is held would hold others


@pytest.mark.parametrize("options", [{"checkpoint": True}, {"reversible": True, "damping": 0.3}], ids=str)
def test_memory_between_the_passes_does_not_hold_what_f_saved(options):
    """Of each way, the numbers that autograd keeps; reversible: whatever the count of steps."""

    def kept(steps, **options):
        f, z0, x, _ = problem()
        alive: weakref.WeakSet[Kept] = weakref.WeakSet()

        def pack(t):
            kept = Kept(t)
            alive.add(kept)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.t):
            z = dq.unroll(lambda z, x: f(f(f(z, x), x), x), z0, steps, (x,), **options)
        assert z.requires_grad
        return sum({kept.t.untyped_storage().data_ptr(): kept.t.numel() for kept in alive}.values())

    assert kept(20, **options) < 0.5 * kept(20)
    if "reversible" in options:
        assert kept(20, **options) == kept(2, **options)


@pytest.mark.parametrize("damping", [0.1, 0.3])
def test_reversible_gradients_are_those_of_the_coupled_iteration(damping):
    f, z0, x, W = problem()
    expected = coupled(f, z0, 20, (x,), damping)
    z = dq.unroll(f, z0, 20, (x,), reversible=True, damping=damping)
    assert torch.equal(z, expected)
    assert far(grads(z, (z0, x, W)), grads(expected, (z0, x, W))) < 1e-10


def test_reversible_has_the_fixed_points_of_f():
    f, z0, x, _ = problem()
    with torch.no_grad():
        z = dq.unroll(f, z0, 400, (x,), reversible=True, damping=0.3)
        assert torch.allclose(z, f(z, x), atol=1e-12)
    assert not z.requires_grad


def test_float32_error_and_drift_over_a_hundred_steps(monkeypatch):
    """The numbers of the docstring."""
    drifts = []
    measure = unrolled.relative_drift
    monkeypatch.setattr(unrolled, "relative_drift", lambda *a: drifts.append(measure(*a)) or drifts[-1])
    f, z0, x, W = problem(torch.float32, N=32, B=8)
    W64, x64, z64 = (t.detach().double().requires_grad_() for t in (W, x, z0))
    expected = coupled(lambda z, x: torch.tanh(z @ W64 + x), z64, 100, (x64,), 0.1)
    z = dq.unroll(f, z0, 100, (x,), reversible=True, damping=0.1)
    assert z.dtype == torch.float32 and torch.allclose(z, expected.float(), atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = grads(z, (W, x))
    assert far(found, grads(expected, (W64, x64))) < 5e-6
    assert drifts[0] < 1e-6
    with pytest.warns(dq.GradientWarning, match="missed its start by"):
        grads(dq.unroll(f, z0, 100, (x,), reversible=True, damping=0.2), (W, x))
    assert 1e-3 < drifts[1] < 1


def test_reversible_trees_steps_and_parameters_used_at_some_steps_alone():
    bank = [torch.randn(3, 3, dtype=F64, requires_grad=True) for _ in range(4)]

    def f(z, x, scale, *, step):
        return {"a": torch.tanh(z["a"] @ bank[step] * scale), "b": (0.5 * z["b"][0] + z["a"].sum(1) + x["u"],)}

    z0 = {"a": torch.randn(2, 3, dtype=F64), "b": (torch.zeros(2, dtype=F64, requires_grad=True),)}
    x = {"u": torch.randn(2, dtype=F64, requires_grad=True), "other": "text"}
    inputs = [*bank, x["u"], z0["b"][0]]

    def by_hand():
        y = z = z0
        mix = lambda s, t: 0.7 * s + 0.3 * t  # noqa: E731
        for k in range(4):
            y = pytree.tree_map(mix, y, f(z, x, 0.5, step=k))
            z = pytree.tree_map(mix, z, f(y, x, 0.5, step=k))
        return z

    z = dq.unroll(f, z0, 4, (x, 0.5), reversible=True, damping=0.3, pass_step=True)
    expected = by_hand()
    assert torch.equal(z["b"][0], expected["b"][0])
    assert far(grads(z, inputs), grads(expected, inputs)) < 1e-12
    seen = []
    dq.unroll(lambda z, step: seen.append(step) or z, z0, 3, pass_step=True)
    assert seen == [0, 1, 2]


def test_reversible_trains_modules_and_args_that_were_computed():
    layer = torch.nn.Linear(6, 6).double()
    x = torch.randn(3, 6, dtype=F64, requires_grad=True)
    z0 = torch.zeros(3, 6, dtype=F64)
    f = lambda z, h: torch.tanh(layer(z) + h)  # noqa: E731
    coupled(f, z0, 6, (x.sin(),), 0.25).square().sum().backward()
    expected = [x.grad, *(p.grad for p in layer.parameters())]
    x.grad = None
    layer.zero_grad()
    dq.unroll(f, z0, 6, (x.sin(),), reversible=True, damping=0.25).square().sum().backward()
    assert far([x.grad, *(p.grad for p in layer.parameters())], expected) < 1e-12


def test_reversible_draws_the_same_dropout_again_and_leaves_the_generator_alone():
    f, z0, x, W = problem()
    dropped = lambda z, x: torch.nn.functional.dropout(f(z, x), 0.5)  # noqa: E731
    torch.manual_seed(3)
    expected = coupled(dropped, z0, 8, (x,), 0.2)
    torch.manual_seed(3)
    z = dq.unroll(dropped, z0, 8, (x,), reversible=True, damping=0.2)
    assert torch.equal(z, expected)
    before = torch.get_rng_state()
    found = grads(z, (z0, x, W))
    assert torch.equal(torch.get_rng_state(), before)
    assert far(found, grads(expected, (z0, x, W))) < 1e-11


def test_reversible_under_autocast():
    f, z0, x, W = problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = dq.unroll(f, z0, 4, (x,), reversible=True, damping=0.2)
        expected = coupled(f, z0, 4, (x,), 0.2)
    assert z.dtype == torch.float32
    assert far(grads(z, (x, W)), grads(expected, (x, W))) < 2e-2


def test_what_changes_between_the_passes_is_noticed():
    f, z0, x, W = problem()
    z = dq.unroll(f, z0, 3, (x,), reversible=True, damping=0.2)
    with torch.no_grad():
        W.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_reversible_refuses_what_it_would_get_wrong():
    f, z0, x, W = problem()
    options = {"reversible": True, "damping": 0.2}
    made = W * 1.0
    with pytest.raises(RuntimeError, match="pass it through args="):
        dq.unroll(lambda z: torch.tanh(z @ made), z0, 2, **options)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda z: dq.unroll(f, z, 2, (x,), **options).sum())(z0.detach())
    z = dq.unroll(f, z0, 2, (x,), **options)
    (g,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="is differentiated once"):
        g.sum().backward()
    W.register_hook(lambda g: g)
    with pytest.raises(RuntimeError, match="hooks"):
        dq.unroll(f, z0, 2, (x,), **options)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"steps": -1}, ValueError, "steps must be at least 0, got -1"),
        ({"steps": 1.5}, TypeError, "steps must be an int"),
        ({"damping": 0}, ValueError, r"damping must be in \(0, 1\], got 0"),
        ({"damping": 1.5}, ValueError, r"damping must be in \(0, 1\], got 1.5"),
        ({"reversible": True}, ValueError, "needs damping below 1"),
        ({"reversible": True, "checkpoint": True, "damping": 0.5}, ValueError, "checkpoint=True does not go together"),
        ({"reversible": 1}, TypeError, "reversible must be a bool"),
        ({"args": torch.zeros(3)}, TypeError, "args must be a tuple"),
        ({"f": 3}, TypeError, "f must be"),
        ({"f": lambda z: z[:1]}, ValueError, r"f\(z\) must have the shape of z0, expected \(4, 16\), got \(1, 16\)"),
        ({"f": lambda z: z.float()}, TypeError, r"f\(z\) must have the dtype of z0"),
        ({"f": lambda z: (z,)}, TypeError, r"f\(z\) must have the structure of z0"),
        ({"z0": torch.zeros(3, dtype=torch.long)}, TypeError, "z0 must be"),
    ],
)
def test_refusals(options, error, match):
    given = {"f": lambda z: z, "z0": torch.zeros(4, 16, dtype=F64), "steps": 2, **options}
    with pytest.raises(error, match=match):
        dq.unroll(**given)
    if "reversible" not in options and "damping" not in options:
        with pytest.raises(error, match=match):
            dq.unroll(**{**given, "reversible": True, "damping": 0.5})
