"""The backward solve of a batch that shrinks gives the gradients of the whole one."""

from __future__ import annotations

import warnings

import pytest
import torch
from problems import BACKENDS
from tanh_map import F64, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import deqfast as dq

B, N, HARD = 24, 12, 2


def uneven(dtype=F64, seed=0):
    """Weights, inputs, rates and a cost vector: two samples take several times as long as the others, both ways."""
    g = torch.Generator().manual_seed(seed)
    W = torch.linalg.qr(torch.randn(N, N, dtype=F64, generator=g)).Q.to(dtype)
    x = 0.1 * torch.randn(B, N, dtype=F64, generator=g)
    rate = torch.full((B, 1), 0.3, dtype=F64)
    rate[:HARD] = 0.95
    c = torch.randn(B, N, dtype=F64, generator=g)
    return W.requires_grad_(), x.to(dtype).requires_grad_(), rate.to(dtype).requires_grad_(), c.to(dtype)


def tanh(z, x, rate, W):
    return torch.tanh(rate * (z @ W) + x)


def solve(x, rate, W, f=tanh, **options):
    options = {"rtol": 1e-11, "max_iter": 400, **options}
    return dq.fixed_point(f, torch.zeros_like(x), (x, rate, W), **options)


def gradients(options, f=tanh, dtype=F64):
    W, x, rate, c = uneven(dtype)
    sol = solve(x, rate, W, f, **options)
    found = torch.autograd.grad((sol.z * c).sum(), (W, x, rate))
    return found, sol


def assert_close(found, expected, bound=1e-8):
    for got, want in zip(found, expected, strict=True):
        assert relative_error(got, want) < bound


WAYS = ["auto", True, (True, True, False)]
PLAINLY = {"solver": "picard", "max_iter": 2000, "rtol": 1e-8}  # which does not mind that samples are coupled


@pytest.mark.parametrize("compact", WAYS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_gradients_are_those_of_the_whole_batch(solver, backend, compact):
    options = {"solver": solver, "backend": backend, "rtol": 1e-10}
    plain, whole = gradients(options)
    found, sol = gradients({**options, "compact": compact})
    assert_close(found, plain)
    assert sol.rows.whole is None and sol.backward.rows.whole is None
    assert sol.backward.rows.spared > 0.2 and sol.backward.converged.all()
    assert torch.equal(sol.steps, whole.steps) and whole.backward.rows is None


def test_float32_gradients_are_those_of_the_whole_batch_to_the_tolerance():
    exact, _ = gradients({})
    for compact in ("auto", True, (True, True, False)):
        found, sol = gradients({"compact": compact, "rtol": 1e-5}, dtype=torch.float32)
        assert_close(found, exact, bound=2e-3)
        assert sol.backward.rows.spared > 0.2


def counted(calls, sizes):
    def f(z, x, rate, W):
        calls.append((len(z), torch.is_grad_enabled()))
        fz = tanh(z, x, rate, W)
        if fz.requires_grad:
            fz.register_hook(lambda g: sizes.append(len(g)))
        return fz

    return f


def test_vjps_go_through_graphs_of_those_who_run():
    calls: list[tuple[int, bool]] = []
    sizes: list[int] = []
    _, sol = gradients({"compact": "auto"}, counted(calls, sizes))
    graphs = [rows for rows, grad in calls if grad]
    assert graphs[0] == B and graphs[1:] == sorted(graphs[1:], reverse=True), "a graph a rung, after the solution's own"
    assert min(graphs) < B // 2
    report = sol.backward
    assert sizes[report.evaluations] == B, "the last look, before the gradient of parameters"
    # One trial beside the whole batch, and the pass to the parameters at the end.
    assert sum(sizes) == report.rows.seen + B
    assert len(sizes) == report.evaluations + 2
    assert report.rows.plain == B * (report.evaluations - 1)


def test_compaction_of_the_forward_alone_is_not_there():
    """Where f is seen to couple samples on the way forward, the way back is of all of them."""

    def coupled(z, x, rate, W):
        return tanh(z, x, rate, W) + 0.01 * z.mean(0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dq.CouplingWarning)
        plain, _ = gradients(PLAINLY, coupled)
        found, sol = gradients({**PLAINLY, "compact": "auto"}, coupled)
    assert sol.rows.whole is not None and sol.backward.rows is None
    assert_close(found, plain, 1e-6)


class Mixing(torch.autograd.Function):
    """The identity, whose derivative couples samples."""

    @staticmethod
    def forward(ctx, z):
        return z.clone()

    @staticmethod
    def backward(ctx, g):
        return g + 0.02 * g.mean(0)


def test_derivatives_that_couple_samples_are_found_out_where_values_do_not():
    def f(z, x, rate, W):
        return tanh(Mixing.apply(z), x, rate, W)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dq.CouplingWarning)
        plain, _ = gradients(PLAINLY, f)
        found, sol = gradients({**PLAINLY, "compact": "auto"}, f)
        certain, confirmed = gradients({**PLAINLY, "compact": True}, f)
    assert sol.rows.whole is None and "came out otherwise" in sol.backward.rows.whole
    assert "were not within tolerance" in confirmed.backward.rows.whole
    assert_close(found, plain, 1e-6)
    assert_close(certain, plain, 1e-6)


def test_f_that_has_no_smaller_graph():
    def f(z, x, rate, W):
        if torch.is_grad_enabled() and len(z) < B:
            raise RuntimeError("graphs of the whole batch alone")
        return tanh(z, x, rate, W)

    plain, _ = gradients({})
    found, sol = gradients({"compact": "auto"}, f)
    assert "graphs of the whole batch alone" in sol.backward.rows.whole
    assert_close(found, plain)
    with pytest.raises(RuntimeError, match="graphs of the whole batch alone"):
        gradients({"compact": True}, f)


def test_second_derivatives_are_as_without():
    def hessian_product(compact):
        W, x, rate, c = uneven()
        z = solve(x, rate, W, compact=compact).z
        (g,) = torch.autograd.grad((z.square() * c).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (W, x))

    assert_close(hessian_product("auto"), hessian_product(False), 1e-6)


def test_trees_tokens_and_autocast():
    W, x, rate, c = uneven()

    def pair(z, x, rate, W):
        a, b = z["a"], z["b"]
        return {"a": torch.tanh(rate * (b @ W) + x), "b": torch.tanh(rate * (a @ W) - x)}

    def of_tree(compact):
        z0 = {"a": torch.zeros_like(x), "b": torch.zeros_like(x)}
        sol = dq.fixed_point(pair, z0, (x, rate, W), compact=compact, rtol=1e-11, max_iter=400)
        return torch.autograd.grad((sol.z["a"] * c).sum() + sol.z["b"].square().sum(), (W, x, rate)), sol

    (plain, _), (found, sol) = of_tree(False), of_tree("auto")
    assert_close(found, plain)
    assert sol.backward.rows.spared > 0.2

    def of_tokens(compact):
        shape = (B // 3, 3, N)
        start, args = torch.zeros(shape, dtype=F64), (x.view(shape), rate.view(B // 3, 3, 1), W)
        sol = dq.fixed_point(tanh, start, args, compact=compact, batch_dims=2, rtol=1e-11, max_iter=400)
        return torch.autograd.grad((sol.z.view(B, N) * c).sum(), (W, x, rate)), sol

    (plain, _), (found, sol) = of_tokens(False), of_tokens("auto")
    assert_close(found, plain)
    assert sol.backward.rows.spared > 0.2 and sol.backward.residual.shape == (B // 3, 3)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, sol = gradients({"compact": "auto", "rtol": 2e-2}, dtype=torch.float32)
        plain, _ = gradients({"rtol": 2e-2}, dtype=torch.float32)
    assert_close(found, plain, 0.2)
    assert sol.backward.rows is not None


def test_a_layer_with_keyword_arguments_and_something_beside_z():
    torch.manual_seed(0)
    linear = nn.utils.parametrizations.orthogonal(nn.Linear(N, N, bias=False)).double()

    def f(z, x, rate, *, gain):
        fz = torch.tanh(gain * rate * linear(z) + x)
        return fz, len(z)

    def of(compact):
        _, x, rate, c = uneven()
        sol = dq.fixed_point(
            f,
            torch.zeros_like(x),
            (x, rate),
            kwargs={"gain": 0.99},
            has_aux=True,
            compact=compact,
            rtol=1e-11,
            max_iter=400,
        )
        assert sol.aux == B
        weight = linear.parametrizations.weight.original
        return torch.autograd.grad((sol.z * c).sum(), (x, rate, weight)), sol

    (plain, _), (found, sol) = of(False), of("auto")
    assert_close(found, plain)
    assert sol.backward.rows.spared > 0.2 and sol.aux == B


def test_hooks_on_parameters_and_modules_run_as_often():
    linear = nn.Linear(N, N, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(torch.linalg.qr(linear.weight).Q)
    seen = []
    linear.weight.register_hook(lambda g: seen.append(g.clone()))

    def of(compact):
        _, x, rate, c = uneven()
        seen.clear()
        linear.zero_grad()
        z = dq.fixed_point(
            lambda z, x, rate: torch.tanh(rate * linear(z) + x),
            torch.zeros_like(x),
            (x, rate),
            compact=compact,
            rtol=1e-11,
            max_iter=400,
        ).z
        (z * c).sum().backward()
        assert len(seen) == 1
        return seen[0], linear.weight.grad

    assert_close(of("auto"), of(False))


def test_hooks_on_saved_tensors_and_checkpoints():
    plain, _ = gradients({})
    with torch.autograd.graph.save_on_cpu():
        found, sol = gradients({"compact": "auto"})
    assert_close(found, plain)
    assert sol.backward.rows.spared > 0.2
    W, x, rate, c = uneven()
    z = checkpoint(lambda x, rate, W: solve(x, rate, W, compact="auto").z, x, rate, W, use_reentrant=False)
    assert_close(torch.autograd.grad((z * c).sum(), (W, x, rate)), plain)


def test_samples_that_no_loss_reads_are_left_out_at_once():
    W, x, rate, c = uneven()
    c[1:] = 0

    def of(compact):
        sol = solve(x, rate, W, compact=compact)
        return torch.autograd.grad((sol.z * c).sum(), (W, x, rate)), sol

    (plain, _), (found, sol) = of(False), of("auto")
    assert_close(found, plain)
    assert sol.backward.rows.spared > 0.6


def test_a_start_and_a_limit_of_the_backward_solve_mean_what_they_did():
    W, x, rate, c = uneven()
    reports: list[dq.BackwardReport] = []
    known = dq.Implicit(u0=c.clone(), callback=reports.append)
    plain, _ = gradients({})
    sol = solve(x, rate, W, compact="auto", backward=known)
    assert_close(torch.autograd.grad((sol.z * c).sum(), (W, x, rate)), plain)
    assert reports[0].rows.spared > 0.2
    sol = solve(x, rate, W, compact="auto", backward=dq.Implicit(max_iter=12, rtol=1e-4))
    with pytest.warns(dq.GradientWarning, match=f"for {HARD} of {B} samples"):
        (sol.z * c).sum().backward()
    assert int((~sol.backward.converged).sum()) == HARD


def test_a_compiled_layer():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.W = nn.Parameter(uneven(torch.float32)[0].detach())

        def forward(self, z, x, rate):
            return torch.tanh(rate * (z @ self.W) + x)

    _, x, rate, c = uneven(torch.float32)
    found = []
    for compact in (False, "auto"):
        layer = dq.DEQ(Cell(), compact=compact, rtol=1e-5, max_iter=200)
        compiled = torch.compile(layer, backend="aot_eager", dynamic=True)
        found.append(torch.autograd.grad((compiled(x, rate) * c).sum(), (x, rate)))
    assert_close(found[1], found[0], 2e-3)


def test_forward_mode_and_functional_transforms_are_as_without():
    W, x, rate, c = uneven()

    def loss(x, compact):
        return (solve(x, rate.detach(), W.detach(), compact=compact).z * c).sum()

    x = x.detach()
    assert_close([torch.func.grad(loss)(x, "auto")], [torch.func.grad(loss)(x, False)])
    t = torch.ones_like(x)
    tangents = [torch.func.jvp(lambda x, how=how: loss(x, how), (x,), (t,))[1] for how in ("auto", False)]
    assert torch.allclose(*tangents)
